package testbed

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/fsnotify/fsnotify"
)

// ConsolePath is the file with all that a machine's console said since the lab's directory was made.
func (c *Client) ConsolePath(node string) string {
	return filepath.Join(c.dir, nodesDir, node, consoleFile)
}

// Console is what a machine's console said since the lab's directory was made.
func (c *Client) Console(node string) (string, error) {
	b, err := os.ReadFile(c.ConsolePath(node))
	if os.IsNotExist(err) {
		return "", nil
	}
	return string(b), err
}

// FollowConsole writes to w what a machine's console says, from the given offset on, until ctx ends. That is its error.
func (c *Client) FollowConsole(ctx context.Context, node string, from int64, w io.Writer) error {
	return follow(ctx, c.ConsolePath(node), from, func(b []byte) (bool, error) {
		_, err := w.Write(b)
		return false, err
	})
}

// WaitConsole waits until re matches something that a machine's console says from the given offset on, and returns the
// offset behind that. So a test that goes on from there takes nothing for new that is old; 0 is the beginning.
func (c *Client) WaitConsole(ctx context.Context, node string, from int64, re *regexp.Regexp) (int64, error) {
	var said []byte
	end := from
	err := follow(ctx, c.ConsolePath(node), from, func(b []byte) (bool, error) {
		said = append(said, b...)
		at := re.FindIndex(said)
		if at == nil {
			return false, nil
		}
		end = from + int64(at[1])
		return true, nil
	})
	if err != nil {
		return from, fmt.Errorf("waiting for %q on the console of node %q: %w; it said last:\n%s", re, node, err, lastLines(said, 20))
	}
	return end, nil
}

// AttachConsole connects to a machine's console, for reading and writing. One at a time can; a second one waits.
func (c *Client) AttachConsole(ctx context.Context, node string) (net.Conn, error) {
	return dialUnix(ctx, filepath.Join(c.dir, nodesDir, node, consoleSock))
}

// Failure is what somebody wants to see who has to find out what went wrong: the last lines that the lab, the server and
// each machine said.
func (c *Client) Failure() string {
	var b strings.Builder
	show := func(title, path string, lines int) {
		said, err := tailFile(path, lines)
		switch {
		case os.IsNotExist(err) || err == nil && said == "":
			said = "(nothing)"
		case err != nil:
			said = err.Error()
		}
		fmt.Fprintf(&b, "---- %s: the last lines of %s\n%s\n", title, path, said)
	}
	show("lab", filepath.Join(c.dir, logFile), 10)
	show("server", filepath.Join(c.dir, serveLog), 40)
	for _, n := range c.rec.Nodes {
		show("console of "+n.Name, c.ConsolePath(n.Name), 12)
	}
	return b.String()
}

// ServeLog is the file with all that the server said.
func (c *Client) ServeLog() string { return filepath.Join(c.dir, serveLog) }

// follow hands to each what is in a file from an offset on, and what is appended to it, until each says that it is done,
// or ctx ends. The file may not be there yet; its directory must be.
func follow(ctx context.Context, path string, from int64, each func([]byte) (done bool, err error)) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching %q: %w", path, err)
	}
	defer watcher.Close()
	if err := watcher.Add(filepath.Dir(path)); err != nil {
		return fmt.Errorf("watching %q: %w", path, err)
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := readAt(path, buf, from)
		if err != nil {
			return err
		}
		if n > 0 {
			from += int64(n)
			if done, err := each(buf[:n]); done || err != nil {
				return err
			}
			continue
		}
		select {
		case <-watcher.Events:
		case err := <-watcher.Errors:
			return fmt.Errorf("watching %q: %w", path, err)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// readAt reads what a file has at an offset: nothing at its end, or where there is no file.
func readAt(path string, buf []byte, from int64) (int, error) {
	f, err := os.Open(path)
	if os.IsNotExist(err) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	defer f.Close()
	n, err := f.ReadAt(buf, from)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n, err
}

// tailFile is the last lines of a file, as text.
func tailFile(path string, lines int) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	const most = 64 << 10
	b := make([]byte, min(info.Size(), most))
	n, err := f.ReadAt(b, info.Size()-int64(len(b)))
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	return lastLines(b[:n], lines), nil
}

// escapes are what firmware and systemd send to terminals: ECMA-48 control sequences, and a few short ones.
var escapes = regexp.MustCompile("\x1b(\\[[0-?]*[ -/]*[@-~]|[@-Z\\\\-_=>]|c)")

// lastLines is the last lines of a console's output as plain text. A line that was drawn over counts as its last state.
func lastLines(b []byte, n int) string {
	b = bytes.ReplaceAll(escapes.ReplaceAll(b, nil), []byte("\r\n"), []byte("\n"))
	all := strings.Split(strings.TrimRight(string(b), "\r\n \x00"), "\n")
	all = all[max(0, len(all)-n):]
	for i, line := range all {
		line = strings.TrimRight(line, "\r ")
		line = line[strings.LastIndexByte(line, '\r')+1:]
		all[i] = strings.Map(printable, line)
	}
	return strings.Join(all, "\n")
}

func printable(r rune) rune {
	if r < ' ' && r != '\t' || r == 0x7f {
		return -1
	}
	return r
}
