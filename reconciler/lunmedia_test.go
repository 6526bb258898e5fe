package reconciler

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// tree are all files below the directory of hosts' disks, with directories that are empty.
func (r *lunRig) tree(t *testing.T) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(r.dir, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // the controller deleted it meanwhile
		}
		if err != nil {
			return err
		}
		empty := false
		if d.IsDir() {
			in, err := os.ReadDir(name)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			empty = len(in) == 0
		}
		if !d.IsDir() || empty {
			names = append(names, strings.TrimPrefix(name, r.dir+"/"))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func (r *lunRig) place(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		name = filepath.Join(r.dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(name, testStart.AddDate(-1, 0, 0), testStart.AddDate(-1, 0, 0)); err != nil { // nobody wrote to it for long
			t.Fatal(err)
		}
	}
}

// warnings are the events about disks that somebody should look at.
func (r *lunRig) warnings(t *testing.T, word string) (n int) {
	t.Helper()
	events, err := state.Events.List(t.Context(), r.store)
	if err != nil {
		t.Fatal(err)
	}
	for _, ev := range events {
		if ev.Kind == "disk" && ev.Warning && strings.Contains(ev.Message, word) {
			n++
		}
	}
	return n
}

// A server whose records are gone, or are older than its disks, has the disks for another week, and says so; those that are
// on record again by then stay. Nothing that is no disk of a host is touched, and nothing of it stops the controller.
func TestDisksThatNoRecordKnows(t *testing.T) {
	r := newLUNRig(t)
	var now atomic.Int64
	clock := func() time.Time { return testStart.Add(time.Duration(now.Load())) }
	r.now = clock
	a := r.assign(t, "n1", r.delta)
	stop := r.start(t)
	r.await(t, ready("n1", a))
	disk := "n1/" + r.record(t, "n1").Current
	stop()
	const stray = "n9/0123456789abcdef"
	others := []string{
		"lost+found/0123456789abcdef.disk", "n1.bak/0123456789abcdef.disk", "n8/0123456789abcdef.disk.bak", "n8/0123456789abcdeg.disk",
		"n8/notes", "notes",
	}
	r.place(t, append(others, stray+".delta", stray+".reservations")...)
	kept := func(more ...string) []string {
		return append(append([]string{others[0], others[1]}, more...), others[2:]...)
	}

	lost := r.store
	r.again(openStore(t)) // without any record
	r.now = clock
	stop = r.start(t)
	met := kept(disk+".disk", disk+".unknown")
	met = append(met, stray+".delta", stray+".reservations", stray+".unknown")
	want := map[string]bool{}
	for _, name := range met {
		want[name] = true
	}
	same := func() bool {
		got := map[string]bool{}
		for _, name := range r.tree(t) {
			got[name] = true
		}
		return cmp.Equal(want, got)
	}
	r.until(t, same)
	now.Store(int64(keepUnused - time.Second))
	const later = "n7/0123456789abcdef"
	r.place(t, later+".disk")
	want[later+".disk"], want[later+".unknown"] = true, true
	r.until(t, same)
	if n := r.warnings(t, "no record knows"); n != 3 {
		t.Errorf("people were told of 3 disks %d times", n)
	}
	stop()

	r.again(lost) // the records are found again: the disk is known, but n9's is not
	r.now = clock
	now.Store(int64(keepUnused))
	stop = r.start(t)
	defer stop()
	want = map[string]bool{}
	for _, name := range kept(disk+".disk", later+".disk", later+".unknown") {
		want[name] = true
	}
	r.until(t, same)
	r.await(t, ready("n1", a))
	if r.warnings(t, "is deleted: no record") != 1 {
		t.Error("people were not told of what is deleted")
	}
}

// A delta of another version of its format keeps its host waiting, with what to do; after a reset the host begins anew.
func TestDeltaOfAnotherVersion(t *testing.T) {
	r := newLUNRig(t)
	a := r.vm(t, "n1", 1, r.base)
	stop := r.start(t)
	r.await(t, ready("n1", a))
	stop()

	disk := r.record(t, "n1").Disks[0]
	path := r.media.file("n1", disk)
	delta, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	binary.LittleEndian.PutUint32(delta[8:], 1) // the version, then the checksum of the header
	binary.LittleEndian.PutUint32(delta[4092:], crc32.Checksum(delta[:4092], crc32.MakeTable(crc32.Castagnoli)))
	if err := os.WriteFile(path, delta, 0o600); err != nil {
		t.Fatal(err)
	}
	r.again(r.store)
	stop = r.start(t)
	defer stop()
	r.await(t, func(v lunViews) bool {
		at, why := v.iscsi("n1", a)
		return at == nil && strings.Contains(why, "what the host wrote cannot be read (troupe reset n1 begins anew)") && strings.Contains(why, "version 1 ")
	})
	if err := r.Reset(t.Context(), "n1", false); err != nil {
		t.Fatal(err)
	}
	r.await(t, ready("n1", a))
	if now := r.record(t, "n1").Current; now == disk.ID {
		t.Errorf("it has disk %s still", now)
	}
}

// An image that is tried again goes on with the reason why it could not be opened: nobody is told twice of the same.
func TestImageKeepsItsErrorWhileItIsTriedAgain(t *testing.T) {
	r := newLUNRig(t)
	now := testStart
	r.now = func() time.Time { return now }
	lost := r.put(t, "lost")
	if err := r.blobs.Delete(t.Context(), lost.Digest); err != nil {
		t.Fatal(err)
	}
	try := func() (opening, done *openImage) {
		opening = r.image(t.Context(), lost.Digest)
		if again := r.image(t.Context(), lost.Digest); again != opening || !opening.opening {
			t.Errorf("an image that is being opened is %+v, then %+v", opening, again)
		}
		r.took(<-r.opened)
		return opening, r.images[lost.Digest]
	}
	first, failed := try()
	if first.err != nil || failed.err == nil {
		t.Fatalf("the first try: %v, then %v", first.err, failed.err)
	}
	now = now.Add(assignAgain)
	second, failed2 := try()
	if second.err == nil || second.err.Error() != failed.err.Error() || failed2.err == nil {
		t.Errorf("while it is tried again: %v, want %v", second.err, failed.err)
	}
	r.put(t, "lost")
	now = now.Add(assignAgain)
	if _, found := try(); found.err != nil || found.medium == nil {
		t.Errorf("when it is there again: %+v", found)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
}

// An image is given up at once where its bytes are gone or wrong, and only after a while where they cannot be read.
func TestImageThatIsLost(t *testing.T) {
	r := newLUNRig(t)
	now := testStart
	r.now = func() time.Time { return now }
	fails := func(err error) *openImage {
		img := &openImage{digest: r.base.Digest, err: err}
		r.opening++
		r.took(img)
		return img
	}
	for _, err := range []error{store.ErrNotFound, digest.ErrMismatch} {
		if img := fails(err); !img.lost(now) {
			t.Errorf("%v: it is not given up", img.err)
		}
		delete(r.images, r.base.Digest)
	}
	fails(errors.New("input/output error"))
	for _, after := range []time.Duration{time.Second, leaveGrace - time.Second, leaveGrace} {
		now = testStart.Add(after)
		if img := fails(errors.New("input/output error")); img.lost(now) != (after == leaveGrace) {
			t.Errorf("an image that cannot be read is given up after %s: %t", after, img.lost(now))
		}
	}
	r.opening++
	r.took(&openImage{digest: r.base.Digest})
	if img := fails(errors.New("input/output error")); img.lost(now) {
		t.Error("an image that was open meanwhile is given up at once")
	}
}

// The file of a disk that was used has what the host wrote: where it is empty, that is gone, and no blank disk is given in
// its place.
func TestDiskWhoseFileIsEmpty(t *testing.T) {
	r := newLUNRig(t)
	image := r.put(t, "image")
	base, err := r.media.image(t.Context(), image.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := base.Close(); err != nil {
			t.Error(err)
		}
	}()
	for _, d := range []state.LUNDisk{{ID: "0123456789abcdef", Size: 1 << 20}, {ID: "0123456789abcde0", Size: 1 << 20, Image: &image}} {
		r.place(t, "n1/"+d.ID)
		if err := os.Rename(filepath.Join(r.dir, "n1", d.ID), r.media.file("n1", d)); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(r.media.file("n1", d), 0); err != nil {
			t.Fatal(err)
		}
		used := d
		used.Opened = testStart
		if _, err := r.media.disk("n1", used, base); err == nil || !strings.Contains(err.Error(), "what the host wrote is not there (troupe reset n1") {
			t.Errorf("a disk that was used: %v", err)
		}
		if fi, err := os.Stat(r.media.file("n1", d)); err != nil || fi.Size() != 0 {
			t.Errorf("its file was changed: %v, %v", fi, err)
		}
		m, err := r.media.disk("n1", d, base)
		if err != nil {
			t.Errorf("a disk that nobody used: %v", err)
			continue
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A disk that is about to be deleted is none that no record knows.
func TestDiskThatIsAboutToGo(t *testing.T) {
	r := newLUNRig(t)
	r.hosts["n1"] = &openHost{gone: []state.LUNDisk{{ID: "0123456789abcdef"}}}
	for id, want := range map[string]bool{"0123456789abcdef": true, "0123456789abcde0": false} {
		if got := r.knows("n1", id); got != want {
			t.Errorf("disk %s is known: %t, want %t", id, got, want)
		}
	}
}
