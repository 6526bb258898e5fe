package web_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/reconciler/api/apitest"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/reconciler/web"
)

// patience is how long a test waits for the page to show something. Chromium on a busy machine takes its time.
const patience = 40 * time.Second

// A site is the page over a real API over a real store.
type site struct {
	*httptest.Server
	store *state.Store
	down  func(bool) // refuses all requests, and drops the watchers
}

// ahead is the fleet's now: later than ours, so that no host gets lost while a test runs slowly.
func ahead() time.Time { return time.Now().Add(5 * time.Minute) }

func serve(t *testing.T, f *apitest.Fleet) *site {
	t.Helper()
	store, err := state.Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Put(t.Context(), store); err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("/", web.Handler())
	mux.Handle("/api/", apitest.Server(store, f, &apitest.Controllers{}).Handler())
	var mu sync.Mutex
	refusing := false
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		refuse := refusing
		mu.Unlock()
		if refuse {
			panic(http.ErrAbortHandler) // as if nobody were there
		}
		mux.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return &site{srv, store, func(down bool) {
		mu.Lock()
		refusing = down
		mu.Unlock()
		srv.CloseClientConnections()
	}}
}

// A browser is a tab of Chromium, and what its console complained of.
type browser struct {
	t   *testing.T
	ctx context.Context //nolint:containedctx // it is what chromedp has for a tab

	mu         sync.Mutex
	complaints []string
}

func open(t *testing.T, url string) *browser {
	t.Helper()
	opts := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true), chromedp.WSURLReadTimeout(patience))
	alloc, cancel := chromedp.NewExecAllocator(context.Background(), opts...)
	t.Cleanup(cancel)
	ctx, cancel := chromedp.NewContext(alloc)
	t.Cleanup(cancel)
	b := &browser{t: t, ctx: ctx}
	if err := chromedp.Listen(ctx, b.hear); err != nil {
		t.Fatalf("starting Chromium (Debian: apt-get install chromium): %v", err)
	}
	if err := chromedp.Do(ctx, chromedp.Navigate(url)); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *browser) hear(ev any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch ev := ev.(type) {
	case *runtime.EventExceptionThrown:
		b.complaints = append(b.complaints, fmt.Sprintf("%+v", ev.ExceptionDetails))
	case *log.EventEntryAdded:
		if ev.Entry.Level == "error" || ev.Entry.Level == "warning" {
			b.complaints = append(b.complaints, ev.Entry.Text)
		}
	}
}

// clean fails the test if the console complained.
func (b *browser) clean() {
	b.t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.complaints) > 0 {
		b.t.Errorf("the browser's console says:\n%s", strings.Join(b.complaints, "\n"))
	}
}

// await waits until a JavaScript expression is true.
func (b *browser) await(what, expression string) {
	b.t.Helper()
	_, err := chromedp.Run(b.ctx, chromedp.Poll[bool](expression, chromedp.WithPollingTimeout(patience)))
	if err != nil {
		text, _ := chromedp.Run(b.ctx, chromedp.Evaluate[string](`document.body.innerText`))
		b.t.Fatalf("%s: %v; the page shows:\n%s", what, err, text)
	}
}

// eval is a JavaScript expression's value.
func eval[T any](b *browser, expression string) T {
	b.t.Helper()
	v, err := chromedp.Run(b.ctx, chromedp.Evaluate[T](expression))
	if err != nil {
		b.t.Fatalf("evaluating %s: %v", expression, err)
	}
	return v
}

func stateIs(host, state string) string {
	return fmt.Sprintf(`document.querySelector('[data-host=%q] .pill')?.dataset.state === %q`, host, state)
}

func TestPageLive(t *testing.T) {
	f := apitest.Mixed(ahead())
	s := serve(t, f)
	b := open(t, s.URL)
	b.await("the first look", stateIs("n1", "healthy"))
	for host, state := range map[string]string{
		"n2": "staging", "n3": "unhealthy", "n4": "waiting", "n5": "absent", "n6": "lost", "n7": "booting", "n8": "failed", "n9": "rebooting",
	} {
		b.await(host, stateIs(host, state))
	}
	text := eval[string](b, `document.body.innerText`)
	for _, want := range []string{
		"hosts.cue:7:12", `unknown role "dbb"`, "Not converged", "http port 80 /: connection refused", "52:54:00:77:00:63",
		"AMD EPYC", `role: "choose-a-role"`, "E: Unable to locate package postgresql-99", f.Source.Repo,
	} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not show %q", want)
		}
	}
	eval[bool](b, `window.sameDocument = true`)

	n := f.Nodes[apitest.MAC(1)]
	n.Running.Health = agentapi.Health{Failing: []string{"unit web.service: failed"}}
	if err := state.Nodes.Put(t.Context(), s.store, n.MAC, n); err != nil {
		t.Fatal(err)
	}
	b.await("n1 changing before our eyes", stateIs("n1", "unhealthy"))
	if !eval[bool](b, `window.sameDocument === true && document.querySelector('[data-host="n1"]').innerText.includes("unit web.service: failed")`) {
		t.Error("the page was reloaded, or does not say what fails")
	}
	b.clean()

	s.down(true)
	b.await("the server's absence", `!document.getElementById("offline").hidden`)
	n.Running.Health = agentapi.Health{Healthy: true}
	if err := state.Nodes.Put(t.Context(), s.store, n.MAC, n); err != nil {
		t.Fatal(err)
	}
	s.down(false)
	b.await("what changed meanwhile", `document.getElementById("offline").hidden && `+stateIs("n1", "healthy"))
}

func TestPageFilter(t *testing.T) {
	s := serve(t, apitest.Mixed(ahead()))
	b := open(t, s.URL)
	b.await("the first look", stateIs("n1", "healthy"))
	rows := `[...document.querySelectorAll("#hosts tbody tr")].map((r) => r.dataset.host).join()`
	if err := chromedp.Do(b.ctx, chromedp.SendKeys(chromedp.ID("filter"), "IDLE 10.77")); err != nil {
		t.Fatal(err)
	}
	b.await("the filter", rows+` === "n2,n6,n9"`)
	if err := chromedp.Do(b.ctx, chromedp.Click(chromedp.CSS(`[data-only="lost"]`))); err != nil {
		t.Fatal(err)
	}
	b.await("the tile", rows+` === "n6"`)
	if got := eval[string](b, `document.getElementById("filter").value`); got != "IDLE 10.77" {
		t.Errorf("the filter's text is now %q", got)
	}
	b.clean()
}

// addLater has n1 stage something an hour after its boot, which began with a URL.
func addLater(f *apitest.Fleet) {
	for key, b := range f.Boots {
		if b.MAC == apitest.MAC(1) {
			b.Marks[0].Detail = "http://10.77.0.1:8080/boot.efi?mac=secret, UEFI"
			b.Marks = append(b.Marks, state.Mark{Stage: "stage", Time: b.Healthy.Add(time.Hour), Detail: "staged something later"})
			f.Boots[key] = b
		}
	}
}

func TestHostPage(t *testing.T) {
	f := apitest.Mixed(ahead())
	addLater(f)
	s := serve(t, f)
	b := open(t, s.URL+"/hosts/n1")
	b.await("the timeline", `document.querySelectorAll(".boot .seg").length >= 9`)
	if eval[bool](b, `[...document.querySelectorAll(".boot .seg")].some((s) => s.title.startsWith("stage"))`) {
		t.Error("what was staged after the boot is drawn as a part of it")
	}
	text := eval[string](b, `document.body.innerText`)
	for _, want := range []string{"healthy after 27.3 s", "dhcp-offer", "switch-root", "made on /dev/vda", "243 MiB", "52:54:00:77:00:01", "boot.efi, UEFI", "staged something later"} {
		if !strings.Contains(text, want) {
			t.Errorf("the page does not show %q:\n%s", want, text)
		}
	}
	id := "20990101T000000-ffffff"
	boot := state.Boot{ID: id, MAC: apitest.MAC(1), Host: "n1", Started: f.Now, Marks: []state.Mark{{Stage: "dhcp-offer", Time: f.Now}}}
	if err := state.Boots.Put(t.Context(), s.store, apitest.MAC(1)+"/"+id, boot); err != nil {
		t.Fatal(err)
	}
	b.await("the new boot", `document.querySelectorAll(".boot").length === 2 && document.querySelector("main .pill").dataset.state === "booting"`)
	b.clean()
}

// TestHostile shows a machine and a commit whose every string tries to be more than a string.
func TestHostile(t *testing.T) {
	const evil = `<img src=x onerror="window.pwned=1"><script>window.pwned=1</script>"'></textarea>` + "\u202e`${1}`"
	f := apitest.Mixed(ahead())
	mac := apitest.MAC(99)
	m := f.Machines[mac]
	m.Serial = evil
	m.Inventory.SMBIOS = agentapi.SMBIOS{Vendor: evil, Product: evil, Serial: evil}
	m.Inventory.Disks[0].Model, m.Inventory.NICs[0].Driver, m.Inventory.CPU.Model, m.Inventory.Firmware = evil, evil, evil, evil
	f.Machines[mac] = m
	f.Source.Repo, f.Source.Applied.Subject, f.Source.Applied.Author, f.Source.FetchError = evil, evil, evil, evil
	f.Source.Problems[0].Message, f.Source.Problems[0].File = evil, evil
	f.Events["9"] = state.Event{Time: time.Now(), Kind: "node", Subject: evil, Message: evil}
	n := f.Nodes[apitest.MAC(3)]
	n.Running.Health.Failing = []string{evil}
	f.Nodes[apitest.MAC(3)] = n
	id := images.BaseRecipeOf(f.Schema.Images["debian"]).ID()
	build := f.Builds[string(id)]
	build.Phase, build.Step, build.Error, build.Tail, build.Name = state.BuildFailed, evil, evil, []string{evil}, evil
	f.Builds[string(id)] = build

	s := serve(t, f)
	for _, path := range []string{"/", "/hosts/" + mac, "/hosts/n3"} {
		b := open(t, s.URL+path)
		b.await("the page", `document.body.innerText.includes("onerror")`)
		if eval[bool](b, `window.pwned === 1 || document.querySelector("main img, main script, header script") !== null`) {
			t.Errorf("%s: a machine's name became markup", path)
		}
		b.clean()
	}
}
