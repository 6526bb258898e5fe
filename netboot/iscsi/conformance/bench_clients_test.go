package conformance

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// A load is what qemu-img bench asks a unit for.
type load struct {
	requests int
	depth    int
	size     int // bytes of a request
	step     int // bytes from one request to the next; 0: size
	offset   int64
	fua      bool // write, and have each write be durable
}

var (
	qemuTime = regexp.MustCompile(`Run completed in ([0-9.]+) seconds`)
	perfRate = regexp.MustCompile(`iops average (\d+) \([^)]*\) *\n`)
)

// qemuImg gives the requests per second that QEMU's initiator gets.
func qemuImg(b *testing.B, url string, l load) float64 {
	b.Helper()
	args := []string{"bench", "-f", "raw", "-c", strconv.Itoa(l.requests), "-d", strconv.Itoa(l.depth), "-s", strconv.Itoa(l.size), "-S", strconv.Itoa(l.step), "-o", strconv.FormatInt(l.offset, 10)}
	if l.fua {
		args = append(args, "-w", "-t", "writethrough") // each write carries FUA where the unit takes it, else a flush follows it
	}
	out, err := exec.CommandContext(b.Context(), "qemu-img", append(args, url)...).CombinedOutput()
	took := qemuTime.FindSubmatch(out)
	if err != nil || took == nil {
		b.Fatalf("qemu-img %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	seconds, err := strconv.ParseFloat(string(took[1]), 64)
	if err != nil {
		b.Fatal(err)
	}
	return float64(l.requests) / seconds
}

// perf gives the requests per second that so many processes of iscsi-perf get together, each with a session of its own. What
// they did counts over the time from the first one's start to the last one's end.
func perf(b *testing.B, url string, sessions, depth, size int) float64 {
	b.Helper()
	const seconds = 3
	var mu sync.Mutex // guards sum and fault
	var sum float64
	var fault error
	var wg sync.WaitGroup
	begin := time.Now()
	for range sessions {
		wg.Go(func() {
			cmd := exec.CommandContext(b.Context(), "iscsi-perf", "-m", strconv.Itoa(depth), "-b", strconv.Itoa(size/512), "-t", strconv.Itoa(seconds), url)
			out, err := cmd.CombinedOutput()
			rate := perfRate.FindSubmatch(out)
			mu.Lock()
			defer mu.Unlock()
			if err != nil || rate == nil {
				fault = fmt.Errorf("iscsi-perf: %w\n%s", err, out)
				return
			}
			n, _ := strconv.ParseFloat(string(rate[1]), 64) // the expression lets nothing but digits pass
			sum += n * seconds
		})
	}
	wg.Wait()
	if fault != nil {
		b.Fatal(fault)
	}
	return sum / time.Since(begin).Seconds()
}

// iperf gives how many messages of 256 KiB a second one TCP connection over loopback carries. Where the system has BBR, which
// our target does not use on loopback, reno is the one to be compared with.
func iperf(b *testing.B, options ...string) float64 {
	b.Helper()
	port := freePort(b)
	srv := exec.CommandContext(b.Context(), "iperf3", "--server", "--one-off", "--forceflush", "--bind", "127.0.0.1", "--port", port)
	stdout, err := srv.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := srv.Start(); err != nil {
		b.Fatal(err)
	}
	said := bufio.NewScanner(stdout)
	for said.Scan() && !strings.Contains(said.Text(), "listening") {
	}
	args := append([]string{"--client", "127.0.0.1", "--port", port, "--length", "256K", "--time", "2", "--json"}, options...)
	out, err := exec.CommandContext(b.Context(), "iperf3", args...).Output()
	if err != nil {
		b.Fatalf("iperf3: %v\n%s", err, out)
	}
	for said.Scan() { // to its end
	}
	if err := srv.Wait(); err != nil {
		b.Fatalf("iperf3's server: %v", err)
	}
	var report struct {
		End struct {
			Received struct {
				BitsPerSecond float64 `json:"bits_per_second"`
			} `json:"sum_received"`
		} `json:"end"`
	}
	if err := json.NewDecoder(bytes.NewReader(out)).Decode(&report); err != nil {
		b.Fatal(err)
	}
	return report.End.Received.BitsPerSecond / 8 / (256 << 10)
}
