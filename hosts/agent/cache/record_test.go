package cache

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

func assign(name string) agentapi.Assignment {
	return agentapi.Assignment{
		State: agentapi.Assigned, Host: "n1", Role: "web", Version: "v-" + name,
		Release: &agentapi.Release{ID: digest.Of([]byte(name)), Base: agentapi.Image{Blob: agentapi.Blob{Digest: digest.Of([]byte("base")), Size: 4}}},
		Node:    agentapi.Node{Hostname: "n1", Digest: digest.Of([]byte("node"))},
	}
}

func TestRecordsSurvive(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir)
	a, b := assign("a"), assign("b")
	b.ISCSI = &agentapi.ISCSI{Target: "iqn", Secret: "secret", MutualSecret: "secret", Disk: "d"}
	for _, x := range []agentapi.Assignment{a, b} {
		if err := c.Remember(x); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range []agentapi.Assignment{a, b, a} {
		if err := c.Begin(KeyOf(x)); err != nil {
			t.Fatal(err)
		}
	}
	since := time.Date(2026, 11, 23, 1, 2, 3, 0, time.UTC)
	if err := c.Change(KeyOf(a), func(r *Record) { r.Healthy, r.Good, r.Attempts = r.Used, since, 0 }); err != nil {
		t.Fatal(err)
	}
	b.ISCSI = &agentapi.ISCSI{Disk: "d"}
	want := []Record{
		{Key: KeyOf(a), Assignment: a, Used: 3, Healthy: 3, Good: since},
		{Key: KeyOf(b), Assignment: b, Used: 2, Attempts: 1},
	}
	c = open(t, dir)
	if diff := cmp.Diff(want, c.Records()); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
	if c.LastGood("").Key != KeyOf(a) || c.LastGood(KeyOf(a)).Key != "" {
		t.Errorf("last good: %q, beside that %q", c.LastGood("").Key, c.LastGood(KeyOf(a)).Key)
	}
	if err := c.Begin("aabb"); err == nil {
		t.Error("a switch to what has no record was counted")
	}
	if err := c.remember("../x", a); err == nil {
		t.Error("a record got a name outside of its directory")
	}
}

// TestABrokenRecordCountsAsNone flips each byte of a record in turn, and cuts it at each.
func TestABrokenRecordCountsAsNone(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir)
	a := assign("a")
	if err := c.Remember(a); err != nil {
		t.Fatal(err)
	}
	path := c.recordPath(KeyOf(a))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, content []byte) {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		c := open(t, dir)
		if n := len(c.Records()); n != 0 {
			// JSON does not tell the case of a member's name, so a flipped one may read as the same.
			if r, _ := c.Record(KeyOf(a)); n != 1 || cmp.Diff(a, r.Assignment) != "" {
				t.Fatalf("%s: %d records, %+v", what, n, c.Records())
			}
			return
		}
		if w := c.Warnings(); len(w) != 1 || !strings.Contains(w[0], "the record of release "+KeyOf(a)+" counts as none") {
			t.Fatalf("%s: warnings %q", what, w)
		}
		if w := open(t, dir).Warnings(); w != nil {
			t.Fatalf("%s: warned again: %q", what, w)
		}
	}
	for i := range whole {
		flipped := bytes.Clone(whole)
		flipped[i] ^= 0x20
		try(fmt.Sprintf("byte %d flipped", i), flipped)
	}
	for i := range len(whole) {
		try(fmt.Sprintf("cut after %d bytes", i), whole[:i])
	}
	other := filepath.Join(dir, "releases", strings.Repeat("ab", 16)+".json")
	if err := os.WriteFile(other, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if c := open(t, dir); len(c.Records()) != 0 || len(c.Warnings()) != 1 {
		t.Errorf("under another name: %+v", c.Records())
	}
}

func TestRecordsAreTrimmed(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir)
	first := assign("first")
	for i := range maxRecords + 5 {
		a := assign(fmt.Sprint(i))
		if i == 0 {
			a = first
		}
		if err := c.Remember(a); err != nil {
			t.Fatal(err)
		}
		if err := c.Begin(KeyOf(a)); err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			becomeGood(t, c, KeyOf(a))
		}
	}
	for _, c := range []*Cache{c, open(t, dir)} {
		if n := len(c.Records()); n != maxRecords {
			t.Errorf("%d records, want %d", n, maxRecords)
		}
		if c.LastGood("").Key != KeyOf(first) {
			t.Error("the last good one is gone")
		}
	}
}
