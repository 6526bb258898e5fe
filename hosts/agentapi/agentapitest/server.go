// Package agentapitest has a server for agents under test: it speaks the protocol of package agentapi, hands out the
// assignment that a test sets, and keeps what agents say.
package agentapitest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/signing"
	"github.com/troupe-dev/troupe/internal/verity"
)

// A Server is an http.Handler with one assignment for whoever asks. The zero value has an Unclaimed one and no blobs.
// It is safe for concurrent use.
type Server struct {
	// Blob, where it is set, may answer a request for a blob itself, by returning true: to cut it short, for example.
	Blob func(w http.ResponseWriter, r *http.Request, d digest.Digest, content []byte) bool

	mu         sync.Mutex
	version    int
	assignment agentapi.Assignment
	blobs      map[digest.Digest][]byte
	files      map[digest.Digest]string
	hellos     []agentapi.Hello
	reports    []agentapi.Report
	marks      []agentapi.Mark
	forgotten  bool
	key        *signing.Key
	changed    chan struct{} // closed at the next change of any of these
}

// Assign sets the assignment, under a new version.
func (s *Server) Assign(a agentapi.Assignment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.assignment = a
	s.assignment.Version = strconv.Itoa(s.version)
	s.notify()
}

// Keys are those that agents must trust to run what they are assigned.
func (s *Server) Keys() signing.Keys {
	s.mu.Lock()
	defer s.mu.Unlock()
	keys, err := signing.ParseKeys(s.signer().Public())
	if err != nil {
		panic(err) // of a key that was just made
	}
	return keys
}

// Signer is the key that assignments are signed with.
func (s *Server) Signer() *signing.Key {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.signer()
}

// SignWith has what is assigned signed by another key from now on.
func (s *Server) SignWith(key *signing.Key) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.key = key
}

// signer is called with mu held.
func (s *Server) signer() *signing.Key {
	if s.key == nil {
		key, err := signing.NewKey()
		if err != nil {
			panic(err) // there is no randomness to be had
		}
		s.key = key
	}
	return s.key
}

// Add makes bytes available and returns what names them.
func (s *Server) Add(content []byte) agentapi.Blob {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.blobs == nil {
		s.blobs = map[digest.Digest][]byte{}
	}
	d := digest.Of(content)
	s.blobs[d] = content
	return agentapi.Blob{Digest: d, Size: int64(len(content))}
}

// AddImage makes bytes available as an image: ImageFile of them.
func (s *Server) AddImage(content []byte) agentapi.Image {
	file, img := ImageFile(content)
	img.Blob = s.Add(file)
	return img
}

// ImageFile is content, padded to whole blocks and with its tree, and what is known of that but its name.
func ImageFile(content []byte) ([]byte, agentapi.Image) {
	data := verity.Padded(int64(len(content)))
	file := make([]byte, data+verity.Size(data))
	copy(file, content)
	root, err := verity.Write(bytes.NewReader(file[:data]), data, intoSlice(file))
	if err != nil {
		panic(err) // nothing is read or written but memory
	}
	return file, agentapi.Image{Data: data, Root: root.String()}
}

type intoSlice []byte

func (b intoSlice) WriteAt(p []byte, off int64) (int, error) { return copy(b[off:], p), nil }

// AddFile makes a file available under a digest that is taken on trust.
func (s *Server) AddFile(d digest.Digest, path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.files == nil {
		s.files = map[digest.Digest]string{}
	}
	s.files[d] = path
}

// Forget makes the server not know the agent until it says hello again, as after the loss of all state.
func (s *Server) Forget() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.forgotten = true
	s.notify()
}

// Hellos are all that were said.
func (s *Server) Hellos() []agentapi.Hello {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.hellos)
}

// Reports are all that came.
func (s *Server) Reports() []agentapi.Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.reports)
}

// Marks are those of all reports, each once, in the order in which they came.
func (s *Server) Marks() []agentapi.Mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.marks)
}

// Wait waits until cond holds, and looks at it after each request and change. It returns an error when ctx
// is done before that.
func (s *Server) Wait(ctx context.Context, cond func() bool) error {
	for {
		s.mu.Lock()
		ch := s.wait()
		s.mu.Unlock()
		if cond() {
			return nil
		}
		select {
		case <-ch:
		case <-ctx.Done():
			return fmt.Errorf("%w; the agent's last report was: %+v", ctx.Err(), s.last())
		}
	}
}

func (s *Server) last() agentapi.Report {
	if r := s.Reports(); len(r) > 0 {
		return r[len(r)-1]
	}
	return agentapi.Report{}
}

// notify and wait are called with mu held.
func (s *Server) notify() {
	if s.changed != nil {
		close(s.changed)
		s.changed = nil
	}
}

func (s *Server) wait() <-chan struct{} {
	if s.changed == nil {
		s.changed = make(chan struct{})
	}
	return s.changed
}

func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch hex, isBlob := strings.CutPrefix(r.URL.Path, agentapi.PathBlobs); {
	case isBlob:
		s.serveBlob(w, r, hex)
	case r.URL.Path == agentapi.PathHello && r.Method == http.MethodPost:
		s.serveHello(w, r)
	case r.URL.Path == agentapi.PathReport && r.Method == http.MethodPost:
		s.serveReport(w, r)
	case r.URL.Path == agentapi.PathAssignment && r.Method == http.MethodGet:
		s.serveAssignment(w, r)
	default:
		answer(w, http.StatusNotFound, agentapi.Error{Message: "no such page"})
	}
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // an agent that left does not listen any more
}

func (s *Server) serveHello(w http.ResponseWriter, r *http.Request) {
	var h agentapi.Hello
	if err := json.NewDecoder(r.Body).Decode(&h); err != nil {
		answer(w, http.StatusBadRequest, agentapi.Error{Message: err.Error()})
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.hellos = append(s.hellos, h)
	s.forgotten = false
	answer(w, http.StatusOK, s.current())
	s.notify()
}

// current is called with mu held.
func (s *Server) current() agentapi.Assignment {
	a := s.assignment
	if a.State == "" {
		a.State, a.Version = agentapi.Unclaimed, "0"
	}
	a, err := agentapi.Sign(a, s.signer())
	if err != nil {
		panic(err) // of a value that becomes JSON
	}
	return a
}

func (s *Server) serveReport(w http.ResponseWriter, r *http.Request) {
	var rep agentapi.Report
	if err := json.NewDecoder(r.Body).Decode(&rep); err != nil {
		answer(w, http.StatusBadRequest, agentapi.Error{Message: err.Error()})
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reports = append(s.reports, rep)
	for _, m := range rep.Marks {
		if !slices.Contains(s.marks, m) {
			s.marks = append(s.marks, m)
		}
	}
	answer(w, http.StatusOK, agentapi.ReportReply{Version: s.current().Version, Hello: s.forgotten})
	s.notify()
}

func (s *Server) serveAssignment(w http.ResponseWriter, r *http.Request) {
	secs, err := strconv.Atoi(r.URL.Query().Get("wait"))
	if err != nil {
		answer(w, http.StatusBadRequest, agentapi.Error{Message: "wait: " + err.Error()})
		return
	}
	timer := time.NewTimer(time.Duration(secs) * time.Second)
	defer timer.Stop()
	for {
		s.mu.Lock()
		a, forgotten, ch := s.current(), s.forgotten, s.wait()
		s.mu.Unlock()
		if forgotten {
			answer(w, http.StatusNotFound, agentapi.Error{Message: "no such machine: say hello"})
			return
		}
		if a.Version != r.URL.Query().Get("after") {
			answer(w, http.StatusOK, a)
			return
		}
		select {
		case <-ch:
		case <-timer.C:
			answer(w, http.StatusOK, a)
			return
		case <-r.Context().Done():
			return
		}
	}
}

func (s *Server) serveBlob(w http.ResponseWriter, r *http.Request, hex string) {
	d, err := digest.FromHex(hex)
	if err != nil {
		answer(w, http.StatusBadRequest, agentapi.Error{Message: err.Error()})
		return
	}
	s.mu.Lock()
	content, ok := s.blobs[d]
	file, isFile := s.files[d]
	s.mu.Unlock()
	switch {
	case isFile:
		http.ServeFile(w, r, file)
	case !ok:
		answer(w, http.StatusNotFound, agentapi.Error{Message: "no such blob"})
	case s.Blob == nil || !s.Blob(w, r, d, content):
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}
}
