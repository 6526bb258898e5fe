package store_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/errdef"

	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
)

// putManifest makes a manifest with one layer, and tags it.
func putManifest(t *testing.T, s *store.Store, text, tag string, subject *ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	config := must(s.PutBlob(t.Context(), "application/vnd.troupe.test.v1+json", []byte(`{"about":"`+text+`"}`)))(t)
	layer := must(s.PutBlob(t.Context(), "application/octet-stream", []byte(text)))(t)
	b, err := json.Marshal(ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, ArtifactType: "application/vnd.troupe.test.v1",
		Config: config, Layers: []ocispec.Descriptor{layer}, Subject: subject,
	})
	if err != nil {
		t.Fatal(err)
	}
	desc := must(s.PutBlob(t.Context(), ocispec.MediaTypeImageManifest, b))(t)
	desc.ArtifactType = "application/vnd.troupe.test.v1"
	if tag == "" {
		return desc
	}
	if err := s.Tag(t.Context(), desc, tag); err != nil {
		t.Fatal(err)
	}
	return desc
}

func must[T any](v T, err error) func(*testing.T) T {
	return func(t *testing.T) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func TestLayoutSurvivesReopening(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	one, two := putManifest(t, s, "one", "web", nil), putManifest(t, s, "two", "db", nil)
	about := putManifest(t, s, "about one", "", &one)
	if err := errors.Join(s.Tag(t.Context(), two, "web"), s.Tag(t.Context(), one, "before"), s.Untag(t.Context(), "db"), s.Close()); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	for tag, want := range map[string]ocispec.Descriptor{"web": two, "before": one, string(one.Digest): one} {
		got, err := s.Resolve(t.Context(), tag)
		if err != nil || got.Digest != want.Digest || got.ArtifactType != want.ArtifactType {
			t.Errorf("%s is %+v, %v; want %s", tag, got, err, want.Digest)
		}
	}
	if _, err := s.Resolve(t.Context(), "db"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a tag that was taken away: %v", err)
	}
	found, err := s.Predecessors(t.Context(), one)
	if err != nil || len(found) != 1 || found[0].Digest != about.Digest {
		t.Errorf("what is about the first manifest: %v, %v", found, err)
	}
	var tags []string
	if err := s.Tags(t.Context(), "before", func(all []string) error { tags = all; return nil }); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{"web"}, tags); d != "" {
		t.Errorf("tags (-want +got):\n%s", d)
	}
}

// Other programs read the directory, and verify what they read.
func TestLayoutIsReadByOthers(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	desc := putManifest(t, s, "one", "web", nil)
	put(t, s, content(1, 100_000)) // a working copy that no manifest names
	out, err := exec.CommandContext(t.Context(), "skopeo", "inspect", "--raw", "oci:"+dir+":web").CombinedOutput()
	if err != nil {
		t.Fatalf("skopeo (Debian package skopeo): %v: %s", err, out)
	}
	if got := digest.Of(out); string(got) != string(desc.Digest) {
		t.Errorf("skopeo read a manifest %s, want %s:\n%s", got, desc.Digest, out)
	}
	to := filepath.Join(t.TempDir(), "copy")
	if out, err := exec.CommandContext(t.Context(), "skopeo", "copy", "--insecure-policy", "oci:"+dir+":web", "oci:"+to+":web").CombinedOutput(); err != nil {
		t.Errorf("skopeo copy: %v: %s", err, out)
	}
	other := must(oci.NewFromFS(t.Context(), os.DirFS(dir)))(t)
	if got, err := oras.Copy(t.Context(), other, "web", must(oci.New(t.TempDir()))(t), "", oras.DefaultCopyOptions); err != nil || got.Digest != desc.Digest {
		t.Errorf("oras read %v, %v", got, err)
	}
}

func TestCopyIntoALayout(t *testing.T) {
	from, dir := open(t, t.TempDir()), t.TempDir()
	to := open(t, dir)
	desc := putManifest(t, from, "one", "web", nil)
	for range 2 {
		if _, err := oras.Copy(t.Context(), from, "web", to, "", oras.DefaultCopyOptions); err != nil {
			t.Fatal(err)
		}
		if err := to.Complete(t.Context(), desc); err != nil {
			t.Error(err)
		}
		// A part that is lost comes with the next copy, though its manifest is there.
		if err := to.Delete(t.Context(), digest.Of([]byte("one"))); err != nil {
			t.Fatal(err)
		}
	}
	if err := to.Complete(t.Context(), desc); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("a manifest without its layer: %v", err)
	}
}

func TestPushTakesOnlyWhatItIsTold(t *testing.T) {
	s := open(t, t.TempDir())
	desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: "sha256:" + "00", Size: 3}
	if err := s.Push(t.Context(), desc, strings.NewReader("abc")); err == nil {
		t.Error("a malformed digest was taken")
	}
	good := []byte("abc")
	desc = store.Describe("application/octet-stream", must(s.Put(t.Context(), bytes.NewReader(good)))(t))
	if err := s.Push(t.Context(), desc, bytes.NewReader(good)); !errors.Is(err, errdef.ErrAlreadyExists) {
		t.Errorf("what is there: %v", err)
	}
	if err := s.Delete(t.Context(), digest.Of(good)); err != nil {
		t.Fatal(err)
	}
	for _, other := range []string{"abd", "ab", "abcd"} {
		if err := s.Push(t.Context(), desc, strings.NewReader(other)); !errors.Is(err, digest.ErrMismatch) {
			t.Errorf("%q for abc: %v", other, err)
		}
	}
	if all := must(s.List(t.Context()))(t); len(all) != 0 {
		t.Errorf("the store has %v", all)
	}
	if err := s.Tag(t.Context(), desc, "x"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("a tag of what is not there: %v", err)
	}
}

// An index that rotted is set aside, and told; the blobs stay.
func TestRottenIndex(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	desc := putManifest(t, s, "one", "web", nil)
	if err := errors.Join(s.Close(), os.WriteFile(filepath.Join(dir, "index.json"), []byte(`{"schemaVersion":2,"mani`), 0o644)); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	if _, err := s.Resolve(t.Context(), "web"); !errors.Is(err, errdef.ErrNotFound) {
		t.Errorf("resolving in an index that is gone: %v", err)
	}
	<-s.Damaged()
	if all := s.TakeDamage(); len(all) != 1 || all[0].Name != "index.json" {
		t.Errorf("told of %v", all)
	}
	if err := errors.Join(s.Complete(t.Context(), desc), s.Tag(t.Context(), desc, "web")); err != nil {
		t.Error(err)
	}
}

func TestTruncatedBlobIsTold(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	b := content(1, 10_000)
	put(t, s, b)
	if err := os.Truncate(filepath.Join(dir, blobFile(b)), 5000); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Open(t.Context(), digest.Of(b)); !errors.Is(err, digest.ErrMismatch) {
		t.Errorf("opening a truncated blob: %v", err)
	}
	<-s.Damaged()
	if all := s.TakeDamage(); len(all) != 1 || all[0].Name != digest.Of(b).String() {
		t.Errorf("told of %v", all)
	}
	if again := s.TakeDamage(); len(again) != 0 {
		t.Errorf("told again of %v", again)
	}
	if _, err := os.Stat(filepath.Join(dir, "corrupt", digest.Of(b).Hex())); err != nil {
		t.Error(err)
	}
}

func TestSweep(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	keep, old, again, young := []byte("keep"), []byte("old"), []byte("again"), []byte("young")
	for _, b := range [][]byte{keep, old, again} {
		put(t, s, b)
	}
	long := time.Now().Add(-time.Hour)
	for _, b := range [][]byte{keep, old, again} {
		if err := os.Chtimes(filepath.Join(dir, blobFile(b)), long, long); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	put(t, s, young)
	put(t, s, again) // a build that makes what was there already
	sweep := func(dry bool) []string {
		t.Helper()
		gone, err := s.Sweep(t.Context(), store.Sweep{
			Keep: func(d digest.Digest) bool { return d == digest.Of(keep) }, Gone: func(digest.Digest) bool { return true },
			After: time.Now().Add(-time.Minute), Dry: dry,
		})
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, b := range gone {
			names = append(names, string(b.Digest))
		}
		return names
	}
	want := []string{digest.Of(old).String()}
	for _, dry := range []bool{true, false} {
		if d := cmp.Diff(want, sweep(dry)); d != "" {
			t.Errorf("dry run %v (-want +got):\n%s", dry, d)
		}
	}
	wantFiles(t, dir, blobFile(keep), blobFile(again), blobFile(young))
	if got := sweep(false); got != nil {
		t.Errorf("swept %v a second time", got)
	}
}

// Who commits what is being swept has it afterwards, whichever came first.
func TestSweepBesideCommits(t *testing.T) {
	s := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() {
		var err error
		for err == nil && ctx.Err() == nil {
			_, err = s.Sweep(context.WithoutCancel(ctx), store.Sweep{
				Keep: func(digest.Digest) bool { return false }, Gone: func(digest.Digest) bool { return true }, After: time.Now().Add(-time.Minute),
			})
		}
		done <- err
	}()
	for i := range uint64(200) {
		b := content(i%7, 100)
		put(t, s, b)
		if _, err := s.Stat(t.Context(), digest.Of(b)); err != nil {
			t.Errorf("after commit %d: %v", i, err)
		}
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What a server puts into its store when it starts is named by nothing, and stays while it runs.
func TestSweepLeavesWhatThisProcessPut(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	agent := []byte("agent")
	put(t, s, agent)
	old := time.Now().Add(-time.Hour)
	if err := os.Chtimes(filepath.Join(dir, blobFile(agent)), old, old); err != nil {
		t.Fatal(err)
	}
	none := func(digest.Digest) bool { return false }
	if gone, err := s.Sweep(t.Context(), store.Sweep{Keep: none, Gone: none, After: time.Now().Add(time.Hour)}); err != nil || len(gone) != 0 {
		t.Errorf("swept %v, %v", gone, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if gone, err := open(t, dir).Sweep(t.Context(), store.Sweep{Keep: none, Gone: none, After: time.Now().Add(time.Hour)}); err != nil || len(gone) != 1 {
		t.Errorf("after a restart swept %v, %v", gone, err)
	}
}
