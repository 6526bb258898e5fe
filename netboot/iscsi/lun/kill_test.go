package lun

import (
	"bufio"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// killDir, where it is set, makes of the test binary a process that writes to a delta for ever: see TestKilled.
const killDir = "LUN_KILL_DIR"

// writeForEver writes to the delta in dir and says on standard output what it is about to do, and when that is done.
func writeForEver(dir string) {
	base, err := OpenImage(filepath.Join(dir, "base"))
	if err != nil {
		panic(err)
	}
	d, err := OpenDelta(base, filepath.Join(dir, "delta"), 0, "base")
	if err != nil {
		panic(err)
	}
	in := bufio.NewReader(os.Stdin)
	for {
		var what string
		var block, n int64
		var id uint64
		if _, err := fmt.Fscanln(in, &what, &block, &n, &id); err != nil {
			panic(err)
		}
		switch what {
		case "write":
			p := make([]byte, 0, n*BlockSize)
			for i := range n {
				p = append(p, content(block+i, id)...)
			}
			_, err = d.WriteAt(p, block*BlockSize)
		case "zero":
			err = d.Zero(block*BlockSize, n*BlockSize, true)
		case "sync":
			err = d.Sync()
		}
		if err != nil {
			panic(err)
		}
		fmt.Println("done") // to TestKilled
	}
}

// A child is a process that has the delta. It is a medium, of which only the changing works.
type child struct {
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	size int64
	left int // things to do until it is killed, while it does the last
}

func startChild(t *testing.T, dir string, size int64) *child {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), killDir+"="+dir)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return &child{cmd, in, bufio.NewReader(out), size, 20 + rand.IntN(60)}
}

// ask has the child do something. The last time it is killed at any moment of that.
func (c *child) ask(what string, block, n int64, id uint64) error {
	_, err := fmt.Fprintln(c.in, what, block, n, id)
	if err != nil {
		return err
	}
	c.left--
	if c.left == 0 {
		for range rand.IntN(200_000) { // any moment, while it works
			continue
		}
		_ = c.cmd.Process.Kill() // it cannot have ended: it is not waited for yet
	}
	line, err := c.out.ReadString('\n')
	if err == nil && line != "done\n" {
		err = fmt.Errorf("the child says %q", line)
	}
	return err
}

func (c *child) ReadAt([]byte, int64) (int, error) { panic("not asked of a child") }
func (c *child) Size() int64                       { return c.size }
func (c *child) Sync() error                       { return c.ask("sync", 0, 0, 0) }

func (c *child) Zero(off, n int64, _ bool) error {
	return c.ask("zero", off/BlockSize, n/BlockSize, 0)
}

func (c *child) WriteAt(p []byte, off int64) (int, error) {
	block := off / BlockSize
	id := (uint64(p[0]) | uint64(p[1])<<8 | uint64(p[2])<<16 | uint64(p[3])<<24 | uint64(p[4])<<32 | uint64(p[5])<<40 | uint64(p[6])<<48 | uint64(p[7])<<56)
	id = (id ^ uint64(block) ^ 0x5a5a5a5a) >> 32
	return len(p), c.ask("write", block, int64(len(p))/BlockSize, id)
}

// TestKilled kills a process that writes to a delta, at any moment, again and again, and finds all that was acknowledged.
func TestKilled(t *testing.T) {
	dir := t.TempDir()
	size := int64(4*perSector+30) * clusterSize
	base := randomBytes(int(size))
	write(t, filepath.Join(dir, "base"), base)
	moments := 0
	h := newHistory(base, func() int { moments++; return moments })
	for range 25 {
		c := startChild(t, dir, size)
		var err error
		for err == nil {
			err = h.random(c, 3)
		}
		ended := c.cmd.Wait()
		if status, ok := c.cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
			t.Fatalf("the child, with %d things to do, ended: %v, %v", c.left, err, ended)
		}
		checkKilled(t, dir, h, crash{op: moments})
		moments++
	}
}

// checkKilled opens the delta that a killed process left, as whoever comes next does.
func checkKilled(t *testing.T, dir string, h *history, c crash) {
	t.Helper()
	image := openImageT(t, filepath.Join(dir, "base"))
	defer image.Close()
	d := must(OpenDelta(image, filepath.Join(dir, "delta"), 0, "base"))(t)
	if err := h.check(d, hot(d.Size()), c); err != nil {
		t.Fatal(err)
	}
	// Close would sync; a process that is killed does not.
	if err := d.mem.close(); err != nil {
		t.Fatal(err)
	}
	if err := d.f.Close(); err != nil {
		t.Fatal(err)
	}
}
