package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/hosts/agent/netup"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
)

// runDir is where both lives of the agent meet: a tmpfs that is kept over switch_root and gone after a reboot.
const runDir = "/run/troupe"

// stateFile is what the first life leaves to the second one, and the second one to itself when it is restarted.
const stateFile = "state.json"

// RunState is what must outlive the agent's process, but not the boot.
type RunState struct {
	Server     string              `json:"server"`
	Identity   agentapi.Identity   `json:"identity"`
	BootID     string              `json:"bootID"`
	Kernel     digest.Digest       `json:"kernel,omitempty"`
	Inventory  agentapi.Inventory  `json:"inventory"`
	Assignment agentapi.Assignment `json:"assignment"` // the one that runs
	Keys       string              `json:"keys"`       // whose releases are run, as in releaseKeys
	Marks      []agentapi.Mark     `json:"marks,omitempty"`
	Marked     []agentapi.Stage    `json:"marked,omitempty"` // stages that were reached in this boot
	Lease      *netup.Lease        `json:"lease,omitempty"`
	CacheDir   string              `json:"cacheDir"`
	NodeDelta  string              `json:"nodeDelta"`
	Order      string              `json:"order,omitempty"` // to drop something, that the node delta was brought up to
	// Trial are the apps that are being tried in place of those of Assignment: a process that finds them goes back.
	Trial *[]agentapi.App `json:"trial,omitempty"`
	// Began is when the service came up, in nanoseconds since the kernel started: the deadline of its checks counts from then.
	Began time.Duration `json:"began,omitempty"`
	// Watchdog is the device that was armed, "" for none.
	Watchdog string `json:"watchdog,omitempty"`
}

// A stateKeeper writes the RunState whenever it changes.
type stateKeeper struct {
	path string
	mu   sync.Mutex
	s    RunState
}

func loadState(path string) (*stateKeeper, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("reading what the boot left: %w", err)
	}
	k := &stateKeeper{path: path}
	if err := json.Unmarshal(b, &k.s); err != nil {
		return nil, fmt.Errorf("reading what the boot left in %q: %w", path, err)
	}
	return k, nil
}

func (k *stateKeeper) get() RunState {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.s
}

// change is written before it returns.
func (k *stateKeeper) change(f func(*RunState)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	f(&k.s)
	return k.write()
}

func (k *stateKeeper) write() error {
	b, err := json.Marshal(k.s)
	if err != nil {
		return fmt.Errorf("writing the agent's state: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(k.path), 0o700); err != nil {
		return fmt.Errorf("writing the agent's state: %w", err)
	}
	return atomicfile.WriteFile(k.path, b, 0o600)
}
