// Package command starts programs that lie on a disk which may not answer.
//
// Go starts a program as vfork(2) does: its thread goes on once the kernel has read the headers of the program, and of
// the interpreter that these name: that of a script, and the dynamic loader of an ELF file. Until then the runtime cannot
// take the thread's processor away (Go 1.26, syscall/exec_linux.go). Where the disk does not answer, all of a process with
// one processor stands still, and of any other from its next garbage collection on: seen with a file system that answers
// no read. So what the kernel reads until then is read before, in a way that holds up nobody else.
package command

import (
	"bytes"
	"context"
	"os"
	"os/exec"
)

// page is how much of a program is read, in bytes: the kernel wants its first 256 to know what it is (BINPRM_BUF_SIZE).
const page = 4096

// chain is how many files a start may lead to: five scripts, the program, and its loader (exec_binprm in Linux, fs/exec.c).
const chain = 7

// New is exec.CommandContext, but waits, for as long as the disk does, for what the start of the program would wait for.
// Whether it can be started is left to the start.
func New(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	path := cmd.Path
	for i := 0; i < chain && path != ""; i++ {
		path = read(path)
	}
	return cmd
}

// read reads what the kernel does of a program before it starts it, and returns the path of what that names as its
// interpreter; "": nothing, or it cannot be read.
func read(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b := make([]byte, page)
	n, _ := f.ReadAt(b, 0) // the start tells what is wrong
	line, isScript := bytes.CutPrefix(b[:n], []byte("#!"))
	if !isScript {
		return interpreter(f)
	}
	line, _, _ = bytes.Cut(line, []byte("\n"))
	if words := bytes.Fields(line); len(words) > 0 {
		return string(words[0])
	}
	return ""
}
