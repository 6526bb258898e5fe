package cache

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/chunk"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/verity"
)

// A chunked is an image as the server has it.
type chunked struct {
	agentapi.Image
	content    []byte
	pack, segs digest.Digest
}

// addChunked gives s an image of these data, with its tree and the three files of its chunks.
func addChunked(t *testing.T, s *agentapitest.Server, data []byte) chunked {
	t.Helper()
	size := int64(len(data))
	file, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Write(data); err != nil {
		t.Fatal(err)
	}
	root, err := verity.Write(bytes.NewReader(data), size, file)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(file.Name())
	if err != nil {
		t.Fatal(err)
	}
	var pack, segs bytes.Buffer
	x, err := chunk.Make(bytes.NewReader(data), size, &pack, &segs)
	if err != nil {
		t.Fatal(err)
	}
	out := chunked{content: content, pack: s.Add(pack.Bytes()).Digest, segs: s.Add(segs.Bytes()).Digest}
	out.Image = agentapi.Image{Blob: s.Add(content), Data: size, Root: root.String(), Chunks: s.Add(x.Bytes())}
	return out
}

// versions are the data of an image, and of one with a part that is new in its middle. Both begin as an EROFS image does,
// so that what has no index can be cut anew.
func versions() (before, after []byte) {
	super := make([]byte, 4096)
	binary.LittleEndian.PutUint32(super[1024:], 0xe0f5e1e2)
	super[1024+12] = 12
	data := randomBytes(3<<20, 30)
	before = slices.Concat(super, data)
	after = slices.Concat(super, data[:1<<20], randomBytes(40<<10, 31), data[1<<20:])
	for _, b := range [][]byte{before, after} {
		binary.LittleEndian.PutUint32(b[1024+36:], uint32(len(b)/4096))
	}
	return before, after
}

// cacheWith is a cache that has fetched the older version by its chunks.
func cacheWith(t *testing.T, client *agentapi.Client, img chunked) *Cache {
	t.Helper()
	c := open(t, t.TempDir())
	if _, err := c.Fetch(t.Context(), Fetch{Source: client, Images: []agentapi.Image{img.Image}}); err != nil {
		t.Fatal(err)
	}
	wantImage(t, c, img.Blob, img.content)
	return c
}

func TestFetchByChunksBringsOnlyWhatIsNew(t *testing.T) {
	var s agentapitest.Server
	old, latest := versions()
	before, after := addChunked(t, &s, old), addChunked(t, &s, latest)
	client := serve(t, &s)
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, c *Cache)
		most  int64
	}{
		{"the older version is there", func(*testing.T, *Cache) {}, 80 << 10},
		{"its index was lost", func(t *testing.T, c *Cache) {
			if err := os.Remove(c.indexPath(before.Digest)); err != nil {
				t.Error(err)
			}
		}, 100 << 10},
		{"its index is broken", func(t *testing.T, c *Cache) {
			if err := os.WriteFile(c.indexPath(before.Digest), []byte("troupe chunks 1\nnonsense"), 0o600); err != nil {
				t.Error(err)
			}
		}, 100 << 10},
		{"one block of it is rotten", func(t *testing.T, c *Cache) { flip(t, c.Path(before.Digest), 2<<20) }, 120 << 10},
		{"much of it is rotten", func(t *testing.T, c *Cache) {
			for at := int64(2 << 20); at < 3<<20; at += 16 << 10 {
				flip(t, c.Path(before.Digest), at)
			}
		}, 3 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := cacheWith(t, client, before)
			tt.spoil(t, c)
			rotten := 0
			n, err := c.Fetch(t.Context(), Fetch{
				Source: client, Images: []agentapi.Image{after.Image},
				Rotten: func(d digest.Digest, _, _ int64) {
					rotten++
					if d != before.Digest {
						t.Errorf("told of %s", d)
					}
				},
			})
			if err != nil || n > tt.most || n < 40<<10 {
				t.Errorf("%d bytes came, at most %d should; %v", n, tt.most, err)
			}
			wantImage(t, c, after.Blob, after.content)
			if isRotten := tt.name == "one block of it is rotten" || tt.name == "much of it is rotten"; (rotten > 0) != isRotten || rotten > maxRotten {
				t.Errorf("told of %d broken chunks", rotten)
			}
		})
	}
}

func flip(t *testing.T, name string, at int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
}

// TestFetchByChunksFromAServerThatLies must end with the image, whatever the files of its chunks are.
func TestFetchByChunksFromAServerThatLies(t *testing.T) {
	old, latest := versions()
	for _, tt := range []struct {
		name string
		// lie answers in place of the server; content is what is right.
		lie func(img chunked, d digest.Digest, w http.ResponseWriter, r *http.Request, content []byte) bool
	}{
		{"has no ranges", func(_ chunked, _ digest.Digest, w http.ResponseWriter, r *http.Request, content []byte) bool {
			_, _ = w.Write(content)
			return true
		}},
		{"has no index", func(img chunked, d digest.Digest, w http.ResponseWriter, r *http.Request, _ []byte) bool {
			if d == img.Chunks.Digest {
				http.NotFound(w, r)
			}
			return d == img.Chunks.Digest
		}},
		{"has another index", func(img chunked, d digest.Digest, w http.ResponseWriter, _ *http.Request, content []byte) bool {
			if d == img.Chunks.Digest {
				_, _ = w.Write(make([]byte, len(content)))
			}
			return d == img.Chunks.Digest
		}},
		{"has other packs", func(img chunked, d digest.Digest, w http.ResponseWriter, r *http.Request, content []byte) bool {
			if d == img.pack || d == img.segs {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(randomBytes(len(content), 33)))
			}
			return d == img.pack || d == img.segs
		}},
		{"has short packs", func(img chunked, d digest.Digest, w http.ResponseWriter, r *http.Request, content []byte) bool {
			if d == img.pack || d == img.segs {
				http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content[:len(content)/3]))
			}
			return d == img.pack || d == img.segs
		}},
		{"sends other ranges", func(img chunked, d digest.Digest, w http.ResponseWriter, _ *http.Request, content []byte) bool {
			if d == img.pack {
				w.Header().Set("Content-Range", "bytes 1-9/100")
				w.WriteHeader(http.StatusPartialContent)
				_, _ = w.Write(content)
			}
			return d == img.pack
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var img chunked
			s := agentapitest.Server{Blob: func(w http.ResponseWriter, r *http.Request, d digest.Digest, content []byte) bool {
				return img.Size > 0 && tt.lie(img, d, w, r, content)
			}}
			before := addChunked(t, &s, old)
			client := serve(t, &s)
			c := cacheWith(t, client, before)
			img = addChunked(t, &s, latest)
			if _, err := c.Fetch(t.Context(), Fetch{Source: client, Images: []agentapi.Image{img.Image}}); err != nil {
				t.Fatal(err)
			}
			wantImage(t, c, img.Blob, img.content)
		})
	}
}

// TestAFetchByChunksGoesOnWhereItWasCut cuts a transfer again and again, by the server's going away and by what a power cut
// leaves of the file, and counts what comes.
func TestAFetchByChunksGoesOnWhereItWasCut(t *testing.T) {
	var img chunked
	var cutting bool // changes only while nobody asks
	s := agentapitest.Server{Blob: func(w http.ResponseWriter, r *http.Request, d digest.Digest, content []byte) bool {
		if cutting && d == img.segs {
			http.ServeContent(&cutWriter{w, 5 << 20}, r, "", time.Time{}, bytes.NewReader(content))
		}
		return cutting && d == img.segs
	}}
	img = addChunked(t, &s, randomBytes(8<<20, 40))
	client := serve(t, &s)
	for _, tt := range []struct {
		name string
		left func(part []byte) []byte // of what was written
		most int64
	}{
		{"all is there", func(b []byte) []byte { return b }, 6 << 20},
		{"the last bytes were lost", func(b []byte) []byte { return b[:len(b)-100_000] }, 6<<20 + 200_000},
		{"the last bytes are zeros", func(b []byte) []byte {
			return slices.Concat(b[:len(b)-100_000], make([]byte, 100_000))
		}, 6<<20 + 200_000},
		{"nothing is there", func([]byte) []byte { return nil }, 9 << 20},
		{"something else is there", func(b []byte) []byte { return randomBytes(len(b), 3) }, 9 << 20},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			c := open(t, dir)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			cutting = true
			_, err := c.Fetch(ctx, Fetch{Source: client, Images: []agentapi.Image{img.Image}, Retry: func(error, time.Duration) { stop() }})
			cutting = false
			name := c.path("images/tmp", img.Digest.Hex())
			part, rerr := os.ReadFile(name)
			if !errors.Is(err, context.Canceled) || rerr != nil || len(part) < 3<<20 {
				t.Fatalf("cut off: %v, %d bytes are there, %v", err, len(part), rerr)
			}
			if err := os.WriteFile(name, tt.left(part), 0o600); err != nil {
				t.Fatal(err)
			}
			c = open(t, dir) // as after a boot
			n, err := c.Fetch(t.Context(), Fetch{Source: client, Images: []agentapi.Image{img.Image}})
			if err != nil || n > tt.most {
				t.Errorf("%d bytes came, at most %d should; %v", n, tt.most, err)
			}
			wantImage(t, c, img.Blob, img.content)
		})
	}
}

// A cutWriter breaks the connection off after some bytes.
type cutWriter struct {
	http.ResponseWriter
	left int
}

func (c *cutWriter) Write(p []byte) (int, error) {
	if c.left -= len(p); c.left < 0 {
		panic(http.ErrAbortHandler)
	}
	return c.ResponseWriter.Write(p)
}

// TestAWholeFileNeedsOnlyItsName has the power cut come between the last byte and the name.
func TestAWholeFileNeedsOnlyItsName(t *testing.T) {
	var s agentapitest.Server
	old, _ := versions()
	img := addChunked(t, &s, old)
	c := open(t, t.TempDir())
	if err := os.WriteFile(c.path("images/tmp", img.Digest.Hex()), img.content, 0o600); err != nil {
		t.Fatal(err)
	}
	n, err := c.Fetch(t.Context(), Fetch{Source: serve(t, &s), Images: []agentapi.Image{img.Image}})
	if err != nil || n != 0 {
		t.Errorf("%d bytes came, %v", n, err)
	}
	wantImage(t, c, img.Blob, img.content)
}

func TestIndexesGoWithTheirImages(t *testing.T) {
	var s agentapitest.Server
	old, _ := versions()
	img := addChunked(t, &s, old)
	c := cacheWith(t, serve(t, &s), img)
	if _, err := os.Stat(c.indexPath(img.Digest)); err != nil {
		t.Error(err)
	}
	if err := c.RemoveImage(img.Digest); err != nil {
		t.Fatal(err)
	}
	open(t, c.Dir())
	if _, err := os.Stat(c.indexPath(img.Digest)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the index of an image that is gone: %v", err)
	}
}

// TestPace has a second of transfer take a second.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := pace{rate: 1 << 20}
		began := time.Now()
		for range 40 {
			if err := p.wait(t.Context(), 64<<10); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(began); took < 2*time.Second || took > 2500*time.Millisecond {
			t.Errorf("2.5 MiB at 1 MiB a second took %v", took)
		}
		free := pace{}
		began = time.Now()
		if err := free.wait(t.Context(), 1<<30); err != nil || time.Since(began) != 0 {
			t.Errorf("without a limit: %v, %v", time.Since(began), err)
		}
	})
}

// TestAMeterWatchesReadsAlone has a transfer that does something else for long, and then stands still.
func TestAMeterWatchesReadsAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := &Cache{stall: time.Second}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		watch := time.AfterFunc(c.stall, cancel)
		watch.Stop()
		m := &meter{ctx: ctx, r: io.MultiReader(bytes.NewReader([]byte("abc")), blocked{ctx}), t: &transfer{c: c, pace: &pace{}}, watch: watch}
		if n, err := m.Read(make([]byte, 10)); n != 3 || err != nil {
			t.Fatalf("%d, %v", n, err)
		}
		time.Sleep(time.Minute)
		if ctx.Err() != nil {
			t.Error("cut off while nobody read")
		}
		if _, err := m.Read(make([]byte, 10)); !errors.Is(err, context.Canceled) || m.t.net != 3 {
			t.Errorf("%v, %d bytes", err, m.t.net)
		}
	})
}
