package testbed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/qemu"
)

// ErrRunning is returned (wrapped) by Start for a directory whose lab runs already.
var ErrRunning = errors.New("a lab runs there already")

// Names below Config.Dir.
const (
	lockFile    = "lock"
	recordFile  = "lab.json"
	logFile     = "lab.log"
	controlSock = "control.sock"
	uplinkSock  = "uplink.sock"
	serveLog    = "serve.log"
	nodesDir    = "nodes"
)

// record is what a lab says of itself in recordFile, for its inner half and for Open.
type record struct {
	Outer  int          `json:"outer"` // process ID of the outer half
	Inner  int          `json:"inner"` // process ID of the inner half; 0 until it runs
	Netns  string       `json:"netns"` // its network namespace, as /proc/PID/ns/net has it
	User   bool         `json:"user"`  // it has a user namespace
	Router netip.Prefix `json:"router"`
	Nodes  []Node       `json:"nodes"`
	Binary string       `json:"binary"`
	Serve  Serve        `json:"serve"`
	Accel  string       `json:"accel"`
	Why    string       `json:"why"`  // of Accel
	Page   string       `json:"page"` // URL on the host; "" for none
}

// A Lab is the outer half of a lab, which keeps the inner one alive.
type Lab struct {
	*Client

	log     *slog.Logger
	lock    *os.File
	inner   *exec.Cmd
	life    *os.File      // its end ends the inner half
	ended   chan struct{} // closed when the inner half has
	doors   []io.Closer
	serving sync.WaitGroup
	once    sync.Once
	err     error // of Close
}

// Start makes the network and starts the server, if cfg has one. The machines are there, and off: see Client.Power. ctx
// bounds the start, not the lab: that ends with Close, and with the program that called Start.
func Start(ctx context.Context, cfg Config) (lab *Lab, err error) {
	if cfg, err = cfg.complete(); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	l := &Lab{log: cfg.Log, ended: make(chan struct{})}
	if l.lock, err = lockDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("lab in %q: %w", cfg.Dir, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("starting a lab in %q: %w", cfg.Dir, err), l.Close())
		}
	}()
	rec := record{
		Outer: os.Getpid(), User: os.Geteuid() != 0, Router: cfg.Router, Nodes: cfg.Nodes, Serve: cfg.Serve,
		Accel: cfg.Accel, Why: "as asked for", Binary: cfg.Binary,
	}
	if rec.Accel == "" {
		rec.Accel, rec.Why = qemu.ProbeAccel(ctx)
	}
	l.log.Info("accelerator", "is", rec.Accel, "why", rec.Why)
	if rec.Binary == "" {
		if rec.Binary, err = os.Executable(); err != nil {
			return nil, err
		}
	}
	l.Client = &Client{dir: cfg.Dir, rec: rec}
	if err := l.openUplink(ctx, cfg.Dir); err != nil {
		return nil, err
	}
	if err := l.startInner(ctx, &l.rec); err != nil {
		return nil, err
	}
	if cfg.Page != "" {
		if err := l.openPage(ctx, cfg.Page); err != nil {
			return nil, err
		}
	}
	return l, l.rec.write(cfg.Dir)
}

// lockDir makes dir and takes its lock, which lasts as long as the file stays open.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Join(dir, nodesDir), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	lk := wholeFile()
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &lk); err != nil {
		f.Close()
		if errors.Is(err, unix.EAGAIN) {
			return nil, ErrRunning
		}
		return nil, fmt.Errorf("locking: %w", err)
	}
	return f, nil
}

// wholeFile is a lock that belongs to an open file, not to a process, and that can be asked for without being taken (fcntl(2)).
func wholeFile() unix.Flock_t { return unix.Flock_t{Type: unix.F_WRLCK} }

// write replaces the record of the lab in dir.
func (r record) write(dir string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, recordFile)
	// No fsync: a lab does not outlive its host's crash.
	if err := os.WriteFile(path+".new", b, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func readRecord(dir string) (record, error) {
	var r record
	b, err := os.ReadFile(filepath.Join(dir, recordFile))
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("decoding %q: %w", filepath.Join(dir, recordFile), err)
	}
	return r, nil
}

// startInner starts the inner half and waits until its network is there and its socket answers.
func (l *Lab) startInner(ctx context.Context, rec *record) error {
	if err := rec.write(l.dir); err != nil { // for the inner half to read
		return err
	}
	out, err := os.OpenFile(filepath.Join(l.dir, logFile), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer out.Close()
	lifeR, life, err := os.Pipe()
	if err != nil {
		return err
	}
	defer lifeR.Close()
	l.life = life
	ready, readyW, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()

	cmd := insideCommand(rec.Binary, l.dir, rec.User)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.ExtraFiles = []*os.File{lifeR, readyW} // descriptors 3 and 4
	err = cmd.Start()
	readyW.Close()
	if err != nil {
		return fmt.Errorf("making namespaces: %w", err)
	}
	l.inner, rec.Inner = cmd, cmd.Process.Pid
	if rec.Netns, err = netnsOf(rec.Inner); err != nil {
		l.log.Warn("the network namespace has no name", "err", err)
	}
	go func() {
		defer close(l.ended)
		_ = cmd.Wait() // how it ended stands in its log
	}()
	if rec.User {
		if err := mapIDs(ctx, cmd.Process.Pid); err != nil {
			return err
		}
	}
	if _, err := life.Write([]byte{'\n'}); err != nil { // go on: the identities are there
		return fmt.Errorf("waking the inner half: %w", err)
	}
	return l.awaitReady(ctx, ready)
}

// awaitReady reads what the inner half says of its start: "ok", or what went wrong.
func (l *Lab) awaitReady(ctx context.Context, ready *os.File) error {
	stop := context.AfterFunc(ctx, func() { ready.Close() })
	defer stop()
	said, err := io.ReadAll(io.LimitReader(ready, 64<<10))
	switch text := strings.TrimSpace(string(said)); {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("waiting for the inner half: %w", err)
	case text == "":
		tail, _ := tailFile(filepath.Join(l.dir, logFile), 20)
		return fmt.Errorf("the inner half ended before it was ready; its last words:\n%s", tail)
	case text != readyWord:
		return errors.New(text)
	}
	return nil
}

// openUplink serves the proxy that the inner half reaches by a socket.
func (l *Lab) openUplink(ctx context.Context, dir string) error {
	sock, err := listenUnix(ctx, filepath.Join(dir, uplinkSock))
	if err != nil {
		return err
	}
	up := newUplink(l.log)
	l.doors = append(l.doors, up)
	l.serving.Go(func() { up.serve(sock) })
	return nil
}

// openPage relays connections to addr on the host to the server's page.
func (l *Lab) openPage(ctx context.Context, addr string) error {
	var lc net.ListenConfig
	listener, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("page: %w", err)
	}
	door := &relay{listener: listener, log: l.log, dial: func(ctx context.Context) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		return l.Dial(ctx, "tcp", l.server())
	}}
	l.doors = append(l.doors, door)
	l.rec.Page = "http://" + listener.Addr().String() + "/"
	l.serving.Go(door.serve)
	return nil
}

// Ended is closed when the inner half has ended, by Close, by Client.Down or by itself.
func (l *Lab) Ended() <-chan struct{} { return l.ended }

// Close ends everything that runs in the lab, waits for it, and leaves the files: see Remove. It may be called again.
func (l *Lab) Close() error {
	l.once.Do(func() { l.err = l.close() })
	return l.err
}

func (l *Lab) close() error {
	var errs []error
	if l.inner != nil {
		// Ask first, so that machines and server end in their own way; the namespace is ended in any case.
		ctx, cancel := context.WithTimeout(context.Background(), 15*time.Second)
		if err := l.stopInner(ctx); err != nil {
			l.log.Warn("the lab did not stop when asked to", "err", err)
		}
		cancel()
		l.life.Close()
		_ = l.inner.Process.Kill() // an error says that it has ended
		<-l.ended
		errs = append(errs, endStragglers(l.rec))
	} else if l.life != nil {
		l.life.Close()
	}
	for _, d := range l.doors {
		errs = append(errs, d.Close())
	}
	l.serving.Wait()
	for _, name := range []string{controlSock, recordFile} {
		if err := os.Remove(filepath.Join(l.lockPath(), name)); err != nil && !os.IsNotExist(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, l.lock.Close())...)
}

func (l *Lab) lockPath() string { return filepath.Dir(l.lock.Name()) }

func (l *Lab) stopInner(ctx context.Context) error {
	select {
	case <-l.ended:
		return nil
	default:
	}
	if err := l.post(ctx, "/down", nil); err != nil {
		return err
	}
	select {
	case <-l.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
