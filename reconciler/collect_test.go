package reconciler

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// A collectLab is a store and records, of which a test says what they have.
type collectLab struct {
	r     *Reconciler
	blobs *store.Store
	dir   string
}

// newCollectLab has testFleet's images built, long ago.
func newCollectLab(t *testing.T) *collectLab {
	t.Helper()
	dir := t.TempDir()
	blobs, err := store.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = blobs.Close() })
	s := openStore(t)
	log := slog.New(slog.DiscardHandler)
	r := &Reconciler{cfg: Config{Store: s, Blobs: blobs}, follow: &follow{}, luns: &luns{target: &testTarget{}}, assign: &assign{}, log: log}
	r.events = &recorder{store: s, log: log}
	r.builds = &builds{alone: make(chan func(context.Context))}
	r.follow.fleet.Store(&inForce{fleet: testFleet(), commit: state.Commit{Hash: "c1"}})
	return &collectLab{r: r, blobs: blobs, dir: dir}
}

// put makes a base and a delta over it that nothing asks for, with their manifests, and gives the delta's recipe.
func (l *collectLab) put(t *testing.T, name string) (base images.Base, delta images.Delta) {
	t.Helper()
	b := &testBuilder{blobs: l.blobs}
	recipe := func(what string) digest.Digest { return digest.Of([]byte(what + name)) }
	base = images.Base{Recipe: recipe("base"), Arch: "amd64", Kernel: b.put(t.Context(), "the kernel of all"), Modules: b.put(t.Context(), "modules "+name)}
	base.Image.Blob = b.put(t.Context(), "base image "+name)
	delta = images.Delta{Recipe: recipe("delta"), Base: base.Image.Blob}
	delta.Image.Blob = b.put(t.Context(), "delta image "+name)
	_, err1 := artifact.Record(t.Context(), l.blobs, artifact.OfBase(base), base.Recipe, name+".base")
	_, err2 := artifact.Record(t.Context(), l.blobs, artifact.OfDelta(delta), delta.Recipe, name+".delta")
	err := errors.Join(err1, err2,
		state.Bases.Put(t.Context(), l.r.cfg.Store, base.Recipe.String(), base), state.Deltas.Put(t.Context(), l.r.cfg.Store, delta.Recipe.String(), delta),
		state.Builds.Put(t.Context(), l.r.cfg.Store, delta.Recipe.String(), state.Build{Recipe: delta.Recipe, Name: name, Phase: state.BuildDone}))
	if err != nil {
		t.Fatal(err)
	}
	return base, delta
}

// age makes all files of the store an hour old, as another process would find them.
func (l *collectLab) age(t *testing.T) {
	t.Helper()
	all, err := l.blobs.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-48 * time.Hour)
	for _, b := range all {
		if err := os.Chtimes(l.blobs.Path(b.Digest), old, old); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.blobs.Close(); err != nil {
		t.Fatal(err)
	}
	if l.blobs, err = store.Open(l.dir); err != nil {
		t.Fatal(err)
	}
	l.r.cfg.Blobs = l.blobs
	t.Cleanup(func() { _ = l.blobs.Close() })
}

func (l *collectLab) collect(t *testing.T, dry bool) (gone []string, bytes int64) {
	t.Helper()
	out, err := l.r.collectAlone(t.Context(), dry, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range out.Artifacts {
		gone = append(gone, a.Kind+" "+a.ID.Short())
		if a.Bytes == 0 {
			t.Errorf("the %s frees nothing", a.Kind)
		}
	}
	slices.Sort(gone)
	return gone, out.Bytes
}

func (l *collectLab) has(t *testing.T, d digest.Digest) bool {
	t.Helper()
	_, err := os.Stat(filepath.Join(l.dir, "blobs/sha256", d.Hex()))
	return err == nil
}

// What a node runs or has in its cache, what a host is assigned and what a disk began as stays, with all that it lies over; the
// rest goes, also where it has a kernel in common.
func TestCollectKeepsWhatAnybodyNeeds(t *testing.T) {
	l := newCollectLab(t)
	_, cached := l.put(t, "cached")
	_, assigned := l.put(t, "assigned")
	under, _ := l.put(t, "under")
	goneBase, gone := l.put(t, "gone")
	s := l.r.cfg.Store
	assignment := state.Assignment{Host: "n9", Release: digest.Of([]byte("r")), DeltaRecipe: assigned.Recipe}
	err := errors.Join(
		state.Nodes.Put(t.Context(), s, "52:54:00:00:00:09", state.Node{MAC: "52:54:00:00:00:09", Cached: []digest.Digest{cached.Image.Digest}}),
		state.Assignments.Put(t.Context(), s, "n9", assignment),
		state.LUNSets.Put(t.Context(), s, "n8", state.LUNs{Host: "n8", Disks: []state.LUNDisk{{ID: "0123456789abcdef", Image: &under.Image.Blob}}}),
	)
	if err != nil {
		t.Fatal(err)
	}
	l.age(t)
	before, _ := l.blobs.List(t.Context())
	want := []string{"base " + goneBase.Recipe.Short(), "delta " + gone.Recipe.Short(), "delta " + digest.Of([]byte("deltaunder")).Short()}
	slices.Sort(want)
	dry, wouldFree := l.collect(t, true)
	if d := cmp.Diff(want, dry); d != "" {
		t.Fatalf("would go (-want +got):\n%s", d)
	}
	if after, _ := l.blobs.List(t.Context()); len(after) != len(before) {
		t.Error("a dry run deleted something")
	}
	got, freed := l.collect(t, false)
	if d := cmp.Diff(want, got); d != "" || freed != wouldFree || freed == 0 {
		t.Errorf("%d bytes freed, %d foretold; gone (-want +got):\n%s", freed, wouldFree, d)
	}
	for _, d := range []digest.Digest{gone.Image.Digest, goneBase.Image.Digest, goneBase.Modules.Digest} {
		if l.has(t, d) {
			t.Errorf("blob %s of what nothing needs is there", d.Short())
		}
	}
	for _, b := range []images.Blob{cached.Image.Blob, cached.Base, assigned.Image.Blob, assigned.Base, under.Image.Blob, under.Kernel} {
		if !l.has(t, b.Digest) {
			t.Errorf("blob %s is gone", b.Digest.Short())
		}
	}
	if v, err := artifact.Verify(t.Context(), l.blobs); err != nil || v.Manifests != 5 || slices.ContainsFunc(v.Problems, func(p artifact.Problem) bool { return p.What != "image" }) {
		t.Errorf("after it: %+v, %v", v, err)
	}
	deltas, err := state.Deltas.List(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if ids := slices.Sorted(maps.Keys(deltas)); len(ids) != 2 || slices.Contains(ids, gone.Recipe.String()) {
		t.Errorf("records of deltas: %v", ids)
	}
	if again, _ := l.collect(t, false); again != nil {
		t.Errorf("a second round takes %v", again)
	}
}

// What was built within the grace is kept, and what the fleet in force has.
func TestCollectLeavesWhatIsYoung(t *testing.T) {
	l := newCollectLab(t)
	_, young := l.put(t, "young")
	l.age(t)
	rec := state.Build{Recipe: young.Recipe, Phase: state.BuildDone, Finished: time.Now()}
	if err := state.Builds.Put(t.Context(), l.r.cfg.Store, young.Recipe.String(), rec); err != nil {
		t.Fatal(err)
	}
	if got, _ := l.collect(t, false); got != nil {
		t.Errorf("took %v", got)
	}
}

// Without a fleet nobody knows what is needed: nothing goes.
func TestCollectNeedsAFleet(t *testing.T) {
	l := newCollectLab(t)
	l.put(t, "all")
	l.age(t)
	l.r.follow.fleet.Store(nil)
	var away *UnavailableError
	if _, err := l.r.collectAlone(t.Context(), false, time.Hour); !errors.As(err, &away) {
		t.Errorf("without a fleet: %v", err)
	}
}
