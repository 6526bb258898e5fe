// Package demo shows troupe at work in a lab: three blank machines boot into their roles, one is switched to another role by
// a commit and a push, and back by git revert. It finds out by itself whether all of that really happened.
package demo

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/troupe-dev/troupe/internal/qemu"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed"
)

// The fleet that the demo runs.
//
//go:embed first/*.cue
var first embed.FS

// Options are how to run the demo.
type Options struct {
	Dir    string // of the lab; "": one that is removed in the end
	Binary string // the troupe program; "": this one, see testbed.Config
	Page   string // address on the host for the web page; "" for none
	// Stay keeps the lab up after the last step, until the context ends.
	Stay bool
	// Timeout is how long all steps may take together, package downloads included; 0: half an hour.
	Timeout time.Duration
	Out     io.Writer
	Log     *slog.Logger // nil: discard
}

// hosts are the machines of the fleet, and what is known of them beforehand.
var hosts = []struct {
	name     string
	firmware testbed.Firmware
	address  netip.Addr
	role     string
}{
	{"n1", testbed.BIOS, netip.MustParseAddr("10.77.0.11"), "web"},
	{"n2", testbed.BIOS, netip.MustParseAddr("10.77.0.12"), "idle"},
	{"n3", testbed.UEFI, netip.MustParseAddr("10.77.0.13"), "web"},
}

// A demo is one run.
type demo struct {
	opts   Options
	print  *printer
	lab    *testbed.Lab
	client *api.Client
	work   testbed.Git

	boots    map[string]result // by host
	switches []result
	bootIDs  map[string]string // of the machines' first boots, by host
}

// Run runs the demo. What went wrong is its error; what there is to know about that was printed.
func Run(ctx context.Context, opts Options) (err error) {
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Minute
	}
	if opts.Dir == "" {
		if opts.Dir, err = os.MkdirTemp("", "troupe-demo-*"); err != nil {
			return err
		}
		// Nobody asked for what is in there; the part that is worth reading has been printed by then.
		defer func() { err = errors.Join(err, removeAll(opts.Dir)) }()
	}
	d := &demo{opts: opts, print: newPrinter(opts.Out), boots: map[string]result{}, bootIDs: map[string]string{}}
	if err := d.up(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.lab.Close()) }()
	if err := d.steps(ctx); err != nil {
		if ctx.Err() == nil { // else somebody pressed Ctrl-C, and knows
			d.print.raw(d.lab.Failure())
		}
		return err
	}
	d.print.table(d.boots, d.switches)
	if !opts.Stay {
		return nil
	}
	d.print.line("", "the lab stays up: the page is %s and the lab %s; Ctrl-C ends it", d.lab.Page(), opts.Dir)
	select {
	case <-ctx.Done():
		return nil
	case <-d.lab.Ended():
		return nil // by troupe lab down
	}
}

// up makes the repo and starts the lab.
func (d *demo) up(ctx context.Context) error {
	dir := d.opts.Dir
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	fleet, err := fs.Sub(first, "first")
	if err != nil {
		return err
	}
	from := filepath.Join(dir, "first")
	if err := os.CopyFS(from, fleet); err != nil {
		return fmt.Errorf("writing the first fleet: %w", err)
	}
	repo := filepath.Join(dir, "fleet.git")
	if d.work, err = testbed.MakeRepo(ctx, repo, filepath.Join(dir, "fleet"), from); err != nil {
		return err
	}
	d.print.line("", "repo %s has its first commit: n1 and n3 are web, n2 is idle", repo)
	cfg := testbed.Config{
		Dir: dir, Binary: d.opts.Binary, Page: d.opts.Page, Log: d.opts.Log,
		Router: netip.MustParsePrefix("10.77.0.1/24"), // as in first/fleet.cue
		Serve:  testbed.Serve{Args: testbed.ServeArgs(dir, repo, "main", ".")},
	}
	for i, h := range hosts {
		cfg.Nodes = append(cfg.Nodes, testbed.Node{
			Name: h.name, Firmware: h.firmware, MAC: fmt.Sprintf("52:54:00:77:00:%02x", i+1),
		})
	}
	if d.lab, err = testbed.Start(ctx, cfg); err != nil {
		return err
	}
	d.client = &api.Client{URL: d.lab.ServerURL(), HTTP: d.lab.HTTP()}
	d.print.line("", "lab %s: three machines, accelerator %s", dir, qemu.AccelText(d.lab.Accel()))
	return nil
}

// steps is what the demo shows, in its order.
func (d *demo) steps(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, d.opts.Timeout, fmt.Errorf("the demo took longer than %v", d.opts.Timeout))
	defer cancel()
	if err := d.lab.WaitServer(ctx); err != nil {
		return err
	}
	if page := d.lab.Page(); page != "" {
		d.print.line("", "troupe serve answers; its page is %s", page)
	}
	for _, step := range []struct {
		title string
		run   func(context.Context) error
	}{
		{"build the images", d.awaitImages},
		{"switch three blank machines on", d.bootAll},
		{"ask the machines themselves", d.askAll},
		{"n2 from idle to web: a commit and a push", d.switchOver},
		{"n2 back to idle: git revert and a push", d.revert},
		{"nobody else was touched", d.checkOthers},
	} {
		d.print.heading(step.title)
		if err := step.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
	}
	return nil
}

// removeAll removes a directory of our own, whether a lab got as far as being in it or not.
func removeAll(dir string) error {
	if testbed.Remove(dir) == nil {
		return nil
	}
	return os.RemoveAll(dir)
}
