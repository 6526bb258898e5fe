package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNoLab is returned (wrapped) by Open where no lab runs.
var ErrNoLab = errors.New("no lab runs there")

// ServePort is the TCP port of the router at which the lab expects the server's page and API.
const ServePort = 8080

// A PowerAction is what Client.Power does to a machine.
type PowerAction string

// The actions of a power button.
const (
	On    PowerAction = "on"    // nothing happens to a machine that is on
	Off   PowerAction = "off"   // at once, as by pulling the plug; its disk stays
	Reset PowerAction = "reset" // of a machine that is on
	Cycle PowerAction = "cycle" // off and on
)

// Status is how a lab is.
type Status struct {
	Router netip.Prefix `json:"router"`
	Accel  string       `json:"accel"`          // "kvm" or "tcg"
	Why    string       `json:"accelReason"`    // what stands before a colon says it in brief
	Page   string       `json:"page,omitempty"` // on the host
	Serve  ServeStatus  `json:"serve"`
	Nodes  []NodeStatus `json:"nodes"`
}

// ServeStatus is how the lab's server is.
type ServeStatus struct {
	Running bool      `json:"running"`
	PID     int       `json:"pid,omitempty"` // as the host has it; 0: it does not run, or cannot be found
	Since   time.Time `json:"since,omitzero"`
	Ended   string    `json:"ended,omitempty"` // how the last one did, e.g. "exit status 1"
}

// NodeStatus is how a machine is.
type NodeStatus struct {
	Node
	On     bool      `json:"on"`
	Since  time.Time `json:"since,omitzero"` // when it was last switched on or off, or went off by itself
	Link   bool      `json:"link"`           // its network cable is plugged in
	Resets int       `json:"resets"`         // since it was switched on, its own reboots included; several within 2 s are one
	// Console is the size of its console output, in bytes, and Booted where in it the output since it was last switched
	// on begins.
	Console int64 `json:"console"`
	Booted  int64 `json:"booted"`
	// Silent: it has been on for a while (SilentAfter) and its console said nothing.
	Silent bool   `json:"silent,omitempty"`
	Error  string `json:"error,omitempty"` // why QEMU ended, if it did so by itself and not well
}

// SilentAfter is how long a machine may be on before its first byte of console output without being called silent.
// Both firmwares print something within two seconds, on a slow machine without KVM.
const SilentAfter = 30 * time.Second

// A Client works on a lab that runs, from any process of the same user.
type Client struct {
	dir string
	rec record
}

// Open finds the lab that runs in dir.
func Open(dir string) (*Client, error) {
	running, err := runs(dir)
	if err != nil {
		return nil, fmt.Errorf("lab %q: %w", dir, err)
	}
	if !running {
		return nil, fmt.Errorf("lab %q: %w", dir, ErrNoLab)
	}
	rec, err := readRecord(dir)
	if err != nil {
		return nil, fmt.Errorf("lab %q: %w", dir, err)
	}
	return &Client{dir: dir, rec: rec}, nil
}

// runs says whether a lab holds the lock of dir.
func runs(dir string) (bool, error) {
	f, err := os.Open(filepath.Join(dir, lockFile))
	if os.IsNotExist(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	lk := wholeFile()
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lk); err != nil {
		return false, err
	}
	return lk.Type != unix.F_UNLCK, nil
}

// Dir is the lab's directory.
func (c *Client) Dir() string { return c.dir }

// Page is where the server's web page can be opened on the host; "" for nowhere.
func (c *Client) Page() string { return c.rec.Page }

// Accel is "kvm" or "tcg", and why that was chosen.
func (c *Client) Accel() (accel, why string) { return c.rec.Accel, c.rec.Why }

// ServerURL is where the server answers inside the lab.
func (c *Client) ServerURL() string { return "http://" + c.server() }

func (c *Client) server() string {
	return netip.AddrPortFrom(c.rec.Router.Addr(), ServePort).String()
}

// Status asks how the lab is.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	if err := c.request(ctx, http.MethodGet, "/status", nil, &s); err != nil {
		return s, err
	}
	s.Router, s.Accel, s.Why, s.Page = c.rec.Router, c.rec.Accel, c.rec.Why, c.rec.Page
	if s.Serve.Running {
		s.Serve.PID = hostPID(c.rec.Inner, s.Serve.PID)
	}
	return s, nil
}

// Power presses a machine's button and returns when that was done.
func (c *Client) Power(ctx context.Context, node string, action PowerAction) error {
	return c.post(ctx, "/nodes/"+url.PathEscape(node)+"/power", map[string]PowerAction{"action": action})
}

// Link plugs a machine's network cable in or pulls it out. It stays so when the machine is switched off and on.
func (c *Client) Link(ctx context.Context, node string, up bool) error {
	return c.post(ctx, "/nodes/"+url.PathEscape(node)+"/link", map[string]bool{"up": up})
}

// ServeStart starts the server if it does not run, with Config.Serve.Args, or from now on with args if there are some.
func (c *Client) ServeStart(ctx context.Context, args ...string) error {
	return c.post(ctx, "/serve/start", map[string][]string{"args": args})
}

// ServeStop ends the server with SIGTERM and waits until it has ended; after half a minute it is killed.
func (c *Client) ServeStop(ctx context.Context) error { return c.post(ctx, "/serve/stop", nil) }

// ServeKill kills the server as kill -9 does, and waits until it is dead. What it had started itself goes on.
func (c *Client) ServeKill(ctx context.Context) error { return c.post(ctx, "/serve/kill", nil) }

// Dial connects to an address as it is inside the lab, e.g. "10.77.0.11:80". The network is "tcp".
func (c *Client) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	if network != "tcp" {
		return nil, fmt.Errorf("dialing %s in the lab: network %q, want tcp", addr, network)
	}
	conn, err := dialUnix(ctx, filepath.Join(c.dir, controlSock))
	if err != nil {
		return nil, err
	}
	return connect(ctx, conn, addr, nil)
}

// HTTP is a client for servers inside the lab. It keeps no connections between requests.
func (c *Client) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: c.Dial, DisableKeepAlives: true}}
}

// Command is a command that will run in the lab's network, with the host's files and processes, as the user that started the lab. There,
// TROUPE_SERVER names the server.
func (c *Client) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", c.enter(append([]string{name}, args...))...)
	cmd.Env = append(os.Environ(), c.Env()...)
	// It is not in the lab's process namespace: where this program dies without a word, it shall not hold the network.
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	return cmd
}

// Enter replaces this program with a command that runs in the lab's network. It returns only if it could not.
func (c *Client) Enter(command []string) error {
	tool, err := exec.LookPath("nsenter")
	if err != nil {
		return fmt.Errorf("entering the lab (Debian package util-linux): %w", err)
	}
	// nsenter would say that only after it entered, with a status that could be the command's.
	if _, err := exec.LookPath(command[0]); err != nil {
		return err
	}
	argv := append([]string{"nsenter"}, c.enter(command)...)
	return unix.Exec(tool, argv, append(os.Environ(), c.Env()...))
}

// Env is what is added to the environment of a command in the lab.
func (c *Client) Env() []string { return []string{"TROUPE_SERVER=" + c.ServerURL()} }

// enter are nsenter's arguments. (A Go program cannot enter a user namespace by itself: setns(2) wants a single thread.)
func (c *Client) enter(command []string) []string {
	args := []string{"--target", strconv.Itoa(c.rec.Inner), "--net"}
	if c.rec.User {
		args = append(args, "--user", "--preserve-credentials")
	}
	return append(append(args, "--"), command...)
}

// Run runs a command in the lab's network and returns what it printed; the error has the end of that as well.
func (c *Client) Run(ctx context.Context, name string, args ...string) (string, error) {
	out, err := c.Command(ctx, name, args...).CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("in the lab: %s: %w:\n%s", name, err, lastLines(out, 20))
	}
	return string(out), nil
}

// Down ends the lab, wherever its outer half runs, and returns when all of it has ended. The files stay: see Remove.
func (c *Client) Down(ctx context.Context) error {
	err := c.post(ctx, "/down", nil)
	if err != nil {
		// The inner half is beyond asking; the outer one ends it.
		if kill := unix.Kill(c.rec.Outer, unix.SIGTERM); kill != nil {
			return errors.Join(err, fmt.Errorf("ending process %d: %w", c.rec.Outer, kill))
		}
	}
	// The lock tells nobody when it is let go: look for that.
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if running, err := runs(c.dir); !running {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the lab in %q to end: %w", c.dir, context.Cause(ctx))
		}
	}
}

func (c *Client) post(ctx context.Context, path string, body any) error {
	return c.request(ctx, http.MethodPost, path, body, nil)
}

// request asks the inner half, and decodes its answer into result unless that is nil.
func (c *Client) request(ctx context.Context, method, path string, body, result any) error {
	b, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://lab"+path, bytes.NewReader(b))
	if err != nil {
		return err
	}
	control := http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return dialUnix(ctx, filepath.Join(c.dir, controlSock))
	}}
	resp, err := control.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("asking the lab: %w", err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, 16<<20))
	if err != nil {
		return fmt.Errorf("asking the lab: %s: %w", path, err)
	}
	if resp.StatusCode != http.StatusOK {
		return errors.New(string(bytes.TrimSpace(answer)))
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(answer, result)
}
