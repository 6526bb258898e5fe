package iscsi_test

import (
	"context"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

const (
	node       = "iqn.2026-11.dev.troupe:node1:initiator"
	stranger   = "iqn.2026-11.dev.troupe:node2:initiator"
	nodeTarget = "iqn.2026-11.dev.troupe:node1"
)

// oneNode is a Directory of one target, for one initiator.
type oneNode struct {
	target *iscsi.Target
	chap   *iscsi.CHAP
}

func (d oneNode) Discover(initiator string) (*iscsi.CHAP, []string) {
	if initiator != node {
		return d.chap, nil
	}
	return d.chap, []string{nodeTarget}
}

func (d oneNode) Open(initiator, target string) (*iscsi.Target, *iscsi.CHAP, error) {
	switch {
	case target != nodeTarget:
		return nil, nil, iscsi.ErrNoTarget
	case initiator != node:
		return nil, nil, iscsi.ErrForbidden
	}
	return d.target, d.chap, nil
}

// serve runs a target with one disk until the test ends, and says where.
func serve(t *testing.T, chap *iscsi.CHAP) (addr string) {
	t.Helper()
	disk, err := lun.OpenDisk(filepath.Join(t.TempDir(), "disk"), 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	unit, err := scsi.NewUnit(disk, scsi.Config{Serial: "1"})
	if err != nil {
		t.Fatal(err)
	}
	target := iscsi.NewTarget(nodeTarget)
	if err := target.Add(0, unit); err != nil {
		t.Fatal(err)
	}
	srv, err := iscsi.NewServer(iscsi.Config{Directory: oneNode{target, chap}})
	if err != nil {
		t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan error)
	go func() { done <- srv.Serve(ctx, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if err := target.Remove(0); err != nil {
			t.Error(err)
		}
		if err := disk.Close(); err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// The initiators that libiscsi and QEMU bring, with all that CHAP can ask of them. What is said on the wire is in the other
// tests; here is who gets in.
func TestInitiatorsLogIn(t *testing.T) {
	const (
		ls  = "iscsi-ls"
		inq = "iscsi-inq"
		io  = "qemu-io"
	)
	open := serve(t, nil)
	oneWay := serve(t, &iscsi.CHAP{User: "node1", Secret: "of-the-node-0001"})
	mutual := serve(t, &iscsi.CHAP{
		User: "node1", Secret: "of-the-node-0001", MutualUser: "troupe", MutualSecret: "of-the-target-01",
	})
	const good, bad = "node1%of-the-node-0001@", "node1%of-the-node-0002@"
	asks := []string{"LIBISCSI_CHAP_TARGET_USERNAME=troupe", "LIBISCSI_CHAP_TARGET_PASSWORD=of-the-target-01"}
	asksOthers := []string{"LIBISCSI_CHAP_TARGET_USERNAME=troupe", "LIBISCSI_CHAP_TARGET_PASSWORD=of-the-target-02"}
	const (
		found      = "Target:" + nodeTarget + " Portal:ADDR,1\n"
		inquired   = "Vendor:TROUPE"
		written    = "read 65536/65536 bytes at offset 0"
		noAuth     = "Status: Authentication failure(513)"
		forbidden  = "Status: Authorization failure(514)"
		notFound   = "Status: Target not found(515)"
		falseProof = "Invalid CHAP_R response from the target"
	)
	tests := []struct {
		name      string
		tool      string
		addr      string
		user      string
		env       []string
		initiator string
		target    string
		want      string
	}{
		{"nothing asked", inq, open, "", nil, node, nodeTarget, inquired},
		{"nothing asked, discovery", ls, open, "", nil, node, "", found},
		{"nothing asked of a user", inq, open, good, nil, node, nodeTarget, inquired},
		{"nothing asked, a disk", io, open, "", nil, node, nodeTarget, written},
		{"a stranger", inq, open, "", nil, stranger, nodeTarget, forbidden},
		{"a stranger that discovers", ls, open, "", nil, stranger, "", ""},
		{"another target", inq, open, "", nil, node, nodeTarget + "0", notFound},
		{"one way", inq, oneWay, good, nil, node, nodeTarget, inquired},
		{"one way, discovery", ls, oneWay, good, nil, node, "", found},
		{"one way, a disk", io, oneWay, good, nil, node, nodeTarget, written},
		{"wrong secret", inq, oneWay, bad, nil, node, nodeTarget, noAuth},
		{"wrong user", inq, oneWay, "troupe%of-the-node-0001@", nil, node, nodeTarget, noAuth},
		{"no user", inq, oneWay, "", nil, node, nodeTarget, noAuth},
		{"no user, discovery", ls, oneWay, "", nil, node, "", noAuth},
		{"a proof asked that there is none for", inq, oneWay, good, asks, node, nodeTarget, noAuth},
		{"mutual", inq, mutual, good, asks, node, nodeTarget, inquired},
		{"mutual, discovery", ls, mutual, good, asks, node, "", found},
		{"mutual, by QEMU, which cannot ask for a proof", io, mutual, good, nil, node, nodeTarget, written},
		{"mutual, of which the initiator needs one way", inq, mutual, good, nil, node, nodeTarget, inquired},
		{"mutual, wrong secret", inq, mutual, bad, asks, node, nodeTarget, noAuth},
		{"mutual, the target's own secret", inq, mutual, "node1%of-the-target-01@", nil, node, nodeTarget, noAuth},
		{"mutual, another target's secret", inq, mutual, good, asksOthers, node, nodeTarget, falseProof},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			url := "iscsi://" + test.user + test.addr
			args := []string{"-i", test.initiator, url}
			switch test.tool {
			case inq:
				args[2] += "/" + test.target + "/0"
			case io:
				options := "driver=iscsi,transport=tcp,portal=" + test.addr + ",target=" + test.target +
					",lun=0,initiator-name=" + test.initiator
				if user, secret, ok := strings.Cut(strings.TrimSuffix(test.user, "@"), "%"); ok {
					args = []string{"--object", "secret,id=s,data=" + secret}
					options += ",user=" + user + ",password-secret=s"
				} else {
					args = nil
				}
				args = append(args, "-c", "write -P 0x5a 0 64k", "-c", "read -P 0x5a 0 64k", "--image-opts", options)
			}
			cmd := exec.CommandContext(t.Context(), test.tool, args...)
			cmd.Env = append(cmd.Environ(), test.env...)
			out, err := cmd.CombinedOutput()
			text := strings.ReplaceAll(string(out), test.addr, "ADDR")
			if refused := strings.Contains(test.want, "Status:") || test.want == falseProof; refused != (err != nil) {
				t.Fatalf("%v: %v\n%s", cmd, err, text)
			}
			if test.tool == ls && err == nil {
				if diff := cmp.Diff(test.want, text); diff != "" {
					t.Errorf("%v (-want +got):\n%s", cmd, diff)
				}
				return
			}
			if !strings.Contains(text, test.want) {
				t.Errorf("%v: no %q in\n%s", cmd, test.want, text)
			}
		})
	}
}
