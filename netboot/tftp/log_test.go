package tftp

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/troupe-dev/troupe/internal/quiet"
)

// TestLogIsBounded: whoever asks for files that are not there writes no line for each.
func TestLogIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := &Server{
			Open: func(string) (io.ReadSeekCloser, error) { return nil, fs.ErrNotExist },
			Log:  slog.New(slog.NewTextHandler(&log, nil)),
		}
		run := s.runner(nil)
		for n := range 1000 {
			if err := run.send(fmt.Sprint("file", n), nil); err == nil {
				t.Fatal("was sent")
			}
		}
		if n := strings.Count(log.String(), "\n"); n != quiet.LinesPerSecond {
			t.Errorf("%d log lines for 1000 requests, want %d", n, quiet.LinesPerSecond)
		}
	})
}
