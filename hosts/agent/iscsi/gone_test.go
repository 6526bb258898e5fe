package iscsi

import (
	"bytes"
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

// An episode is how each try to log in ends for a while.
type episode struct {
	how   error
	lasts time.Duration
}

var (
	errRefused = &RefusedError{Class: 2, Detail: 1}
	errNoDisk  = &RefusedError{Class: 2, Detail: 3}
	errBusy    = &RefusedError{Class: 3, Detail: 1}
	errOdd     = &RefusedError{Class: 2, Detail: 0}
)

// A machine whose target has no disk for it any more is rebooted. One whose target is away, busy, not ready or wrong for a
// while is left alone, however long that takes.
func TestAMachineWithoutItsTargetIsRebooted(t *testing.T) {
	const day = 24 * time.Hour
	for _, tt := range []struct {
		name     string
		logins   int
		isKept   bool
		cmdline  string
		episodes []episode
		want     string // of sysrq-trigger
	}{
		{"refused", 1, true, "", []episode{{errRefused, goneTime + refusalGap}}, "b"},
		{"of another name", 3, true, "", []episode{{errNoDisk, goneTime + refusalGap}}, "b"},
		{"away, then refused", 1, true, "", []episode{{unix.ECONNREFUSED, day}, {errRefused, goneTime + refusalGap}}, "b"},
		{"refused in both ways", 1, true, "", []episode{{errNoDisk, goneTime / 2}, {errRefused, goneTime/2 + refusalGap}}, "b"},
		{"in the initramfs", 1, false, "", []episode{{errRefused, goneTimeAtBoot + refusalGap}}, "b"},
		{"powered off", 1, true, "/usr/lib/systemd/systemd-shutdown\x00poweroff\x00", []episode{{errRefused, goneTime + refusalGap}}, "o"},
		{"not for long enough", 1, true, "", []episode{{errRefused, goneTime - refusalGap}}, ""},
		{"not for long enough in the initramfs", 1, false, "", []episode{{errRefused, goneTimeAtBoot - refusalGap}}, ""},
		{"never let in", 0, false, "", []episode{{errRefused, day}}, ""},
		{"away", 1, true, "", []episode{{unix.ECONNREFUSED, day}}, ""},
		{"not ready", 1, true, "", []episode{{errBusy, day}}, ""},
		{"of another protocol", 1, true, "", []episode{{errOdd, day}}, ""},
		{"somebody else", 1, true, "", []episode{{ErrImpostor, day}}, ""},
		{
			"restarting", 1, true, "",
			[]episode{{errRefused, goneTime - refusalGap}, {unix.ECONNREFUSED, time.Second}, {errRefused, goneTime - refusalGap}, {errBusy, time.Second}, {errRefused, goneTime - refusalGap}},
			"",
		},
		{"let in meanwhile", 1, true, "", []episode{{errRefused, goneTime - refusalGap}, {connError(1020), time.Second}, {errRefused, goneTime - refusalGap}}, ""},
		{"asleep", 1, true, "", []episode{{errRefused, time.Second}, {nil, day}, {errRefused, time.Second}}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := tree(t, map[string]string{"1/comm": "systemd\n", "1/cmdline": tt.cmdline, "sysrq-trigger": ""})
			proc, err := os.OpenRoot(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer proc.Close()
			var log bytes.Buffer
			synctest.Test(t, func(*testing.T) {
				w := &lastWord{log: slog.New(slog.NewTextHandler(&log, nil)), proc: proc, end: func() {}}
				w.isKept.Store(tt.isKept)
				live(w, tt.logins, tt.episodes)
			})
			if got := content(t, filepath.Join(dir, "sysrq-trigger")); got != tt.want {
				t.Errorf("it says %q, want %q\n%s", got, tt.want, log.String())
			}
			if isTold := strings.Contains(log.String(), "has refused"); isTold != (tt.want != "") {
				t.Errorf("people are told: %v\n%s", isTold, log.String())
			}
		})
	}
}

// live is a session with that many logins in which things happen.
func live(w *lastWord, logins int, episodes []episode) {
	k := &keeper{
		log: w.log, driver: newFakeDriver(), tell: func(Status) {}, patience: w.patience, gone: w.gone,
		status: Status{Logins: logins, Up: logins > 0, Session: 1}, exists: true, stopped: true,
	}
	for _, e := range episodes {
		if e.how == nil {
			time.Sleep(e.lasts)
			continue
		}
		for range e.lasts / maxPause {
			k.down(e.how)
			time.Sleep(maxPause)
		}
		k.down(e.how)
	}
}

// The refusals of a real login count, and nothing else that a login ends with.
func TestKeeperKnowsATargetThatIsGone(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status [2]byte
		isGone bool
	}{{"authentication failed", [2]byte{2, 1}, true}, {"no such target", [2]byte{2, 3}, true}, {"not ready", [2]byte{3, 1}, false}} {
		t.Run(tt.name, func(t *testing.T) {
			f := &fakeTarget{secret: testSecret, mutual: testMutual}
			portal := f.start(t, "127.0.0.1:0")
			gone := make(chan struct{}, 1000)
			r := keepAfter(t, testConfig(portal), func(k *keeper, _ *fakeDriver) {
				k.gone = func(time.Duration) { gone <- struct{}{} }
			})
			r.until("it is up", up(1))
			f.kill()
			r.until("the target is away", func(st Status) bool { return strings.Contains(st.Error, "refused") })
			if len(gone) > 0 {
				t.Error("a target that is away is taken for one that is gone")
			}
			f.status = tt.status
			f.start(t, portal.String())
			want := (&RefusedError{tt.status[0], tt.status[1]}).Error()
			for range 3 { // what a status leads to comes after it, and before the next
				r.until("it is refused", func(st Status) bool { return st.Error == want })
			}
			if isGone := len(gone) > 0; isGone != tt.isGone {
				t.Errorf("the target is taken for gone: %v, want %v", isGone, tt.isGone)
			}
		})
	}
}

func TestIsGone(t *testing.T) {
	for _, err := range []error{errRefused, errNoDisk, &RefusedError{2, 2}, &RefusedError{2, 4}, errors.Join(errDestroyed, errNoDisk)} {
		if !isGone(err) {
			t.Errorf("%v says nothing", err)
		}
	}
	for _, err := range []error{errOdd, errBusy, &RefusedError{2, 6}, &RefusedError{2, 10}, &RefusedError{3, 2}, ErrImpostor, errDigests, unix.ECONNREFUSED} {
		if isGone(err) {
			t.Errorf("%v says that the disk is gone", err)
		}
	}
}
