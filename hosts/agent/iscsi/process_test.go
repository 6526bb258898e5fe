package iscsi

import (
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agent/netup"
)

var unspecified netip.AddrPort

// program puts this test's own program into a directory, to be a keeper there.
func program(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	src, err := os.Open(exe)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	path := filepath.Join(t.TempDir(), "keeper")
	dst, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(content(t, filepath.Join(filepath.Dir(path), "log")))
		}
	})
	return path
}

func started(t *testing.T, cfg Config) *Session {
	t.Helper()
	path := program(t)
	s, err := Start(path, filepath.Dir(path), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestSession(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	cfg := testConfig(f.start(t, "127.0.0.1:0"))
	old := cfg
	old.Secret = "an old secret"
	s := started(t, old)
	st, err := s.Await(t.Context(), func(st Status) {
		if !st.Refused {
			t.Errorf("status %+v, want a refusal", st)
		}
		if err := s.Configure(cfg); err != nil {
			t.Error(err)
		}
	})
	if err != nil || !st.Up || st.Logins != 1 {
		t.Errorf("status %+v, %v", st, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Forget(); err != nil {
		t.Error(err)
	}
	if _, err := ReadStatus(s.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("status of a session that is over: %v", err)
	}
}

// A keeper outlives its starter, is not told to end by a signal that a shutdown sends, and looks like one to systemd.
func TestSessionIsKept(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	portal := f.start(t, "127.0.0.1:0")
	s := started(t, testConfig(portal))
	if _, err := s.Await(t.Context(), func(Status) {}); err != nil {
		t.Fatal(err)
	}
	if err := s.Keep(); err != nil {
		t.Fatal(err)
	}
	if err := s.control.Close(); err != nil {
		t.Fatal(err)
	}
	pid := s.process.Pid
	if err := s.process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if line := content(t, "/proc/"+strconv.Itoa(pid)+"/cmdline"); line != processName+"\x00"+Argument+"\x00" {
		t.Errorf("its command line is %q", line)
	}
	if kept, err := IsKept(s.dir); !kept || err != nil {
		t.Errorf("IsKept: %v, %v", kept, err)
	}
	f.kill()
	f.start(t, portal.String())
	for st := (Status{}); !st.Up || st.Logins != 2; {
		if _, ok := <-s.changed; !ok {
			t.Fatal("the keeper ended")
		}
		var err error
		if st, err = ReadStatus(s.dir); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		t.Error(err)
	}
	if kept, err := IsKept(s.dir); kept || err != nil {
		t.Errorf("IsKept after it was killed: %v, %v", kept, err)
	}
}

func TestKeeperIsResident(t *testing.T) {
	f := &fakeTarget{secret: testSecret, mutual: testMutual}
	s := started(t, testConfig(f.start(t, "127.0.0.1:0")))
	if _, err := s.Await(t.Context(), func(Status) {}); err != nil {
		t.Fatal(err)
	}
	proc := "/proc/" + strconv.Itoa(s.process.Pid)
	if !strings.Contains(content(t, proc+"/smaps_rollup"), "Locked:") || strings.Contains(content(t, proc+"/status"), "VmLck:\t       0 kB") {
		t.Error("its memory is not locked")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestStartSaysWhatIsWrong(t *testing.T) {
	cfg := testConfig(unspecified)
	if _, err := Start("/nowhere/keeper", t.TempDir(), cfg); err == nil {
		t.Error("a config without a portal is taken")
	}
	f := &fakeTarget{}
	if _, err := Start("/nowhere/keeper", t.TempDir(), testConfig(f.start(t, "127.0.0.1:0"))); !errors.Is(err, unix.ENOENT) {
		t.Errorf("a program that is not there: %v", err)
	}
}

func TestAwaitHearsOfTheEnd(t *testing.T) {
	f := &fakeTarget{}
	s, err := Start("/bin/true", t.TempDir(), testConfig(f.start(t, "127.0.0.1:0")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Await(t.Context(), func(Status) {}); !errors.Is(err, ErrEnded) {
		t.Errorf("Await: %v, want %v", err, ErrEnded)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestChangeConfig(t *testing.T) {
	dir := t.TempDir()
	if err := ChangeConfig(dir, func(*Config) { t.Error("there is none") }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without a config: %v", err)
	}
	f := &fakeTarget{}
	cfg := testConfig(f.start(t, "127.0.0.1:0"))
	if err := WriteConfig(dir, cfg); err != nil {
		t.Fatal(err)
	}
	if err := ChangeConfig(dir, func(c *Config) { c.Secret = "new" }); err != nil {
		t.Fatal(err)
	}
	if got := content(t, filepath.Join(dir, configFile)); !strings.Contains(got, `"secret":"new"`) || !strings.Contains(got, cfg.Initiator) {
		t.Errorf("config %s", got)
	}
	fi, err := os.Stat(filepath.Join(dir, configFile))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v: it has secrets", fi.Mode(), err)
	}
}

// Secrets and addresses change at the same time: none of these changes is lost.
func TestChangesOfAConfigAddUp(t *testing.T) {
	dir := t.TempDir()
	f := &fakeTarget{}
	cfg := testConfig(f.start(t, "127.0.0.1:0"))
	if err := WriteConfig(dir, cfg); err != nil {
		t.Fatal(err)
	}
	const each = 20
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range each {
				if err := ChangeConfig(dir, func(c *Config) { c.Target += "n" }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	moved := &netup.Lease{Interface: "eth1"}
	if err := ChangeConfig(dir, func(c *Config) { c.Lease = moved }); err != nil {
		t.Fatal(err)
	}
	run, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer run.Close()
	got, err := places{run: run}.config()
	if want := cfg.Target + strings.Repeat("n", 4*each); err != nil || got.Target != want {
		t.Errorf("%d changes of %d are there: %v", len(got.Target)-len(cfg.Target), 4*each, err)
	}
	cfg.Secret, cfg.Lease = "new", &netup.Lease{Interface: "eth0"}
	if err := (&Session{dir: dir}).Configure(cfg); err != nil {
		t.Fatal(err)
	}
	if got, err = (places{run: run}).config(); err != nil || got.Secret != "new" || got.Lease.Interface != "eth1" {
		t.Errorf("after other secrets from somebody who does not know of the new address: %+v, %v", got, err)
	}
}

func TestCheckConfig(t *testing.T) {
	f := &fakeTarget{}
	good := testConfig(f.start(t, "127.0.0.1:0"))
	for name, change := range map[string]func(*Config){
		"no portal": func(c *Config) { c.Portal = unspecified }, "no target": func(c *Config) { c.Target = "" },
		"spaces": func(c *Config) { c.Initiator = "iqn.2026-11.dev.troupe:a b" }, "no secret": func(c *Config) { c.Secret = "" },
		"a NUL": func(c *Config) { c.Target = "iqn\x00SessionType=Discovery" }, "a long name": func(c *Config) { c.Target = strings.Repeat("n", 224) },
		"one way": func(c *Config) { c.User, c.Secret = "", "" }, "one secret": func(c *Config) { c.Secret = c.MutualSecret },
	} {
		c := good
		change(&c)
		if c.check() == nil {
			t.Errorf("%s: %+v is taken", name, c)
		}
	}
	if err := good.check(); err != nil {
		t.Error(err)
	}
}
