package source

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/go-git/go-git/v5/storage/filesystem"
)

// revSyntax is what of gitrevisions(7) is understood: a name or a hash, then steps to parents.
var revSyntax = regexp.MustCompile(`^([A-Za-z0-9_][A-Za-z0-9._/+#-]{0,199})((?:[~^][0-9]{0,6}){0,20})$`)

var revStep = regexp.MustCompile(`[~^][0-9]*`)

// resolve finds the commit that rev names.
func (m *mirror) resolve(rev, branch string) (plumbing.Hash, error) {
	parts := revSyntax.FindStringSubmatch(rev)
	if parts == nil {
		return plumbing.ZeroHash, fmt.Errorf("%w: want a hash, a branch, a tag or HEAD, then ~N and ^N", ErrNoRevision)
	}
	h, err := m.base(parts[1], branch)
	if err != nil {
		return h, err
	}
	for _, step := range revStep.FindAllString(parts[2], -1) {
		n := 1
		if len(step) > 1 {
			if n, err = strconv.Atoi(step[1:]); err != nil {
				return h, fmt.Errorf("%w: %w", ErrNoRevision, err)
			}
		}
		if h, err = m.step(h, step[0], n); err != nil {
			return h, err
		}
	}
	return h, nil
}

// step goes n first parents up for '~', and to the nth parent for '^'.
func (m *mirror) step(h plumbing.Hash, how byte, n int) (plumbing.Hash, error) {
	times, parent := n, 0
	if how == '^' {
		times, parent = min(n, 1), n-1
	}
	for range times {
		c, err := m.objects.commit(h)
		if err != nil {
			return h, fmt.Errorf("%w: reading commit %s: %w", ErrNoRevision, h, err)
		}
		if parent >= len(c.ParentHashes) {
			return h, fmt.Errorf("%w: %s has %d parents", ErrNoRevision, h, len(c.ParentHashes))
		}
		h = c.ParentHashes[parent]
	}
	return h, nil
}

// base finds a name, or else a hash. A name that looks like a hash goes first only where it is no commit.
func (m *mirror) base(name, branch string) (plumbing.Hash, error) {
	if len(name) == 40 && plumbing.IsHash(name) {
		return m.peel(plumbing.NewHash(name))
	}
	names := *m.refs.Load()
	if name == "HEAD" {
		name = followedName(branch).String()
	}
	for _, prefix := range []string{"", "refs/", "refs/tags/", "refs/heads/"} {
		if h, ok := names[plumbing.ReferenceName(prefix+name)]; ok {
			return m.peel(h)
		}
	}
	if h, ok := names[plumbing.NewBranchReferenceName(strings.TrimPrefix(name, "origin/"))]; ok {
		return m.peel(h)
	}
	return m.abbreviated(strings.ToLower(name))
}

// abbreviated finds the only commit whose hash begins with prefix.
func (m *mirror) abbreviated(prefix string) (plumbing.Hash, error) {
	if len(prefix) < 4 || len(prefix) > 39 || strings.Trim(prefix, "0123456789abcdef") != "" {
		return plumbing.ZeroHash, ErrNoRevision
	}
	var found []plumbing.Hash
	b := plumbing.NewHash(prefix + strings.Repeat("0", 40-len(prefix)))
	err := m.objects.with(func(s *filesystem.Storage) error {
		all, err := s.HashesWithPrefix(b[:len(prefix)/2])
		if err != nil {
			return err
		}
		found = slices.DeleteFunc(all, func(h plumbing.Hash) bool {
			if !strings.HasPrefix(h.String(), prefix) {
				return true
			}
			_, err := s.EncodedObject(plumbing.CommitObject, h)
			return err != nil
		})
		if len(found) == 0 {
			return ErrNoRevision // look again: a pack may be new
		}
		return nil
	})
	switch {
	case err != nil && !errors.Is(err, ErrNoRevision):
		return plumbing.ZeroHash, fmt.Errorf("looking for %q: %w", prefix, err)
	case len(found) == 0:
		return plumbing.ZeroHash, ErrNoRevision
	case len(found) > 1:
		return plumbing.ZeroHash, fmt.Errorf("%w: %d commits begin so", ErrNoRevision, len(found))
	}
	return found[0], nil
}

// peel goes from a tag to its commit.
func (m *mirror) peel(h plumbing.Hash) (plumbing.Hash, error) {
	for range 10 {
		var tag *object.Tag
		err := m.objects.with(func(s *filesystem.Storage) error {
			obj, err := s.EncodedObject(plumbing.AnyObject, h)
			if err != nil {
				return err
			}
			switch obj.Type() {
			case plumbing.CommitObject:
				return nil
			case plumbing.TagObject:
				tag, err = object.DecodeTag(nil, obj)
				return err
			}
			return fmt.Errorf("%w: %s is a %s", ErrNoRevision, h, obj.Type())
		})
		if errors.Is(err, plumbing.ErrObjectNotFound) {
			return h, ErrNoRevision
		}
		if err != nil || tag == nil {
			return h, err
		}
		h = tag.Target
	}
	return h, fmt.Errorf("%w: too many tags of tags", ErrNoRevision)
}
