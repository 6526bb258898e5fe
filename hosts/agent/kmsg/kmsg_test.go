package kmsg

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestHandlerWritesOneLineARecord(t *testing.T) {
	var out bytes.Buffer
	log := slog.New(NewHandler(&out, "troupe", slog.LevelInfo))
	log.Debug("not shown")
	log.With("mac", "52:54:00:77:00:01").Info("has an address", "address", "10.77.0.11")
	log.WithGroup("disk").Warn("left alone", "name", "vda", "holds", "ext4 and more")
	log.Error("two\nlines", slog.Group("g", "a", 1)) //nolint:sloglint // groups are under test
	want := `<13>troupe: has an address mac=52:54:00:77:00:01 address=10.77.0.11
<12>troupe: left alone disk.name=vda disk.holds="ext4 and more"
<11>troupe: two; lines g.a=1
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func TestHandlerCutsWhatTheKernelWouldRefuse(t *testing.T) {
	var out bytes.Buffer
	slog.New(NewHandler(&out, "troupe", slog.LevelInfo)).Info(strings.Repeat("x", 5000)) //nolint:sloglint // its length is under test
	if out.Len() > 1000 {
		t.Errorf("line of %d bytes", out.Len())
	}
}
