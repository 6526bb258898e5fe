package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/testbed"
)

// A result is one line of the table at the end.
type result struct {
	what  string
	took  time.Duration
	bytes int64 // of images that were fetched for it
}

// awaitImages waits until there is a release for every host. A build that failed for good ends the demo: it says why.
func (d *demo) awaitImages(ctx context.Context) error {
	var failed error
	err := d.client.Follow(ctx, func(s *api.Snapshot) bool {
		ready := len(s.Hosts) > 0
		for _, h := range s.Hosts {
			ready = ready && h.Target != ""
		}
		for _, img := range s.Images {
			d.print.image(img)
			if img.Phase == state.BuildFailed {
				failed = fmt.Errorf("building %s %s: %s: %s\n%s", img.Kind, img.Name, img.Step, img.Error, strings.Join(img.Tail, "\n"))
			}
		}
		if len(s.Status.Problems) > 0 {
			failed = fmt.Errorf("the fleet is refused: %s", s.Status.Problems[0])
		}
		return ready || failed != nil
	})
	return errors.Join(failed, waitError(err))
}

// bootAll switches all machines on and waits until each is healthy in its role.
func (d *demo) bootAll(ctx context.Context) error {
	on := map[string]time.Time{}
	for _, h := range hosts {
		on[h.name] = time.Now()
		if err := d.lab.Power(ctx, h.name, testbed.On); err != nil {
			return err
		}
	}
	return d.follow(ctx, func(s *api.Snapshot) (bool, error) {
		for _, h := range hosts {
			if _, done := d.boots[h.name]; done || !plays(s, h.name, h.role) {
				continue
			}
			took := time.Since(on[h.name])
			boot, err := d.lastBoot(ctx, h.name)
			if err != nil {
				return false, err
			}
			bytes, err := d.fetchedSince(ctx, h.name, on[h.name])
			if err != nil {
				return false, err
			}
			d.bootIDs[h.name] = boot.ID
			what := fmt.Sprintf("%s (%s): power on to healthy as %s", h.name, h.firmware, h.role)
			d.boots[h.name] = result{what: what, took: took, bytes: bytes}
			d.print.line(h.name, "healthy as %s after %s", h.role, seconds(took))
		}
		return len(d.boots) == len(hosts), nil
	})
}

// askAll has the web machines answer for themselves.
func (d *demo) askAll(ctx context.Context) error {
	for _, h := range hosts {
		if h.role != "web" {
			continue
		}
		if err := d.ask(ctx, h.name, h.address); err != nil {
			return err
		}
	}
	return nil
}

// switchOver makes n2 a web server.
func (d *demo) switchOver(ctx context.Context) error {
	path := filepath.Join(d.work.Dir, "hosts.cue")
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	changed := strings.Replace(string(b), `role: "idle"`, `role: "web"`, 1)
	if changed == string(b) {
		return fmt.Errorf("%q has no host in role idle", path)
	}
	if err := os.WriteFile(path, []byte(changed), 0o644); err != nil {
		return err
	}
	start := time.Now()
	if err := d.work.Commit(ctx, "n2: from idle to web"); err != nil {
		return err
	}
	if err := d.awaitSwitch(ctx, "web", "push to healthy: n2 from idle to web", start); err != nil {
		return err
	}
	return d.ask(ctx, "n2", hosts[1].address)
}

// revert undoes switchOver with Git alone. n2 has the old release in its cache.
func (d *demo) revert(ctx context.Context) error {
	start := time.Now()
	for _, args := range [][]string{{"revert", "--no-edit", "HEAD"}, {"push", "--quiet", "origin", "HEAD"}} {
		if _, err := d.work.Run(ctx, args...); err != nil {
			return err
		}
	}
	if err := d.awaitSwitch(ctx, "idle", "push to healthy: n2 back to idle (revert)", start); err != nil {
		return err
	}
	if n := d.switches[len(d.switches)-1].bytes; n != 0 {
		return fmt.Errorf("the revert fetched %d bytes of images that were in the cache", n)
	}
	dial, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	addr := netip.AddrPortFrom(hosts[1].address, 80).String()
	if c, err := d.lab.Dial(dial, "tcp", addr); err == nil {
		c.Close()
		return fmt.Errorf("n2 is idle, and still answers at %s", addr)
	}
	d.print.line("n2", "does not answer on port 80 any more")
	return nil
}

// awaitSwitch waits until n2 is healthy in a role that was just pushed.
func (d *demo) awaitSwitch(ctx context.Context, role, what string, start time.Time) error {
	commit, err := d.work.Run(ctx, "rev-parse", "HEAD")
	if err != nil {
		return err
	}
	d.print.line("", "pushed %.10s", commit)
	err = d.follow(ctx, func(s *api.Snapshot) (bool, error) {
		at := s.Status.Applied
		return at != nil && at.Hash == commit && plays(s, "n2", role), nil
	})
	if err != nil {
		return err
	}
	took := time.Since(start)
	bytes, err := d.fetchedSince(ctx, "n2", start)
	if err != nil {
		return err
	}
	d.switches = append(d.switches, result{what: what, took: took, bytes: bytes})
	d.print.line("n2", "healthy as %s after %s", role, seconds(took))
	return nil
}

// checkOthers makes sure that a change to one host reached that one only.
func (d *demo) checkOthers(ctx context.Context) error {
	for _, h := range hosts {
		boot, err := d.lastBoot(ctx, h.name)
		switch {
		case err != nil:
			return err
		case h.name == "n2":
		case boot.ID != d.bootIDs[h.name]:
			return fmt.Errorf("%s booted again, though no commit changed it", h.name)
		default:
			d.print.line(h.name, "still runs its first boot")
		}
	}
	return nil
}

// follow prints what happens until done says so. The error of done ends it as well.
func (d *demo) follow(ctx context.Context, done func(*api.Snapshot) (bool, error)) error {
	var failed error
	err := d.client.Follow(ctx, func(s *api.Snapshot) bool {
		for _, img := range s.Images {
			d.print.image(img)
		}
		for _, h := range hosts {
			if failed = d.printHost(ctx, s, h.name); failed != nil {
				return true
			}
		}
		var ok bool
		ok, failed = done(s)
		return ok || failed != nil
	})
	return errors.Join(failed, waitError(err))
}

// printHost prints the stages that a host reached since it was last asked for. Only a host that changed is asked for.
func (d *demo) printHost(ctx context.Context, s *api.Snapshot, name string) error {
	h, ok := s.Host(name)
	if !ok || !d.print.changed(h) {
		return nil
	}
	detail, err := d.client.Host(ctx, name)
	if err != nil {
		return err
	}
	for _, b := range detail.Boots {
		for _, m := range b.Marks {
			d.print.mark(name, b.ID, m)
		}
	}
	d.print.state(h)
	return nil
}

// plays says whether a host runs, healthily, the newest release of a role that it shall play.
func plays(s *api.Snapshot, name, role string) bool {
	h, ok := s.Host(name)
	return ok && h.State == api.HostHealthy && h.Role == role && h.RunningRole == role && h.Running == h.Target
}

// fetchedSince counts the image bytes that a host fetched, in whichever boot: what a switch needs is fetched in the boot
// before it. The server's clock is ours.
func (d *demo) fetchedSince(ctx context.Context, name string, start time.Time) (int64, error) {
	h, err := d.client.Host(ctx, name)
	if err != nil {
		return 0, err
	}
	var n int64
	for _, b := range h.Boots {
		for _, m := range b.Marks {
			if m.Time.After(start) {
				n += m.Bytes
			}
		}
	}
	return n, nil
}

func (d *demo) lastBoot(ctx context.Context, name string) (api.Boot, error) {
	h, err := d.client.Host(ctx, name)
	if err != nil {
		return api.Boot{}, err
	}
	if len(h.Boots) == 0 {
		return api.Boot{}, fmt.Errorf("%s has no boot on record", name)
	}
	return h.Boots[0], nil
}

// ask gets a machine's own page, and wants it to be that machine's.
func (d *demo) ask(ctx context.Context, name string, addr netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr.String()+"/", nil)
	if err != nil {
		return err
	}
	resp, err := d.lab.HTTP().Do(req)
	if err != nil {
		return fmt.Errorf("asking %s: %w", name, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	if err != nil {
		return fmt.Errorf("asking %s: %w", name, err)
	}
	want := fmt.Sprintf("web on %s at %s\n", name, addr)
	if string(b) != want {
		return fmt.Errorf("%s answers %q (%s), want %q", name, b, resp.Status, want)
	}
	d.print.line(name, "http://%s/ answers %q", addr, strings.TrimSpace(want))
	return nil
}

// waitError says what was waited for in vain.
func waitError(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("following the server: %w", err)
}
