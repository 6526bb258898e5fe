package watchdog

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

// kennel has devices, and notes what is done to them.
type kennel struct {
	t    *testing.T
	sys  string
	dogs map[string]*fake
}

type fake struct {
	has       uint32
	most      time.Duration
	busy      bool
	did       []string
	barksAt   time.Time // when it resets the machine
	timeout   time.Duration
	isStopped bool
}

func (f *fake) options() (uint32, error) { return f.has, nil }

func (f *fake) setTimeout(d time.Duration) error {
	if d > f.most {
		return unix.EINVAL
	}
	f.timeout = d
	f.did = append(f.did, d.String())
	return nil
}

func (f *fake) keepAlive() error {
	if !f.barksAt.IsZero() && time.Now().After(f.barksAt) {
		return errors.New("the machine was reset")
	}
	f.barksAt = time.Now().Add(f.timeout)
	return nil
}

func (f *fake) disarm() error {
	f.isStopped, f.barksAt = true, time.Time{}
	f.did = append(f.did, "disarm")
	return nil
}

func (f *fake) leave() error {
	f.did = append(f.did, "leave")
	return nil
}

func newKennel(t *testing.T) *kennel {
	return &kennel{t: t, sys: t.TempDir(), dogs: map[string]*fake{}}
}

func (k *kennel) add(name, identity string, f fake) *fake {
	k.t.Helper()
	if err := os.MkdirAll(filepath.Join(k.sys, name), 0o755); err != nil {
		k.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(k.sys, name, "identity"), []byte(identity+"\n"), 0o644); err != nil {
		k.t.Fatal(err)
	}
	k.dogs[name] = &f
	return &f
}

func (k *kennel) dog() Dog {
	return Dog{Sys: k.sys, Log: slog.New(slog.DiscardHandler), open: func(name string) (device, error) {
		if f := k.dogs[name]; !f.busy {
			return f, nil
		}
		return nil, unix.EBUSY
	}}
}

const fine = canSetTimeout | hasMagicClose

func TestArmTakesTheFirstThatServes(t *testing.T) {
	k := newKennel(t)
	k.add("watchdog0", "Software Watchdog", fake{has: fine, most: time.Hour})
	k.add("watchdog1", "taken by another program", fake{has: fine, most: time.Hour, busy: true})
	short := k.add("watchdog2", "counts to 30 s", fake{has: fine, most: 30 * time.Second})
	stops := k.add("watchdog3", "stops when it is closed", fake{has: canSetTimeout, most: time.Hour})
	hard := k.add("watchdog4", "i6300ESB timer", fake{has: fine, most: time.Hour})
	name, err := k.dog().Arm(BootTime, func() error { return errors.New("not asked for") })
	if err != nil || name != "watchdog4" {
		t.Fatalf("Arm: %q, %v", name, err)
	}
	if strings.Join(hard.did, " ") != "5m0s leave" || !short.isStopped || !stops.isStopped {
		t.Errorf("armed: %q; the others were left counting: %v, %v", hard.did, !short.isStopped, !stops.isStopped)
	}
}

func TestArmLoadsTheSoftwareWatchdog(t *testing.T) {
	k := newKennel(t)
	k.add("watchdog0", "counts to 30 s", fake{has: fine, most: 30 * time.Second})
	name, err := k.dog().Arm(BootTime, func() error {
		k.add("watchdog1", "Software Watchdog", fake{has: fine, most: time.Hour})
		return nil
	})
	if err != nil || name != "watchdog1" {
		t.Errorf("Arm: %q, %v", name, err)
	}
	empty := newKennel(t)
	if _, err := empty.dog().Arm(BootTime, func() error { return os.ErrNotExist }); !errors.Is(err, ErrNone) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("with none: %v", err)
	}
}

func TestRunPetsUntilTheEnd(t *testing.T) {
	for _, goesDown := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			k := newKennel(t)
			f := k.add("watchdog0", "x", fake{has: fine, most: time.Hour})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			defer cancel()
			if err := k.dog().Run(ctx, "watchdog0", func() bool { return goesDown }); err != nil {
				t.Fatal(err)
			}
			got, want := strings.Join(f.did, " "), "1m0s disarm"
			if goesDown {
				want = "1m0s 5m0s leave"
			}
			if got != want || goesDown && time.Until(f.barksAt) != DownTime {
				t.Errorf("goes down %v: %q, want %q; barks in %v", goesDown, got, want, time.Until(f.barksAt))
			}
		})
	}
	k := newKennel(t)
	k.add("watchdog0", "systemd has it", fake{busy: true})
	if err := k.dog().Run(t.Context(), "watchdog0", func() bool { return false }); !errors.Is(err, unix.EBUSY) {
		t.Errorf("where it is open: %v", err)
	}
}
