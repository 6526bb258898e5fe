package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/initramfs"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed"
)

// BenchmarkSwitch has a machine change its role by a push and back by a revert, again and again, and says of each where the
// time went. In turn with the switches it boots the floor. With -benchtime 3x there are three rounds of both. The first
// switch brings the role delta into the node's cache and does not count.
func BenchmarkSwitch(b *testing.B) {
	r := newRig(b)
	r.sizes()
	r.firstBoot()
	release := map[string]images.Release{}
	switches := table{title: "push to healthy in the new role, everything cached but for the first (seconds)", skip: 1}
	floors := table{title: "the floor: QEMU is handed the same kernel and the same images (seconds)"}
	round := func(role string, change func()) {
		j := r.switchTo(role, change)
		switches.cols = append(switches.cols, j)
		if n := len(switches.cols); n > switches.skip && j.bytes != 0 {
			b.Errorf("switch %d fetched %d bytes of images that were in the cache", n, j.bytes)
		}
		if _, ok := release[role]; !ok {
			release[role] = r.release(role)
		}
		floors.cols = append(floors.cols, r.floor.boot(release[role].Base.Digest, release[role].Delta.Digest, role == "web"))
		floors.cols[len(floors.cols)-1].title = role
	}
	for b.Loop() {
		round("web", r.toWeb)
		round("idle", r.revert)
	}
	b.StopTimer()
	r.report(&switches, &floors)
}

// node is the machine that changes its role.
const node = "n2"

// A rig is the lab with one machine of the first fleet, and the floor beside it.
type rig struct {
	b       *testing.B
	work    testbed.Git
	data    string // of the server
	agent   string // the agent's program
	lab     *testbed.Lab
	client  *api.Client
	console *clock
	base    images.Base
	floor   *floor
}

func newRig(b *testing.B) *rig {
	b.Helper()
	dir := b.TempDir()
	troupe := filepath.Join(dir, "troupe")
	r := &rig{b: b, agent: filepath.Join(dir, "troupe-agent"), console: newClock()}
	buildProgram(b, troupe, "../../cmd/troupe")
	buildProgram(b, r.agent, "../../cmd/troupe-agent", small...)
	bare := filepath.Join(dir, "fleet.git")
	var err error
	if r.work, err = testbed.MakeRepo(b.Context(), bare, filepath.Join(dir, "work"), first); err != nil {
		b.Fatal(err)
	}
	labDir := filepath.Join(dir, "lab")
	r.data = filepath.Join(labDir, "serve")
	r.lab, err = testbed.Start(b.Context(), testbed.Config{
		Dir: labDir, Binary: troupe, Router: netip.MustParsePrefix("10.77.0.1/24"),
		Nodes: slices.DeleteFunc(slices.Clone(firstNodes), func(n testbed.Node) bool { return n.Name != node }),
		Serve: testbed.Serve{Args: testbed.ServeArgs(labDir, bare, "main", ".")},
	})
	if err != nil {
		b.Fatal(err)
	}
	r.client = &api.Client{URL: r.lab.ServerURL(), HTTP: r.lab.HTTP()}
	b.Cleanup(func() {
		if b.Failed() {
			b.Log(r.lab.Failure())
		}
		if err := r.lab.Close(); err != nil {
			b.Error(err)
		}
	})
	r.follow()
	if err := r.lab.WaitServer(b.Context()); err != nil {
		b.Fatal(err)
	}
	r.await("the images are built", func(s *api.Snapshot) bool {
		h, ok := s.Host(node)
		return ok && h.Target != "" && !slices.ContainsFunc(s.Images, func(i api.Image) bool { return i.Declared && i.Digest == "" })
	})
	img, err := r.client.Image(b.Context(), "debian")
	if err != nil {
		b.Fatal(err)
	}
	r.base = *img.Base
	accel, _ := r.lab.Accel()
	r.floor = newFloor(b, accel, r.data, r.base)
	return r
}

// buildProgram builds a static program. What travels to nodes has small as its flags.
func buildProgram(b *testing.B, to, from string, flags ...string) {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), "go", slices.Concat([]string{"build", "-o", to}, flags, []string{from})...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("building %s: %v\n%s", from, err, out)
	}
}

// small leaves out symbols and paths.
var small = []string{"-trimpath", "-ldflags=-s -w"}

// follow stamps what the node's console says, until the benchmark ends.
func (r *rig) follow() {
	ctx, cancel := context.WithCancel(r.b.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		defer r.console.end()
		if err := r.lab.FollowConsole(ctx, node, 0, r.console); ctx.Err() == nil {
			r.b.Error(err)
		}
	})
	r.b.Cleanup(func() {
		cancel()
		wg.Wait()
	})
}

// await waits until the fleet is as done wants it.
func (r *rig) await(what string, done func(*api.Snapshot) bool) {
	r.b.Helper()
	ctx, cancel := context.WithTimeout(r.b.Context(), 2*patience) // packages may have to be downloaded
	defer cancel()
	var last string
	err := r.client.Follow(ctx, func(s *api.Snapshot) bool {
		last = hostsText(s)
		return done(s)
	})
	if err != nil {
		r.b.Fatalf("waited in vain for: %s: %v\n%s", what, err, last)
	}
}

// awaitHealthy waits until the node runs a role healthily, and said when it became so.
func (r *rig) awaitHealthy(role string) {
	r.b.Helper()
	r.await("healthy as "+role, func(s *api.Snapshot) bool {
		h, ok := s.Host(node)
		return ok && h.State == api.HostHealthy && h.Role == role && h.RunningRole == role && h.Stage == string(agentapi.StageHealthy)
	})
}

func (r *rig) host() api.HostDetail {
	r.b.Helper()
	h, err := r.client.Host(r.b.Context(), node)
	if err != nil {
		r.b.Fatal(err)
	}
	return h
}

// firstBoot boots the blank machine into its first role.
func (r *rig) firstBoot() {
	r.b.Helper()
	start := time.Now()
	if err := r.lab.Power(r.b.Context(), node, testbed.On); err != nil {
		r.b.Fatal(err)
	}
	r.awaitHealthy("idle")
	r.settled(start)
}

// settled waits until the node's system has nothing more to start.
func (r *rig) settled(since time.Time) time.Time {
	r.b.Helper()
	ctx, cancel := context.WithTimeout(r.b.Context(), patience)
	defer cancel()
	at, err := r.console.after(ctx, since, multiUser)
	if err != nil {
		r.b.Fatal(err)
	}
	return at
}

func (r *rig) git(args ...string) {
	r.b.Helper()
	if _, err := r.work.Run(r.b.Context(), args...); err != nil {
		r.b.Fatal(err)
	}
}

// toWeb commits the node's other role.
func (r *rig) toWeb() {
	r.b.Helper()
	name := filepath.Join(r.work.Dir, "hosts.cue")
	text, err := os.ReadFile(name)
	if err != nil {
		r.b.Fatal(err)
	}
	changed := bytes.Replace(text, []byte(`role: "idle"`), []byte(`role: "web"`), 1)
	if bytes.Equal(changed, text) {
		r.b.Fatalf("%q has no host in role idle", name)
	}
	if err := os.WriteFile(name, changed, 0o644); err != nil {
		r.b.Fatal(err)
	}
	r.git("commit", "--quiet", "-a", "-m", node+": from idle to web")
}

func (r *rig) revert() {
	r.b.Helper()
	r.git("revert", "--no-edit", "HEAD")
}

// switchTo commits a change, pushes it, and follows the node into the new role.
func (r *rig) switchTo(role string, commit func()) journey {
	r.b.Helper()
	commit()
	start := time.Now()
	r.git("push", "--quiet", "origin", "HEAD")
	r.awaitHealthy(role)
	last := r.settled(start)
	return r.journey(role, start, last)
}

// journey puts together what the server recorded and what the console said.
func (r *rig) journey(role string, start, multi time.Time) journey {
	r.b.Helper()
	h := r.host()
	status, err := r.client.Status(r.b.Context())
	if err != nil {
		r.b.Fatal(err)
	}
	if len(h.Boots) < 2 {
		r.b.Fatalf("%s has %d boots on record, want the one before the switch and the one after", node, len(h.Boots))
	}
	now, before := h.Boots[0], h.Boots[1]
	j := journey{title: role, bytes: now.Bytes}
	mark := func(b api.Boot, stage any) time.Time { return r.mark(b, fmt.Sprint(stage)) }
	j.add("push", nobody, start)
	j.add("push to in force: fetch and load", byTroupe, status.AppliedAt)
	j.add("plan and assignment", byTroupe, h.Assignment.Since)
	j.add("the agent is told, and has all in its cache", byTroupe, mark(before, agentapi.StageStage))
	j.add(lastReport, byTroupe, mark(before, agentapi.StageReboot))
	reset := r.seen(start, restarts)
	j.add("shutdown", bySystemd, reset)
	j.add("BIOS and iPXE up to its DHCP", byFirmware, mark(now, netboot.StageOffer))
	j.add("iPXE's DHCP up to its script", byFirmware, mark(now, netboot.StageScript))
	j.add("iPXE loads kernel and initramfs", byLoading, mark(now, netboot.StageKernel))
	j.add(bootFirmware, byKernel, r.seen(reset, kernelSpeak))
	j.add(bootKernel, byKernel, r.seen(reset, agentStarts))
	j.add("agent: drivers, network", byTroupe, mark(now, agentapi.StageAgent))
	j.add("agent: hello, cache", byTroupe, mark(now, agentapi.StageCache))
	j.add("agent: all is in the cache", byTroupe, mark(now, agentapi.StageFetch))
	j.add("agent: mount", byTroupe, mark(now, agentapi.StageMount))
	j.add(readyToSwitch, byTroupe, mark(now, agentapi.StageSwitch))
	j.add(bootSystemd, bySystemd, r.seen(reset, systemdIs))
	j.add("systemd starts the agent's service", bySystemd, mark(now, agentapi.StageService))
	healthy := mark(now, agentapi.StageHealthy)
	if role == "web" { // whose check wants the web server
		j.add("web.service", bySystemd, r.seen(reset, webStarted))
		j.add("healthy", byTroupe, healthy)
		j.add(bootMultiUser, afterwards, multi)
	} else { // which has no check, and is healthy once the system is up
		j.add(bootMultiUser, bySystemd, multi)
		j.add("healthy", byTroupe, healthy)
	}
	return j
}

// mark is when a boot last reached a stage.
func (r *rig) mark(boot api.Boot, stage string) time.Time {
	r.b.Helper()
	for _, m := range slices.Backward(boot.Marks) {
		if m.Stage == stage {
			return m.Time
		}
	}
	r.b.Fatalf("the timeline of boot %s lacks %s: %+v", boot.ID, stage, boot.Marks)
	return time.Time{}
}

// seen is when the console said something that it must have said by now.
func (r *rig) seen(since time.Time, re *regexp.Regexp) time.Time {
	r.b.Helper()
	ctx, cancel := context.WithTimeout(r.b.Context(), 5*time.Second)
	defer cancel()
	at, err := r.console.after(ctx, since, re)
	if err != nil {
		r.b.Fatal(err)
	}
	return at
}

// release is what a role's nodes run.
func (r *rig) release(role string) images.Release {
	r.b.Helper()
	id := r.host().Running
	all, err := r.client.Releases(r.b.Context())
	if err != nil {
		r.b.Fatal(err)
	}
	i := slices.IndexFunc(all, func(rel api.Release) bool { return rel.ID == id })
	if i < 0 {
		r.b.Fatalf("the release %s that %s runs as %s is not listed", id, node, role)
	}
	return all[i].Content
}

// sizes prints what travels to a node before its agent runs.
func (r *rig) sizes() {
	r.b.Helper()
	prog, err := os.ReadFile(r.agent)
	if err != nil {
		r.b.Fatal(err)
	}
	var segment bytes.Buffer
	if err := initramfs.Agent(&segment, bytes.NewReader(prog), ""); err != nil {
		r.b.Fatal(err)
	}
	agent, modules := int64(segment.Len()), r.base.Modules.Size
	t := table{title: "sizes (MB)"}
	t.printf("")
	t.printf("%s", t.title)
	for _, row := range []struct {
		name string
		size int64
		goal string
	}{
		{"the agent, stripped", int64(len(prog)), ""},
		{"initramfs: the agent's part, compressed", agent, ""},
		{"initramfs: modules and tools, compressed", modules, ""},
		{"initramfs", agent + modules, "  goal < 16"},
		{"kernel", r.base.Kernel.Size, ""},
		{"base image (stays in the node's cache)", r.base.Image.Size, ""},
	} {
		t.printf("  %-46s %9.2f%s", row.name, float64(row.size)/1e6, row.goal)
	}
	fmt.Print(t.String())
	r.b.ReportMetric(float64(agent+modules)/1e6, "initramfs-MB")
}

// answers is what our HTTP server takes for a boot: for the script, and for all bytes of kernel and initramfs. It is asked
// by a machine that is none, over the lab's door, by which it takes a little longer than it really does.
func (r *rig) answers() (script, files time.Duration) {
	r.b.Helper()
	const rounds = 11
	var scripts, all []time.Duration
	for range rounds {
		start := time.Now()
		text := r.get(r.lab.ServerURL() + "/boot/ipxe?mac=02:00:00:00:00:01&arch=0")
		scripts = append(scripts, time.Since(start))
		start = time.Now()
		n := 0
		for line := range strings.Lines(text) {
			if f := strings.Fields(line); len(f) > 3 && (f[0] == "kernel" || f[0] == "initrd") {
				r.get(f[3])
				n++
			}
		}
		if n != 3 {
			r.b.Fatalf("the script has %d files to load, want a kernel and two parts of an initramfs:\n%s", n, text)
		}
		all = append(all, time.Since(start))
	}
	return median(scripts), median(all)
}

func (r *rig) get(url string) string {
	r.b.Helper()
	req, err := http.NewRequestWithContext(r.b.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		r.b.Fatal(err)
	}
	resp, err := r.lab.HTTP().Do(req)
	if err != nil {
		r.b.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		r.b.Fatalf("GET %s: %s, %v", url, resp.Status, err)
	}
	return string(body)
}
