package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/quiet"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// Agents answers what agents ask. An error with a method Invalid() bool that says true is the agent's fault; one
// with Unavailable() bool passes by itself.
type Agents interface {
	Hello(ctx context.Context, peer netip.Addr, h agentapi.Hello) (agentapi.Assignment, error)
	// Assignment returns when the assignment of mac is another than after, or wait is over.
	Assignment(ctx context.Context, mac, after string, wait time.Duration) (agentapi.Assignment, error)
	Report(ctx context.Context, peer netip.Addr, r agentapi.Report) (agentapi.ReportReply, error)
}

// Images builds images. An unknown name, and a recipe without a log, wrap state.ErrNotFound.
type Images interface {
	// Build has the image or, where there is no such image, the role of that name built, also if its build failed and waits.
	// It returns the recipes of that: of a role first its image's, then its own.
	Build(ctx context.Context, name string) ([]digest.Digest, error)
	// Log reads the output of a recipe's last build; with follow, until the build ends.
	Log(ctx context.Context, recipe digest.Digest, follow bool) (io.ReadCloser, error)
}

// A Server answers operators and agents. Store, Fleet and what an endpoint asks must be set; an endpoint whose
// controller is nil answers 501. The Server must not be copied once Handler was called.
type Server struct {
	Store *state.Store
	Fleet func() *schema.Fleet // in force, from memory; it returns nil before there is one
	Poke  func()               // looks at the repo soon; must not block
	// Look returns when a look at the repo has ended that began after the call, so that the source record tells of what
	// was pushed before it. It returns that look's error.
	Look    func(ctx context.Context) error
	Agents  Agents
	Planner Planner
	Images  Images
	LUNs    LUNs
	Deltas  Deltas
	// Artifacts are what the store has.
	Artifacts Artifacts

	// Planned is the hash of the commit that all assignments are those of, so that a fleet does not count as converged
	// between a commit's coming into force and its plan. nil: that moment is not told apart.
	Planned func() string
	// Boots are the newest boots of all machines, from memory. nil: all boots are read from the store each time.
	Boots func() []state.Boot

	// Started is since when the server hears of machines: none counts as lost for what it did not say before. Zero: since
	// Handler was called.
	Started time.Time

	Log *slog.Logger // nil: nothing is logged

	shared shared
	lists  *queue // of requests that read all records
}

// Bounds of one request.
const (
	maxBody     = 256 << 10 // bytes; a report of a machine with hundreds of disks has some 100 KB
	maxPlanBody = 64 << 20
	maxWait     = time.Minute      // for an assignment
	answerTime  = 30 * time.Second // for all that does not wait or stream
	bodyTime    = 30 * time.Second // for a client to send its whole body
	planTime    = 2 * time.Minute  // a revision may have to be fetched and evaluated
	lookTime    = 5 * time.Minute  // for one look at the repo, with what comes before it
	maxPlans    = 2                // at a time: each may take seconds of all processors, and as much memory as the fleet
	retryAfter  = 5 * time.Second  // what is said with 503
)

// Handler serves the API: /api/v1/, /node/v1/, /healthz and /metrics. Requests that a browser makes for a page of
// another origin and that would change something are refused.
func (s *Server) Handler() http.Handler {
	s.Log = quiet.New(s.Log)
	if s.Started.IsZero() {
		s.Started = time.Now()
	}
	if s.lists == nil {
		s.lists = newQueue()
	}
	mux := http.NewServeMux()
	for _, route := range s.routes() {
		mux.Handle(route.pattern, s.answer(route))
	}
	mux.Handle("/api/", s.answer(route{serve: unknown}))
	mux.Handle("/node/", s.answer(route{serve: unknown}))
	return s.logged(http.NewCrossOriginProtection().Handler(mux))
}

// A route is one endpoint. Its function writes the whole answer and returns nil, or returns an error.
type route struct {
	pattern string
	kind    routeKind
	serve   func(http.ResponseWriter, *http.Request) error
}

// A routeKind is how long a request may take, and of how many others it waits for the end.
type routeKind uint8

const (
	quick   routeKind = iota // within answerTime
	lists                    // as quick, but it reads all records: it waits for its turn
	streams                  // it lives as long as the client likes
)

func (s *Server) routes() []route {
	return []route{
		{"GET /api/v1/status", lists, s.getStatus},
		{"GET /api/v1/hosts", lists, s.getHosts},
		{"GET /api/v1/hosts/{host}", lists, s.getHost},
		{"POST /api/v1/hosts/{host}/reset", lists, s.resetHost},
		{"GET /api/v1/hosts/{host}/delta", quick, s.getDelta},
		{"POST /api/v1/hosts/{host}/delta/drop", quick, s.dropDelta},
		{"GET /api/v1/luns", lists, s.getLUNs},
		{"GET /api/v1/roles", lists, s.getRoles},
		{"GET /api/v1/images", lists, s.getImages},
		{"GET /api/v1/images/{image}", lists, s.getImage},
		{"POST /api/v1/images/{image}/build", quick, s.buildImage},
		{"GET /api/v1/builds/{recipe}/log", streams, s.getLog},
		{"GET /api/v1/releases", lists, s.getReleases},
		{"GET /api/v1/releases/{release}/sbom", lists, s.getSBOM},
		{"GET /api/v1/images/{image}/contents", lists, s.getContents},
		{"GET /api/v1/diff", streams, s.getDiff}, // within planTime
		{"GET /api/v1/artifacts/{artifact}", quick, s.getArtifact},
		{"POST /api/v1/artifacts/{artifact}/pull", streams, s.pullArtifact}, // within storeTime
		{"POST /api/v1/store/verify", streams, s.verifyStore},               // within storeTime
		{"POST /api/v1/store/collect", streams, s.collect},                  // within storeTime
		{"GET /api/v1/events", lists, s.getEvents},
		{"POST /api/v1/poke", streams, s.poke}, // within lookTime
		{"POST /api/v1/plan", streams, s.plan}, // within planTime
		{"GET /api/v1/watch", streams, s.watch},
		{"GET /api/v1/openapi.json", quick, s.getOpenAPI},
		{"POST /node/v1/hello", quick, s.hello},
		{"GET /node/v1/assignment", streams, s.assignment}, // waits for up to maxWait
		{"POST /node/v1/report", quick, s.report},
		{"POST /node/v1/delta", quick, s.takeDelta},
		{"GET /healthz", quick, s.healthz},
		{"GET /metrics", lists, s.metrics},
	}
}

// answer bounds a request in time and answers its error. The deadlines are the connection's, which serves other
// requests after this one, and not only ours: the one for writing is taken off again.
func (s *Server) answer(rt route) http.Handler {
	serve := rt.serve
	if rt.kind == lists {
		serve = s.queued(serve)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctl := http.NewResponseController(w) // not every writer has deadlines; those of a net.Conn do
		if r.ContentLength != 0 {
			// http.Server would read what is left of the body before it sends an answer. readJSON takes this off again.
			w.Header().Set("Connection", "close")
		}
		_ = ctl.SetReadDeadline(time.Now().Add(answerTime + slowClient))
		_ = ctl.SetWriteDeadline(time.Now().Add(2 * answerTime))
		defer func() {
			_ = ctl.Flush()
			_ = ctl.SetWriteDeadline(time.Time{})
			// Some of what nobody read of the body is read now. The next request gets a new deadline.
			_ = ctl.SetReadDeadline(time.Now().Add(slowClient))
		}()
		if rt.kind == streams {
			_ = ctl.SetReadDeadline(time.Time{}) // its end would end the request
			_ = ctl.SetWriteDeadline(time.Time{})
		} else {
			ctx, cancel := context.WithTimeout(r.Context(), answerTime)
			defer cancel()
			r = r.WithContext(ctx)
		}
		if err := serve(w, r); err != nil {
			s.fail(w, r, err)
		}
	})
}

// fail answers an error: with the status that it has, else as one of the server's own.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil && errors.Is(err, context.Canceled) {
		return // nobody is there any more
	}
	e := asError(err)
	if e.Status >= 500 {
		s.Log.Warn("a request was not answered", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if e.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.Itoa(int(retryAfter.Seconds())))
	}
	_ = writeJSON(w, e.Status, e)
}

// asError gives err its status.
func asError(err error) *Error {
	var own *Error
	var problems schema.Problems
	var invalid interface{ Invalid() bool }
	var unavailable interface{ Unavailable() bool }
	var conflict interface{ Conflict() bool }
	e := &Error{Status: http.StatusInternalServerError, Message: err.Error()}
	switch {
	case errors.As(err, &own):
		return own
	case errors.As(err, &problems):
		e.Status, e.Problems = http.StatusUnprocessableEntity, problems
	case errors.Is(err, state.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		e.Status = http.StatusNotFound
	case errors.As(err, &invalid) && invalid.Invalid():
		e.Status = http.StatusBadRequest
	case errors.As(err, &conflict) && conflict.Conflict():
		e.Status = http.StatusConflict
	case errors.As(err, &unavailable) && unavailable.Unavailable():
		e.Status = http.StatusServiceUnavailable
	case errors.Is(err, context.DeadlineExceeded):
		e.Status = http.StatusGatewayTimeout
	}
	return e
}

func badRequest(format string, args ...any) error {
	return &Error{Status: http.StatusBadRequest, Message: fmt.Sprintf(format, args...)}
}

func notFound(format string, args ...any) error {
	return &Error{Status: http.StatusNotFound, Message: fmt.Sprintf(format, args...)}
}

func notHere(what string) error {
	return &Error{Status: http.StatusNotImplemented, Message: "this server has no " + what}
}

func unknown(_ http.ResponseWriter, r *http.Request) error {
	return notFound("there is no %s %s", r.Method, r.URL.Path)
}

func writeJSON(w http.ResponseWriter, status int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encoding the answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	b = append(b, '\n')
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	out := &flusher{w: w, ctl: http.NewResponseController(w)}
	for part := range slices.Chunk(b, 256<<10) {
		if _, err := out.Write(part); err != nil {
			break // there is nobody to tell that the client is gone
		}
	}
	return nil
}

// readJSON reads a body of at most most bytes, which comes within bodyTime.
func readJSON(w http.ResponseWriter, r *http.Request, most int64, v any) error {
	ctl := http.NewResponseController(w)
	_ = ctl.SetReadDeadline(time.Now().Add(bodyTime))
	body := http.MaxBytesReader(w, r.Body, most)
	err := json.NewDecoder(body).Decode(v)
	if err == nil {
		_, err = io.Copy(io.Discard, body)
	}
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil:
		_ = ctl.SetReadDeadline(time.Time{}) // its end would end the request
		w.Header().Del("Connection")
	case errors.As(err, &tooLarge):
		return &Error{Status: http.StatusRequestEntityTooLarge, Message: fmt.Sprintf("the body has more than %d bytes", most)}
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &Error{Status: http.StatusRequestTimeout, Message: "the body did not come within " + bodyTime.String()}
	case err != nil:
		return badRequest("reading the body: %v", err)
	}
	return nil
}

// peer is the address that a request came from; the zero Addr where it is not known.
func peer(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{}
	}
	return ap.Addr().Unmap().WithZone("")
}

// logged notes each request at debug level.
func (s *Server) logged(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		sw := &statusWriter{ResponseWriter: w}
		next.ServeHTTP(sw, r)
		s.shared.count(sw.status)
		s.Log.Debug("request", "method", r.Method, "path", r.URL.Path, "status", sw.status, "took", time.Since(start),
			"from", r.RemoteAddr)
	})
}

// A statusWriter remembers the status.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

// Unwrap gives http.ResponseController the writer that can flush and has deadlines.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }
