package agent

import (
	"log/slog"
	"os"
	"testing"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

// ordered is an assignment with an order to drop something.
func ordered(id string, reboot bool, paths ...string) agentapi.Assignment {
	return agentapi.Assignment{
		Version: "with " + id, State: agentapi.Assigned, Host: "n1",
		Release: &agentapi.Release{ID: digest.Of(nil), Base: image("base"), Delta: image("delta")},
		Node:    agentapi.Node{Hostname: "n1", Digest: digest.Of([]byte("node"))},
		Delta:   &agentapi.DeltaOrder{ID: id, Paths: paths, Reboot: reboot},
	}
}

func image(of string) agentapi.Image {
	return agentapi.Image{Blob: agentapi.Blob{Digest: digest.Of([]byte(of)), Size: 1}}
}

func TestDecideOrders(t *testing.T) {
	before := ordered("first", true)
	for name, c := range map[string]struct {
		change func(a *agentapi.Assignment)
		want   decision
	}{
		"a reset":                      {func(a *agentapi.Assignment) { a.Delta = &agentapi.DeltaOrder{ID: "second", Reboot: true} }, moveOn},
		"a drop at the next boot":      {func(a *agentapi.Assignment) { a.Delta = &agentapi.DeltaOrder{ID: "second"} }, adopt},
		"no order any more":            {func(a *agentapi.Assignment) { a.Delta = nil }, adopt},
		"the same order":               {func(*agentapi.Assignment) {}, adopt},
		"other directories are kept":   {func(a *agentapi.Assignment) { a.Persist = []string{"/var/lib/x"} }, moveOn},
		"from memory":                  {func(a *agentapi.Assignment) { a.RAM = true }, moveOn},
		"a fresh delta with each boot": {func(a *agentapi.Assignment) { a.Fresh = true }, adopt},
	} {
		after := ordered("first", true)
		after.Version = "another"
		c.change(&after)
		if got := decide(before, after); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

// TestOpenDelta follows each order once, and begins anew at each boot where the role says so.
func TestOpenDelta(t *testing.T) {
	c, err := cache.Open(t.TempDir(), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	boot := func(a agentapi.Assignment) *cache.Delta {
		t.Helper()
		d, _, err := openDelta(c, a)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	seeded := func(a agentapi.Assignment, d *cache.Delta) {
		t.Helper()
		kept := *d
		kept.Order = orderID(a)
		if err := kept.Seeded(); err != nil {
			t.Fatal(err)
		}
	}
	first, drop := ordered("first", true), ordered("second", false, "/dropped")
	d := boot(first)
	if !d.Fresh {
		t.Fatal("a new delta is not fresh")
	}
	for _, name := range []string{"/kept", "/dropped"} {
		if err := os.WriteFile(d.Upper+name, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	seeded(first, d)
	if d = boot(first); d.Fresh || !isThere(d.Upper+"/dropped") {
		t.Error("an order that was followed was followed again")
	}
	for range 2 { // the first boot is cut before its mark
		if d = boot(drop); d.Fresh || isThere(d.Upper+"/dropped") || !isThere(d.Upper+"/kept") || !isBehind(drop, d) {
			t.Error("a path was not dropped, or more than that")
		}
	}
	seeded(drop, d)
	if d = boot(ordered("third", true)); !d.Fresh || isThere(d.Upper+"/kept") {
		t.Error("all of it was not dropped")
	}
	seeded(ordered("third", true), d)
	fresh := ordered("third", true)
	fresh.Fresh = true
	if d = boot(fresh); !d.Fresh {
		t.Error("a boot of a role with a fresh delta found the one before")
	}
}

func isThere(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}
