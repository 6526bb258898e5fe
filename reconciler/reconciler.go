// Package reconciler makes machines be what a Git repo says: controllers that read records, compute, and write records
// of their own kind. Data moves one way, from the repo to the nodes; a controller never calls another; a wake-up carries
// no data, so whoever is woken lists its inputs afresh, and a process that is killed at any point goes on where the
// records stand.
//
//	controller  reads                          writes
//	follow      Git                            source, and the fleet in force (memory)
//	builds      fleet, bases, deltas, builds   builds, bases, deltas, and blobs
//	assign      fleet, bases, deltas           assignments, releases
//	artifacts   bases, deltas, releases        manifests in the store, and the registry
//	luns        assignments, nodes, sessions   luns, and the files of hosts' disks
//	views       all of these                   the view that machines are answered from (memory)
//	agents      what agents say                machines, nodes, boots
//	nodeDeltas  what operators ask for         orders
//	strangers   machines, nodes, the fleet     removes machines, nodes and boots of those that no host is
//	boots       what netboot's servers see     boots
package reconciler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"time"

	"golang.org/x/sync/errgroup"
	"oras.land/oras-go/v2"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/internal/signing"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/netboot/dhcp"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/source"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/schema"
)

// Config is what a Reconciler works with. Every field but Jobs and Log is needed.
type Config struct {
	Repo    *source.Repo
	Branch  string // and
	Path    string // that Repo follows, for people
	Loader  Loader
	Store   *state.Store
	Blobs   *store.Store
	Builder Builder
	// Registry takes what is built, and gives what is built there already; nil: there is none. Place is what it is called.
	Registry oras.Target
	Place    string
	Logs     string        // the directory of the builds' logs
	Key      *signing.Key  // signs what agents are told to run
	Agent    agentapi.Blob // the initramfs segment that holds the agent
	// Loaders are what machines start from their own disks; nil: none are at hand.
	Loaders *agentapi.Loaders
	Arch    string // the agent's, and so that of every image: "amd64", "arm64"
	Jobs    int    // builds at a time; 0 means 2
	LUNs    string // the directory of what hosts write to LUNs
	// ISCSIPort is where ServeISCSI listens; 0: there is no target.
	ISCSIPort uint16
	Log       *slog.Logger // nil means none
}

// A Reconciler is the controllers of one fleet.
type Reconciler struct {
	cfg       Config
	log       *slog.Logger
	events    *recorder
	views     *views
	boots     *boots
	follow    *follow
	builds    *builds
	artifacts *artifacts
	assign    *assign
	luns      *luns
	agents    *agents
	deltas    *nodeDeltas

	target *iscsi.Server

	operators *api.Server
	silences  *silences

	refresh chan struct{} // wakes the views controller for the fleet, which is no record
}

// New puts the controllers together; Run starts them.
func New(cfg Config) (*Reconciler, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Jobs == 0 {
		cfg.Jobs = 2
	}
	r := &Reconciler{cfg: cfg, log: cfg.Log, views: newViews(), refresh: make(chan struct{}, 1)}
	r.events = &recorder{store: cfg.Store, log: cfg.Log}
	r.boots = newBoots(cfg.Store, cfg.Log)
	r.agents = &agents{store: cfg.Store, views: r.views, boots: r.boots, events: r.events, now: time.Now, each: newStriped(), key: cfg.Key}
	r.deltas = newNodeDeltas(cfg.Store, r.events)
	r.agents.deltas = r.deltas
	r.boots.standing = r.views.standing
	r.agents.strangers = newStrangers(r.agents)
	r.follow = &follow{
		repo: cfg.Repo, branch: cfg.Branch, path: cfg.Path, loader: cfg.Loader, store: cfg.Store, events: r.events, log: cfg.Log, now: time.Now,
		changed: r.fleetChanged, wake: make(chan struct{}, 1), gap: lookGap,
	}
	r.artifacts = newArtifacts(cfg.Store, cfg.Blobs, cfg.Registry, cfg.Place, r.events, cfg.Log)
	r.builds = &builds{
		builder: cfg.Builder, arch: cfg.Arch, blobs: cfg.Blobs, damage: cfg.Blobs, artifacts: r.artifacts, store: cfg.Store, plan: r.plan, events: r.events, logs: logs{cfg.Logs}, log: cfg.Log, files: r.files,
		now: time.Now, limit: cfg.Jobs, wake: make(chan struct{}, 1), asks: make(chan ask), alone: make(chan func(context.Context)),
	}
	r.assign = &assign{
		store: cfg.Store, plan: r.plan, events: r.events, log: cfg.Log, now: time.Now, wake: make(chan struct{}, 1), again: assignAgain,
	}
	r.luns = newLUNs(cfg.Store, lunMedia{blobs: cfg.Blobs, dir: cfg.LUNs}, cfg.ISCSIPort, r.events, cfg.Log)
	r.luns.refresh, r.luns.observe = r.fleetViews, r.boots.observe
	r.agents.booting = func(host string) { r.luns.booting(host, nil) }
	r.operators = newAPI(r)
	r.silences = &silences{hosts: r.operators.Hosts, store: cfg.Store, events: r.events, every: listenEvery}
	var err error
	r.target, err = iscsi.NewServer(iscsi.Config{Directory: r.luns, Log: cfg.Log, Changed: r.luns.poke, InitiatorSessions: hostSessions})
	if err != nil {
		return nil, fmt.Errorf("making the iSCSI target: %w", err)
	}
	r.luns.target = r.target
	return r, nil
}

// Director tells netboot what a machine boots. Like all that netboot asks for here, it answers from memory.
func (r *Reconciler) Director() netboot.Director {
	return &director{views: r.views, boots: r.boots, booting: r.luns.booting, agent: r.cfg.Agent.Digest}
}

// Blobs gives netboot the store's bytes.
func (r *Reconciler) Blobs() netboot.Blobs { return bootBlobs{r.cfg.Blobs} }

// Observer hears how far machines come.
func (r *Reconciler) Observer() netboot.Observer { return observer{r.boots} }

// Addresses tells DHCP what the fleet says of addresses.
func (r *Reconciler) Addresses() dhcp.Addresses { return addresses{r.views} }

// Leases keeps what DHCP gave away.
func (r *Reconciler) Leases() dhcp.LeaseStore { return leases{r.cfg.Store} }

// Agents is what agents talk to.
func (r *Reconciler) Agents() api.Agents { return r.agents }

// Poke makes the reconciler look at the repo now.
func (r *Reconciler) Poke() { r.follow.poke() }

// Look makes the reconciler look at the repo, and returns when a look has ended that began after the call: then the
// source record tells of the newest commit.
func (r *Reconciler) Look(ctx context.Context) error { return r.follow.looks.after(ctx, r.follow.poke) }

// Fleet is the fleet in force; nil before the first good commit.
func (r *Reconciler) Fleet() *schema.Fleet {
	if cur := r.follow.fleet.Load(); cur != nil {
		return cur.fleet
	}
	return nil
}

func (r *Reconciler) fleetChanged() {
	r.builds.poke()
	poke(r.assign.wake)
	r.fleetViews()
}

// fleetViews has a new view made for what is no record.
func (r *Reconciler) fleetViews() { poke(r.refresh) }

func poke(wake chan struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}

// ServeISCSI serves the LUNs of hosts on l until ctx ends, which must be the context of Run. It closes l.
func (r *Reconciler) ServeISCSI(ctx context.Context, l net.Listener) error {
	if err := r.target.Serve(ctx, l); err != nil {
		return fmt.Errorf("serving iSCSI: %w", err)
	}
	<-r.luns.ended
	return r.luns.close()
}

// Run runs the controllers until ctx ends, and waits for them. A controller that fails or panics is started again; the
// others go on. It may be called once.
func (r *Reconciler) Run(ctx context.Context) error {
	defer close(r.luns.ended)
	if err := r.boots.load(ctx); err != nil {
		return fmt.Errorf("reading the machines' boots: %w", err)
	}
	g, ctx := errgroup.WithContext(ctx)
	for name, run := range map[string]func(context.Context) error{
		"views": r.runViews, "boots": r.boots.run, "assign": r.assign.run, "builds": r.builds.run, "follow": r.follow.run,
		"silences": r.silences.run, "strangers": r.agents.strangers.run, "luns": r.luns.run,
		"artifacts": r.artifacts.run, "push": r.artifacts.push, "collect": r.collectWhereLow,
	} {
		g.Go(func() error { return r.keep(ctx, name, run) })
	}
	return g.Wait()
}

// keep runs one controller again and again until ctx ends.
func (r *Reconciler) keep(ctx context.Context, name string, run func(context.Context) error) error {
	wait := backoff.Backoff{First: time.Second, Limit: time.Minute}
	for {
		began := time.Now()
		err := caught(ctx, run)
		if time.Since(began) > 10*time.Minute {
			wait.Reset() // that it failed long ago says nothing of now
		}
		if ctx.Err() != nil {
			return nil //nolint:nilerr // the controller ended because ctx did
		}
		r.log.Error("a controller ended and is started again", "controller", name, "error", err)
		if wait.Wait(ctx) != nil {
			return nil //nolint:nilerr // what the controller ended with is logged
		}
	}
}

// caught makes a panic of run an error with its stack.
func caught(ctx context.Context, run func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return run(ctx)
}

// errNoFleet says that there is nothing to compute with yet.
var errNoFleet = errors.New("no commit is in force yet")
