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
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// A lunWorld is one host and its LUNs, over some time.
type lunWorld struct {
	rec    state.LUNs
	f      lunFacts
	disks  int
	ending bool // the sessions are those of a disk before the current one
}

func newLUNWorld() *lunWorld { return &lunWorld{f: lunFacts{now: testStart}} }

// runs has the host run a role of those images: base and delta of an agent's release.
func (w *lunWorld) runs(base, delta string) *lunWorld {
	w.f.assigned = &state.Assignment{
		ISCSI: &state.ISCSI{Size: 1 << 30},
		Spec: agentapi.Assignment{Release: &agentapi.Release{
			Base: agentapi.Image{Blob: agentapi.Blob{Digest: digest.Of([]byte(base))}}, Delta: agentapi.Image{Blob: agentapi.Blob{Digest: digest.Of([]byte(delta))}},
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
	if w.f.served = w.rec.Current; w.ending {
		w.f.served = ""
	}
	w.rec = nextLUNs(w.rec, w.f, func() state.LUNDisk {
		w.disks++
		return state.LUNDisk{ID: fmt.Sprintf("disk%d", w.disks)}
	})
	w.f.boot, w.f.proven = nil, ""
}

// uses has an initiator be given the current disk.
func (w *lunWorld) uses() {
	w.f.sessions, w.f.lastSeen = []iscsi.SessionInfo{{Since: w.f.now}}, w.f.now
	w.step()
}

// boot has the machine log in to the disk that it is to have.
func (w *lunWorld) boot() {
	d, _ := w.rec.Wanted(w.f.wants())
	w.f.now, w.f.sessions, w.f.proven = w.f.now.Add(time.Hour), nil, d.ID
	w.step()
	w.uses()
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
	w.f.reported = w.f.now.Add(time.Second)
	w.runs("base", "idle").step()
	w.want(t, "disk1 of disk1; 1=base 2=web 3=idle") // it still runs web
	w.f.running.Delta = digest.Of([]byte("idle"))
	w.step()
	w.want(t, "disk1 of disk1; 1=base 3=idle")
	w.runs("base2", "idle").step()
	w.want(t, "disk1 of disk1; 1=base 2=base2 3=idle")
	w.runs("base", "cloud").step() // before it booted: what nobody runs goes, and its number is not given away at once
	w.want(t, "disk1 of disk1; 1=base 3=idle 4=cloud")
	w.runs("base2", "cloud").step()
	w.want(t, "disk1 of disk1; 1=base 2=base2 3=idle 4=cloud")
}

// While a machine boots, nobody knows which images it has: none goes from under it.
func TestLUNsOfAMachineThatDoesNotSay(t *testing.T) {
	w := newLUNWorld().runs("base", "web")
	w.step()
	w.uses()
	w.runs("base", "idle").step()
	w.want(t, "disk1 of disk1; 1=base 2=web 3=idle")
	w.f.sessions = nil // for a moment: it comes back to what it has mounted
	w.step()
	w.want(t, "disk1 of disk1; 1=base 2=web 3=idle")
	w.f.running = &agentapi.Running{Base: digest.Of([]byte("base")), Delta: digest.Of([]byte("idle"))}
	w.f.reported = w.f.now.Add(-time.Second) // of the machine that it took the place of
	w.step()
	w.want(t, "disk1 of disk1; 1=base 2=web 3=idle")
	w.f.reported = w.f.now.Add(time.Second)
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
	w.want(t, "disk2 of disk2;")
	w.uses()
	w.boots("cloud 3")
	w.step()
	w.want(t, "disk2 of disk2,disk3;")
	w.f.sessions = nil
	w.f.boot = &atBoot{told: state.LUNBoot{Disk: "disk3"}} // anybody may ask for a boot script
	w.step()
	w.want(t, "disk2 of disk2,disk3;")
	w.boot()
	w.want(t, "disk3 of disk2,disk3;") // that before stays for who goes back
	w.boots("cloud 2")
	w.boot()
	w.want(t, "disk2 of disk2,disk3;")
}

// What sessions of the disk before do while they end says nothing of the one that took its place.
func TestDiskIsNotUsedBySessionsOfTheOneBefore(t *testing.T) {
	w := newLUNWorld().runs("base", "web")
	w.step()
	w.uses()
	w.reset(0)
	w.want(t, "disk2 of disk2; 1=base 2=web")
	for _, w.ending = range []bool{true, false} {
		w.step()
		if used := !w.rec.Disks[0].Opened.IsZero() && !w.rec.Login.IsZero(); used == w.ending {
			t.Errorf("while sessions of the disk before end is %t: %+v", w.ending, w.rec)
		}
	}
}

// A machine that has just logged in has the disk that nobody used before.
func TestDiskOfAMachineThatHasJustLoggedIn(t *testing.T) {
	w := newLUNWorld()
	w.boots("cloud")
	w.step()
	w.boots("cloud 2")
	w.uses()
	w.want(t, "disk1 of disk1,disk2;")
}

// What a host wrote outlives images that it never booted, and what is kept is what it used last.
func TestDiskThatIsKept(t *testing.T) {
	w := newLUNWorld()
	w.boots("a")
	w.step()
	w.uses()
	w.boots("b")
	w.step()
	w.want(t, "disk1 of disk1,disk2;")
	w.boots("c")
	w.step()
	w.want(t, "disk1 of disk1,disk3;")
	w.boot()
	w.want(t, "disk3 of disk1,disk3;")
	w.boots("a")
	w.boot()
	w.want(t, "disk1 of disk1,disk3;")
	w.boots("d")
	w.step()
	w.want(t, "disk1 of disk1,disk3,disk4;")
	w.boot()
	w.want(t, "disk4 of disk1,disk4;") // a was used after c, though for the first time before it
}

// A record from before it was kept which disk was used before, and when a machine logged in, loses nothing by that.
func TestRecordOfAnEarlierServer(t *testing.T) {
	w := newLUNWorld()
	for i, image := range []string{"a", "b", "c"} {
		w.boots(image)
		d := w.f.assigned.ISCSI.Image
		w.rec.Disks = append(w.rec.Disks, state.LUNDisk{ID: image, Image: d, Size: 1 << 30, Opened: testStart.Add(time.Duration(i) - time.Hour)})
	}
	w.rec.Current = "c"
	w.step()
	w.want(t, "c of b,c;") // the one that was used last stays

	w = newLUNWorld().runs("base", "idle")
	w.rec.Disks, w.rec.Current = []state.LUNDisk{{ID: "disk", Size: 1 << 30, Opened: testStart.Add(-time.Hour)}}, "disk"
	w.rec.Images = map[digest.Digest]uint16{digest.Of([]byte("base")): 1, digest.Of([]byte("web")): 2}
	w.step()
	w.want(t, "disk of disk; 1=base 2=web 3=idle") // it may run web still
	w.uses()
	w.f.running = &agentapi.Running{Base: digest.Of([]byte("base")), Delta: digest.Of([]byte("idle"))}
	w.f.reported = w.f.now.Add(time.Second)
	w.step()
	w.want(t, "disk of disk; 1=base 3=idle")
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
		w.boot()
		w.want(t, "disk2 of disk2; 1=base 2=web")
	})
	t.Run("off", func(t *testing.T) {
		w := newLUNWorld().runs("base", "web")
		w.step()
		w.uses()
		w.f.sessions = nil
		w.reset(0)
		w.want(t, "disk2 of disk2; 1=base 2=web")
	})
	t.Run("cut off for a moment", func(t *testing.T) {
		w := newLUNWorld().runs("base", "web")
		w.step()
		w.uses()
		w.reset(time.Minute)
		w.f.sessions = nil
		w.step()
		w.want(t, "disk1 of disk1,disk2; 1=base 2=web")
		w.f.now = w.f.now.Add(time.Minute)
		w.step()
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
	w.f.running, w.f.reported = &agentapi.Running{}, w.f.now.Add(time.Second)
	w.f.assigned = nil
	w.step()
	w.want(t, "disk1 of disk1;")
	w.f.now = w.f.now.Add(2 * keepUnused) // nobody rebooted it
	w.f.lastSeen = w.f.now
	w.step()
	w.want(t, "disk1 of disk1;")
	w.f.sessions = nil
	w.step()
	w.f.now, w.f.lastSeen, w.f.began = w.f.now.Add(keepUnused), time.Time{}, w.f.now.Add(keepUnused)
	w.step()
	w.want(t, "disk1 of disk1;") // the server was off, and its machine may log in again
	w.f.began = testStart
	w.f.now = w.f.now.Add(-time.Second)
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

// A machine without an agent runs what it was told to boot once its system has logged in for itself, or has gone on with
// the boot loader's session for so long that this is no silent one.
func TestBootOfAnImageThatIsBootedAsItIs(t *testing.T) {
	session := func(isid uint64, after time.Duration) iscsi.SessionInfo {
		return iscsi.SessionInfo{ISID: isid, Since: testStart.Add(after)}
	}
	told := func(w *lunWorld, generation uint64) {
		w.step() // so that there is a disk
		w.f.boot = &atBoot{told: state.LUNBoot{ID: fmt.Sprint("boot", generation), Generation: generation, Disk: w.rec.Current, Told: w.f.now}}
		w.step()
	}
	at := func(w *lunWorld, after time.Duration, sessions ...iscsi.SessionInfo) {
		w.f.now, w.f.sessions = testStart.Add(after), sessions
		if len(sessions) > 0 {
			w.f.lastSeen = w.f.now
		}
		w.step()
	}
	want := func(w *lunWorld, want string) {
		t.Helper()
		got := "none"
		if b := w.rec.Boot; b != nil {
			n := w.rec.Node(len(w.f.sessions) > 0, w.f.now)
			got = fmt.Sprintf("%s %s, seen at %s", b.ID, n.Stage, n.LastSeen.Sub(testStart))
			if n.Running != nil {
				got += fmt.Sprintf(", runs %d", n.Running.Generation)
			}
		}
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	w := newLUNWorld()
	w.boots("cloud")
	told(w, 1)
	want(w, "boot1 script, seen at 0s")
	loader, system := session(1, time.Second), session(2, 9*time.Second)
	at(w, 2*time.Second, loader)
	want(w, "boot1 disk, seen at 2s")
	at(w, 10*time.Second, loader, system)
	want(w, "boot1 booted, seen at 10s, runs 1")
	at(w, 70*time.Second, system)
	want(w, "boot1 booted, seen at 1m10s, runs 1")
	at(w, 80*time.Second)
	want(w, "boot1 booted, seen at 1m10s, runs 1")
	at(w, 90*time.Second, session(3, 85*time.Second)) // the server was started anew
	want(w, "boot1 booted, seen at 1m30s, runs 1")

	w.f.now = testStart.Add(100 * time.Second)
	told(w, 2) // its former session is still open: it may be somebody else who asked
	want(w, "boot1 booted, seen at 1m40s, runs 1")
	at(w, 102*time.Second, session(3, 85*time.Second), session(4, 101*time.Second))
	want(w, "boot2 disk, seen at 1m42s")
	at(w, 160*time.Second, session(4, 101*time.Second))
	want(w, "boot2 disk, seen at 2m40s")
	at(w, 161*time.Second, session(4, 101*time.Second)) // a BIOS reads on by it
	want(w, "boot2 booted, seen at 2m41s, runs 2")

	at(w, 170*time.Second)
	told(w, 3)
	want(w, "boot3 script, seen at 2m50s")
	w.f.boot = &atBoot{told: state.LUNBoot{Told: w.f.now}}
	w.step()
	want(w, "none") // it boots with an agent
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

// After a reset the time of that says nothing any more once no assignment wants another disk.
func TestLookAgain(t *testing.T) {
	w := newLUNWorld().runs("base", "web")
	w.step()
	w.uses()
	w.reset(time.Minute)
	soon := func(failed bool) time.Duration {
		if at := lookAgain(w.rec, w.f, failed); !at.IsZero() {
			return at.Sub(w.f.now)
		}
		return 0
	}
	if got := soon(false); got != time.Minute {
		t.Errorf("while a reset waits: in %s", got)
	}
	if got := soon(true); got != min(assignAgain, time.Minute) {
		t.Errorf("while a reset waits, after an error: in %s", got)
	}
	w.f.assigned = &state.Assignment{}
	w.f.now = w.f.now.Add(2 * time.Minute)
	w.step()
	if got := soon(false); got != 0 {
		t.Errorf("a disk that nobody wants: in %s", got)
	}
}

// A machine may run from its disk also where no session of it is open: for a moment after one was, and while it may not have
// heard yet that the server is back.
func TestDiskMayBeInUse(t *testing.T) {
	for _, tt := range []struct {
		name             string
		open             int
		seen, began, now time.Duration // after testStart; seen 0: never
		used, login      bool
		want             bool
	}{
		{"a session is open", 1, time.Hour, 0, time.Hour, true, true, true},
		{"one was a moment ago", 0, time.Hour, 0, time.Hour + resetGrace - 1, true, true, true},
		{"one was a while ago", 0, time.Hour, 0, time.Hour + resetGrace, true, true, false},
		{"the server began", 0, 0, time.Hour, time.Hour + leaveGrace - 1, true, true, true},
		{"the server began, and no login is on record", 0, 0, time.Hour, time.Hour + leaveGrace - 1, true, false, true},
		{"the server began, and nobody ever used it", 0, 0, time.Hour, time.Hour, false, false, false},
		{"the server began a while ago", 0, 0, time.Hour, time.Hour + leaveGrace, true, true, false},
	} {
		f := lunFacts{sessions: make([]iscsi.SessionInfo, tt.open), began: testStart.Add(tt.began), now: testStart.Add(tt.now)}
		rec := state.LUNs{Disks: []state.LUNDisk{{ID: "disk"}}, Current: "disk"}
		if tt.seen != 0 {
			f.lastSeen = testStart.Add(tt.seen)
		}
		if tt.used {
			rec.Disks[0].Opened = testStart
		}
		if tt.login {
			rec.Login = testStart
		}
		if got := f.mayUse(&rec); got != tt.want {
			t.Errorf("%s: got %t, want %t", tt.name, got, tt.want)
		}
	}
}
