package reconciler

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/state"
)

const testMAC = "52:54:00:77:00:01"

var testStart = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func openStore(t testing.TB) *state.Store {
	t.Helper()
	s, err := state.Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// seen is what netboot's servers see of one machine at some second.
func seen(stage netboot.Stage, second int) netboot.Event {
	mac, _ := net.ParseMAC(testMAC)
	return netboot.Event{MAC: mac, Stage: stage, Time: testStart.Add(time.Duration(second) * time.Second)}
}

func stages(b *state.Boot) []string {
	var out []string
	for _, m := range b.Marks {
		out = append(out, m.Stage)
	}
	return out
}

func TestTimelineOfOneBoot(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.now = func() time.Time { return testStart.Add(12 * time.Second) }
	b.observe(seen(netboot.StageOffer, 0))
	b.observe(seen(netboot.StageTFTP, 5))
	b.observe(seen(netboot.StageOffer, 10)) // iPXE's own: the same boot
	id := b.id(testMAC)
	b.observe(seen(netboot.StageScript, 12))
	b.observe(seen(netboot.StageKernel, 20))
	report := agentapi.Report{
		Identity: agentapi.Identity{MAC: testMAC}, BootID: id, Uptime: 10 * time.Second,
		Marks: []agentapi.Mark{{Stage: agentapi.StageAgent, At: 4 * time.Second}, {Stage: agentapi.StageFetch, At: 8 * time.Second, Bytes: 1000}},
	}
	received := testStart.Add(35 * time.Second)
	for range 2 { // told twice, since the first reply got lost
		if err := b.report(t.Context(), "n1", report, received); err != nil {
			t.Fatal(err)
		}
	}
	got, err := state.Boots.Get(t.Context(), b.store, testMAC+"/"+id)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"dhcp-offer", "tftp", "dhcp-offer", "script", "kernel", "agent-up", "fetch"}
	if s := stages(&got); len(s) != len(want) {
		t.Fatalf("stages: got %v, want %v", s, want)
	}
	for i, s := range stages(&got) {
		if s != want[i] {
			t.Errorf("stage %d: got %s, want %s", i, s, want[i])
		}
	}
	if got.Bytes != 1000 {
		t.Errorf("bytes: got %d, want 1000: a mark told twice counts once", got.Bytes)
	}
	if at := got.Marks[5].Time; !at.Equal(testStart.Add(29 * time.Second)) {
		t.Errorf("agent-up at %s, want 6 s before the report came in", at)
	}
	if got.Host != "n1" {
		t.Errorf("host: got %q", got.Host)
	}
}

// TestLateReport has an agent whose first reports waited for a server that was being started again.
func TestLateReport(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.now = func() time.Time { return testStart }
	id := b.id(testMAC)
	b.observe(seen(netboot.StageKernel, 10))
	report := func(second, uptime int, marks ...agentapi.Mark) {
		t.Helper()
		r := agentapi.Report{Identity: agentapi.Identity{MAC: testMAC}, BootID: id, Uptime: time.Duration(uptime) * time.Second, Marks: marks}
		if err := b.report(t.Context(), "n1", r, testStart.Add(time.Duration(second)*time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	up := agentapi.Mark{Stage: agentapi.StageAgent, At: 4 * time.Second}
	report(30, 5, up)                                                                  // made at 17, 13 seconds late
	report(31, 19, up, agentapi.Mark{Stage: agentapi.StageCache, At: 6 * time.Second}) // in time: the first one's reply was lost
	report(60, 40, agentapi.Mark{Stage: agentapi.StageFetch, At: 20 * time.Second})    // late again
	report(62, 50, agentapi.Mark{Stage: agentapi.StageHealthy, At: 45 * time.Second})
	report(99, 80, agentapi.Mark{Stage: agentapi.StageStage, At: 79 * time.Second})
	got, err := state.Boots.Get(t.Context(), b.store, testMAC+"/"+id)
	if err != nil {
		t.Fatal(err)
	}
	var marks []string
	for _, m := range got.Marks {
		marks = append(marks, fmt.Sprint(m.Stage, " ", m.Time.Sub(testStart)))
	}
	want := []string{"kernel 10s", "agent-up 16s", "cache 18s", "fetch 32s", "healthy 57s", "stage 1m38s"}
	if diff := cmp.Diff(want, marks); diff != "" {
		t.Errorf("timeline (-want +got):\n%s", diff)
	}
}

func TestBeginsBoot(t *testing.T) {
	after := func(last string, age time.Duration) *state.Boot {
		return &state.Boot{Marks: []state.Mark{{Stage: last, Time: testStart.Add(-age)}}}
	}
	for _, tt := range []struct {
		name  string
		cur   *state.Boot
		stage netboot.Stage
		want  bool
	}{
		{"firmware repeats its DISCOVER", after("dhcp-offer", 4*time.Second), netboot.StageOffer, false},
		{"iPXE's DHCP after it was sent by TFTP", after("tftp", 4*time.Second), netboot.StageOffer, false},
		{"an offer long after the last one", after("dhcp-offer", time.Hour), netboot.StageOffer, true},
		{"a reset while the kernel was loading", after("kernel", 4*time.Second), netboot.StageOffer, true},
		{"a reset of a node that runs", after("healthy", time.Hour), netboot.StageOffer, true},
		{"a script after the agent: DHCP was a foreign server's", after("service", time.Minute), netboot.StageScript, true},
		{"its system logs in after its boot loader", after("disk", time.Minute), netboot.StageBooted, false},
		{"a reset of a system that is booted as it is", after("booted", time.Hour), netboot.StageOffer, true},
		{"a machine that waits asks for its script again", after("script", 30*time.Second), netboot.StageScript, false},
	} {
		if got := beginsBoot(tt.cur, string(tt.stage), testStart); got != tt.want {
			t.Errorf("%s: got %v, want %v", tt.name, got, tt.want)
		}
	}
}

func TestRepeatedMarksAreOneAndTimelinesAreBounded(t *testing.T) {
	boot := &state.Boot{}
	for i := range 1000 {
		addMark(boot, state.Mark{Stage: "script", Time: testStart.Add(time.Duration(i) * time.Second)})
	}
	if len(boot.Marks) != 1 {
		t.Errorf("%d marks of a machine that asked for the same script 1000 times, want 1", len(boot.Marks))
	}
	for i := range 1000 {
		addMark(boot, state.Mark{Stage: "script", Detail: string(rune('a' + i%2)), Time: testStart.Add(time.Duration(i) * time.Second)})
	}
	if len(boot.Marks) > maxMarks {
		t.Errorf("%d marks, want at most %d", len(boot.Marks), maxMarks)
	}
}

func TestFullTimelineBecomesHealthy(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.now = func() time.Time { return testStart }
	id := b.id(testMAC)
	report := func(m agentapi.Mark, why string) {
		t.Helper()
		r := agentapi.Report{Identity: agentapi.Identity{MAC: testMAC}, BootID: id, Uptime: m.At, Marks: []agentapi.Mark{m}, Error: why}
		if err := b.report(t.Context(), "n1", r, testStart.Add(m.At)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range maxMarks + 10 {
		report(agentapi.Mark{Stage: agentapi.StageFailed, At: time.Duration(i+1) * time.Second, Detail: fmt.Sprint(i)}, "no room")
	}
	report(agentapi.Mark{Stage: agentapi.StageHealthy, At: time.Hour}, "")
	got, err := state.Boots.Get(t.Context(), b.store, testMAC+"/"+id)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Marks) != maxMarks || got.Healthy.IsZero() || got.Error != "" {
		t.Errorf("%d marks, healthy %s, error %q; want %d, a time and none", len(got.Marks), got.Healthy, got.Error, maxMarks)
	}
}

func TestHealthyEndsABootsError(t *testing.T) {
	boot := &state.Boot{}
	addMark(boot, state.Mark{Stage: "tftp", Time: testStart, Error: "timed out"})
	boot.Error = "timed out"
	addMark(boot, state.Mark{Stage: "healthy", Time: testStart.Add(time.Minute)})
	if boot.Error != "" || !boot.Healthy.Equal(testStart.Add(time.Minute)) {
		t.Errorf("after healthy: error %q, healthy %s", boot.Error, boot.Healthy)
	}
}

func TestOldBootsAreDropped(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.standing = func() func(string) standing { return func(string) standing { return declared } }
	for i := range keepBoots + 5 {
		b.observe(seen(netboot.StageOffer, i*1000))
		b.flush(t.Context())
	}
	all, err := state.Boots.List(t.Context(), b.store)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != keepBoots {
		t.Errorf("%d boots are kept, want %d", len(all), keepBoots)
	}
	again := newBoots(b.store, b.log)
	if err := again.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := again.current[testMAC]; got == nil || !got.Started.Equal(testStart.Add((keepBoots+4)*1000*time.Second)) {
		t.Errorf("after a restart the current boot is %v, want the newest", got)
	}
}

func TestAnErrorBeginsNoBoot(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	full := seen(netboot.StageOffer, 0)
	full.Err = errors.New("no address is left")
	b.observe(full)
	if len(b.current) != 0 {
		t.Errorf("a boot of a machine that was given nothing: %+v", b.current[testMAC])
	}
	b.observe(seen(netboot.StageOffer, 1))
	cut := seen(netboot.StageTFTP, 2)
	cut.Err = errors.New("timed out")
	b.observe(cut)
	id := b.current[testMAC].ID
	if got := b.current[testMAC].Error; got != "timed out" {
		t.Errorf("the error of a boot under way: %q", got)
	}
	r := agentapi.Report{
		Identity: agentapi.Identity{MAC: testMAC}, BootID: id, Uptime: time.Minute, Marks: []agentapi.Mark{{Stage: agentapi.StageHealthy, At: time.Minute}},
	}
	if err := b.report(t.Context(), "n1", r, testStart.Add(2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	for i := range keepBoots { // its renewals, each after a report
		full.Time = testStart.Add(time.Duration(i) * time.Hour)
		b.observe(full)
		r.Marks = nil
		if err := b.report(t.Context(), "n1", r, full.Time); err != nil {
			t.Fatal(err)
		}
	}
	if cur := b.current[testMAC]; cur.ID != id || cur.Error != "" || cur.Marks[len(cur.Marks)-1].Stage != string(agentapi.StageHealthy) {
		t.Errorf("a healthy node that gets no address: boot %+v, want the one that it is in, as it was", cur)
	}
}

func TestStagedBytesCountForTheNextBoot(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.observe(seen(netboot.StageOffer, 0))
	first := b.id(testMAC)
	report := agentapi.Report{
		Identity: agentapi.Identity{MAC: testMAC}, BootID: first, Uptime: time.Hour,
		Marks: []agentapi.Mark{{Stage: agentapi.StageFetch, At: time.Second, Bytes: 1000}, {Stage: agentapi.StageStage, At: time.Minute, Bytes: 20}},
	}
	if err := b.report(t.Context(), "n1", report, testStart.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	b.observe(seen(netboot.StageOffer, 4000))
	b.flush(t.Context())
	all, err := state.Boots.List(t.Context(), b.store)
	if err != nil {
		t.Fatal(err)
	}
	if got := all[testMAC+"/"+first].Bytes; got != 1000 {
		t.Errorf("the first boot has %d bytes, want the 1000 that it fetched for itself", got)
	}
	if got := b.current[testMAC].Bytes; got != 20 {
		t.Errorf("the second boot has %d bytes, want the 20 that were staged for it", got)
	}
}

// Only some strangers have a place, and no old one keeps out a new one. Machines of the fleet do not count.
func TestMadeUpMACsFillNothing(t *testing.T) {
	const most, hosts = 16, 40
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.most = most
	b.standing = func() func(string) standing {
		return func(mac string) standing {
			if strings.HasPrefix(mac, "52:") {
				return declared
			}
			return stranger
		}
	}
	offer := func(first byte, i int) string {
		mac := net.HardwareAddr{first, 0, 0, 0, 0, byte(i)}
		b.observe(netboot.Event{MAC: mac, Stage: netboot.StageOffer, Time: testStart.Add(time.Duration(i) * time.Second)})
		b.flush(t.Context())
		return mac.String()
	}
	for i := range hosts {
		offer(0x52, i)
	}
	for i := range 5 * most {
		mac := offer(2, i)
		if first := b.id(mac); first != b.id(mac) || b.current[mac] == nil {
			t.Fatalf("stranger %d has no boot: the ones before keep it out", i)
		}
	}
	check := func(b *boots) {
		t.Helper()
		n := 0
		for mac := range b.current {
			if strings.HasPrefix(mac, "02:") {
				n++
			}
		}
		if len(b.current)-n != hosts || n > most {
			t.Errorf("boots of %d hosts and %d strangers are in memory, want all %d and at most %d", len(b.current)-n, n, hosts, most)
		}
	}
	check(b)
	all, err := state.Boots.List(t.Context(), b.store)
	if err != nil || len(all) > hosts+most {
		t.Errorf("%d boots are on record, %v; want at most %d", len(all), err, hosts+most)
	}
	again := newBoots(b.store, b.log)
	again.most, again.standing = most, b.standing
	if err := again.load(t.Context()); err != nil {
		t.Fatal(err)
	}
	b = again
	offer(2, 5*most)
	check(b)
}

func TestNobodyIsEvictedWhileNoFleetIsInForce(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.observe(seen(netboot.StageOffer, 0))
	b.standing = func() func(string) standing { return nil }
	b.most = 1
	b.observe(netboot.Event{MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, Stage: netboot.StageOffer, Time: testStart})
	if len(b.current) != 1 || b.current[testMAC] == nil {
		t.Errorf("boots of %d machines, want those of the one that was there alone", len(b.current))
	}
}

func TestAForgottenMachineHasNoBoots(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	b.observe(seen(netboot.StageOffer, 0))
	b.flush(t.Context())
	b.observe(seen(netboot.StageScript, 1)) // and this is not written yet
	if err := b.forget(t.Context(), testMAC); err != nil {
		t.Fatal(err)
	}
	b.flush(t.Context())
	all, err := state.Boots.List(t.Context(), b.store)
	if err != nil || len(all)+len(b.current) != 0 {
		t.Errorf("%d boots are on record, %d in memory, %v; want none", len(all), len(b.current), err)
	}
}

func TestWhatCouldNotBeWrittenIsNotAcknowledged(t *testing.T) {
	s, err := state.Open(t.Context(), t.TempDir(), nil)
	if err != nil {
		t.Fatal(err)
	}
	b := newBoots(s, slog.New(slog.DiscardHandler))
	r := agentapi.Report{Identity: agentapi.Identity{MAC: testMAC}, BootID: "b1", Uptime: time.Minute, Marks: []agentapi.Mark{{Stage: agentapi.StageAgent}}}
	gone, cancel := context.WithCancel(t.Context())
	if err := b.adopt(gone, r, testStart); err != nil {
		t.Fatal(err)
	}
	cancel() // from here on nothing can be written
	for range 2 {
		if err := b.report(gone, "n1", r, testStart); err == nil {
			t.Fatal("marks that were not written were acknowledged")
		}
	}
	if err := b.report(t.Context(), "n1", r, testStart); err != nil {
		t.Fatal(err)
	}
	got, err := state.Boots.Get(t.Context(), s, testMAC+"/b1")
	if err != nil || len(got.Marks) != 1 {
		t.Errorf("%+v, %v; want the mark", got, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestAnErrorThatIsOverIsGone(t *testing.T) {
	b := newBoots(openStore(t), slog.New(slog.DiscardHandler))
	r := agentapi.Report{Identity: agentapi.Identity{MAC: testMAC}, BootID: "b1", Marks: []agentapi.Mark{{Stage: agentapi.StageAgent}}}
	for _, want := range []string{"", "the fetch was cut; trying again", ""} {
		r.Error = want
		if err := b.report(t.Context(), "n1", r, testStart); err != nil {
			t.Fatal(err)
		}
		r.Marks = nil
		got, err := state.Boots.Get(t.Context(), b.store, testMAC+"/b1")
		if err != nil || got.Error != want {
			t.Errorf("error of the boot: %q, %v; want %q", got.Error, err, want)
		}
	}
}
