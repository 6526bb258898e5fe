package load

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Evaluate is what the evaluating child does: it limits its own process, reads from in what a Loader wrote there, and
// writes the results to out. A fleet that takes more than the limits ends the process.
func Evaluate(in io.Reader, out io.Writer) error {
	req, err := decodeRequest(in)
	if err != nil {
		return err
	}
	if err := limitProcess(req.Memory); err != nil {
		return err
	}
	return evaluateAll(req, out)
}

// maxStack is what one goroutine's stack may take: Go's own bound of 1 GB lets a recursion fill the memory first.
const maxStack = 128 << 20

// limitProcess lets this process grow by no more than memory bytes, and keeps it from leaving a core file.
func limitProcess(memory int64) error {
	size, err := addressSpace()
	if err != nil {
		return fmt.Errorf("limiting the evaluator's memory: %w", err)
	}
	// Much of the address space that a Go program has is only reserved, so the limit counts from there.
	space := uint64(size + memory) //nolint:gosec // neither is negative
	if err := unix.Setrlimit(unix.RLIMIT_AS, &unix.Rlimit{Cur: space, Max: space}); err != nil {
		return fmt.Errorf("limiting the evaluator's memory: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("limiting the evaluator's core file: %w", err)
	}
	debug.SetMemoryLimit(memory / 10 * 9)
	debug.SetGCPercent(400) // a shard's garbage is small beside the limit, above which Go collects it more often
	debug.SetMaxStack(int(min(maxStack, memory)))
	return nil
}

// addressSpace is the size in bytes of this process's address space (proc(5), statm, first field).
func addressSpace() (int64, error) {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	first, _, _ := strings.Cut(string(b), " ")
	pages, err := strconv.ParseInt(first, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("reading /proc/self/statm: %w", err)
	}
	return pages * int64(os.Getpagesize()), nil
}

// evaluateAll evaluates the shards of req, several at once.
func evaluateAll(req *request, out io.Writer) error {
	var (
		mu    sync.Mutex // guards enc and first
		enc   = json.NewEncoder(out)
		first error
		next  = make(chan int)
		wait  sync.WaitGroup
	)
	write := func(r response) {
		mu.Lock()
		defer mu.Unlock()
		if err := enc.Encode(r); err != nil && first == nil {
			first = fmt.Errorf("writing a result: %w", err)
		}
	}
	for range min(req.Workers, len(req.Shards)) {
		wait.Go(func() {
			var w worker
			for i := range next {
				write(response{Begin: &i})
				write(response{End: &i, Result: w.evaluate(req, req.Shards[i])})
			}
		})
	}
	for i := range req.Shards {
		next <- i
	}
	close(next)
	wait.Wait()
	return first
}
