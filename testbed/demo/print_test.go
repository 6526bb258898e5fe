package demo

import (
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// text is what a printer wrote, without the times.
func text(b *strings.Builder) string {
	return regexp.MustCompile(`(?m)^ *[0-9.]+s  `).ReplaceAllString(b.String(), "")
}

func TestPrinterSaysNothingTwice(t *testing.T) {
	var out strings.Builder
	p := newPrinter(&out)
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	img := api.Image{Name: "debian", Kind: "base", Recipe: "r", Phase: state.BuildRunning, Step: "packages"}
	for range 2 {
		p.image(img)
		p.mark("n1", "b1", api.Mark{Stage: "fetch", Time: at, Bytes: 284e6})
		p.state(api.Host{Name: "n1", State: api.HostUnhealthy, Detail: "http :80/: refused"})
		p.state(api.Host{Name: "n1", State: api.HostBooting, Detail: "fetch"}) // its stages say that
	}
	img.Phase, img.Step, img.Size, img.Started, img.Finished = state.BuildDone, "", 284e6, at, at.Add(90*time.Second)
	p.image(img)
	p.mark("n1", "b2", api.Mark{Stage: "fetch", Time: at, Bytes: 4096, Detail: "twice", Error: "no space"}) // of another boot
	want := `    base debian: running, packages
n1  fetch        284.0 MB
n1  unhealthy: http :80/: refused
    base debian: done, 284.0 MB in 90.0 s
n1  fetch        4.1 kB twice ERROR: no space
`
	if diff := cmp.Diff(want, text(&out)); diff != "" {
		t.Errorf("what was printed (-want +got):\n%s", diff)
	}
}

func TestChangedLooksAtWhatIsShown(t *testing.T) {
	p := newPrinter(&strings.Builder{})
	h := api.Host{Name: "n1", State: api.HostBooting, Stage: "fetch"}
	if !p.changed(h) {
		t.Error("a host that was never seen: not changed")
	}
	h.LastSeen = time.Now() // every few seconds
	if p.changed(h) {
		t.Error("a host that only reported again: changed")
	}
	h.Stage = "mount"
	if !p.changed(h) {
		t.Error("a host with another stage: not changed")
	}
}

func TestTable(t *testing.T) {
	var out strings.Builder
	boots := map[string]result{}
	for i, h := range hosts {
		boots[h.name] = result{what: h.name + " boots", took: time.Duration(i+60) * time.Second, bytes: 284164096}
	}
	newPrinter(&out).table(boots, []result{{what: "n2 becomes web", took: 41300 * time.Millisecond, bytes: 8192}, {what: "and idle", took: 9 * time.Second}})
	want := `
== what it took
     time   image bytes
   60.0 s     284164096  n1 boots
   61.0 s     284164096  n2 boots
   62.0 s     284164096  n3 boots
   41.3 s          8192  n2 becomes web
    9.0 s             0  and idle

`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("the table (-want +got):\n%s", diff)
	}
}
