// Package iscsi gives a machine disks over the network: an iSCSI initiator (RFC 7143) that speaks the login itself and
// leaves everything after it to the Linux kernel (iscsi_tcp), which it drives over netlink (include/scsi/iscsi_if.h).
//
// A root file system on such a disk needs somebody who logs in again whenever the connection breaks, and who needs
// nothing of that root to do so. That is the keeper: a process that the initramfs starts and that lives until the kernel
// reboots.
//
//	initramfs (Start)            keeper (Main)                      kernel
//	config, in /run       ──▶    TCP connect, bind             ──▶  session, connection
//	                             login requests and responses  ◀─▶  puts them on the wire
//	status, in /run       ◀──    parameters, start             ──▶  SCSI host, disks
//	scan, mount, Keep                                          ◀──  connection error
//	switch_root                  stop, and again from the connect, for as long as it takes
//
// Meanwhile I/O waits: the recovery timeout is off, so that the kernel never fails it. The login goes through the
// kernel and not beside it, since a session that is recovered goes on with its command numbers, and only the kernel
// knows these.
package iscsi

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"

	"github.com/troupe-dev/troupe/hosts/agent/netup"
)

// Config says what to log in to. The keeper reads it again before each try.
type Config struct {
	Portal    netip.AddrPort `json:"portal"`
	Target    string         `json:"target"`
	Initiator string         `json:"initiator"`
	// User and Secret prove the machine to the target; both empty: it does not ask.
	User   string `json:"user,omitempty"`
	Secret string `json:"secret,omitempty"`
	// MutualUser and MutualSecret prove the target to the machine; both empty: it need not.
	MutualUser   string `json:"mutualUser,omitempty"`
	MutualSecret string `json:"mutualSecret,omitempty"`
	// Lease is the address that the connection comes from. The keeper sets it again wherever it is taken away; nil leaves
	// that to others.
	Lease *netup.Lease `json:"lease,omitempty"`
}

// maxName is the length of an iSCSI name in bytes (RFC 7143 section 4.2.7.1).
const maxName = 223

func (c Config) check() error {
	switch {
	case !c.Portal.IsValid() || c.Portal.Port() == 0:
		return errors.New("iSCSI: the portal has no address or no port")
	case !isName(c.Target) || !isName(c.Initiator):
		return fmt.Errorf("iSCSI: target %q or initiator %q is no iSCSI name", c.Target, c.Initiator)
	case (c.User == "") != (c.Secret == "") || (c.MutualUser == "") != (c.MutualSecret == ""):
		return errors.New("iSCSI: a user without a secret, or a secret without a user")
	case c.MutualUser != "" && c.User == "":
		return errors.New("iSCSI: the target is to prove itself to a machine that does not")
	case c.Secret != "" && c.Secret == c.MutualSecret: // RFC 7143 section 9.2.1
		return errors.New("iSCSI: both sides have the same secret")
	}
	return nil
}

// isName says whether s may stand as a value of InitiatorName and TargetName.
func isName(s string) bool {
	if s == "" || len(s) > maxName {
		return false
	}
	for _, c := range []byte(s) {
		if c <= ' ' || c > '~' {
			return false
		}
	}
	return true
}

// isid is the session identifier of an initiator, the same at each boot: a login after a reset takes the place of the
// session that was (RFC 7143 section 6.3.5). Type 10b, "random", and the qualifier 0 (section 11.12.5).
func isid(initiator string) [6]byte {
	h := sha256.Sum256([]byte("troupe isid 1\n" + initiator))
	return [6]byte{0x80, h[0], h[1], h[2], 0, 0}
}

// A Status is how the session is.
type Status struct {
	Up     bool   `json:"up"`
	Logins int    `json:"logins"` // so far; each after the first one was a recovery
	Error  string `json:"error,omitempty"`
	// Refused says that the target answered and does not let this machine in, or is not who it should be.
	Refused bool   `json:"refused,omitempty"`
	Session uint32 `json:"session"` // the kernel's number, once there was a login
	Host    uint32 `json:"host"`    // of the SCSI host
}
