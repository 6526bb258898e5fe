package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"

	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/object"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/capability"
	"github.com/go-git/go-git/v5/plumbing/protocol/packp/sideband"
	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"
)

const (
	// wireTries is how often a transfer is begun anew that broke after the remote had answered: a branch that is forced
	// elsewhere between listing and transfer makes the remote refuse what it offered.
	wireTries = 3
	// haveCommits is how many commits we tell the remote that we have, beside the tips: after a force-push it is an
	// ancestor of the old tip that saves fetching everything.
	haveCommits = 256
)

// A wire is a repository that speaks Git's pack protocol. There is one connection for each list and each fetch.
type wire struct {
	dial   func(ctx context.Context) (session, error)
	done   func()                 // closes what connections are kept; may be nil
	branch plumbing.ReferenceName // the one that matters
	most   int64                  // bytes of a file; 0 stands for maxReceived

	// What was too big, for whoever calls fetch. It is forgotten when the remote learns to leave out big files, or unlearns it.
	filters bool                   // whether the remote could when it was last asked
	huge    map[plumbing.Hash]bool // heads that are not asked for again until they move: one of them is too big
	refused refusal                // of branch
}

// A refusal is a head that is not asked for again until its branch moves: how big it is, only a whole transfer tells.
type refusal struct {
	head plumbing.Hash
	err  error // what every fetch says until then; nil for no refusal
}

// A session is one conversation with git-upload-pack(1).
type session interface {
	AdvertisedReferencesContext(ctx context.Context) (*packp.AdvRefs, error)
	UploadPack(ctx context.Context, req *packp.UploadPackRequest) (*packp.UploadPackResponse, error)
	Close() error
}

// newHTTPRemote takes the credentials out of ep: they go into a header, and URLs come back in errors.
func newHTTPRemote(cfg Config, ep *transport.Endpoint, s *scrubber) (*wire, error) {
	auth, err := httpAuth(cfg, ep)
	if err != nil {
		return nil, err
	}
	if auth != nil {
		s.add(auth.Password)
	}
	ep.User, ep.Password = "", ""
	tr, err := httpTransport(cfg.CAFile)
	if err != nil {
		return nil, err
	}
	client := githttp.NewClient(&http.Client{Transport: tr})
	dial := func(context.Context) (session, error) {
		e := *ep // the session follows redirects by changing it
		if auth == nil {
			return client.NewUploadPackSession(&e, nil)
		}
		return client.NewUploadPackSession(&e, auth)
	}
	return &wire{dial: dial, done: tr.CloseIdleConnections, branch: plumbing.NewBranchReferenceName(cfg.Branch)}, nil
}

func (w *wire) list(ctx context.Context) (refs, error) {
	var got refs
	err := w.session(ctx, func(_ session, ar *packp.AdvRefs) (err error) {
		got, err = advertised(ar)
		return err
	})
	return got, err
}

func (w *wire) fetch(ctx context.Context, m *mirror) (refs, error) {
	var got refs
	var err error
	for range wireTries {
		answered := false
		err = w.session(ctx, func(s session, ar *packp.AdvRefs) (err error) {
			answered = true
			if got, err = advertised(ar); err != nil {
				return err
			}
			return w.transfer(ctx, s, ar, got, m)
		})
		if errors.Is(err, errHuge) && w.forgo(m, got, err) {
			continue
		}
		if err == nil || !answered || errors.Is(err, errHuge) || errors.Is(err, errMirror) || ctx.Err() != nil {
			break
		}
		m.sweepPacks()
	}
	return got, err
}

// forgo gives up the heads beside the followed one that the mirror lacks, after err, which says that something is too big:
// nobody shall hold up that branch by pushing another. It says whether there was anything to give up. Where there was
// not, the followed head alone is too big, and is refused.
func (w *wire) forgo(m *mirror, got refs, err error) bool {
	if w.refused.err != nil {
		return false // err is that one: nothing was transferred
	}
	dst := openStorage(m.dir)
	huge := map[plumbing.Hash]bool{}
	more := false
	for name, h := range got {
		if name != w.branch && h != got[w.branch] && dst.HasEncodedObject(h) != nil {
			huge[h] = true
			more = more || !w.huge[h]
		}
	}
	if !more {
		w.huge, w.refused = nil, refusal{head: got[w.branch], err: err} // the others may have been given up for its sake
		return false
	}
	w.huge = huge
	m.log.Warn("following one branch without the new heads of others", "branch", w.branch.Short(), "why", err)
	return true
}

// session talks to the remote: f gets what it offers, and is not called for an empty repository.
func (w *wire) session(ctx context.Context, f func(session, *packp.AdvRefs) error) (err error) {
	if w.done != nil {
		defer w.done()
	}
	s, err := w.dial(ctx)
	if err != nil {
		return classify(err)
	}
	defer func() {
		if cerr := s.Close(); err == nil && cerr != nil {
			err = classify(cerr)
		}
	}()
	ar, err := s.AdvertisedReferencesContext(ctx)
	if errors.Is(err, transport.ErrEmptyRemoteRepository) {
		return nil
	}
	if err != nil {
		return classify(err)
	}
	if err := f(s, ar); err != nil {
		return classify(err)
	}
	return nil
}

func advertised(ar *packp.AdvRefs) (refs, error) {
	all, err := ar.AllReferences()
	if err != nil {
		return nil, fmt.Errorf("reading the list of branches: %w", err)
	}
	return readRefs(all)
}

// recall is the error with which head was refused, if nothing has changed since then that could make it acceptable.
func (w *wire) recall(head plumbing.Hash, filters bool) error {
	if filters != w.filters {
		w.filters, w.huge, w.refused = filters, nil, refusal{}
	}
	if head != w.refused.head {
		w.refused = refusal{}
	}
	return w.refused.err
}

// transfer brings what the mirror lacks of got, unless the head that matters was refused before.
func (w *wire) transfer(ctx context.Context, s session, ar *packp.AdvRefs, got refs, m *mirror) error {
	filters := ar.Capabilities.Supports(capability.Filter)
	if err := w.recall(got[w.branch], filters); err != nil {
		return err
	}
	dst := openStorage(m.dir)
	req := packp.NewUploadPackRequestFromCapabilities(ar.Capabilities)
	if ar.Capabilities.Supports(capability.NoProgress) {
		if err := req.Capabilities.Set(capability.NoProgress); err != nil {
			return err
		}
	}
	for _, h := range got {
		if !w.huge[h] && dst.HasEncodedObject(h) != nil && !slices.Contains(req.Wants, h) {
			req.Wants = append(req.Wants, h)
		}
	}
	if len(req.Wants) == 0 {
		return nil
	}
	req.Haves = m.haves()
	if filters {
		if err := req.Capabilities.Set(capability.Filter); err != nil {
			return err
		}
		req.Filter = packp.FilterBlobLimit(MaxFileSize+1, packp.BlobLimitPrefixNone)
	}
	res, err := s.UploadPack(ctx, req)
	if err != nil {
		return fmt.Errorf("asking for %d objects: %w", len(req.Wants), err)
	}
	defer res.Close() //nolint:errcheck // only read
	err = receive(m, dst, demux(req.Capabilities, res), w.most)
	if errors.Is(err, errHuge) && !filters {
		err = fmt.Errorf("%w; with uploadpack.allowFilter the Git server would leave it out", err)
	}
	if err != nil {
		return fmt.Errorf("receiving objects: %w", err)
	}
	return nil
}

// demux takes the pack out of the bands in which it comes beside the remote's messages (gitprotocol-pack(5)).
func demux(l *capability.List, r io.Reader) io.Reader {
	switch {
	case l.Supports(capability.Sideband64k):
		return sideband.NewDemuxer(sideband.Sideband64k, r)
	case l.Supports(capability.Sideband):
		return sideband.NewDemuxer(sideband.Sideband, r)
	}
	return r
}

// haves are commits of the mirror, for the remote to find what both have.
func (m *mirror) haves() []plumbing.Hash {
	var all []plumbing.Hash
	walkCommits(m.objects.commit, slices.Collect(maps.Values(*m.refs.Load())), func(c *object.Commit) bool {
		all = append(all, c.Hash)
		return len(all) < haveCommits
	})
	return all
}
