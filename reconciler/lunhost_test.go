package reconciler

import (
	"errors"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// bootInto has a host's machine boot from the disk that waits for that, until it is LUN 0.
func (r *lunRig) bootInto(t *testing.T, host string, disk state.LUNDisk, isid uint64) {
	t.Helper()
	r.target.sessions, r.target.has[host] = nil, disk.Secret
	if err := r.target.login(r.luns, host, isid); !errors.Is(err, iscsi.ErrNotReady) {
		t.Fatalf("the first login to the disk that comes next: %v", err)
	}
	r.look(t, func() bool { return r.hosts[host].current == disk.ID })
	r.look(t, func() bool { return r.target.login(r.luns, host, isid) == nil })
}

// A disk that has lost something is opened anew also while its host runs from another one: who goes back to it can write.
func TestLostDiskOfWhatRanBefore(t *testing.T) {
	r := newLUNRig(t)
	a := r.loggedIn(t, "n1")
	h, before := r.hosts["n1"], r.record(t, "n1").Disks[0]
	h.disks[before.ID] = lostMedium{h.disks[before.ID]}
	r.look(t, func() bool { return r.warnings(t, "an earlier sync failed") == 1 })

	b := r.vm(t, "n1", 2, r.put(t, "one"))
	r.look(t, func() bool { return ready("n1", b)(r.views()) })
	if h.disks[before.ID].Lost() == nil {
		t.Fatal("the disk is opened anew under the machine that runs from it")
	}
	rec := r.record(t, "n1")
	next, ok := rec.Wanted(b.ISCSI)
	if !ok || next.ID == before.ID {
		t.Fatalf("what the new image runs from: %+v", next)
	}
	r.bootInto(t, "n1", next, 2)

	a = r.assign(t, "n1", r.delta)
	r.look(t, func() bool { return ready("n1", a)(r.views()) })
	r.bootInto(t, "n1", before, 3)
	if r.hosts["n1"].disks[before.ID].Lost() != nil {
		t.Error("its machine was given the disk that fails all writes")
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// A disk that goes while it is being opened anew is deleted when that has ended.
func TestDiskThatGoesWhileItIsClosed(t *testing.T) {
	r := newLUNRig(t)
	now := testStart
	r.now = func() time.Time { return now }
	a := r.assign(t, "n1", r.delta)
	r.look(t, func() bool { return ready("n1", a)(r.views()) })
	h, id := r.hosts["n1"], r.record(t, "n1").Current
	ends := make(chan struct{})
	h.disks[id] = lostMedium{slowMedium{medium: h.disks[id], ends: ends}}
	r.look(t, func() bool { return !h.failed.IsZero() })
	now = now.Add(leaveGrace)
	r.look(t, func() bool { return h.closing() })

	if err := state.Assignments.Delete(t.Context(), r.store, "n1"); err != nil {
		t.Fatal(err)
	}
	r.look(t, func() bool { return !r.record(t, "n1").Unused.IsZero() })
	now = now.Add(keepUnused)
	r.look(t, func() bool { _, known := r.recs["n1"]; return !known })
	close(ends)
	r.look(t, func() bool { return r.hosts["n1"] == nil })
	if files := r.files(t); len(files) > 0 {
		t.Errorf("it is forgotten, and its files are still there: %q", files)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}
