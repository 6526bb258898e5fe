// Package agent is the node side of troupe. It has two lives, in one program.
//
// As init of the initramfs (Init) it loads drivers, brings up the network, tells the server what machine this is, asks
// for an assignment, and acts on it:
//
//	unclaimed, waiting   show it, report, ask again. No disk is written to, and none is mounted
//	assigned             cache -> right kernel? -> fetch what is missing -> mount -> seed the node delta -> switch_root
//	assigned, iSCSI      log in, LUNs -> right kernel? -> mount -> seed the node delta -> switch_root
//
// As a service of the booted system (Serve) it reports, checks the node's health, keeps the DHCP lease, and follows the
// assignment: it fetches a new release beside the running one and then reboots into it.
//
// What the first life knows goes to the second one through /run/troupe/state.json. Nothing is waited for by sleeping
// where it can be awaited, and nothing is given up: a server that is away is asked again for as long as it takes.
package agent

import (
	"errors"
	"fmt"
	"strings"

	"github.com/troupe-dev/troupe/hosts/agent/apps"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

// Places in the file system of a node, the same in both lives.
const (
	cacheDir  = runDir + "/cache" // the cache's file system
	baseDir   = runDir + "/base"  // the OS base, read-only
	deltaDir  = runDir + "/delta" // the role delta, read-only
	agentFile = runDir + "/troupe-agent"
	newRoot   = "/newroot" // not below /run, which is moved into it
)

// check says whether an assignment has all that running it needs.
func check(a agentapi.Assignment) error {
	switch {
	case a.State != agentapi.Assigned:
		return fmt.Errorf("assignment %q is %q, not assigned", a.Version, a.State)
	case a.Host == "" || a.Release == nil:
		return errors.New("the assignment names no host or no release")
	case isWhole(a) && a.Release.ID != "":
		return nil
	case a.Release.Base.Digest == "" || a.Release.Delta.Digest == "" || a.Release.ID == "":
		return errors.New("the release has no base, no delta or no name")
	case apps.Check(a.Release.Apps) != nil:
		return apps.Check(a.Release.Apps)
	case a.Node.Hostname == "" || strings.ContainsAny(a.Node.Hostname+a.Node.Domain, " \t\n/"):
		return fmt.Errorf("the assignment's host name %q is none", a.Node.Hostname)
	}
	return nil
}

// isWhole says whether an assignment is for a disk image with a boot loader of its own, which firmware boots and no agent.
// Whoever hears of it is of a boot before that.
func isWhole(a agentapi.Assignment) bool {
	return a.ISCSI != nil && a.Release != nil && a.Release.Base.Digest == "" && a.Release.Delta.Digest == ""
}

// machineID is machine-id(5) of a node: the same at each boot, another one on each machine and for each host.
func machineID(id agentapi.Identity, host string) string {
	h := []byte(digest.Of([]byte("troupe machine-id 1\n" + host + "\n" + id.MAC + "\n" + id.UUID + "\n" + id.Serial + "\n")).Hex()[:32])
	// The bits of a random UUID (RFC 9562 section 5.4), which systemd asks for.
	h[12] = '4'
	h[16] = "89ab"[h[16]&3]
	return string(h)
}

// running is what a node says of what it runs.
func running(a agentapi.Assignment) *agentapi.Running {
	return &agentapi.Running{
		Host: a.Host, Role: a.Role, Generation: a.Generation,
		Release: a.Release.ID, System: a.Release.System(), Base: a.Release.Base.Digest, Delta: a.Release.Delta.Digest, Node: a.Node.Digest,
	}
}
