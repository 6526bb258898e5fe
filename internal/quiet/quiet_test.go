package quiet_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/internal/quiet"
)

func TestLinesAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := quiet.New(slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})))
		other := log.With("from", "another part").WithGroup("g") // not a way around it
		for range 2 {
			for n := range 500 {
				log.Info("a stranger", "n", n)
				other.Warn("a stranger")
			}
			time.Sleep(time.Second)
		}
		if n := strings.Count(out.String(), "\n"); n != 2*quiet.LinesPerSecond {
			t.Errorf("%d lines, want %d:\n%s", n, 2*quiet.LinesPerSecond, &out)
		}
		if n := strings.Count(out.String(), "suppressed="); n != 1 || !strings.Contains(out.String(), "suppressed=990\n") {
			t.Errorf("the log does not say how many lines it lacks:\n%s", &out)
		}
		out.Reset()
		for range 100 {
			log.Debug("wanted")
		}
		log.Error("the next second") // those kept back of the last are told now, and debug lines took nothing
		if n := strings.Count(out.String(), "\n"); n != 101 || !strings.HasSuffix(out.String(), "suppressed=990\n") {
			t.Errorf("%d lines, want 101:\n%s", n, &out)
		}
	})
}

func TestNoLog(t *testing.T) {
	quiet.New(nil).Error("nobody hears")
}
