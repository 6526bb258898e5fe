package choice

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func assign(name string) agentapi.Assignment {
	return agentapi.Assignment{
		State: agentapi.Assigned, Host: "n1", Role: name, Release: &agentapi.Release{ID: digest.Of([]byte(name))},
		Checks: []agentapi.Check{{HTTP: &agentapi.HTTPCheck{Port: 80, Path: "/", Status: 200}}},
	}
}

func record(name string, change func(*cache.Record)) cache.Record {
	a := assign(name)
	r := cache.Record{Key: cache.KeyOf(a), Assignment: a}
	change(&r)
	return r
}

func good(used, healthy uint64) func(*cache.Record) {
	return func(r *cache.Record) { r.Used, r.Healthy = used, healthy }
}

func with(base func(*cache.Record), change func(*cache.Record)) func(*cache.Record) {
	return func(r *cache.Record) {
		base(r)
		change(r)
	}
}

func TestChoose(t *testing.T) {
	tried := func(n int) func(*cache.Record) { return func(r *cache.Record) { r.Used, r.Attempts = 9, n } }
	bad := func(r *cache.Record) { r.Used, r.Bad = 9, &cache.Bad{Why: "its kernel panics"} }
	left := &cache.Left{Why: "3 boots"}
	const rowOf2, rowOf3 = "2 boots of it in a row did not become healthy", "3 boots of it in a row did not become healthy"
	for _, tt := range []struct {
		name    string
		wanted  string // "" for no word of the server
		records []cache.Record
		broken  string // what is not whole in the cache
		boot    string // "" for rescue
		why     string
		judge   string // of the wanted one: "bad", "left" or ""
	}{
		{name: "never seen", wanted: "b", boot: "b"},
		{name: "wanted and good", wanted: "a", records: []cache.Record{record("a", good(1, 1))}, boot: "a"},
		{name: "one boot failed", wanted: "b", records: []cache.Record{record("b", tried(1)), record("a", good(1, 1))}, boot: "b"},
		{name: "all boots used up", wanted: "b", records: []cache.Record{record("b", tried(2)), record("a", good(1, 1))}, boot: "a", why: rowOf2, judge: "bad"},
		{name: "bad", wanted: "b", records: []cache.Record{record("b", bad), record("a", good(1, 1))}, boot: "a", why: "its kernel panics"},
		{name: "another is wanted than the bad one", wanted: "c", records: []cache.Record{record("b", bad), record("a", good(1, 1))}, boot: "c"},
		{
			name: "bad, and nothing good", wanted: "b", records: []cache.Record{record("b", bad)},
			why: "its kernel panics; there is no good release to go back to",
		},
		{
			name: "the last good one comes first", wanted: "b", boot: "a2", why: "its kernel panics",
			records: []cache.Record{record("b", bad), record("a1", good(8, 3)), record("a2", good(4, 4)), record("a3", good(2, 2))},
		},
		{
			name: "the last good one is not whole", wanted: "b", boot: "a1", why: "its kernel panics", broken: "a2",
			records: []cache.Record{record("b", bad), record("a1", good(3, 3)), record("a2", good(4, 4))},
		},
		{
			name: "nothing is whole", wanted: "b", broken: "a1 a2",
			records: []cache.Record{record("b", bad), record("a1", good(3, 3)), record("a2", good(4, 4))},
			why:     "its kernel panics; there is no good release to go back to",
		},
		{
			name: "the power fails twice in a good one", wanted: "a", boot: "a",
			records: []cache.Record{record("a", with(good(9, 3), tried(2))), record("z", good(1, 1))},
		},
		{
			name: "a good one fails each time", wanted: "a", boot: "z", why: rowOf3, judge: "left",
			records: []cache.Record{record("a", with(good(9, 3), tried(3))), record("z", good(1, 1))},
		},
		{
			name: "a good one fails each time, and there is no other", wanted: "a", boot: "a",
			records: []cache.Record{record("a", with(good(9, 3), tried(5))), record("b", bad)},
		},
		{
			name: "a good one was left", wanted: "a", boot: "z", why: "3 boots",
			records: []cache.Record{record("a", with(good(9, 3), func(r *cache.Record) { r.Left = left })), record("z", good(1, 1))},
		},
		{
			name: "its second row", wanted: "a", boot: "z", why: rowOf3, judge: "bad",
			records: []cache.Record{record("a", with(good(9, 3), func(r *cache.Record) { r.Again, r.Attempts = true, 3 })), record("z", good(1, 1))},
		},
		{
			name: "shut down before it was healthy", wanted: "b", boot: "b",
			records: []cache.Record{record("b", func(r *cache.Record) { r.Used, r.Ended = 9, MaxEnded }), record("a", good(1, 1))},
		},
		{
			name: "it shuts itself down each time", wanted: "b", boot: "a", why: rowOf2, judge: "bad",
			records: []cache.Record{record("b", func(r *cache.Record) { r.Used, r.Ended = 9, MaxEnded+2 }), record("a", good(1, 1))},
		},
		{
			name: "bad by other checks", wanted: "b", boot: "b",
			records: []cache.Record{record("b", func(r *cache.Record) { r.Bad = &cache.Bad{Why: "http", Checks: "others"} }), record("a", good(1, 1))},
		},
		{
			name: "bad by these checks", wanted: "b", boot: "a", why: "http",
			records: []cache.Record{record("b", func(r *cache.Record) { r.Bad = &cache.Bad{Why: "http", Checks: ChecksOf(r.Assignment)} }), record("a", good(1, 1))},
		},
		{
			name: "no server", boot: "a", why: "the server does not answer",
			records: []cache.Record{record("b", func(r *cache.Record) {}), record("a", good(1, 1)), record("z", good(8, 0))},
		},
		{
			name: "no server, and the last good one has used up its boots", boot: "z", why: "the server does not answer",
			records: []cache.Record{record("a", with(good(9, 3), tried(3))), record("z", good(1, 1))},
		},
		{
			name: "no server, and only one good one, which has used up its boots", boot: "a", why: "the server does not answer",
			records: []cache.Record{record("a", with(good(9, 3), tried(7))), record("b", bad)},
		},
		{name: "no server, and nothing was ever healthy", boot: "b", why: "the server does not answer", records: []cache.Record{record("b", tried(1))}},
		{
			name: "no server, and nothing to boot", records: []cache.Record{record("b", bad), record("c", tried(2))},
			why: "the server does not answer, and no release in the cache can be booted",
		},
		{
			name: "no server, and images on it", why: "the server does not answer, and no release in the cache can be booted",
			records: []cache.Record{record("a", with(good(1, 1), func(r *cache.Record) { r.Assignment.ISCSI = &agentapi.ISCSI{} }))},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := Question{Records: tt.records, Whole: func(r cache.Record) error {
				if strings.Contains(" "+tt.broken+" ", " "+r.Assignment.Role+" ") {
					return errors.New("an image is missing")
				}
				return nil
			}}
			if tt.wanted != "" {
				a := assign(tt.wanted)
				q.Wanted = &a
			}
			c := Choose(q, now)
			if c.Assignment.Role != tt.boot || (c.Key == "") != (tt.boot == "") {
				t.Errorf("boots %q (key %q), want %q", c.Assignment.Role, c.Key, tt.boot)
			}
			if why, _, _ := strings.Cut(c.Why, "; release "); why != tt.why {
				t.Errorf("why: %q, want %q", c.Why, tt.why)
			}
			judge := ""
			if c.Judge != nil {
				judge = map[bool]string{true: "bad", false: "left"}[c.Judge.Bad]
				if c.Judge.Key != cache.KeyOf(*q.Wanted) || c.Judge.Why != tt.why || !c.Judge.When.Equal(now) {
					t.Errorf("verdict %+v", c.Judge)
				}
			}
			if judge != tt.judge {
				t.Errorf("verdict %q, want %q", judge, tt.judge)
			}
		})
	}
}

func TestChecksOfTellsChecksApart(t *testing.T) {
	seen := map[string]string{}
	for name, change := range map[string]func(*agentapi.Assignment){
		"the same":         func(*agentapi.Assignment) {},
		"another port":     func(a *agentapi.Assignment) { a.Checks[0].HTTP.Port = 81 },
		"a port alone":     func(a *agentapi.Assignment) { a.Checks[0] = agentapi.Check{TCP: &agentapi.TCPCheck{Port: 80}} },
		"a unit":           func(a *agentapi.Assignment) { a.Checks[0] = agentapi.Check{Unit: "x.service"} },
		"a command":        func(a *agentapi.Assignment) { a.Checks[0] = agentapi.Check{Exec: []string{"x", "y"}} },
		"another command":  func(a *agentapi.Assignment) { a.Checks[0] = agentapi.Check{Exec: []string{"x y"}} },
		"none":             func(a *agentapi.Assignment) { a.Checks = nil },
		"another deadline": func(a *agentapi.Assignment) { a.HealthyWithin = time.Hour },
	} {
		a := assign("a")
		change(&a)
		got := ChecksOf(a)
		if other, is := seen[got]; is {
			t.Errorf("%s and %s have one name", name, other)
		}
		seen[got] = name
	}
	a, b := assign("a"), assign("b")
	if diff := cmp.Diff(ChecksOf(a), ChecksOf(b)); diff != "" {
		t.Errorf("the same checks of two releases (-a +b):\n%s", diff)
	}
}
