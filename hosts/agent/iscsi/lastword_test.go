package iscsi

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// A shutdown that waits for a target which is away is ended, as it was meant; anything else is left to itself.
func TestLastWord(t *testing.T) {
	const program = "/usr/lib/systemd/systemd-shutdown\x00"
	for _, tt := range []struct {
		cmdline, want string
		ends          bool // the session
	}{
		{program + "reboot\x00--timeout\x0090000000us\x00", "b", false},
		{program + "kexec\x00--timeout\x0090000000us\x00", "b", false},
		{program + "poweroff\x00--timeout\x0090000000us\x00", "o", true},
		{program + "halt\x00--timeout\x0090000000us\x00", "o", true},
		{program, "b", false},
	} {
		t.Run(tt.cmdline, func(t *testing.T) { testLastWord(t, tt.cmdline, tt.want, tt.ends) })
	}
}

func testLastWord(t *testing.T, cmdline, want string, ends bool) {
	t.Helper()
	dir := tree(t, map[string]string{"1/comm": "systemd\n", "1/cmdline": cmdline, "sysrq-trigger": ""})
	proc, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	said := func() string { return content(t, filepath.Join(dir, "sysrq-trigger")) }
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var up, ended atomic.Bool
		done := make(chan struct{})
		go func() {
			defer close(done)
			end := func() {
				ended.Store(true)
				cancel()
			}
			(&lastWord{log: slog.New(slog.DiscardHandler), proc: proc, isUp: up.Load, end: end}).run(ctx)
		}()
		time.Sleep(time.Hour)
		if said() != "" {
			t.Errorf("it says %q in a system that runs on", said())
		}
		if err := os.WriteFile(filepath.Join(dir, "1/comm"), []byte(shutdownName+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lastWordTime - lastWordLook)
		up.Store(true)
		time.Sleep(time.Hour)
		up.Store(false)
		time.Sleep(lastWordTime - lastWordLook)
		if said() != "" || ended.Load() {
			t.Errorf("it says %q in a shutdown whose session comes back", said())
		}
		time.Sleep(3 * lastWordLook)
		synctest.Wait()
		if said() != want || ended.Load() != ends {
			t.Errorf("it says %q in a shutdown that hangs, and ends the session: %v; want %q, %v", said(), ended.Load(), want, ends)
		}
		cancel()
		<-done
	})
}
