package quick_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed"
	"github.com/troupe-dev/troupe/testbed/quick"
)

// bulky has role c with an image of 64 MiB that nothing compresses, and host n2, whose machine is never there: roles that it names are
// built before n1 wants them.
var bulky = map[string]string{
	"bulky.cue": `package fleet

images: bulky: {
	kind: "os"
	from: debian: {suite: "bookworm", packages: ["quick", "quick-bulk-65536"], kernel: "linux-image-quick"}
}
roles: [string]: kernel: args: ["troupe.alone=5"]
roles: c: {}
hosts: {
	n2: {mac: "52:54:00:77:01:02", address: "10.77.0.12", role: "b"}
	n3: {mac: "52:54:00:77:01:03", address: "10.77.0.13", role: "c"}
}
`,
}

// TestFaults has the power cut while a release is fetched, the cache's own records broken, its disk full, a blob of the server's store
// cut short, and the server gone in the middle of a switch. The node runs what is good through all of it.
func TestFaults(t *testing.T) {
	files := map[string]string{"roles.cue": strings.Replace(quick.Fleet()["roles.cue"], `os:   "quick"`, `os: *"quick" | string`, 1)}
	for name, text := range bulky {
		files[name] = strings.Replace(text, "roles: c: {}", `roles: c: os: "bulky"`, 1)
	}
	lab := quick.Start(t, quick.Config{Files: files, Nodes: []testbed.Node{{Name: "n1", MAC: "52:54:00:77:01:01", Disk: 2 << 30}}})
	lab.On("n1")
	lab.AwaitHealthy("n1")
	lab.Await("all roles are built", func(s *api.Snapshot) bool {
		return !slices.ContainsFunc(s.Hosts, func(h api.Host) bool { return h.Name != "" && h.Target == "" })
	})
	// First, while the cache has nothing that could go to make room.
	t.Run("FullDisk", func(t *testing.T) { fillDisk(t, lab.Within(t)) })
	t.Run("PowerCutWhileFetching", func(t *testing.T) { cutWhileFetching(lab.Within(t)) })
	t.Run("BrokenRecords", func(t *testing.T) { breakRecords(t, lab.Within(t)) })
	t.Run("TruncatedBlob", func(t *testing.T) { truncateBlob(t, lab.Within(t)) })
	t.Run("ServerGoneInASwitch", func(t *testing.T) { loseServer(lab.Within(t)) })
}

// cutWhileFetching cuts the power when some of the new image is on the disk, and not all of it.
func cutWhileFetching(lab *quick.Lab) {
	lab.Role("n1", "c")
	lab.Poll("a transfer under way", func(ctx context.Context) error {
		out, _, err := lab.TryRun(ctx, n1, "sh", "-c", "ls /run/troupe/cache/images/tmp")
		if err == nil && strings.TrimSpace(out) == "" {
			err = errors.New("there is none")
		}
		return err
	})
	lab.Cycle("n1")
	lab.AwaitRole("n1", "c")
}

// breakRecords overwrites all that the cache says of itself, on a machine that is off.
func breakRecords(t *testing.T, lab *quick.Lab) {
	boot := lab.Host("n1").Boots[0].ID
	lab.Off("n1")
	lab.WithCache("n1", func(dir string) {
		records, err := filepath.Glob(filepath.Join(dir, "releases", "*.json"))
		if err != nil || len(records) == 0 {
			t.Fatalf("%d records, %v", len(records), err)
		}
		for _, name := range append(records, filepath.Join(dir, "state.json")) {
			if err := os.WriteFile(name, []byte("{\x00broken"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	})
	lab.On("n1")
	lab.AwaitBoot("n1", boot)
	if n := lab.Host("n1").Boots[0].Bytes; n != 0 {
		t.Errorf("with broken records %d image bytes were fetched: the images were whole", n)
	}
}

// truncateBlob cuts short what the server has of a role's delta. No node may take that for the role. A server that starts anew finds it, and
// builds it again.
func truncateBlob(t *testing.T, lab *quick.Lab) {
	all, err := lab.API.Releases(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(all, func(r api.Release) bool { return slices.Contains(r.Roles, "b") })
	if i < 0 {
		t.Fatal("role b has no release")
	}
	delta := all[i].Content.Delta
	for _, name := range []string{lab.BlobPath(delta.Digest), lab.BlobPath(delta.Chunks.Digest)} {
		if err := os.Truncate(name, 100); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
	}
	boot := lab.Host("n1").Boots[0].ID
	lab.Role("n1", "b")
	lab.Await("the node says what it cannot fetch", func(s *api.Snapshot) bool {
		h := quick.Find(s, "n1")
		return h.Role == "b" && strings.Contains(h.Error, delta.Digest.Short())
	})
	if h := lab.Host("n1"); h.BootID != boot || h.RunningRole != "c" || !h.Healthy {
		t.Errorf("with a truncated blob on the server: runs %s, healthy %v, boot %s (%s before)", h.RunningRole, h.Healthy, h.BootID, boot)
	}
	lab.StopServer()
	lab.StartServer()
	lab.AwaitRole("n1", "b")
	lab.Poll("role b", answersAs(lab, "b"))
}

// fillDisk leaves too little room for another image.
func fillDisk(t *testing.T, lab *quick.Lab) {
	const filler = "/run/troupe/cache/filler"
	lab.Run(n1, "sh", "-c", "free=$(df -k /run/troupe/cache | tail -n 1 | busybox awk '{print $4}')\n"+
		"busybox fallocate -l $(( (free - 20480) * 1024 )) "+filler)
	boot := lab.Host("n1").Boots[0].ID
	lab.Push(map[string]string{"d.cue": "package fleet\n\nroles: d: files: \"/srv/new\": \"d\"\n"})
	lab.Role("n1", "d")
	lab.Await("the node says that its disk is full", func(s *api.Snapshot) bool {
		h := quick.Find(s, "n1")
		return h.Role == "d" && strings.Contains(h.Error, "not enough space")
	})
	if h := lab.Host("n1"); h.BootID != boot || h.RunningRole != "a" || !h.Healthy {
		t.Errorf("with a full disk: runs %s, healthy %v, boot %s (%s before)", h.RunningRole, h.Healthy, h.BootID, boot)
	}
	if out, _ := lab.Troupe("describe", "host", "n1"); !strings.Contains(out, "not enough space") {
		t.Errorf("describe does not name the cause:\n%s", out)
	}
	lab.Run(n1, "rm", filler)
	lab.AwaitRole("n1", "d")
}

// loseServer kills the server when the node reboots into another role.
func loseServer(lab *quick.Lab) {
	const id = "/proc/sys/kernel/random/boot_id"
	before := lab.Run(n1, "cat", id)
	lab.Role("n1", "a")
	lab.Await("the node reboots", func(s *api.Snapshot) bool { return quick.Find(s, "n1").State == api.HostRebooting })
	lab.StopServer()
	lab.Poll("a boot into what was good", func(ctx context.Context) error {
		now, status, err := lab.TryRun(ctx, n1, "cat", id)
		if err != nil || status != 0 || now == before {
			return fmt.Errorf("it answers %q as it did before, status %d, %w", now, status, err)
		}
		return answersAs(lab, "b")(ctx)
	})
	lab.StartServer()
	lab.AwaitRole("n1", "a")
}
