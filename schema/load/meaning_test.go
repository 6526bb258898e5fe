package load

import (
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/tools/txtar"

	"github.com/troupe-dev/troupe/schema"
)

func loadText(t *testing.T, l *Loader, text string) *schema.Fleet {
	t.Helper()
	fleet, err := l.Load(t.Context(), tree(t, txtar.Parse([]byte(text))))
	if err != nil {
		t.Fatal(err)
	}
	return fleet
}

// TestDirectories loads a fleet that makes use of directories, definitions, and CUE's own library.
func TestDirectories(t *testing.T) {
	var l Loader
	fleet := loadText(t, &l, `
-- fleet.cue --
package fleet
import "strings"
network: {subnet: "10.77.0.0/16", lease: "10m"}
_suite: "bookworm"
#Machine: {rack: string, n: int, serial: "\(rack)-\(n)", role: *"web" | string, address: "10.77.\(n).1", labels: "rack": strings.ToUpper(rack), ...}
images: debian: {kind: "os", from: debian: {suite: _suite, kernel: "linux-image-cloud-amd64"}}
images: alpha: images.debian
roles: web: {
	os: "debian"
	#host: _
	node: files: {
		"/etc/hostname": #host.name
		"/etc/\(#host.name)": {content: "\(#host.labels.rack)\n", mode: 0o600, uid: 7}
	}
}
roles: plain: {os: "alpha", node: files: "/etc/same": "same"}
discovery: os: "debian"
hosts: [Name=string]: {role: *"web" | string, labels: site: "s-\(Name)"}
-- roles/extra.cue --
package fleet
roles: extra: os: "debian"
-- hosts/r1/hosts.cue --
package fleet
import "list"
hosts: {
	for i in list.Range(1, 4, 1) {
		"r1-\(i)": {serial: "r1-\(i)", address: "10.77.1.\(i)", labels: rack: "r1"}
	}
	x: {mac: "52:54:00:AA:BB:CC", uuid: "4C4C4544-0000-1000-8000-00000000000A", role: "extra"}
}
-- hosts/r2/hosts.cue --
package fleet
hosts: y: {serial: "y", role: "plain", node: files: "/etc/own": {content: "own"}, disk: {take: true, device: "/dev/vda"}}
-- notes/readme.cue --
package notes
nothing: "of the fleet"
-- _tmp/x.cue --
package fleet
hosts: z: "would be wrong"
`)
	got := slices.Sorted(maps.Keys(fleet.Hosts))
	if d := cmp.Diff([]string{"r1-1", "r1-2", "r1-3", "x", "y"}, got); d != "" {
		t.Errorf("hosts differ (-want +got):\n%s", d)
	}
	if got := slices.Sorted(maps.Keys(fleet.Roles)); !slices.Equal(got, []string{"extra", "plain", "web"}) {
		t.Errorf("got roles %q", got)
	}
	for name, want := range map[string]map[string]schema.File{
		"r1-2": {"/etc/hostname": {Content: "r1-2", Mode: 0o644}, "/etc/r1-2": {Content: "r1\n", Mode: 0o600, UID: 7}},
		"x":    nil,
		"y":    {"/etc/same": {Content: "same", Mode: 0o644}, "/etc/own": {Content: "own", Mode: 0o644}},
	} {
		if d := cmp.Diff(want, fleet.Hosts[name].Node.Files); d != "" {
			t.Errorf("the node files of %s differ (-want +got):\n%s", name, d)
		}
	}
	if x := fleet.Hosts["x"]; x.MAC != "52:54:00:aa:bb:cc" || x.UUID != "4c4c4544-0000-1000-8000-00000000000a" {
		t.Errorf("got MAC %q and UUID %q; want lower case", x.MAC, x.UUID)
	}
	if got := fleet.Hosts["r1-1"].Labels; !maps.Equal(got, map[string]string{"rack": "r1", "site": "s-r1-1"}) {
		t.Errorf("r1-1 has labels %v", got)
	}
	if y := fleet.Hosts["y"]; y.Disk != (schema.Disk{Take: true, Device: "/dev/vda"}) {
		t.Errorf("got disk %+v", y.Disk)
	}
}

func TestEmptyFleet(t *testing.T) {
	var l Loader
	fleet := loadText(t, &l, "-- a.cue --\npackage fleet\nnetwork: subnet: \"10.0.0.0/24\"\nhosts: {}\nallowEmpty: true\n")
	if len(fleet.Hosts) != 0 || !fleet.AllowEmpty || fleet.Discovery.OS != "" {
		t.Errorf("got %+v", fleet)
	}
}

// TestManyProblems wants no more problems than somebody can read, with a last line that says so.
func TestManyProblems(t *testing.T) {
	var l Loader
	_, err := l.Load(t.Context(), fstest.MapFS{"a.cue": {Data: []byte(`package fleet
import "list"
network: subnet: "10.77.0.0/24"
hosts: {for i in list.Range(0, 1500, 1) {"n\(i)": {serial: 5, role: "nope"}}}
`)}})
	var ps schema.Problems
	if !errors.As(err, &ps) || len(ps) != maxProblems+1 {
		t.Fatalf("got %d problems; want %d", len(ps), maxProblems+1)
	}
	if first, last := ps[0], ps[maxProblems]; first.File != "a.cue" || !strings.HasPrefix(last.Message, "and ") {
		t.Errorf("got first %q, last %q", first, last)
	}
}

// TestDeterministic loads a fleet twice from nothing, and wants the same.
func TestDeterministic(t *testing.T) {
	var a, b Loader
	one, err := a.Load(t.Context(), benchFleet(300, true))
	if err != nil {
		t.Fatal(err)
	}
	two, err := b.Load(t.Context(), benchFleet(300, false))
	if err != nil {
		t.Fatal(err)
	}
	equal := cmp.Comparer(func(a, b schema.Host) bool {
		return cmp.Equal(a.Node, b.Node) && a.Address == b.Address && a.MAC == b.MAC
	})
	if d := cmp.Diff(one.Hosts, two.Hosts, equal); d != "" {
		t.Errorf("in directories and in one directory, the hosts differ:\n%s", d)
	}
}

// TestCache takes the evaluator away and sees what still loads.
func TestCache(t *testing.T) {
	var l Loader
	fleet := benchFleet(300, true)
	before, err := l.Load(t.Context(), fleet)
	if err != nil {
		t.Fatal(err)
	}
	l.Command = []string{filepath.Join(t.TempDir(), "nothing")}
	again, err := l.Load(t.Context(), fleet)
	if err != nil || len(again.Hosts) != len(before.Hosts) {
		t.Fatalf("an unchanged fleet was evaluated again: %v", err)
	}

	fleet["hosts/s001/hosts.cue"] = &fstest.MapFile{Data: benchHosts(101, 100, "changed")}
	if _, err := l.Load(t.Context(), fleet); err == nil {
		t.Error("a changed directory was not evaluated again")
	}
	l.Command = nil
	changed, err := l.Load(t.Context(), fleet)
	if err != nil {
		t.Fatal(err)
	}
	if got := changed.Hosts["n00101"].Labels["rack"]; !strings.Contains(got, "changed") {
		t.Errorf("after a change, the label rack is %q", got)
	}
	if before.Hosts["n00101"].Labels["rack"] == changed.Hosts["n00101"].Labels["rack"] {
		t.Error("a fleet that was loaded before has changed")
	}

	// The root is part of every directory.
	fleet["fleet.cue"] = &fstest.MapFile{Data: []byte(strings.ReplaceAll(benchRoot(), "role 1", "ROLE 1"))}
	changed, err = l.Load(t.Context(), fleet)
	if err != nil {
		t.Fatal(err)
	}
	if got := changed.Roles["r1"].Files["/etc/motd"].Content; got != "ROLE 1\n" {
		t.Errorf("after a change of the root, /etc/motd of role r1 is %q", got)
	}
}

// TestCacheForgets looks up many states of one directory, and wants the cache to stay small.
func TestCacheForgets(t *testing.T) {
	var c cache
	for i := range 5 * keepLoads {
		shards, missing := c.lookup([]*plan{{key: "root"}, {key: fmt.Sprint("state ", i)}})
		if i == 0 {
			c.add([]*shard{{key: "root"}})
		} else if len(shards) != 1 || shards[0].key != "root" {
			t.Fatalf("load %d: what every load uses was forgotten", i)
		}
		c.add([]*shard{{key: missing[len(missing)-1].key}})
	}
	if n := len(c.entries); n > keepLoads+2 {
		t.Errorf("the cache has %d entries after %d loads", n, 5*keepLoads)
	}
}

// TestSchemaHasComments holds that every field and definition of the schema says what it means: it is the reference.
func TestSchemaHasComments(t *testing.T) {
	lines := strings.Split(schema.CUE, "\n")
	for i, line := range lines {
		text := strings.TrimSpace(line)
		name, _, isField := strings.Cut(text, ":")
		if !isField || strings.HasPrefix(text, "//") || strings.ContainsAny(name, " \"") {
			continue
		}
		if before := strings.TrimSpace(lines[i-1]); !strings.HasPrefix(before, "//") {
			t.Errorf("line %d of the schema: %s has no comment: the schema is the reference of its users", i+1, name)
		}
	}
}
