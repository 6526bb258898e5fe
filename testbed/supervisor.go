package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// serveGrace is how long the server may take to end after SIGTERM.
const serveGrace = 30 * time.Second

// A supervisor is the working process of the inner half.
type supervisor struct {
	dir      string
	rec      record
	log      *slog.Logger
	machines []*machine
	server   *server

	control  http.Server
	uplink   *relay
	tunnels  connSet
	serving  sync.WaitGroup
	down     chan struct{} // closed when somebody asked for the end
	downOnce sync.Once
}

func newSupervisor(dir string, log *slog.Logger) (*supervisor, error) {
	rec, err := readRecord(dir)
	if err != nil {
		return nil, err
	}
	s := &supervisor{dir: dir, rec: rec, log: log, down: make(chan struct{})}
	s.control.ReadHeaderTimeout = time.Minute
	s.server = newServer(filepath.Join(dir, serveLog), rec, log)
	for i, n := range rec.Nodes {
		m, err := newMachine(n, filepath.Join(dir, nodesDir, n.Name), tapName(i), rec.Accel, (&Client{rec: rec}).ServerURL(), log)
		if err != nil {
			return nil, fmt.Errorf("node %q: %w", n.Name, err)
		}
		s.machines = append(s.machines, m)
	}
	return s, nil
}

// tapName is short, as the names of interfaces must be; that of a node may not be.
func tapName(i int) string { return fmt.Sprintf("tap%d", i) }

func (s *supervisor) taps() []string {
	names := make([]string, len(s.machines))
	for i := range names {
		names[i] = tapName(i)
	}
	return names
}

// handler answers the Client.
func (s *supervisor) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, s.status())
	})
	mux.HandleFunc("POST /nodes/{node}/power", s.node(func(ctx context.Context, m *machine, body io.Reader) error {
		var ask struct{ Action PowerAction }
		if err := decode(body, &ask); err != nil {
			return err
		}
		return m.power(ctx, ask.Action)
	}))
	mux.HandleFunc("POST /nodes/{node}/link", s.node(func(ctx context.Context, m *machine, body io.Reader) error {
		var ask struct{ Up bool }
		if err := decode(body, &ask); err != nil {
			return err
		}
		return m.setLink(ctx, ask.Up)
	}))
	mux.HandleFunc("POST /serve/start", func(w http.ResponseWriter, r *http.Request) {
		var ask struct{ Args []string }
		err := decode(r.Body, &ask)
		if err == nil {
			err = s.server.start(ask.Args)
		}
		result(w, err)
	})
	mux.HandleFunc("POST /serve/stop", func(w http.ResponseWriter, _ *http.Request) {
		result(w, s.server.stop(unix.SIGTERM, serveGrace))
	})
	mux.HandleFunc("POST /serve/kill", func(w http.ResponseWriter, _ *http.Request) {
		result(w, s.server.stop(unix.SIGKILL, serveGrace))
	})
	mux.HandleFunc("POST /down", func(w http.ResponseWriter, _ *http.Request) {
		result(w, nil)
		s.downOnce.Do(func() { close(s.down) })
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodConnect {
			s.tunnel(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// tunnel lets the outer half connect to an address inside.
func (s *supervisor) tunnel(w http.ResponseWriter, r *http.Request) {
	var d net.Dialer
	far, err := d.DialContext(r.Context(), "tcp", r.Host)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	near, err := accept(w)
	if err != nil {
		far.Close()
		s.log.Warn("tunnel", "to", r.Host, "err", err)
		return
	}
	s.tunnels.splice(near, far)
}

func (s *supervisor) status() Status {
	st := Status{Serve: s.server.status(), Nodes: make([]NodeStatus, len(s.machines))}
	for i, m := range s.machines {
		st.Nodes[i] = m.status(time.Now())
	}
	return st
}

// node finds the machine that a request is about.
func (s *supervisor) node(do func(context.Context, *machine, io.Reader) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("node")
		for _, m := range s.machines {
			if m.spec.Name == name {
				// A button that was pressed is pressed: whoever did it may have gone since.
				result(w, do(context.WithoutCancel(r.Context()), m, r.Body))
				return
			}
		}
		result(w, fmt.Errorf("the lab has no node %q", name))
	}
}

func decode(body io.Reader, v any) error {
	if err := json.NewDecoder(io.LimitReader(body, 1<<20)).Decode(v); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("decoding the request: %w", err)
	}
	return nil
}

func answer(w http.ResponseWriter, v any) {
	b, err := json.Marshal(v)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(b) // the asker may be gone
}

func result(w http.ResponseWriter, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	answer(w, struct{}{})
}
