package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

var (
	one = Machine{
		Identity: agentapi.Identity{MAC: "52:54:00:00:00:01", UUID: "0a1b2c3d-0000-4000-8000-000000000001", Serial: "A1"},
		MACs:     []string{"52:54:00:00:00:01", "52:54:00:00:00:11"},
	}
	two = Machine{Identity: agentapi.Identity{MAC: "52:54:00:00:00:02", UUID: "0a1b2c3d-0000-4000-8000-000000000001", Serial: "A2"}}
)

func (m Maker) as(who Machine) Maker {
	m.Machine = who
	return m
}

func TestOwns(t *testing.T) {
	for _, tt := range []struct {
		name  string
		owner agentapi.Identity
		want  bool
	}{
		{"nobody's", agentapi.Identity{}, true},
		{"its own", one.Identity, true},
		{"made when it booted by its other interface", agentapi.Identity{MAC: "52:54:00:00:00:11", UUID: "x"}, true},
		{"with another interface", agentapi.Identity{MAC: "52:54:00:00:00:99", UUID: one.UUID, Serial: one.Serial}, true},
		{"of a board with the same UUID", two.Identity, false},
		{"of a board that says nothing", agentapi.Identity{MAC: "52:54:00:00:00:99"}, false},
		{"of one with the same UUID and no serial number", agentapi.Identity{MAC: "52:54:00:00:00:99", UUID: one.UUID}, false},
	} {
		if got := one.owns(tt.owner); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
	nobody := Machine{Identity: agentapi.Identity{MAC: "52:54:00:00:00:03"}, MACs: []string{""}}
	if nobody.owns(agentapi.Identity{MAC: "52:54:00:00:00:99"}) || nobody.has("") {
		t.Error("an interface without an address is everybody's")
	}
}

func TestOwnerRecord(t *testing.T) {
	long := agentapi.Identity{MAC: "52:54:00:00:00:01", UUID: "u", Serial: strings.Repeat("x", 600)}
	for _, tt := range []struct{ id, want agentapi.Identity }{{one.Identity, one.Identity}, {long, agentapi.Identity{MAC: long.MAC}}} {
		b := ownerRecord(tt.id)
		if diff := cmp.Diff(tt.want, readOwner(b)); len(b) != ownerSize || diff != "" {
			t.Errorf("%d bytes (-want +got):\n%s", len(b), diff)
		}
	}
	for _, bad := range []string{"", ownerMark, ownerMark + "{", "troupe cache owner 2\n{}", strings.Repeat("\x00", 512)} {
		if got := readOwner([]byte(bad)); got != (agentapi.Identity{}) {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

// TestACacheOfAnotherMachineIsLeftAlone has one disk that two machines see, and in the end the board of one replaced.
func TestACacheOfAnotherMachineIsLeftAlone(t *testing.T) {
	shared := diskWith(t, "true")
	m := makerOf(shared)
	m.E2fsck = "e2fsck"
	found, err := m.as(one).Ensure(t.Context(), agentapi.Disks{})
	if err != nil || !found.Made {
		t.Fatalf("Ensure: %+v, %v", found, err)
	}
	mounted(t, found.Path, func(dir string) {
		if err := os.WriteFile(filepath.Join(dir, "x"), []byte("kept"), 0o600); err != nil {
			t.Error(err)
		}
	})
	if out := run(t, "blkid", "-p", found.Path); !strings.Contains(out, `TYPE="ext4"`) {
		t.Errorf("blkid: %s", out)
	}
	run(t, "e2fsck", "-f", "-n", found.Path)
	before := run(t, "sha256sum", shared.dev)
	if got, err := m.as(one).Ensure(t.Context(), agentapi.Disks{}); err != nil || got != (Found{Path: found.Path}) {
		t.Errorf("its own: %+v, %v", got, err)
	}
	for _, spec := range []agentapi.Disks{{}, {Device: shared.dev}} {
		if got, err := m.as(two).Ensure(t.Context(), spec); !errors.Is(err, ErrNoDisk) || !strings.Contains(err.Error(), one.MAC) {
			t.Errorf("the other machine's: %+v, %v", got, err)
		}
	}
	if got, _, err := mount(t, m.as(two), found); !errors.Is(err, errForeign) {
		t.Errorf("mounted by the other machine: %+v, %v", got, err)
	}
	if run(t, "sha256sum", shared.dev) != before {
		t.Fatal("the disk was written to")
	}
	got, err := m.as(two).Ensure(t.Context(), agentapi.Disks{Take: true})
	if err != nil || got.Made || !strings.Contains(got.Note, one.MAC) {
		t.Errorf("taken over: %+v, %v", got, err)
	}
	if _, x, err := mount(t, m.as(two), got); err != nil || x != "kept" {
		t.Errorf("it lost its content: %q, %v", x, err)
	}
	if got, err := m.as(two).Ensure(t.Context(), agentapi.Disks{}); err != nil || got != (Found{Path: found.Path}) {
		t.Errorf("its own now: %+v, %v", got, err)
	}
	if got, err := m.as(one).Ensure(t.Context(), agentapi.Disks{}); !errors.Is(err, ErrNoDisk) {
		t.Errorf("no longer its own: %+v, %v", got, err)
	}
}

// TestACacheOfNobodyIsMarked has one that a power cut left before it was marked, and one that somebody made by hand.
func TestACacheOfNobodyIsMarked(t *testing.T) {
	m, found := usedCache(t)
	owner := func() agentapi.Identity {
		t.Helper()
		disks, err := m.Scanner.Scan()
		if err != nil || len(disks) != 1 || len(disks[0].Parts) != 1 {
			t.Fatalf("Scan: %+v, %v", disks, err)
		}
		return disks[0].Parts[0].Owner
	}
	if got := owner(); got != (agentapi.Identity{}) {
		t.Fatalf("it has an owner: %+v", got)
	}
	put(t, found.Path, 0, "a boot loader")
	if _, err := m.as(one).Ensure(t.Context(), agentapi.Disks{}); err != nil || owner() != (agentapi.Identity{}) {
		t.Errorf("with a boot loader: %v, owner %+v", err, owner())
	}
	put(t, found.Path, 0, strings.Repeat("\x00", 16))
	if _, err := m.as(one).Ensure(t.Context(), agentapi.Disks{}); err != nil || owner() != one.Identity {
		t.Errorf("Ensure: %v, owner %+v", err, owner())
	}
	other := Machine{Identity: agentapi.Identity{MAC: "52:54:00:00:00:99", UUID: one.UUID, Serial: one.Serial}} // its interface was replaced
	if _, err := m.as(other).Ensure(t.Context(), agentapi.Disks{}); err != nil || owner() != other.Identity {
		t.Errorf("after the interface was replaced: %v, owner %+v", err, owner())
	}
	if _, x, err := mount(t, m.as(other), found); err != nil || x != "kept" {
		t.Errorf("its content: %q, %v", x, err)
	}
	m.E2fsck = tool(t, "exit 12")
	breakDescriptors(t, found.Path)
	if got, _, err := mount(t, m.as(other), found); err != nil || !got.Made || owner() != other.Identity {
		t.Errorf("made anew: %+v, %v, owner %+v", got, err, owner())
	}
}
