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

// A shutdown that waits for a target which is away is ended; anything else is left to itself.
func TestLastWord(t *testing.T) {
	dir := tree(t, map[string]string{"1/comm": "systemd\n", "sysrq-trigger": ""})
	proc, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	said := func() string { return content(t, filepath.Join(dir, "sysrq-trigger")) }
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		var up atomic.Bool
		done := make(chan struct{})
		go func() {
			defer close(done)
			(&lastWord{log: slog.New(slog.DiscardHandler), proc: proc, isUp: up.Load}).run(ctx)
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
		if said() != "" {
			t.Errorf("it says %q in a shutdown whose session comes back", said())
		}
		time.Sleep(3 * lastWordLook)
		synctest.Wait()
		if said() != "b" {
			t.Errorf("it says %q in a shutdown that hangs, want \"b\"", said())
		}
		cancel()
		<-done
	})
}
