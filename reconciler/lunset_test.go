package reconciler

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// A lunWorld is one host and its LUNs, over some time.
type lunWorld struct {
	rec   state.LUNs
	f     lunFacts
	disks int
}

func newLUNWorld() *lunWorld { return &lunWorld{f: lunFacts{now: testStart}} }

// runs has the host run a role of those images: base and delta of an agent's release.
func (w *lunWorld) runs(base, delta string) *lunWorld {
	w.f.assigned = &state.Assignment{
		ISCSI: &state.ISCSI{Size: 1 << 30},
		Spec: agentapi.Assignment{Release: &agentapi.Release{
			Base: agentapi.Blob{Digest: digest.Of([]byte(base))}, Delta: agentapi.Blob{Digest: digest.Of([]byte(delta))},
		}},
	}
	return w
}

// boots has the host boot an image of kind "disk".
func (w *lunWorld) boots(image string) {
	w.f.assigned = &state.Assignment{ISCSI: &state.ISCSI{Size: 1 << 30, Image: &images.Blob{Digest: digest.Of([]byte(image))}}}
}

// step decides once. The machine boots in one step only.
func (w *lunWorld) step() {
	w.rec = nextLUNs(w.rec, w.f, func() state.LUNDisk {
		w.disks++
		return state.LUNDisk{ID: fmt.Sprintf("disk%d", w.disks)}
	})
	w.f.booting = false
}

// uses has an initiator be given the current disk.
func (w *lunWorld) uses() {
	w.f.sessions = 1
	for i := range w.rec.Disks {
		if w.rec.Disks[i].ID == w.rec.Current {
			w.rec.Disks[i].Opened = w.f.now
		}
	}
	w.step()
}

func (w *lunWorld) reset(ends time.Duration) {
	for i := range w.rec.Disks {
		if d, _ := w.rec.Wanted(w.f.wants()); w.rec.Disks[i].ID == d.ID {
			w.rec.Disks[i].Ends = w.f.now.Add(ends)
			break
		}
	}
	w.step()
}

// String is "current of disks; images by number".
func (w *lunWorld) String() string {
	var disks, imgs []string
	for _, d := range w.rec.Disks {
		disks = append(disks, d.ID)
	}
	for _, name := range []string{"base", "base2", "web", "idle", "cloud"} {
		if n := w.rec.Images[digest.Of([]byte(name))]; n != 0 {
			imgs = append(imgs, fmt.Sprintf("%d=%s", n, name))
		}
	}
	slices.Sort(imgs)
	return strings.TrimSpace(w.rec.Current + " of " + strings.Join(disks, ",") + "; " + strings.Join(imgs, " "))
}

func (w *lunWorld) want(t *testing.T, want string) {
	t.Helper()
	if d := cmp.Diff(want, w.String()); d != "" {
		t.Error(d)
	}
}

func TestLUNsAreMadeOnceAndKept(t *testing.T) {
	w := newLUNWorld().runs("base", "web")
	for range 3 {
		w.step()
		w.want(t, "disk1 of disk1; 1=base 2=web")
	}
	w.uses()
	w.f.running = &agentapi.Running{Base: digest.Of([]byte("base")), Delta: digest.Of([]byte("web"))}
	w.runs("base", "idle").step()
	w.want(t, "disk1 of disk1; 1=base 2=web 3=idle") // it still runs web
	w.f.running.Delta = digest.Of([]byte("idle"))
	w.step()
	w.want(t, "disk1 of disk1; 1=base 3=idle")
	w.runs("base2", "idle").step()
	w.want(t, "disk1 of disk1; 1=base 2=base2 3=idle")
}

// While a machine boots, nobody knows which images it has: none goes from under it.
func TestLUNsOfAMachineThatDoesNotSay(t *testing.T) {
	w := newLUNWorld().runs("base", "web")
	w.step()
	w.uses()
	w.runs("base", "idle").step()
	w.want(t, "disk1 of disk1; 1=base 2=web 3=idle")
	w.f.sessions = 0
	w.step()
	w.want(t, "disk1 of disk1; 1=base 3=idle")
}

// What a running system has mounted is never another disk all at once: also not when it is cut off for a while.
func TestDiskChangesWhenTheMachineBoots(t *testing.T) {
	w := newLUNWorld()
	w.boots("cloud")
	w.step()
	w.want(t, "disk1 of disk1;")
	w.boots("cloud 2") // before anybody used the first
	w.step()
	w.want(t, "disk2 of disk1,disk2;")
	w.uses()
	w.boots("cloud 3")
	w.step()
	w.want(t, "disk2 of disk1,disk2,disk3;")
	w.f.sessions = 0
	w.step()
	w.want(t, "disk2 of disk1,disk2,disk3;")
	w.f.booting = true
	w.step()
	w.want(t, "disk3 of disk2,disk3;") // that before stays for who goes back
	w.boots("cloud 2")
	w.f.booting = true
	w.step()
	w.want(t, "disk2 of disk2,disk3;")
}

func TestResetOfADisk(t *testing.T) {
	t.Run("in use", func(t *testing.T) {
		w := newLUNWorld().runs("base", "web")
		w.step()
		w.uses()
		w.reset(time.Minute)
		w.want(t, "disk1 of disk1,disk2; 1=base 2=web")
		w.f.now = w.f.now.Add(time.Minute)
		w.step()
		w.want(t, "disk2 of disk2; 1=base 2=web")
	})
	t.Run("until its machine boots", func(t *testing.T) {
		w := newLUNWorld().runs("base", "web")
		w.step()
		w.uses()
		w.reset(time.Minute)
		w.f.booting = true
		w.step()
		w.want(t, "disk2 of disk2; 1=base 2=web")
	})
	t.Run("off", func(t *testing.T) {
		w := newLUNWorld().runs("base", "web")
		w.step()
		w.uses()
		w.f.sessions = 0
		w.reset(time.Minute)
		w.want(t, "disk2 of disk2; 1=base 2=web")
	})
	t.Run("at once", func(t *testing.T) {
		w := newLUNWorld()
		w.boots("cloud")
		w.step()
		w.uses()
		w.reset(0)
		w.want(t, "disk2 of disk2;")
	})
}

func TestLUNsOfAHostThatLeft(t *testing.T) {
	w := newLUNWorld().runs("base", "web")
	w.step()
	w.uses()
	w.f.assigned, w.f.sessions, w.f.running = nil, 0, nil
	w.step()
	w.want(t, "disk1 of disk1;")
	w.f.now = w.f.now.Add(keepUnused - time.Second)
	w.step()
	w.want(t, "disk1 of disk1;")
	back := *w
	back.runs("base", "web").step()
	back.want(t, "disk1 of disk1; 1=base 2=web")
	if !back.rec.Unused.IsZero() {
		t.Error("its disk would go though it came back")
	}
	w.f.now = w.f.now.Add(time.Second)
	w.step()
	if d := cmp.Diff(state.LUNs{}, w.rec); d != "" {
		t.Errorf("after a week something is left:\n%s", d)
	}
}

func TestSecretsAreOfEachDisk(t *testing.T) {
	seen := map[string]bool{}
	for range 3 {
		d := newDisk()
		for _, s := range []string{d.Secret, d.MutualSecret, d.ID} {
			if seen[s] {
				t.Errorf("%q twice", s)
			}
			seen[s] = true
		}
		if len(d.Secret) != 32 || len(d.MutualSecret) != 32 || len(d.ID) != 16 {
			t.Errorf("got %+v", d)
		}
	}
}
