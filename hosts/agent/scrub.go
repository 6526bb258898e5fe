package agent

import (
	"context"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agent/dm"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/verity"
)

// corruptLook is how often the service asks the kernel whether it met a damaged block.
const corruptLook = 10 * time.Second

// scrubEvery is within what time each image of the cache is read through.
const scrubEvery = 24 * time.Hour

// watchImages mends what the kernel found damaged of what runs, at once, and reads each image of the cache through once a
// day, until ctx is done. A node without a cache has nothing to look after: its images are the server's.
func (s *service) watchImages(ctx context.Context) {
	if s.state.get().Assignment.ISCSI != nil {
		return
	}
	for backoff.Sleep(ctx, corruptLook) == nil {
		roots, err := dm.Corrupt()
		if err != nil {
			s.log.Warn("the kernel does not say how the images are", "error", err)
		}
		images := imagesOf(s.cache)
		for _, img := range images {
			isBad := slices.ContainsFunc(roots, func(r string) bool { return strings.HasPrefix(img.Root, r) })
			if isBad || s.isDue(img.Digest) {
				s.scrub(ctx, img, isBad)
			}
		}
	}
}

// imagesOf are the images in the cache of which it is known what they should be.
func imagesOf(c *cache.Cache) []agentapi.Image {
	var out []agentapi.Image
	for _, r := range c.Records() {
		if r.Assignment.Release == nil {
			continue
		}
		for _, img := range []agentapi.Image{r.Assignment.Release.Base, r.Assignment.Release.Delta} {
			if c.Has(img.Digest, img.Size) && !slices.Contains(out, img) {
				out = append(out, img)
			}
		}
	}
	return out
}

// isDue says whether an image was not read through for a day. Of one that was never before, the first time is anywhere in
// the next day: a thousand nodes that got it at once need not all read it at once.
func (s *service) isDue(d digest.Digest) bool {
	at, ok := s.cache.State().Scrubs[d]
	if !ok {
		s.scrubbed(d, time.Now().Add(-rand.N(scrubEvery))) //nolint:gosec // it spreads load, and is no secret
		return false
	}
	return time.Since(at) > scrubEvery
}

// scrubbed keeps when an image was read through, and forgets images that are gone.
func (s *service) scrubbed(d digest.Digest, at time.Time) {
	err := s.cache.SetState(func(st *cache.State) {
		all := map[digest.Digest]time.Time{d: at}
		for other, t := range st.Scrubs {
			if other != d && s.cache.Has(other, -1) {
				all[other] = t
			}
		}
		st.Scrubs = all
	})
	if err != nil {
		s.log.Warn("the cache's state cannot be written", "error", err)
	}
}

// scrub reads an image through in the background and mends it. refresh has the kernel look at the disk again.
func (s *service) scrub(ctx context.Context, img agentapi.Image, refresh bool) {
	n, err := inBackground(func() (int64, error) {
		n, err := s.cache.Scrub(ctx, img, s.client)
		return int64(n), err
	})
	if ctx.Err() != nil {
		return
	}
	if err == nil && (refresh || n > 0) {
		var root verity.Root
		if root, err = verity.ParseRoot(img.Root); err == nil {
			err = dm.Refresh(root)
		}
	}
	if err != nil {
		s.log.Error("an image is damaged and cannot be mended, trying again", "image", img.Digest.Short(), "error", err)
	} else {
		s.log.Info("image read through", "image", img.Digest.Short(), "mended", n)
		s.scrubbed(img.Digest, time.Now())
	}
	if n > 0 || err != nil {
		s.rep.update(true, func(r *agentapi.Report) { r.Warnings = s.cache.Warnings() })
	}
}

// checkStaged reads through what of a release was in the cache before it was staged: what came just now was hashed on its way.
func (s *service) checkStaged(ctx context.Context, r *agentapi.Release, had []digest.Digest) error {
	for _, img := range []agentapi.Image{r.Base, r.Delta} {
		if !slices.Contains(had, img.Digest) {
			continue
		}
		n, err := inBackground(func() (int64, error) {
			n, err := s.cache.Scrub(ctx, img, s.client)
			return int64(n), err
		})
		if n > 0 {
			s.rep.update(true, func(r *agentapi.Report) { r.Warnings = s.cache.Warnings() })
		}
		if err != nil {
			return err
		}
		s.scrubbed(img.Digest, time.Now())
	}
	return nil
}
