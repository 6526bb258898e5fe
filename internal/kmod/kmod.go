// Package kmod loads kernel modules from /lib/modules as modprobe(8) does: by name, with their dependencies
// (modules.dep), and by the modalias of each device that the kernel found (modules.alias; "coldplug").
package kmod

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrNoModule is in the chain of the error about a module that is not in modules.dep.
var ErrNoModule = errors.New("no such module")

// A Loader knows the modules of one kernel. It is safe for concurrent use.
type Loader struct {
	dir     string
	insert  func(path string) error
	mods    map[string]*module // by name, dashes as underscores
	builtin map[string]bool
	aliases Aliases
}

type module struct {
	path string   // from dir
	deps []string // names
	once sync.Once
	err  error
}

// Open reads the tables of the modules in dir ("/lib/modules/6.1.0-…"). A directory that does not exist is a kernel
// without modules: nothing is loaded, and nothing is missed.
func Open(dir string) (*Loader, error) {
	l := &Loader{dir: dir, insert: insert, mods: map[string]*module{}, builtin: map[string]bool{}}
	if err := eachLine(filepath.Join(dir, "modules.dep"), l.addDep); err != nil {
		return nil, err
	}
	if err := eachLine(filepath.Join(dir, "modules.builtin"), func(s string) { l.builtin[moduleName(s)] = true }); err != nil {
		return nil, err
	}
	if err := eachLine(filepath.Join(dir, "modules.alias"), l.aliases.addLine); err != nil {
		return nil, err
	}
	return l, nil
}

// OpenRunning is Open for the kernel that runs.
func OpenRunning() (*Loader, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("asking for the kernel's release: %w", err)
	}
	return Open(filepath.Join("/lib/modules", unix.ByteSliceToString(u.Release[:])))
}

func eachLine(path string, f func(string)) error {
	file, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	s := bufio.NewScanner(file)
	for s.Scan() {
		if line := strings.TrimSpace(s.Text()); line != "" && line[0] != '#' {
			f(line)
		}
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("reading %q: %w", path, err)
	}
	return nil
}

// addDep takes "kernel/fs/erofs/erofs.ko: kernel/lib/libcrc32c.ko".
func (l *Loader) addDep(line string) {
	path, deps, ok := strings.Cut(line, ":")
	if !ok {
		return
	}
	m := &module{path: path}
	for d := range strings.FieldsSeq(deps) {
		m.deps = append(m.deps, moduleName(d))
	}
	l.mods[moduleName(path)] = m
}

// moduleName is what the kernel calls the module in that file.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// Load loads the named module and all that it needs, unless they are there already.
func (l *Loader) Load(name string) error { return l.load(moduleName(name), nil) }

func (l *Loader) load(name string, above []string) error {
	if l.builtin[name] {
		return nil
	}
	m := l.mods[name]
	if m == nil {
		return fmt.Errorf("module %q: %w", name, ErrNoModule)
	}
	if slices.Contains(above, name) {
		return fmt.Errorf("module %q needs itself: %s", name, strings.Join(above, " needs "))
	}
	m.once.Do(func() { m.err = l.insertAll(name, m, above) })
	return m.err
}

func (l *Loader) insertAll(name string, m *module, above []string) error {
	for _, d := range m.deps {
		if err := l.load(d, append(slices.Clip(above), name)); err != nil {
			return fmt.Errorf("module %q: %w", name, err)
		}
	}
	if err := l.insert(filepath.Join(l.dir, m.path)); err != nil {
		return fmt.Errorf("module %q: %w", name, err)
	}
	return nil
}

// LoadAll loads several modules side by side; the errors are joined.
func (l *Loader) LoadAll(names ...string) error {
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() { errs[i] = l.Load(n) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// moduleInitCompressed asks the kernel (5.17 and later) to decompress the module itself.
const moduleInitCompressed = 4

func insert(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	flags := 0
	if filepath.Ext(path) != ".ko" {
		flags = moduleInitCompressed
	}
	err = unix.FinitModule(int(f.Fd()), "", flags)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("inserting %q: %w", path, err)
	}
	return nil
}

// Coldplug loads the modules for each device under sys ("/sys"). Modules make new devices appear (a PCI device becomes
// a virtio device becomes a disk), so it goes on until a round finds nothing more to load. What leads to a network or
// a disk comes first: its answers are waited for while the rest loads. It returns the modules that this call asked for,
// and the joined errors of those that would not load: one broken driver stops no other.
func (l *Loader) Coldplug(sys string) ([]string, error) {
	var all, later []string
	var errs []error
	d := devices{sys: sys, seen: map[string]bool{}}
	tried := map[string]bool{}
	for {
		found, err := d.next()
		if err != nil {
			return all, err
		}
		var now []string
		for _, name := range l.wanted(found, tried) {
			if l.urgent(name) {
				now = append(now, name)
			} else {
				later = append(later, name)
			}
		}
		if len(now) == 0 {
			now, later = later, nil
		}
		if len(now) == 0 {
			return all, errors.Join(errs...)
		}
		if err := l.LoadAll(now...); err != nil {
			errs = append(errs, err)
		}
		all = append(all, now...)
	}
}

// wanted are the modules for the devices with these aliases that were not tried yet.
func (l *Loader) wanted(aliases []string, tried map[string]bool) []string {
	var names []string
	for _, alias := range aliases {
		for _, n := range l.aliases.Match(alias) {
			if !tried[n] && !l.builtin[n] {
				tried[n] = true
				names = append(names, n)
			}
		}
	}
	return names
}

// urgent says whether a module drives a network interface or a disk, or the bus that virtual ones are on.
func (l *Loader) urgent(name string) bool {
	m := l.mods[name]
	if m == nil {
		return false
	}
	for _, dir := range []string{"/drivers/net/", "/drivers/virtio/", "/drivers/block/", "/drivers/nvme/"} {
		if strings.Contains(m.path, dir) {
			return true
		}
	}
	return false
}

// devices goes over the devices of all buses, again and again, and gives each once: to walk all of /sys takes longer
// than to load a driver.
type devices struct {
	sys  string
	seen map[string]bool // paths
}

// next returns the aliases of the devices that appeared since the last call.
func (d *devices) next() ([]string, error) {
	buses, err := os.ReadDir(filepath.Join(d.sys, "bus"))
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	var out []string
	for _, bus := range buses {
		dir := filepath.Join(d.sys, "bus", bus.Name(), "devices")
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // a bus may leave while we look
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name(), "modalias")
			if d.seen[path] {
				continue
			}
			d.seen[path] = true
			if alias := readAlias(path); alias != "" {
				out = append(out, alias)
			}
		}
	}
	return out, nil
}

// readAlias is the content of the file; "" where it is not there: most devices have none, and some leave.
func readAlias(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}
