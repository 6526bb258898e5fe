package cache

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/digest"
)

func open(t *testing.T, dir string) *Cache {
	t.Helper()
	c, err := Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	c.free = func() (int64, error) { return 1 << 40, nil }
	return c
}

func randomBytes(n int, seed uint64) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// serve is a server with the blobs, and a client of it.
func serve(t *testing.T, s *agentapitest.Server) *agentapi.Client {
	t.Helper()
	h := httptest.NewServer(s)
	t.Cleanup(h.Close)
	c, err := agentapi.NewClient(h.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.CloseIdle)
	return c
}

func wantImage(t *testing.T, c *Cache, b agentapi.Blob, content []byte) {
	t.Helper()
	got, err := os.ReadFile(c.Path(b.Digest))
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("image %s: %v, %d bytes", b.Digest.Short(), err, len(got))
	}
	if left, err := os.ReadDir(c.path("images/tmp")); err != nil || len(left) != 0 {
		t.Errorf("left in tmp: %v, %v", left, err)
	}
}

func TestFetchBringsOnlyWhatIsMissing(t *testing.T) {
	var s agentapitest.Server
	base, delta := randomBytes(900_000, 1), randomBytes(5000, 2)
	bb, db := s.Add(base), s.Add(delta)
	client := serve(t, &s)
	c := open(t, t.TempDir())
	var last [2]int64
	f := Fetch{Source: client, Blobs: []agentapi.Blob{bb, db, db}, Report: func(d, n int64) { last = [2]int64{d, n} }}
	n, err := c.Fetch(t.Context(), f)
	if err != nil || n != bb.Size+db.Size {
		t.Fatalf("Fetch: %d bytes, %v", n, err)
	}
	wantImage(t, c, bb, base)
	wantImage(t, c, db, delta)
	if last != [2]int64{905_000, 905_000} {
		t.Errorf("last report %v", last)
	}
	n, err = c.Fetch(t.Context(), f)
	if err != nil || n != 0 {
		t.Errorf("again: %d bytes, %v", n, err)
	}
	other := s.Add([]byte("another role"))
	if n, err = c.Fetch(t.Context(), Fetch{Source: client, Blobs: []agentapi.Blob{bb, other}}); err != nil || n != other.Size {
		t.Errorf("another role on the same base: %d bytes, %v", n, err)
	}
	list, err := c.List()
	if err != nil || len(list) != 3 {
		t.Errorf("List: %v, %v", list, err)
	}
}

// TestFetchThroughAServerThatMisbehaves counts the bytes too: what was got is not asked for again.
func TestFetchThroughAServerThatMisbehaves(t *testing.T) {
	content := randomBytes(1_000_000, 3)
	for _, tt := range []struct {
		name string
		blob func(try int, w http.ResponseWriter, r *http.Request) bool
		net  int64 // bytes that must have come; 0: not looked at
	}{
		{"cuts the connection, twice", func(try int, w http.ResponseWriter, r *http.Request) bool {
			if try > 2 {
				return false
			}
			from := rangeStart(r)
			if from > 0 {
				w.Header().Set("Content-Range", "bytes "+strconv.Itoa(from)+"-999999/1000000")
				w.WriteHeader(http.StatusPartialContent)
			}
			_, _ = w.Write(content[from : from+300_000])
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, 1_000_000},
		{"ends early with a good status", func(try int, w http.ResponseWriter, _ *http.Request) bool {
			if try == 1 {
				_, _ = w.Write(content[:400_000])
			}
			return try == 1
		}, 1_000_000},
		{"ignores Range", func(try int, w http.ResponseWriter, _ *http.Request) bool {
			if try == 1 {
				_, _ = w.Write(content[:400_000])
			} else {
				_, _ = w.Write(content)
			}
			return true
		}, 1_400_000},
		{"sends a flipped bit", func(try int, w http.ResponseWriter, _ *http.Request) bool {
			if try == 1 {
				bad := bytes.Clone(content)
				bad[500_000] ^= 1
				_, _ = w.Write(bad)
			}
			return try == 1
		}, 2_000_000},
		{"sends too much", func(try int, w http.ResponseWriter, _ *http.Request) bool {
			if try == 1 {
				_, _ = w.Write(append(bytes.Clone(content), "more"...))
			}
			return try == 1
		}, 0},
		{"answers another range", func(try int, w http.ResponseWriter, r *http.Request) bool {
			switch try {
			case 1:
				_, _ = w.Write(content[:1000])
			case 2:
				w.Header().Set("Content-Range", "bytes 0-999999/1000000")
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(content)
			default:
				return false
			}
			return true
		}, 1_000_000},
		{"is broken for a while", func(try int, w http.ResponseWriter, _ *http.Request) bool {
			if try < 3 {
				http.Error(w, "not now", http.StatusServiceUnavailable)
			}
			return try < 3
		}, 1_000_000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var try atomic.Int64
			s := agentapitest.Server{Blob: func(w http.ResponseWriter, r *http.Request, _ digest.Digest, _ []byte) bool {
				return tt.blob(int(try.Add(1)), w, r)
			}}
			b := s.Add(content)
			c := open(t, t.TempDir())
			retries := 0
			n, err := c.Fetch(t.Context(), Fetch{Source: serve(t, &s), Blobs: []agentapi.Blob{b}, Retry: func(error, time.Duration) { retries++ }})
			if err != nil || retries == 0 {
				t.Fatalf("Fetch: %v after %d retries", err, retries)
			}
			if tt.net != 0 && n != tt.net {
				t.Errorf("%d bytes came, want %d", n, tt.net)
			}
			wantImage(t, c, b, content)
		})
	}
}

func rangeStart(r *http.Request) int {
	n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(r.Header.Get("Range"), "bytes="), "-"))
	if err != nil {
		return 0
	}
	return n
}

// TestFetchAfterAPowerCut begins with each thing that a cut may have left of an image, and must end with the image.
func TestFetchAfterAPowerCut(t *testing.T) {
	content := randomBytes(300_000, 4)
	hex := digest.Of(content).Hex()
	for _, tt := range []struct {
		name string
		left map[string][]byte
		net  int64
	}{
		{"nothing", nil, 300_000},
		{"an empty partial", map[string][]byte{"images/tmp/" + hex: {}}, 300_000},
		{"a good partial", map[string][]byte{"images/tmp/" + hex: content[:100_000]}, 200_000},
		{"a whole partial that was not renamed", map[string][]byte{"images/tmp/" + hex: content}, 0},
		{"a partial whose end was lost to zeros", map[string][]byte{"images/tmp/" + hex: append(bytes.Clone(content[:50_000]), make([]byte, 50_000)...)}, 500_000},
		{"a whole file of zeros", map[string][]byte{"images/tmp/" + hex: make([]byte, 300_000)}, 300_000},
		{"a partial that is too long", map[string][]byte{"images/tmp/" + hex: append(bytes.Clone(content), 1, 2, 3)}, 300_000},
		{"a short file under the final name", map[string][]byte{"images/sha256/" + hex: content[:10]}, 300_000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			open(t, dir)
			for name, b := range tt.left {
				if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var s agentapitest.Server
			b := s.Add(content)
			c := open(t, dir)
			n, err := c.Fetch(t.Context(), Fetch{Source: serve(t, &s), Blobs: []agentapi.Blob{b}})
			if err != nil || n != tt.net {
				t.Errorf("Fetch: %d bytes, want %d; %v", n, tt.net, err)
			}
			wantImage(t, c, b, content)
		})
	}
}

// slow is a Source that stands still after some bytes.
type slow struct {
	content []byte
	after   int
	calls   int
}

func (s *slow) Blob(ctx context.Context, _ digest.Digest, offset int64) (io.ReadCloser, int64, error) {
	s.calls++
	rest := s.content[offset:]
	if s.calls > 1 {
		return io.NopCloser(bytes.NewReader(rest)), offset, nil
	}
	return io.NopCloser(io.MultiReader(bytes.NewReader(rest[:s.after]), blocked{ctx})), offset, nil
}

type blocked struct{ ctx context.Context } //nolint:containedctx // a Reader is given none

func (b blocked) Read([]byte) (int, error) {
	<-b.ctx.Done()
	return 0, b.ctx.Err()
}

func TestFetchGivesUpAStalledTransfer(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		content := randomBytes(100_000, 5)
		c := open(t, dir)
		src := &slow{content: content, after: 60_000}
		var said error
		began := time.Now()
		n, err := c.Fetch(t.Context(), Fetch{
			Source: src, Blobs: []agentapi.Blob{{Digest: digest.Of(content), Size: 100_000}},
			Retry: func(err error, _ time.Duration) { said = err },
		})
		if err != nil || n != 100_000 || src.calls != 2 {
			t.Fatalf("Fetch: %d bytes in %d calls, %v", n, src.calls, err)
		}
		if said == nil || !strings.Contains(said.Error(), "no byte came for 30s") {
			t.Errorf("told %v", said)
		}
		if took := time.Since(began); took < 30*time.Second || took > time.Minute {
			t.Errorf("took %v", took)
		}
	})
}

// away is a Source that cannot be reached until some time.
type away struct {
	content []byte
	until   time.Time
	asked   []time.Time
}

func (a *away) Blob(_ context.Context, _ digest.Digest, offset int64) (io.ReadCloser, int64, error) {
	a.asked = append(a.asked, time.Now())
	if time.Now().Before(a.until) {
		return nil, 0, errors.New("connection refused")
	}
	return io.NopCloser(bytes.NewReader(a.content[offset:])), offset, nil
}

func TestFetchAsksAgainSoonAfterTheServerIsBack(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		content := randomBytes(1000, 6)
		src := &away{content: content, until: time.Now().Add(3 * time.Minute)}
		_, err := open(t, dir).Fetch(t.Context(), Fetch{Source: src, Blobs: []agentapi.Blob{{Digest: digest.Of(content), Size: 1000}}})
		if err != nil {
			t.Fatal(err)
		}
		for i := range len(src.asked) - 1 {
			if gap := src.asked[i+1].Sub(src.asked[i]); gap > 5*time.Second {
				t.Errorf("try %d came %v after the one before", i+1, gap)
			}
		}
	})
}

func TestFetchEndsWithItsContextAndKeepsWhatItHas(t *testing.T) {
	content := randomBytes(500_000, 6)
	ctx, cancel := context.WithCancel(t.Context())
	c := open(t, t.TempDir())
	src := &slow{content: content, after: 200_000}
	f := Fetch{Source: src, Blobs: []agentapi.Blob{{Digest: digest.Of(content), Size: 500_000}}}
	f.Report = func(done, _ int64) {
		if done > 0 {
			cancel()
		}
	}
	if _, err := c.Fetch(ctx, f); !errors.Is(err, context.Canceled) {
		t.Fatalf("Fetch: %v", err)
	}
	f.Report = nil
	n, err := c.Fetch(t.Context(), f)
	if err != nil || n != 500_000-200_000 {
		t.Errorf("again: %d bytes, %v", n, err)
	}
}

func TestFetchEvictsOnlyWhenThereIsNoRoom(t *testing.T) {
	var s agentapitest.Server
	var blobs []agentapi.Blob
	for i := range 5 {
		blobs = append(blobs, s.Add(randomBytes(1<<20, uint64(10+i))))
	}
	client := serve(t, &s)
	c := open(t, t.TempDir())
	for i, b := range blobs[:4] {
		if _, err := c.Fetch(t.Context(), Fetch{Source: client, Blobs: []agentapi.Blob{b}}); err != nil {
			t.Fatal(err)
		}
		at := time.Unix(int64(1000+i), 0)
		if err := os.Chtimes(c.Path(b.Digest), at, at); err != nil {
			t.Fatal(err)
		}
	}
	// 0 is what runs, 1 what was good before, 2 and 3 are old.
	for i, key := range []string{"a1", "a0"} {
		switchTo(t, c, key, blobs[1-i], blobs[1-i])
		becomeGood(t, c, key)
	}
	room := int64(reserve)
	c.free = func() (int64, error) { // of a disk that holds four of them beside the reserve
		list, err := c.List()
		return room + int64(4-len(list))<<20, err
	}
	fetch := func(i int) error {
		_, err := c.Fetch(t.Context(), Fetch{Source: client, Blobs: []agentapi.Blob{blobs[i]}})
		return err
	}
	has := func() (out []int) {
		for i, b := range blobs {
			if c.Has(b.Digest, b.Size) {
				out = append(out, i)
			}
		}
		return out
	}
	if err := fetch(4); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{0, 1, 3, 4}, has()); diff != "" {
		t.Errorf("after one (-want +got):\n%s", diff)
	}
	room -= 1 << 20 // somebody else's data
	if err := fetch(2); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]int{0, 1, 2}, has()); diff != "" {
		t.Errorf("after the second: what runs stays (-want +got):\n%s", diff)
	}
	room -= 1 << 20
	err := fetch(3)
	if !errors.Is(err, ErrNoSpace) || !strings.Contains(err.Error(), "65 MiB are needed") {
		t.Errorf("with no room at all: %v", err)
	}
	if diff := cmp.Diff([]int{0, 1}, has()); diff != "" {
		t.Errorf("what runs and the last good one before it stay (-want +got):\n%s", diff)
	}
}

// switchTo counts a switch to a release of these images.
func switchTo(t *testing.T, c *Cache, key string, base, delta agentapi.Blob) {
	t.Helper()
	a := agentapi.Assignment{Host: "n1", Release: &agentapi.Release{ID: digest.Of([]byte(key)), Base: agentapi.Image{Blob: base}, Delta: agentapi.Image{Blob: delta}}}
	if err := errors.Join(c.remember(key, a), c.Begin(key)); err != nil {
		t.Fatal(err)
	}
}

func becomeGood(t *testing.T, c *Cache, key string) {
	t.Helper()
	if err := c.Change(key, func(r *Record) { r.Healthy, r.Attempts = r.Used, 0 }); err != nil {
		t.Fatal(err)
	}
}

// use seeds the node delta of a release and switches to it.
func use(t *testing.T, c *Cache, id string, base, delta agentapi.Blob) {
	t.Helper()
	d, err := c.Delta(id)
	if err != nil {
		t.Fatal(err)
	}
	if d.Fresh {
		if err := os.WriteFile(filepath.Join(d.Upper, "data"), []byte("of "+id), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := d.Seeded(); err != nil {
			t.Fatal(err)
		}
	}
	switchTo(t, c, id, base, delta)
}

func deltasIn(t *testing.T, c *Cache) string {
	t.Helper()
	entries, err := os.ReadDir(c.path("deltas"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// TestFetchEvictsNodeDeltas takes the room away step by step, and looks at what goes for it.
func TestFetchEvictsNodeDeltas(t *testing.T) {
	var s agentapitest.Server
	client := serve(t, &s)
	c := open(t, t.TempDir())
	var blobs []agentapi.Blob
	for i := range 6 {
		blobs = append(blobs, s.Add(randomBytes(1<<20, uint64(20+i))))
	}
	base, old, previous, current, next, gone := blobs[0], blobs[1], blobs[2], blobs[3], blobs[4], blobs[5]
	for _, b := range blobs[:4] {
		if _, err := c.Fetch(t.Context(), Fetch{Source: client, Blobs: []agentapi.Blob{b}}); err != nil {
			t.Fatal(err)
		}
	}
	use(t, c, "a1", base, gone)     // its image is no longer here
	use(t, c, "a0", base, gone)     // nor is this one's, which was used later
	use(t, c, "b0", base, old)      // goes with its image
	use(t, c, "ee", base, gone)     // shall run next
	use(t, c, "c1", base, current)  // of other files of the same host
	use(t, c, "c0", base, previous) // ran before, and was good
	becomeGood(t, c, "c0")
	use(t, c, "d0", base, current)                                  // runs
	if err := os.Mkdir(c.path("deltas", "f0"), 0o700); err != nil { // a boot that ended before it switched
		t.Fatal(err)
	}
	lacks := 0 // units of room
	c.free = func() (int64, error) {
		images, err := c.List()
		return reserve + int64(4-len(images)+8-len(strings.Fields(deltasIn(t, c)))+1-lacks)<<20, err
	}
	for i, want := range []string{
		"old previous current; a0 a1 b0 c0 c1 d0 ee f0",
		"previous current; a0 a1 b0 c0 c1 d0 ee f0",
		"previous current; a0 a1 b0 c0 c1 d0 ee",
		"previous current; a0 b0 c0 c1 d0 ee",
		"previous current; b0 c0 c1 d0 ee",
		"previous current; c0 c1 d0 ee",
		"previous current; c0 d0 ee",
	} {
		lacks = i
		f := Fetch{Deltas: []string{"ee"}, Blobs: []agentapi.Blob{base, next}}
		if err := c.makeRoom([]agentapi.Image{plain(next)}, f); err != nil {
			t.Fatal(err)
		}
		var left []string
		for name, b := range map[string]agentapi.Blob{"old": old, "previous": previous, "current": current} {
			if c.Has(b.Digest, b.Size) {
				left = append(left, name)
			}
		}
		order := []string{"old", "previous", "current"}
		slices.SortFunc(left, func(a, b string) int { return slices.Index(order, a) - slices.Index(order, b) })
		if got := strings.Join(left, " ") + "; " + deltasIn(t, c); got != want {
			t.Errorf("with %d MiB too few there are %q, want %q", lacks, got, want)
		}
	}
	lacks++
	err := c.makeRoom([]agentapi.Image{plain(next)}, Fetch{Deltas: []string{"ee"}, Blobs: []agentapi.Blob{base, next}})
	if !errors.Is(err, ErrNoSpace) || deltasIn(t, c) != "c0 d0 ee" {
		t.Errorf("with nothing to evict: %v, and there are %s", err, deltasIn(t, c))
	}
}

func TestTrimDeltasKeepsTheLastOnesUsed(t *testing.T) {
	dir := t.TempDir()
	c := open(t, dir)
	b := agentapi.Blob{Digest: digest.Of([]byte("b"))}
	id := func(i int) string { return hex.EncodeToString([]byte{byte(i)}) }
	var want []string
	for i := range maxDeltas + 10 {
		use(t, c, id(i), b, b)
		if i > 10 && i != 15 {
			want = append(want, id(i))
		}
	}
	use(t, c, id(3), b, b) // went back to an old one
	use(t, c, id(maxDeltas+9), b, b)
	want = append([]string{id(2), id(3)}, want...)
	if err := c.removeDelta(id(15)); err != nil {
		t.Fatal(err)
	}
	c = open(t, dir)
	if err := c.TrimDeltas(id(2)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Join(want, " "), deltasIn(t, c)); diff != "" {
		t.Errorf("node deltas (-want +got):\n%s", diff)
	}
	d, err := c.Delta(id(3))
	if err != nil || d.Fresh {
		t.Errorf("a delta that was kept: %+v, %v", d, err)
	}
	if d, err = c.Delta(id(15)); err != nil || !d.Fresh {
		t.Errorf("a delta that was removed: %+v, %v", d, err)
	}
}

func TestStateSurvivesAndIsNotNeeded(t *testing.T) {
	dir := t.TempDir()
	want := State{Goal: "aa", GoalTries: 3, Kernel: digest.Of([]byte("k")), KernelTries: 1, Lease: []byte(`{"mac":"a"}`)}
	if err := open(t, dir).SetState(func(s *State) { *s = want }); err != nil {
		t.Fatal(err)
	}
	c := open(t, dir)
	if diff := cmp.Diff(want, c.State()); diff != "" || c.Warnings() != nil {
		t.Errorf("state (-want +got):\n%s\nwarnings %q", diff, c.Warnings())
	}
	// One digit that is another one is still JSON.
	path := filepath.Join(dir, "state.json")
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for what, content := range map[string][]byte{
		"a count changed": bytes.Replace(b, []byte(`"goalTries":3`), []byte(`"goalTries":0`), 1),
		"torn":            b[:len(b)/2],
		"empty":           {},
		"endless":         bytes.Repeat([]byte{'{'}, maxSealed+10),
	} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		c := open(t, dir)
		if got := c.State(); !reflect.DeepEqual(got, State{}) || len(c.Warnings()) != 1 || !strings.Contains(c.Warnings()[0], "the state is begun anew") {
			t.Errorf("%s: %+v, warnings %q", what, got, c.Warnings())
		}
	}
}

func TestVerifyFindsRot(t *testing.T) {
	var s agentapitest.Server
	b := s.Add(randomBytes(100_000, 7))
	c := open(t, t.TempDir())
	if _, err := c.Fetch(t.Context(), Fetch{Source: serve(t, &s), Blobs: []agentapi.Blob{b}}); err != nil {
		t.Fatal(err)
	}
	if ok, err := c.Verify(b.Digest); !ok || err != nil {
		t.Errorf("a good image: %v, %v", ok, err)
	}
	f, err := os.OpenFile(c.Path(b.Digest), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("rot"), 5000); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if ok, err := c.Verify(b.Digest); ok || err != nil {
		t.Errorf("a rotten image: %v, %v", ok, err)
	}
	if err := c.RemoveImage(b.Digest); err != nil || c.Has(b.Digest, -1) {
		t.Errorf("removing the rotten image: %v", err)
	}
	if err := c.RemoveImage(b.Digest); err != nil {
		t.Errorf("removing an image that is gone: %v", err)
	}
	if ok, err := c.Verify(b.Digest); ok || err != nil {
		t.Errorf("no image: %v, %v", ok, err)
	}
}

func TestDeltaIsMadeAnewUntilItIsSeeded(t *testing.T) {
	c := open(t, t.TempDir())
	id := DeltaID("n1", "sha256:r", "sha256:n")
	for try := range 3 {
		d, err := c.Delta(id)
		if err != nil || !d.Fresh {
			t.Fatalf("try %d: %+v, %v", try, d, err)
		}
		left, err := os.ReadDir(d.Upper)
		if err != nil || len(left) != 0 {
			t.Fatalf("try %d: a delta that was not seeded was kept: %v, %v", try, left, err)
		}
		if err := os.WriteFile(filepath.Join(d.Upper, "half"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := c.Delta(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(d.Upper, "hostname"), []byte("n1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Seeded(); err != nil {
		t.Fatal(err)
	}
	d, err = c.Delta(id)
	if err != nil || d.Fresh {
		t.Fatalf("a seeded delta: %+v, %v", d, err)
	}
	if b, err := os.ReadFile(filepath.Join(d.Upper, "hostname")); string(b) != "n1" {
		t.Errorf("its content: %v", err)
	}
	for _, bad := range []string{"", "..", "../images", "x/y"} {
		if _, err := c.Delta(bad); err == nil {
			t.Errorf("a delta called %q", bad)
		}
	}
}

func TestDeltaIDsDiffer(t *testing.T) {
	seen := map[string]string{}
	for _, k := range [][3]string{{"n1", "r", "n"}, {"n2", "r", "n"}, {"n1", "r2", "n"}, {"n1", "r", "n2"}, {"n1\nr", "", "n"}, {"n1", "r\nn", ""}} {
		id := DeltaID(k[0], digest.Digest(k[1]), digest.Digest(k[2]))
		if was, ok := seen[id]; ok {
			t.Errorf("%v and %v have one name", k, was)
		}
		seen[id] = strings.Join(k[:], " ")
	}
}

// chattr makes a file immutable, or append-only, until the test ends.
func chattr(t *testing.T, flag, path string) {
	t.Helper()
	if out, err := exec.Command("chattr", "+"+flag, path).CombinedOutput(); err != nil {
		t.Fatalf("chattr +%s %s: %v: %s", flag, path, err, out)
	}
	t.Cleanup(func() { _ = exec.Command("chattr", "-"+flag, path).Run() }) // where it was removed, nothing is to be done
}

// TestDeltasGoThoughARoleMadeFilesImmutable has one delta with each kind of file that a mere unlink does not remove.
func TestDeltasGoThoughARoleMadeFilesImmutable(t *testing.T) {
	disk := smallDisk(t, 256<<20)
	c := open(t, disk)
	b := agentapi.Blob{Digest: digest.Of([]byte("b"))}
	for _, id := range []string{"aa", "bb"} {
		use(t, c, id, b, b)
		etc := c.path("deltas", id, "upper/etc")
		if err := os.Mkdir(etc, 0o755); err != nil {
			t.Fatal(err)
		}
		for name, flag := range map[string]string{"resolv.conf": "i", "log": "a"} {
			if err := os.WriteFile(filepath.Join(etc, name), []byte(name), 0o644); err != nil {
				t.Fatal(err)
			}
			chattr(t, flag, filepath.Join(etc, name))
		}
		if err := unix.Mkfifo(filepath.Join(etc, "pipe"), 0o600); err != nil { // which nobody may open
			t.Fatal(err)
		}
		if err := os.Symlink("/proc/self/nothing", filepath.Join(etc, "link")); err != nil {
			t.Fatal(err)
		}
		chattr(t, "i", etc)
	}
	if gone, err := c.evictDelta(nil, func(r Record) bool { return r.Key == "aa" }); !gone || err != nil || deltasIn(t, c) != "bb" {
		t.Errorf("evictDelta: %v, %v; there are %q", gone, err, deltasIn(t, c))
	}
	if err := os.Remove(c.path("deltas/bb/seeded")); err != nil {
		t.Fatal(err)
	}
	if d, err := c.Delta("bb"); err != nil || !d.Fresh {
		t.Errorf("Delta: %+v, %v", d, err)
	}
	if left, err := os.ReadDir(c.path("deltas/bb/upper")); err != nil || len(left) != 0 {
		t.Errorf("left in a fresh delta: %v, %v", left, err)
	}
}

// TestADeltaThatCannotBeRemovedIsPassedOver has a mount in the way, which no flag explains.
func TestADeltaThatCannotBeRemovedIsPassedOver(t *testing.T) {
	c := open(t, t.TempDir())
	b := agentapi.Blob{Digest: digest.Of([]byte("b"))}
	for _, id := range []string{"aa", "bb", "cc"} {
		use(t, c, id, b, b)
	}
	stuck := c.path("deltas/aa/upper/mnt")
	if err := os.Mkdir(stuck, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", stuck, "tmpfs", 0, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(stuck, 0); err != nil {
			t.Error(err)
		}
	})
	if gone, err := c.evictDelta([]string{"cc"}, func(Record) bool { return true }); !gone || err != nil || deltasIn(t, c) != "aa cc" {
		t.Errorf("evictDelta: %v, %v; there are %q", gone, err, deltasIn(t, c))
	}
	if gone, err := c.evictDelta([]string{"cc"}, func(Record) bool { return true }); gone || err != nil {
		t.Errorf("evictDelta with nothing that goes: %v, %v", gone, err)
	}
	if d, err := c.Delta("cc"); err != nil || d.Fresh {
		t.Errorf("the one that was to be kept: %+v, %v", d, err)
	}
}

// smallDisk is ext4 of size bytes, mounted on a loop device.
func smallDisk(t *testing.T, size int64) string {
	t.Helper()
	image, dir := filepath.Join(t.TempDir(), "disk.img"), t.TempDir()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, size); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range [][]string{{"mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(cmd[0], cmd[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", cmd[0], err, out)
		}
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// fill writes to a file until the disk has no block left, and returns how many bytes that were.
func fill(t *testing.T, name string) int64 {
	t.Helper()
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var n int64
	for size := 1 << 20; size >= 512; size /= 2 {
		for err = nil; err == nil; {
			var m int
			m, err = f.Write(make([]byte, size))
			n += int64(m)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestAFullDiskCanBeChanged has a role that filled the disk, and then another node delta on images that are here.
func TestAFullDiskCanBeChanged(t *testing.T) {
	dir := smallDisk(t, 256<<20)
	c, err := Open(dir, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var s agentapitest.Server
	b := s.Add(randomBytes(1<<20, 40))
	f := Fetch{Source: serve(t, &s), Blobs: []agentapi.Blob{b}, Deltas: []string{"bb"}}
	if _, err := c.Fetch(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	use(t, c, "aa", b, b)
	if err := os.WriteFile(c.path("deltas/aa/upper/old"), make([]byte, 100<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	use(t, c, "cc", b, b)
	fill(t, c.path("deltas/cc/upper/log"))
	if n, err := c.Fetch(t.Context(), f); err != nil || n != 0 {
		t.Fatalf("Fetch of nothing: %d bytes, %v", n, err)
	}
	if got := deltasIn(t, c); got != "cc" {
		t.Errorf("there are %q, and want cc, which runs", got)
	}
	use(t, c, "bb", b, b)
	if !c.Has(b.Digest, b.Size) {
		t.Error("the image that is needed was evicted")
	}
}

func TestFetchOfNothingIsNoErrorOnADiskThatStaysFull(t *testing.T) {
	c := open(t, t.TempDir())
	content := randomBytes(1000, 41)
	b := agentapi.Blob{Digest: digest.Of(content), Size: 1000}
	if err := os.WriteFile(c.Path(b.Digest), content, 0o600); err != nil {
		t.Fatal(err)
	}
	c.free = func() (int64, error) { return 0, nil }
	if n, err := c.Fetch(t.Context(), Fetch{Blobs: []agentapi.Blob{b}, Deltas: []string{"aa"}}); n != 0 || err != nil || !c.Has(b.Digest, b.Size) {
		t.Errorf("Fetch: %d bytes, %v", n, err)
	}
}

func TestStateIsWrittenOnAFullDisk(t *testing.T) {
	dir := smallDisk(t, 64<<20)
	c := open(t, dir)
	fill(t, filepath.Join(dir, "log"))
	// A directory entry and an inode cost a block at times: what is left is filled again and again.
	for i := range 20 {
		if err := c.SetState(func(s *State) { s.Goal, s.GoalTries = strings.Repeat("g", 10_000), i+1 }); err != nil {
			t.Fatalf("write %d: %v", i+1, err)
		}
		fill(t, filepath.Join(dir, "log"+strconv.Itoa(i)))
	}
	if got := open(t, dir).State().GoalTries; got != 20 {
		t.Errorf("%d was kept, want 20", got)
	}
}

// TestABootIsCountedOnAFullDisk has a release with as many files as a host may have.
func TestABootIsCountedOnAFullDisk(t *testing.T) {
	dir := smallDisk(t, 64<<20)
	c := open(t, dir)
	a := agentapi.Assignment{Host: "n1", Release: &agentapi.Release{}}
	a.Node.Files = map[string]agentapi.File{"/etc/large": {Content: strings.Repeat("x", 640<<10)}}
	if err := c.remember("aa", a); err != nil {
		t.Fatal(err)
	}
	fill(t, filepath.Join(dir, "log"))
	for i := range 5 {
		if err := c.Begin("aa"); err != nil {
			t.Fatalf("boot %d: %v", i+1, err)
		}
	}
	if r, _ := open(t, dir).Record("aa"); r.Attempts != 5 {
		t.Errorf("%d boots were counted, want 5", r.Attempts)
	}
}
