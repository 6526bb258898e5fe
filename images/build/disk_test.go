package build

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/qcow2"
	"github.com/troupe-dev/troupe/internal/digest"
)

// aDisk has data at its start and its end and nothing between.
func aDisk() []byte {
	b := make([]byte, 8<<20)
	copy(b, "boot loader")
	copy(b[len(b)-100:], "backup of the partition table")
	return b
}

func sumOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// qcow2Of is b in QEMU's format (qemu-img is in Debian's qemu-utils).
func qcow2Of(t *testing.T, b []byte) []byte {
	t.Helper()
	dir := t.TempDir()
	raw, out := filepath.Join(dir, "raw"), filepath.Join(dir, "qcow2")
	if err := os.WriteFile(raw, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if said, err := exec.CommandContext(t.Context(), "qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-c", raw, out).CombinedOutput(); err != nil {
		t.Fatalf("qemu-img: %v\n%s", err, said)
	}
	packed, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return packed
}

// A fileServer serves one file, and breaks off as often as it is told to.
type fileServer struct {
	content []byte
	breaks  int  // how many answers end after half of their bytes
	plain   bool // it knows no ranges

	mu     sync.Mutex
	ranges []string
}

func (s *fileServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	s.ranges = append(s.ranges, r.Header.Get("Range"))
	broken := s.breaks > 0
	s.breaks--
	s.mu.Unlock()
	if s.plain {
		r.Header.Del("Range")
	}
	w.Header().Set("ETag", `"`+sumOf(s.content)[:8]+`"`)
	if !broken {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(s.content))
		return
	}
	var from int
	if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-", &from); err == nil && !s.plain {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", from, len(s.content)-1, len(s.content)))
		w.Header().Set("Content-Length", fmt.Sprint(len(s.content)-from))
		w.WriteHeader(http.StatusPartialContent)
	} else {
		from = 0
		w.Header().Set("Content-Length", fmt.Sprint(len(s.content)))
	}
	_, _ = w.Write(s.content[from : from+(len(s.content)-from)/2])
	panic(http.ErrAbortHandler)
}

func (s *fileServer) asked() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.ranges
}

func serveFile(t *testing.T, s *fileServer) string {
	t.Helper()
	srv := httptest.NewServer(s)
	t.Cleanup(srv.Close)
	return srv.URL + "/disk.img"
}

func TestDiskOfEachFormatIsTheSameBlob(t *testing.T) {
	b := newBuilder(t)
	raw := aDisk()
	packed := qcow2Of(t, raw)
	local := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(local, raw, 0o600); err != nil {
		t.Fatal(err)
	}
	want := images.Blob{Digest: digest.Of(raw), Size: int64(len(raw))}
	for _, tt := range []struct {
		name, format string
		recipe       images.DiskRecipe
		file         int
	}{
		{"raw by HTTP", formatRaw, images.DiskRecipe{URL: serveFile(t, &fileServer{content: raw}), SHA256: sumOf(raw)}, len(raw)},
		{"raw on the server", formatRaw, images.DiskRecipe{URL: "file://" + local, SHA256: sumOf(raw), Format: formatRaw}, len(raw)},
		{"qcow2", formatQCOW2, images.DiskRecipe{URL: serveFile(t, &fileServer{content: packed}), SHA256: sumOf(packed)}, len(packed)},
	} {
		got, err := b.Disk(t.Context(), tt.recipe, nil)
		if err != nil {
			t.Fatalf("%s: %v", tt.name, err)
		}
		if d := cmp.Diff(images.Disk{Recipe: tt.recipe.ID(), Image: want, Format: tt.format, File: int64(tt.file)}, got); d != "" {
			t.Errorf("%s:\n%s", tt.name, d)
		}
	}
	fi, err := os.Stat(b.Store.Path(want.Digest))
	if err != nil {
		t.Fatal(err)
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); !ok || st.Blocks*512 > 1<<20 {
		t.Errorf("the blob takes %d KiB for two pages of data", st.Blocks/2)
	}
	if left, err := os.ReadDir(b.Dir); err != nil || len(left) > 0 {
		t.Errorf("left in the scratch directory: %v (%v)", left, err)
	}
}

func TestDiskGoesOnWhereItBrokeOff(t *testing.T) {
	raw := aDisk()
	half, threeQuarters := len(raw)/2, len(raw)*3/4
	for _, tt := range []struct {
		name string
		srv  *fileServer
		want []string
	}{
		{"with ranges", &fileServer{content: raw, breaks: 2}, []string{"", fmt.Sprintf("bytes=%d-", half), fmt.Sprintf("bytes=%d-", threeQuarters)}},
		{"without", &fileServer{content: raw, breaks: 1, plain: true}, []string{"", fmt.Sprintf("bytes=%d-", half)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := newBuilder(t)
			got, err := b.Disk(t.Context(), images.DiskRecipe{URL: serveFile(t, tt.srv), SHA256: sumOf(raw)}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if got.Image.Digest != digest.Of(raw) {
				t.Error("the disk has other bytes")
			}
			if d := cmp.Diff(tt.want, tt.srv.asked()); d != "" {
				t.Error(d)
			}
		})
	}
}

// A killed server's next try fetches the rest alone.
func TestDiskGoesOnInAnotherTry(t *testing.T) {
	raw := aDisk()
	srv := &fileServer{content: raw, breaks: 1 << 20}
	b := newBuilder(t)
	r := images.DiskRecipe{URL: serveFile(t, srv), SHA256: sumOf(raw)}
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := b.Disk(ctx, r, stopAtOutput{cancel}); !errors.Is(err, context.Canceled) {
		t.Fatalf("got %v, want it to be canceled", err)
	}
	if err := b.Clean(); err != nil {
		t.Fatal(err)
	}
	srv.mu.Lock()
	srv.breaks, srv.ranges = 0, nil
	srv.mu.Unlock()
	if _, err := b.Disk(t.Context(), r, nil); err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{fmt.Sprintf("bytes=%d-", len(raw)/2)}, srv.asked()); d != "" {
		t.Error(d)
	}
}

// stopAtOutput cancels a build as soon as it says that a transfer broke off.
type stopAtOutput struct{ cancel func() }

func (stopAtOutput) Step(string) {}

func (s stopAtOutput) Write(p []byte) (int, error) {
	if strings.Contains(string(p), "trying again") {
		s.cancel()
	}
	return len(p), nil
}

func TestDiskThatIsRefused(t *testing.T) {
	raw := aDisk()
	for _, tt := range []struct {
		name    string
		content []byte
		format  string
		sum     string
		want    error
		says    string
	}{
		{"wrong sum", raw, "", strings.Repeat("0", 64), digest.ErrMismatch, "step \"check\": digest mismatch: the SHA-256 of the disk image is " + sumOf(raw)},
		{"compressed", []byte("\xfd7zXZ\x00rest"), "", "", nil, "begins like a file of format xz: unpack or convert it"},
		{"empty", nil, "", "", nil, "the disk image is empty"},
		{"not what was said", raw, formatQCOW2, "", qcow2.ErrFormat, "there is no header"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			b := newBuilder(t)
			if tt.sum == "" {
				tt.sum = sumOf(tt.content)
			}
			_, err := b.Disk(t.Context(), images.DiskRecipe{URL: serveFile(t, &fileServer{content: tt.content}), SHA256: tt.sum, Format: tt.format}, nil)
			var step *StepError
			if !errors.As(err, &step) || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want a step's error that says %q", err, tt.says)
			}
			if blobs, err := b.Store.List(t.Context()); err != nil || len(blobs) > 0 {
				t.Errorf("in the store: %v (%v)", blobs, err)
			}
		})
	}
	b := newBuilder(t)
	for _, tt := range []struct{ url, says string }{
		{serveFile(t, &fileServer{}) + "%zz", "invalid URL escape"},
		{"file:///dev/null", "is not a regular file"},
		{"file:///nowhere/disk.img", "no such file"},
		{"ftp://example.com/disk.img", "want http, https or file"},
	} {
		if _, err := b.Disk(t.Context(), images.DiskRecipe{URL: tt.url}, nil); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: got %v, want an error that says %q", tt.url, err, tt.says)
		}
	}
	gone := httptest.NewServer(http.NotFoundHandler())
	defer gone.Close()
	if _, err := b.Disk(t.Context(), images.DiskRecipe{URL: gone.URL + "/x"}, nil); err == nil || !strings.Contains(err.Error(), "404 Not Found") {
		t.Errorf("a file that is not there: %v", err)
	}
}

func TestOldPartsAreCleared(t *testing.T) {
	b := newBuilder(t)
	for name, age := range map[string]time.Duration{partPrefix + "old": keepPart + time.Hour, partPrefix + "new": 0, "base-1": 0} {
		at := filepath.Join(b.Dir, name)
		if err := os.WriteFile(at, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(at, time.Time{}, time.Now().Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Clean(); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(b.Dir)
	if err != nil || len(left) != 1 || left[0].Name() != partPrefix+"new" {
		t.Errorf("left: %v (%v)", left, err)
	}
}
