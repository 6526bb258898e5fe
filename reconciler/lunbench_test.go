package reconciler

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// lunBenchHosts is how many hosts BenchmarkLUNs has, none of which has a disk of its own.
const lunBenchHosts = 1000

// A lunBench is the controller of their LUNs, with the one of views beside it.
type lunBench struct {
	b           *testing.B
	store       *state.Store
	blobs       *store.Store
	dir         string
	base, delta images.Blob
	rec         *Reconciler
	target      *testTarget
}

func newLUNBench(b *testing.B) *lunBench {
	b.Helper()
	r := newLUNRig(b)
	f := &lunBench{b: b, store: r.store, blobs: r.blobs, dir: filepath.Join(b.TempDir(), "luns"), base: r.base, delta: r.delta}
	g, ctx := errgroup.WithContext(b.Context())
	g.SetLimit(64)
	for i := range lunBenchHosts {
		g.Go(func() error { return f.write(ctx, fmt.Sprintf("n%04d", i)) })
	}
	if err := g.Wait(); err != nil {
		b.Fatal(err)
	}
	return f
}

// write writes the records of a host that are there before its LUNs are: as big as those of a real one.
func (f *lunBench) write(ctx context.Context, host string) error {
	a := state.Assignment{Host: host, ISCSI: &state.ISCSI{Size: 1 << 20}, Spec: agentapi.Assignment{
		State: agentapi.Assigned, Host: host, Release: &agentapi.Release{Base: agentapi.Image{Blob: agentapi.Blob(f.base)}, Delta: agentapi.Image{Blob: agentapi.Blob(f.delta)}},
		Node: agentapi.Node{Files: map[string]agentapi.File{"/etc/service.conf": {Mode: 0o644, Content: strings.Repeat("a line of a file\n", 128)}}},
	}}
	if err := state.Assignments.Put(ctx, f.store, host, a); err != nil {
		return err
	}
	mac := "52:54:00:00:" + host[1:3] + ":" + host[3:]
	return state.Nodes.Put(ctx, f.store, mac, state.Node{
		MAC: mac, BootID: "20261123T120000-abcdef", LastSeen: time.Now().Add(time.Hour), Stage: string(agentapi.StageHealthy), Kernel: f.base.Digest,
		Running: &agentapi.Running{Host: host, Base: f.base.Digest, Delta: f.delta.Digest, Health: agentapi.Health{Healthy: true}},
		Cached:  []digest.Digest{f.base.Digest, f.delta.Digest},
	})
}

// begin makes the controllers anew, as a server that starts does.
func (f *lunBench) begin() {
	f.b.Helper()
	var err error
	f.rec, err = New(Config{Store: f.store, Blobs: f.blobs, LUNs: f.dir, ISCSIPort: 3260, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.b.Fatal(err)
	}
	f.target = &testTarget{has: map[string]string{}}
	f.rec.luns.target = f.target
}

// serve runs the controllers until all hosts may boot.
func (f *lunBench) serve() {
	f.b.Helper()
	ctx, cancel := context.WithCancel(f.b.Context())
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return f.rec.luns.run(ctx) })
	g.Go(func() error { return f.rec.runViews(ctx) })
	for ready := 0; ready < lunBenchHosts; {
		v, changed := f.rec.views.get()
		ready = 0
		for host, a := range v.assignments {
			if at, _ := v.luns.iscsi(host, a); at != nil {
				ready++
			}
		}
		if ready < lunBenchHosts {
			<-changed
		}
	}
	f.b.StopTimer()
	cancel()
	if err := g.Wait(); err != nil {
		f.b.Error(err)
	}
}

// login has a session of each host be open, and that be on record.
func (f *lunBench) login() {
	f.b.Helper()
	for i := range lunBenchHosts {
		host := fmt.Sprintf("n%04d", i)
		f.target.sessions = append(f.target.sessions, iscsi.SessionInfo{Initiator: initiatorName(host), Target: targetName(host), Since: time.Now()})
	}
	for range 2 { // the first writes
		if _, err := f.rec.luns.step(f.b.Context()); err != nil {
			f.b.Fatal(err)
		}
	}
}

func (f *lunBench) close() {
	f.b.Helper()
	if err := f.rec.luns.close(); err != nil {
		f.b.Error(err)
	}
}

// BenchmarkLUNs measures how long a server takes to have the LUNs of all hosts open that never had any, and again after a
// restart; and a look at hosts that all run what they should, which each login and logout has.
func BenchmarkLUNs(b *testing.B) {
	b.Run(fmt.Sprint("first/", lunBenchHosts), func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			f := newLUNBench(b)
			f.begin()
			b.StartTimer()
			f.serve()
			f.close()
			b.StartTimer()
		}
	})
	b.Run(fmt.Sprint("restart/", lunBenchHosts), func(b *testing.B) {
		f := newLUNBench(b)
		f.begin()
		f.serve()
		f.login()
		f.close()
		b.StartTimer()
		for b.Loop() {
			b.StopTimer()
			f.begin()
			b.StartTimer()
			f.serve()
			f.close()
			b.StartTimer()
		}
	})
	b.Run(fmt.Sprint("look/", lunBenchHosts), func(b *testing.B) {
		f := newLUNBench(b)
		f.begin()
		f.serve()
		f.login()
		b.StartTimer()
		for b.Loop() {
			if _, err := f.rec.luns.step(b.Context()); err != nil {
				b.Fatal(err)
			}
		}
		b.StopTimer()
		f.close()
	})
}
