package api

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/filediff"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// Artifacts are what the store has, as OCI manifests. An unknown name wraps state.ErrNotFound.
type Artifacts interface {
	// Resolve finds a manifest by tag, or by its digest.
	Resolve(ctx context.Context, ref string) (Artifact, error)
	// Pull gets an artifact from the server's registry.
	Pull(ctx context.Context, ref string) (Artifact, error)
	Verify(ctx context.Context) (artifact.Verification, error)
	// Collect deletes what nothing needs or, in a dry run, says what that is.
	Collect(ctx context.Context, dry bool) (Collected, error)
	SBOM(ctx context.Context, release digest.Digest) ([]byte, error)
	// Files compares two roots, each of images that lie over one another.
	Files(ctx context.Context, before, after []digest.Digest) ([]filediff.Change, error)
}

// An Artifact is a manifest of the store.
type Artifact struct {
	Digest       digest.Digest `json:"digest"`
	Size         int64         `json:"size"` // bytes of the manifest
	MediaType    string        `json:"mediaType"`
	ArtifactType string        `json:"artifactType"`
}

// Collected is what was deleted from the store, or would be.
type Collected struct {
	DryRun    bool            `json:"dryRun"`
	Artifacts []CollectedItem `json:"artifacts"` // the largest first
	Blobs     int             `json:"blobs"`     // all that go, also what belongs to no artifact
	Bytes     int64           `json:"bytes"`     // of them
	Kept      int             `json:"kept"`      // artifacts that stay
}

// A CollectedItem is one artifact that goes.
type CollectedItem struct {
	Kind  string        `json:"kind"` // "base", "delta", "disk", "release", …
	Name  string        `json:"name"` // for people
	ID    digest.Digest `json:"id"`   // of its recipe, or of the release
	Bytes int64         `json:"bytes"`
}

// Contents are what an image, a role or a release consists of.
type Contents struct {
	Name     string          `json:"name"`
	Kind     string          `json:"kind"` // "base", "delta", "disk" or "release"
	ID       digest.Digest   `json:"id"`   // of its image, or of the release
	Layers   []digest.Digest `json:"layers"`
	Packages []string        `json:"packages"` // "name=version" by name; of what lies over a base with those of the base
}

// isDisk says whether it is a disk with file systems that nobody looks into.
func (c Contents) isDisk() bool {
	return c.Kind == artifact.KindDisk || c.Kind == artifact.KindRelease && len(c.Layers) == 1
}

// A Diff is in what two images, roles or releases differ.
type Diff struct {
	Before   Contents          `json:"before"`
	After    Contents          `json:"after"`
	Packages []PackageChange   `json:"packages"`
	Files    []filediff.Change `json:"files"`
}

// A PackageChange is a package that two have not in the same version.
type PackageChange struct {
	Name   string `json:"name"`
	Before string `json:"before,omitempty"` // its version; absent: it was added
	After  string `json:"after,omitempty"`  // absent: it was removed
}

// Contents finds an image, a role or a release by name, or by the first six or more digits of a digest.
func (r *Records) Contents(ref string) (Contents, bool) {
	for _, rel := range r.newestReleases() {
		if hasDigest(rel.ID, ref) {
			return r.releaseContents(rel)
		}
	}
	i, ok := r.Image(ref)
	switch {
	case !ok:
		return Contents{}, false
	case i.Base != nil:
		return Contents{Name: i.Name, Kind: i.Kind, ID: i.Digest, Layers: []digest.Digest{i.Base.Image.Digest}, Packages: orEmpty(i.Base.Packages)}, true
	case i.Disk != nil:
		return Contents{Name: i.Name, Kind: i.Kind, ID: i.Digest, Layers: []digest.Digest{i.Disk.Image.Digest}, Packages: []string{}}, true
	case i.Delta != nil:
		base, ok := r.baseWith(i.Delta.Base.Digest)
		return Contents{
			Name: i.Name, Kind: i.Kind, ID: i.Digest, Layers: []digest.Digest{i.Delta.Base.Digest, i.Delta.Image.Digest},
			Packages: merged(base.Packages, i.Delta.Packages),
		}, ok
	}
	return Contents{}, false
}

func (r *Records) releaseContents(rel state.Release) (Contents, bool) {
	c := Contents{Name: strings.Join(rel.Roles, ","), Kind: artifact.KindRelease, ID: rel.ID, Packages: []string{}}
	if rel.Disk.Digest != "" {
		c.Layers = []digest.Digest{rel.Disk.Digest}
		return c, true
	}
	base, ok := r.baseWith(rel.Release.Base.Digest)
	delta := r.Deltas[string(rel.Delta)]
	c.Layers = []digest.Digest{rel.Release.Base.Digest, rel.Release.Delta.Digest}
	c.Packages = merged(base.Packages, delta.Packages)
	return c, ok && delta.Image.Digest == rel.Release.Delta.Digest
}

func (r *Records) baseWith(image digest.Digest) (images.Base, bool) {
	for _, b := range r.Bases {
		if b.Image.Digest == image {
			return b, true
		}
	}
	return images.Base{}, false
}

// merged is a lock with what another one adds or has in other versions.
func merged(base, over []string) []string {
	newer := map[string]bool{}
	for _, p := range over {
		name, _, _ := strings.Cut(p, "=")
		newer[name] = true
	}
	all := slices.DeleteFunc(slices.Clone(base), func(p string) bool {
		name, _, _ := strings.Cut(p, "=")
		return newer[name]
	})
	return orEmpty(slices.Sorted(slices.Values(append(all, over...))))
}

// DiffPackages lists the packages that two locks have not in the same version, by name.
func DiffPackages(before, after []string) []PackageChange {
	changes := map[string]PackageChange{}
	for _, p := range before {
		name, version, _ := strings.Cut(p, "=")
		changes[name] = PackageChange{Name: name, Before: version}
	}
	for _, p := range after {
		name, version, _ := strings.Cut(p, "=")
		c := changes[name]
		changes[name] = PackageChange{Name: name, Before: c.Before, After: version}
	}
	all := []PackageChange{}
	for _, c := range changes {
		if c.Before != c.After {
			all = append(all, c)
		}
	}
	slices.SortFunc(all, func(a, b PackageChange) int { return strings.Compare(a.Name, b.Name) })
	return all
}

// storeTime bounds what reads all of the store: at 200 MB/s a terabyte takes that long.
const storeTime = 90 * time.Minute

func (s *Server) contents(r *http.Request, ref string) (Contents, error) {
	recs, err := s.records(r.Context())
	if err != nil {
		return Contents{}, err
	}
	c, ok := recs.Contents(ref)
	if !ok {
		return Contents{}, notFound("nothing that is built is called %q (an image, a role, or the start of a digest)", ref)
	}
	return c, nil
}

func (s *Server) getContents(w http.ResponseWriter, r *http.Request) error {
	c, err := s.contents(r, r.PathValue("image"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, c)
}

func (s *Server) getSBOM(w http.ResponseWriter, r *http.Request) error {
	if s.Artifacts == nil {
		return notHere("store")
	}
	recs, err := s.records(r.Context())
	if err != nil {
		return err
	}
	id, ok := recs.releaseOf(r.PathValue("release"))
	if !ok {
		return notFound("there is no release %q (a role that has one, or the start of a digest)", r.PathValue("release"))
	}
	doc, err := s.Artifacts.SBOM(r.Context(), id)
	if err != nil {
		return err
	}
	w.Header().Set("Content-Type", "application/spdx+json")
	w.Header().Set("Content-Length", strconv.Itoa(len(doc)))
	_, _ = w.Write(doc) // there is nobody to tell that the client is gone
	return nil
}

// releaseOf finds a release by the start of its digest, or the newest one of a role.
func (r *Records) releaseOf(ref string) (digest.Digest, bool) {
	all := r.newestReleases()
	at := slices.IndexFunc(all, func(rel state.Release) bool { return slices.Contains(rel.Roles, ref) })
	if at < 0 {
		at = slices.IndexFunc(all, func(rel state.Release) bool { return hasDigest(rel.ID, ref) })
	}
	if at < 0 {
		return "", false
	}
	return all[at].ID, true
}

func (s *Server) getDiff(w http.ResponseWriter, r *http.Request) error {
	if s.Artifacts == nil {
		return notHere("store")
	}
	before, err := s.contents(r, r.FormValue("before"))
	if err != nil {
		return err
	}
	after, err := s.contents(r, r.FormValue("after"))
	if err != nil {
		return err
	}
	if before.isDisk() || after.isDisk() {
		return badRequest("nobody looks into the files of an image of kind disk")
	}
	ctx, cancel := context.WithTimeout(r.Context(), planTime)
	defer cancel()
	files, err := s.Artifacts.Files(ctx, before.Layers, after.Layers)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, Diff{Before: before, After: after, Packages: DiffPackages(before.Packages, after.Packages), Files: orEmpty(files)})
}

func (s *Server) getArtifact(w http.ResponseWriter, r *http.Request) error {
	return s.artifact(w, r, func(ctx context.Context, of Artifacts, ref string) (Artifact, error) { return of.Resolve(ctx, ref) })
}

func (s *Server) pullArtifact(w http.ResponseWriter, r *http.Request) error {
	return s.artifact(w, r, func(ctx context.Context, of Artifacts, ref string) (Artifact, error) { return of.Pull(ctx, ref) })
}

func (s *Server) artifact(w http.ResponseWriter, r *http.Request, do func(context.Context, Artifacts, string) (Artifact, error)) error {
	if s.Artifacts == nil {
		return notHere("store")
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTime)
	defer cancel()
	a, err := do(ctx, s.Artifacts, r.PathValue("artifact"))
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, a)
}

func (s *Server) verifyStore(w http.ResponseWriter, r *http.Request) error {
	if s.Artifacts == nil {
		return notHere("store")
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTime)
	defer cancel()
	v, err := s.Artifacts.Verify(ctx)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, v)
}

func (s *Server) collect(w http.ResponseWriter, r *http.Request) error {
	if s.Artifacts == nil {
		return notHere("store")
	}
	dry := false
	if text := r.FormValue("dryRun"); text != "" {
		var err error
		if dry, err = strconv.ParseBool(text); err != nil {
			return badRequest("dryRun=%s: %v", text, errors.Unwrap(err))
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), storeTime)
	defer cancel()
	c, err := s.Artifacts.Collect(ctx, dry)
	if err != nil {
		return err
	}
	return writeJSON(w, http.StatusOK, c)
}
