package testbed

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The kernel takes 107 bytes for the name of a Unix socket (unix(7)), and a test's directory alone can be longer. So
// sockets are reached by a descriptor of their directory: through /proc/self/fd every name is short.

// listenUnix listens on the socket at path, which it makes anew.
func listenUnix(ctx context.Context, path string) (net.Listener, error) {
	dir, short, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		dir.Close()
		return nil, err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", short)
	if err != nil {
		dir.Close()
		return nil, fmt.Errorf("listening on socket %q: %w", path, err)
	}
	return &unixListener{l, dir}, nil
}

// dialUnix connects to the socket at path.
func dialUnix(ctx context.Context, path string) (net.Conn, error) {
	dir, short, err := shortPath(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", short)
	if err != nil {
		return nil, fmt.Errorf("socket %q: %w", path, err)
	}
	return c, nil
}

// shortPath is a short name for path, which holds as long as dir stays open.
func shortPath(path string) (dir *os.File, short string, err error) {
	fd, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, "", &os.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Dir(path)), fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(path)), nil
}

// unixListener keeps the directory open that its socket's name is relative to: closing removes the socket by that name.
type unixListener struct {
	net.Listener
	dir *os.File
}

func (l *unixListener) Close() error {
	defer l.dir.Close()
	return l.Listener.Close()
}
