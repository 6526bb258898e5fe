package kmod

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestGlob(t *testing.T) {
	for _, tt := range []struct {
		pattern, name string
		want          bool
	}{
		{"virtio:d00000001v*", "virtio:d00000001v00001AF4", true},
		{"virtio:d00000001v*", "virtio:d00000002v00001AF4", false},
		{"pci:v00001AF4d*sv*sd*bc*sc*i*", "pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00", true},
		{"pci:v*d*sv*sd*bc01sc08i02*", "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc08i02", true},
		{"pci:v*d*sv*sd*bc01sc08i02*", "pci:v00001B36d00000010sv00001AF4sd00001100bc01sc06i01", false},
		{"cpu:type:x86,ven*fam*mod*:feature:*0081*", "cpu:type:x86,ven0002fam0019mod0001:feature:,0000,0081,0082", true},
		{"usb:v0525pA4A[0-3]d*", "usb:v0525pA4A2d0100", true},
		{"usb:v0525pA4A[0-3]d*", "usb:v0525pA4A4d0100", false},
		{"usb:d0*[0-2][!3-9]", "usb:d01119", false},
		{"a[]b]c", "a]c", true},
		{"a[b", "a[b", true},
		{"a\\*b", "a*b", true},
		{"a\\*b", "axb", false},
		{"a\\", "a\\", true},
		{"?", "", false},
		{"*", "", true},
		{"", "", true},
		{"", "a", false},
		{strings.Repeat("*a", 40), strings.Repeat("a", 39), false},
	} {
		if got := Glob(tt.pattern, tt.name); got != tt.want {
			t.Errorf("Glob(%q, %q) = %v", tt.pattern, tt.name, got)
		}
	}
}

// FuzzGlob holds Glob against filepath.Match where both speak the same language: no slash, no negated set.
func FuzzGlob(f *testing.F) {
	f.Add("virtio:d00000001v*", "virtio:d00000001v00001AF4")
	f.Add("a[0-9]?*", "a5bcd")
	f.Add("[a", "[a")
	f.Add("\\", "\\")
	f.Fuzz(func(t *testing.T, pattern, name string) {
		got := Glob(pattern, name) // must end, and not panic
		ascii := strings.IndexFunc(pattern+name, func(r rune) bool { return r > 126 || r < 32 }) < 0
		if !ascii || strings.ContainsAny(pattern+name, "/[]\\") {
			return
		}
		want, err := filepath.Match(pattern, name)
		if err != nil {
			return
		}
		if got != want {
			t.Errorf("Glob(%q, %q) = %v, filepath.Match says %v", pattern, name, got, want)
		}
	})
}

// tree writes files below a new directory.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

const deps = `kernel/drivers/virtio/virtio.ko: kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/virtio/virtio_ring.ko:
kernel/drivers/virtio/virtio_pci.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/net/virtio_net.ko.xz: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko
kernel/drivers/char/hw_random/virtio-rng.ko: kernel/drivers/virtio/virtio.ko
kernel/loop/a.ko: kernel/loop/b.ko
kernel/loop/b.ko: kernel/loop/a.ko
`

const table = `# Aliases extracted from modules themselves.
alias pci:v00001AF4d*sv*sd*bc*sc*i* virtio_pci
alias virtio:d00000001v* virtio_net
alias virtio:d00000004v* virtio-rng
alias virtio:d00000002v* virtio_blk
alias fs-ext4 ext4
`

// recorder stands where the kernel would insert modules.
type recorder struct {
	mu    sync.Mutex
	order []string
	hook  func(name string)
}

func (r *recorder) insert(path string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	name := moduleName(path)
	r.order = append(r.order, name)
	if r.hook != nil {
		r.hook(name)
	}
	return nil
}

func open(t *testing.T, r *recorder) *Loader {
	t.Helper()
	l, err := Open(tree(t, map[string]string{"modules.dep": deps, "modules.alias": table, "modules.builtin": "kernel/fs/ext4/ext4.ko\n"}))
	if err != nil {
		t.Fatal(err)
	}
	l.insert = r.insert
	return l
}

func TestLoadBringsDependenciesFirstAndOnce(t *testing.T) {
	var r recorder
	l := open(t, &r)
	if err := l.LoadAll("virtio_net", "virtio-rng", "virtio_rng", "ext4"); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"virtio", "virtio_net", "virtio_ring", "virtio_rng"}, slices.Sorted(slices.Values(r.order))); diff != "" {
		t.Errorf("inserted (-want +got):\n%s", diff)
	}
	if slices.Index(r.order, "virtio_ring") != 0 || slices.Index(r.order, "virtio") != 1 {
		t.Errorf("order %v", r.order)
	}
	if err := l.Load("nosuch"); !errors.Is(err, ErrNoModule) {
		t.Errorf("Load of an unknown module: %v", err)
	}
	if err := l.Load("a"); err == nil || !strings.Contains(err.Error(), "needs itself") {
		t.Errorf("Load of a circle: %v", err)
	}
}

func TestColdplugGoesOnUntilNothingNewAppears(t *testing.T) {
	const pci = "pci:v00001AF4d00001000sv00001AF4sd00000001bc02sc00i00\n"
	sys := tree(t, map[string]string{
		"bus/pci/devices/00:03.0/modalias": pci, "bus/pci/devices/00:04.0/modalias": pci, "bus/acpi/devices/X/modalias": "acpi:X:\n", "bus/empty": "",
	})
	r := recorder{}
	r.hook = func(name string) {
		if name == "virtio_pci" { // the bus appears, with its devices
			for i, id := range []string{"1", "2"} {
				dir := filepath.Join(sys, "bus/virtio/devices", "virtio"+string(rune('0'+i)))
				if err := errors.Join(os.MkdirAll(dir, 0o755),
					os.WriteFile(filepath.Join(dir, "modalias"), []byte("virtio:d0000000"+id+"v00001AF4\n"), 0o644)); err != nil {
					t.Error(err)
				}
			}
		}
	}
	names, err := open(t, &r).Coldplug(sys)
	if diff := cmp.Diff([]string{"virtio_pci", "virtio_net", "virtio_blk"}, names); diff != "" {
		t.Errorf("modules (-want +got):\n%s", diff)
	}
	if !errors.Is(err, ErrNoModule) { // virtio_blk is in the aliases but not among the modules
		t.Errorf("error %v", err)
	}
	if !slices.Contains(r.order, "virtio_net") {
		t.Errorf("virtio_net was not inserted: %v", r.order)
	}
}

func TestOpenWithoutModules(t *testing.T) {
	l, err := Open(filepath.Join(t.TempDir(), "none"))
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Load("erofs"); !errors.Is(err, ErrNoModule) {
		t.Errorf("Load: %v", err)
	}
}
