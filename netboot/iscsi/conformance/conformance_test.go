package conformance

import (
	"context"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// atOnce is how many tests run at a time. Each has a target and a unit of its own; some wait for seconds.
const atOnce = 4

// cuSize is the size of the units under test: above 100 MiB no test finds its unit too small.
const cuSize = 128 << 20

// A medium is a kind of unit that all tests run against.
type medium struct {
	name     string
	physical int // bytes of a physical block
	open     func(t testing.TB, base *lun.Image) scsi.Medium
}

var media = [2]medium{
	{"file", 512, openFile},
	{"cow", 4096, openCopyOnWrite},
}

func openFile(t testing.TB, _ *lun.Image) scsi.Medium {
	t.Helper()
	return openDisk(t)
}

func openCopyOnWrite(t testing.TB, base *lun.Image) scsi.Medium {
	t.Helper()
	return openDelta(t, base)
}

// openDisk opens a new file of zeros.
func openDisk(t testing.TB) *lun.Disk {
	t.Helper()
	d, err := lun.OpenDisk(filepath.Join(t.TempDir(), "disk"), cuSize)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMedium(t, d) })
	return d
}

// openDelta opens a new copy-on-write disk.
func openDelta(t testing.TB, base *lun.Image) *lun.Delta {
	t.Helper()
	d, err := lun.OpenDelta(base, filepath.Join(t.TempDir(), "delta"), 0, "base")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMedium(t, d) })
	return d
}

// TestConformance holds the outcome of every test of iscsi-test-cu against the list.
func TestConformance(t *testing.T) {
	want, err := readOutcomes()
	if err != nil {
		t.Fatal(err)
	}
	tests := cuTests(t)
	for name := range want {
		if !slices.Contains(tests, name) {
			t.Errorf("%s lists %s, which iscsi-test-cu does not have", outcomesFile, name)
		}
	}
	base := openImage(t, filepath.Join(t.TempDir(), "base"), cuSize)
	p := startPortal(t)
	for i, m := range media {
		t.Run(m.name, func(t *testing.T) {
			results := runAll(t, p, tests, func() unit { return unit{medium: m.open(t, base), physical: m.physical} })
			count := make(map[outcome]int)
			for _, name := range tests {
				t.Run(name, func(t *testing.T) {
					got := results[name]
					count[got.outcome]++
					if d := want[name].differs(i, got.outcome); d != "" {
						t.Errorf("%s\n%s", d, got.output)
					}
				})
			}
			t.Logf("%d passed, %d skipped, %d failed, %d hung", count[passed], count[skipped], count[failed], count[hung])
		})
	}
}

// runAll runs every test against a unit of its own, atOnce at a time.
func runAll(t *testing.T, p *portal, tests []string, fresh func() unit) map[string]cuResult {
	t.Helper()
	results := make(map[string]cuResult)
	var mu sync.Mutex // guards results
	var wg sync.WaitGroup
	free := make(chan struct{}, atOnce)
	for _, name := range tests {
		free <- struct{}{}
		url := p.add(t, fresh())
		wg.Go(func() {
			r := runCU(t.Context(), name, url)
			mu.Lock()
			results[name] = r
			mu.Unlock()
			<-free
		})
	}
	wg.Wait()
	return results
}

// TestTwoPaths runs the tests that want two sessions on one unit, which are skips where they have one. The unit has to be of
// zeros: CompareAndWrite compares 257 blocks, and has written 256.
func TestTwoPaths(t *testing.T) {
	p := startPortal(t)
	for _, name := range []string{
		"ALL.MultipathIO.Simple", "ALL.MultipathIO.Reset", "ALL.MultipathIO.CompareAndWrite", "ALL.MultipathIO.CompareAndWriteAsync",
	} {
		t.Run(name, func(t *testing.T) {
			url := p.add(t, unit{medium: openDisk(t)})
			mustPass(t.Context(), t, name, url, url)
		})
	}
}

// TestReadOnly runs the test that wants a unit that is write protected.
func TestReadOnly(t *testing.T) {
	p := startPortal(t)
	url := p.add(t, unit{medium: openImage(t, filepath.Join(t.TempDir(), "image"), cuSize)})
	mustPass(t.Context(), t, "ALL.ReadOnly.ReadOnlySBC", url)
}

// mustPass runs one test that does not stand in the list.
func mustPass(ctx context.Context, t *testing.T, name string, urls ...string) {
	t.Helper()
	if got := runCU(ctx, name, urls...); got.outcome != passed {
		t.Errorf("%s: %s\n%s", name, got.outcome, got.output)
	}
}
