// Package command starts programs that lie on a disk which may not answer.
//
// Go starts a program as vfork(2) does: its thread goes on once the kernel has read the first page of the program, and of
// the interpreter that this names. Until then the runtime cannot take the thread's processor away (Go 1.26,
// syscall/exec_linux.go). Where the disk does not answer, all of a process with one processor stands still, and of any
// other from its next garbage collection on: seen with a file system that answers no read. So these pages are read
// before, in a way that holds up nobody else.
package command

import (
	"bytes"
	"context"
	"io"
	"os"
	"os/exec"
)

// page is how much of a program is read, in bytes: the kernel wants its first 256 to know what it is (BINPRM_BUF_SIZE).
const page = 4096

// New is exec.CommandContext, but waits, for as long as the disk does, for what the start of the program would wait for.
// Whether it can be started is left to the start.
func New(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	line, isScript := bytes.CutPrefix(first(cmd.Path), []byte("#!"))
	if line, _, _ = bytes.Cut(line, []byte("\n")); !isScript {
		return cmd
	}
	if f := bytes.Fields(line); len(f) > 0 {
		first(string(f[0]))
	}
	return cmd
}

// first reads the first page of a file; nothing where that cannot be read.
func first(path string) []byte {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	b := make([]byte, page)
	n, _ := io.ReadFull(f, b) // the start tells what is wrong
	return b[:n]
}
