package conformance

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
)

const (
	rounds    = 5
	lunSize   = 1 << 30 // bytes
	cluster   = 4096    // bytes of a copy-on-write disk's clusters
	idle      = 1000    // sessions whose memory is measured
	manyPaths = 64      // sessions at once
	// stride leads over the whole unit before it comes to a block again: an odd number of 4 KiB blocks, far from one another.
	stride = 100003 * cluster
	// window is the part of a unit that one round writes.
	window = 32 << 20
)

// Titles of measures that others refer to.
const (
	pipe        = "iperf3, one stream of 256 KiB messages, reno: /s"
	pacedPipe   = "iperf3, the same, as the system would have it: /s"
	oneSession  = "read 256 KiB, 1 session of depth 32: /s"
	manySession = "read 256 KiB, 64 sessions of depth 4: /s"
)

// A reading is one way to read, of a read-only unit and of copy-on-write units.
type reading struct {
	load       load
	ours, tgt  int // requests, for some 2 s
	title      string
	none, half string // the titles for units of which nothing is written, and of which every second cluster is
	goal       string
}

var (
	sequential = reading{
		load: load{depth: 32, size: 256 << 10}, ours: 24000, tgt: 8000, goal: ">= 4",
		title: "read 256 KiB in sequence, depth 32: /s",
		none:  "  in sequence, copy-on-write, nothing written: /s",
		half:  "  in sequence, copy-on-write, every second cluster: /s",
	}
	random = reading{
		load: load{depth: 32, size: 4 << 10, step: stride}, ours: 200000, tgt: 60000, goal: ">= 3",
		title: "read 4 KiB at random, depth 32: /s",
		none:  "  at random, copy-on-write, nothing written: /s",
		half:  "  at random, copy-on-write, every second cluster: /s",
	}
)

// A bench is both servers over files of the same bytes.
type bench struct {
	*testing.B
	ours, tgt *server
	report    report
}

// BenchmarkTarget measures our target beside tgt's and iperf3: five rounds of everything, each measure of all in turn.
func BenchmarkTarget(b *testing.B) {
	for b.Loop() {
		n := newBench(b)
		for round := range rounds {
			b.Logf("round %d of %d", round+1, rounds)
			n.reads()
			n.writes(round)
			n.sessions()
			n.latency()
		}
		n.memory()
		n.print()
	}
}

func newBench(b *testing.B) *bench {
	b.Helper()
	dir := b.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	writePattern(b, file("base"), lunSize)
	writePattern(b, file("tgt-base"), lunSize)
	writeHalf(b, file("base"), file("half"))
	for _, name := range []string{"disk", "tgt-disk"} {
		if err := os.WriteFile(file(name), nil, 0o600); err != nil {
			b.Fatal(err)
		}
		if err := os.Truncate(file(name), lunSize); err != nil {
			b.Fatal(err)
		}
	}
	return &bench{
		B: b,
		ours: startOurs(b, "image=ro:"+file("base"), "half=cow:"+file("base")+","+file("half"),
			"none=cow:"+file("base")+","+file("none"), "written=cow:"+file("base")+","+file("written"), "disk=rw:"+file("disk")),
		tgt: startTgt(b, "image="+file("tgt-base"), "disk="+file("tgt-disk")),
	}
}

// writeHalf makes a copy-on-write disk of which every second cluster is written.
func writeHalf(b *testing.B, base, delta string) {
	b.Helper()
	image, err := lun.OpenImage(base)
	if err != nil {
		b.Fatal(err)
	}
	defer closeMedium(b, image)
	d, err := lun.OpenDelta(image, delta, 0, "base")
	if err != nil {
		b.Fatal(err)
	}
	defer closeMedium(b, d)
	buf := make([]byte, cluster)
	for off := int64(0); off < lunSize; off += 2 * cluster {
		if _, err := d.WriteAt(buf, off); err != nil {
			b.Fatal(err)
		}
	}
	if err := d.Sync(); err != nil {
		b.Fatal(err)
	}
}

// reads takes one round of the measures of throughput.
func (n *bench) reads() {
	for _, r := range []reading{sequential, random} {
		run := func(title, goal string, s *server, unit string, requests int) {
			l := r.load
			l.requests = requests
			n.report.row(title, goal).add(s.name, qemuImg(n.B, s.url(unit), l))
		}
		run(r.title, r.goal, n.ours, "image", r.ours)
		run(r.title, r.goal, n.tgt, "image", r.tgt)
		run(r.none, "", n.ours, "none", r.ours)
		run(r.half, "", n.ours, "half", r.ours)
	}
	n.report.row(pipe, "").add("iperf3", iperf(n.B, "--congestion", "reno"))
	n.report.row(pacedPipe, "").add("iperf3", iperf(n.B))
}

// writes takes one round of the measures of writes that are durable when they are acknowledged. Each round writes a window
// that no round before it wrote, and then writes it again.
func (n *bench) writes(round int) {
	for _, depth := range []int{1, 32} {
		l := load{requests: max(1500, 100*depth), depth: depth, size: 4 << 10, offset: int64(round*2*window + depth/32*window), fua: true}
		for _, state := range []string{"new clusters", "old clusters"} {
			row := n.report.row(fmt.Sprintf("write 4 KiB with FUA, depth %d, %s: /s", depth, state), ">= 1")
			row.add("ours", qemuImg(n.B, n.ours.url("written"), l))
			row.add("tgt", qemuImg(n.B, n.tgt.url("disk"), l))
			n.report.row(fmt.Sprintf("  with FUA to a plain file, depth %d, %s: /s", depth, state), "").add("ours", qemuImg(n.B, n.ours.url("disk"), l))
		}
	}
}

// sessions takes one round of what many sessions get together, and one alone.
func (n *bench) sessions() {
	for _, s := range []*server{n.ours, n.tgt} {
		n.report.row(oneSession, "").add(s.name, perf(n.B, s.url("image"), 1, 32, 256<<10))
		n.report.row(manySession, "").add(s.name, perf(n.B, s.url("image"), manyPaths, 4, 256<<10))
	}
}

// latency takes one round of how long single reads take.
func (n *bench) latency() {
	for _, s := range []*server{n.ours, n.tgt} {
		took := n.single(s)
		for _, q := range []struct {
			title string
			part  float64
		}{{"read 4 KiB, depth 1, p50: µs", 0.50}, {"read 4 KiB, depth 1, p99: µs", 0.99}} {
			m := n.report.row(q.title, "<= 1")
			m.decimals = 1
			m.add(s.name, quantile(took, q.part))
		}
	}
}

// single reads blocks one after another, and gives what each took in microseconds.
func (n *bench) single(s *server) []float64 {
	i, err := dial(s.url("image"), 1)
	if err != nil {
		n.Fatal(err)
	}
	defer i.conn.Close()
	const reads = 20000
	took := make([]float64, 0, reads)
	for k := range reads {
		begin := time.Now()
		if err := i.read(uint32(k*stride/512%(lunSize/512)), cluster/512); err != nil {
			n.Fatal(err)
		}
		took = append(took, float64(time.Since(begin).Nanoseconds())/1000)
	}
	return took
}

// memory measures what sessions take that read once and then say nothing.
func (n *bench) memory() {
	for _, s := range []*server{n.ours, n.tgt} {
		before := anonymous(n.B, s.pid)
		for k := range idle {
			i, err := dial(s.url("image"), uint16(100+k))
			if err != nil {
				n.Fatal(err)
			}
			n.Cleanup(func() { i.conn.Close() })
			if err := i.read(uint32(k), 64<<10/512); err != nil {
				n.Fatal(err)
			}
		}
		m := n.report.row(fmt.Sprintf("memory of one of %d idle sessions: KiB", idle), "< 64")
		m.decimals = 1
		m.add(s.name, float64(anonymous(n.B, s.pid)-before)/idle)
	}
}

var anonymousLine = regexp.MustCompile(`(?m)^Anonymous: +(\d+) kB$`)

// anonymous gives the KiB of memory that a process has for itself: files that it mapped are not in it.
func anonymous(b *testing.B, pid int) int {
	b.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		b.Fatal(err)
	}
	kib := anonymousLine.FindSubmatch(maps)
	if kib == nil {
		b.Fatalf("no anonymous memory in\n%s", maps)
	}
	n, err := strconv.Atoi(string(kib[1]))
	if err != nil {
		b.Fatal(err)
	}
	return n
}

// print prints the tables and what they come to.
func (n *bench) print() {
	r := &n.report
	r.table(fmt.Sprintf("iSCSI target, 1 GiB in the page cache, loopback; medians of %d", rounds), "ours", "tgt")
	row := func(title string) *measure { return r.row(title, "") }
	beside := min(ratio(row(sequential.title), "ours", row(pipe), "iperf3"), ratio(row(sequential.title), "ours", row(pacedPipe), "iperf3"))
	for _, title := range []string{pipe, pacedPipe} {
		r.printf("%-64s %9s", title, row(title).number(row(title).median("iperf3")))
	}
	r.printf("")
	r.share("in sequence: ours to iperf3", beside, ">= 0.75")
	for _, read := range []reading{sequential, random} {
		for _, title := range []string{read.none, read.half} {
			r.share(strings.TrimSpace(strings.TrimSuffix(title, ": /s"))+", to read-only", ratio(row(title), "ours", row(read.title), "ours"), ">= 0.85")
		}
	}
	r.share("64 sessions to one", ratio(row(manySession), "ours", row(oneSession), "ours"), ">= 1")
	r.rounds("ours", "tgt", "iperf3")
	fmt.Print(r.String())
	n.ReportMetric(0, "ns/op") // it says nothing here
	n.ReportMetric(ratio(row(sequential.title), "ours", row(sequential.title), "tgt"), "sequential/tgt")
	n.ReportMetric(ratio(row(random.title), "ours", row(random.title), "tgt"), "random/tgt")
	n.ReportMetric(beside, "sequential/iperf3")
}
