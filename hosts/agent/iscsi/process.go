package iscsi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
)

// Argument makes the agent's program a keeper.
const Argument = "iscsi"

// processName is argv[0] of a keeper. The "@" tells systemd that the root file system depends on it, and that a shutdown
// does not kill it (https://systemd.io/ROOT_STORAGE_DAEMONS).
const processName = "@troupe-iscsi"

// Files of a keeper in its directory, which lies in a tmpfs.
const (
	configFile = "iscsi-config.json"
	statusFile = "iscsi-status.json"
	lockFile   = "iscsi-lock" // held by the keeper: there is one at most, and whoever gets it knows that there is none
)

// Descriptors that a keeper inherits: from the first one it reads what its session is to come to, to the second one it
// writes a byte for each new status.
const (
	controlFD = 3
	noticeFD  = 4
)

// keepWord on the control descriptor says that the session outlives its starter; without it, the end of the file ends
// the session.
const keepWord = "keep\n"

// places are directories that the keeper holds open: a root of its own remains to it after switch_root, in which there is
// nothing any more.
type places struct{ sys, proc, run *os.Root }

func openPlaces(dir string) (p places, err error) {
	for _, d := range []struct {
		root **os.Root
		path string
	}{{&p.sys, "/sys"}, {&p.proc, "/proc"}, {&p.run, dir}} {
		if *d.root, err = os.OpenRoot(d.path); err != nil {
			return p, err
		}
	}
	return p, nil
}

// Main is the keeper: it holds the session that dir's config names, until its starter ends without a word. It is a
// process of its own, needs no file system but those in memory, and is to be the last that ends.
func Main(ctx context.Context, dir string, log *slog.Logger) error {
	p, lock, err := setApart(dir, log)
	if err != nil {
		return err
	}
	defer lock.Close()
	d, err := openDriver(p.sys, log)
	if err != nil {
		return err
	}
	stayResident(p.proc, log)
	return errors.Join(serve(ctx, p, d, log), d.close())
}

// setApart makes this process one that nobody ends, that waits for no disk, and, while lock is open, the one keeper with dir.
func setApart(dir string, log *slog.Logger) (p places, lock *os.File, err error) {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGPIPE)
	if err := flushesIO(); err != nil {
		log.Warn("the keeper of the iSCSI session may wait for a disk where it wants memory", "error", err)
	}
	if p, err = openPlaces(dir); err != nil {
		return p, nil, err
	}
	lock, err = p.lock()
	return p, lock, err
}

// serve holds the session until its starter ends without a word.
func serve(ctx context.Context, p places, d driver, log *slog.Logger) error {
	notice := os.NewFile(noticeFD, "notice")
	k := &keeper{
		log: log, driver: d, load: p.config,
		tell: func(st Status) {
			if err := p.setStatus(st); err != nil {
				log.Warn("the status of the iSCSI session is not told", "error", err)
			}
			_, _ = notice.Write([]byte{0}) // nobody reads it after switch_root
		},
		online: func(st Status) {
			if err := bringOnline(p.sys, st); err != nil {
				log.Warn("a disk of the iSCSI session is not back", "error", err)
			}
		},
	}
	if st, err := p.status(); err == nil && st.Logins > 0 && p.hasSession(st) {
		log.Warn("taking over an iSCSI session that nobody keeps", "session", st.Session)
		if err := k.adopt(st); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	word := &lastWord{log: log, proc: p.proc, isUp: p.isUp, end: cancel}
	k.patience, k.gone = word.patience, word.gone
	wg.Go(func() {
		if !isKept(os.NewFile(controlFD, "control")) {
			cancel()
			return
		}
		log.Info("the iSCSI session is kept", "process", os.Getpid())
		word.isKept.Store(true)
		word.run(ctx)
	})
	wg.Go(func() { (&guard{log: log, load: p.config}).run(ctx) })
	err := k.run(ctx)
	return errors.Join(err, k.closeSession())
}

// isKept waits for the starter's word.
func isKept(control io.ReadCloser) bool {
	defer control.Close()
	b, err := io.ReadAll(io.LimitReader(control, int64(len(keepWord))))
	return err == nil && string(b) == keepWord
}

func (p places) config() (Config, error) {
	var c Config
	b, err := p.run.ReadFile(configFile)
	if err != nil {
		return c, fmt.Errorf("reading what to log in to: %w", err)
	}
	if err := json.Unmarshal(b, &c); err != nil {
		return c, fmt.Errorf("reading what to log in to: %w", err)
	}
	return c, c.check()
}

func (p places) setStatus(st Status) error {
	b, err := json.Marshal(st)
	if err != nil {
		return err
	}
	const tmp = statusFile + ".new"
	if err := p.run.WriteFile(tmp, b, 0o600); err != nil {
		return err
	}
	return p.run.Rename(tmp, statusFile)
}

func (p places) status() (Status, error) {
	var st Status
	b, err := p.run.ReadFile(statusFile)
	if err != nil {
		return st, err
	}
	return st, json.Unmarshal(b, &st)
}

func (p places) isUp() bool {
	st, err := p.status()
	return err == nil && st.Up
}

// hasSession says whether the session is still in the kernel.
func (p places) hasSession(st Status) bool {
	_, err := p.sys.Stat(fmt.Sprintf("class/iscsi_session/session%d", st.Session))
	return err == nil
}

// lock makes this process the one keeper, for as long as the file is open.
func (p places) lock() (*os.File, error) {
	f, err := p.run.OpenFile(lockFile, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("the iSCSI session has a keeper: %w", err), f.Close())
	}
	return f, nil
}

// IsKept says whether there is a keeper with dir.
func IsKept(dir string) (bool, error) {
	run, err := os.OpenRoot(dir)
	if err != nil {
		return false, err
	}
	defer run.Close()
	f, err := places{run: run}.lock()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return true, nil
	}
	if err != nil {
		return false, err
	}
	return false, f.Close()
}

// ReadStatus is how the session is that a keeper with dir holds.
func ReadStatus(dir string) (Status, error) {
	run, err := os.OpenRoot(dir)
	if err != nil {
		return Status{}, err
	}
	defer run.Close()
	return places{run: run}.status()
}

// WriteConfig changes what a keeper with dir logs in to the next time.
func WriteConfig(dir string, c Config) error {
	unlock, err := lockConfig(dir)
	if err != nil {
		return err
	}
	return errors.Join(writeConfig(dir, c), unlock())
}

// writeConfig is for who holds the lock.
func writeConfig(dir string, c Config) error {
	if err := c.check(); err != nil {
		return err
	}
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	return atomicfile.WriteFile(filepath.Join(dir, configFile), b, 0o600)
}

// lockConfig waits until nobody else changes the config: one may tell of other secrets while another tells of another
// address, and each writes all of it.
func lockConfig(dir string) (unlock func() error, err error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("locking the config of the iSCSI session: %w", err), f.Close())
	}
	return f.Close, nil
}

// ChangeConfig changes some of it; os.ErrNotExist where there is none. It may be called at any time, by several processes.
func ChangeConfig(dir string, change func(*Config)) error {
	unlock, err := lockConfig(dir)
	if err != nil {
		return err
	}
	return errors.Join(changeConfig(dir, change), unlock())
}

func changeConfig(dir string, change func(*Config)) error {
	run, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer run.Close()
	c, err := places{run: run}.config()
	if err != nil {
		return err
	}
	change(&c)
	return writeConfig(dir, c)
}

// Forget removes what the keeper of a session that was closed left.
func (s *Session) Forget() error {
	var errs []error
	for _, name := range []string{configFile, statusFile, lockFile} {
		if err := os.Remove(filepath.Join(s.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// flushesIO makes this process one that the kernel does not make wait for disks when it wants memory (prctl(2),
// PR_SET_IO_FLUSHER): it is what they wait for. That holds for one thread and those that come from it, so the program is
// begun anew from that one.
func flushesIO() error {
	const (
		setIOFlusher = 57
		getIOFlusher = 58
	)
	is, err := unix.PrctlRetInt(getIOFlusher, 0, 0, 0, 0)
	if err != nil || is != 0 {
		return err // EINVAL: Linux before 5.6
	}
	// One thread calls both: exec ends all others.
	lockThread()
	if err := unix.Prctl(setIOFlusher, 1, 0, 0, 0); err != nil {
		return err
	}
	return unix.Exec("/proc/self/exe", os.Args, os.Environ())
}

// Memory of a keeper, in bytes: it collects garbage only near the limit, and holds the reserve from the start, so that it
// asks the system for none when there may be none.
const (
	memoryLimit   = 10 << 20
	memoryReserve = 2 << 20
)

// stayResident keeps all of the process in memory, and out of the way of the OOM killer.
func stayResident(proc *os.Root, log *slog.Logger) {
	debug.SetGCPercent(-1)
	debug.SetMemoryLimit(memoryLimit)
	reserve := make([]byte, memoryReserve)
	// Only what is touched: the runtime reserves far more than it uses.
	err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT)
	for i := 0; i < len(reserve); i += os.Getpagesize() {
		reserve[i] = 1
	}
	clear(reserve)
	err = errors.Join(err, lockProgram(proc))
	if f, openErr := proc.OpenFile("self/oom_score_adj", os.O_WRONLY, 0); openErr == nil {
		_, writeErr := f.WriteString("-1000")
		err = errors.Join(err, writeErr, f.Close())
	}
	if err != nil {
		log.Warn("the keeper of the iSCSI session may lose its memory", "error", err)
	}
}

// lockProgram brings the whole program into memory, and holds it there.
func lockProgram(proc *os.Root) error {
	maps, err := proc.ReadFile(strconv.Itoa(os.Getpid()) + "/maps")
	if err != nil {
		return err
	}
	for line := range bytes.Lines(maps) {
		f := strings.Fields(string(line)) // "START-END rwxp OFFSET DEVICE INODE PATH"
		if len(f) < 6 || !strings.HasPrefix(f[5], "/") {
			continue
		}
		from, to, _ := strings.Cut(f[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		if _, _, errno := unix.Syscall(unix.SYS_MLOCK, uintptr(start), uintptr(end-start), 0); errno != 0 {
			return fmt.Errorf("locking %s of the program: %w", f[0], errno)
		}
	}
	return nil
}
