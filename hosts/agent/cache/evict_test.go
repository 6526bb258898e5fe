package cache

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
	"github.com/troupe-dev/troupe/internal/digest"
)

// fullCache runs the node delta "d0" of the first image, and has of everything that may be evicted: the second image, of
// the previous release, the third, of none, two other node deltas, and half of the fourth image.
func fullCache(t *testing.T, s *agentapitest.Server) (*Cache, *agentapi.Client, []agentapi.Blob) {
	t.Helper()
	c, client := open(t, t.TempDir()), serve(t, s)
	var blobs []agentapi.Blob
	for i := range 4 {
		blobs = append(blobs, s.Add(randomBytes(1<<20, uint64(60+i))))
	}
	for _, b := range blobs[:3] {
		if _, err := c.Fetch(t.Context(), Fetch{Source: client, Blobs: []agentapi.Blob{b}}); err != nil {
			t.Fatal(err)
		}
	}
	use(t, c, "a0", agentapi.Blob{Digest: digest.Of([]byte("gone"))}, blobs[0])
	use(t, c, "b0", blobs[1], blobs[1])
	becomeGood(t, c, "b0")
	use(t, c, "d0", blobs[0], blobs[0])
	half := randomBytes(1<<20, 63)[:1<<19]
	if err := os.WriteFile(c.path("images/tmp", blobs[3].Digest.Hex()), half, 0o600); err != nil {
		t.Fatal(err)
	}
	return c, client, blobs
}

// contents lists what could have been evicted from a fullCache.
func contents(t *testing.T, c *Cache, blobs []agentapi.Blob) string {
	t.Helper()
	var out []string
	for i, name := range []string{"current", "previous", "old", "fourth"} {
		if c.Has(blobs[i].Digest, blobs[i].Size) {
			out = append(out, name)
		}
	}
	tmp, err := os.ReadDir(c.path("images/tmp"))
	if err != nil {
		t.Fatal(err)
	}
	out = append(out, slices.Repeat([]string{"transfer"}, len(tmp))...)
	return strings.Join(append(out, deltasIn(t, c)), " ")
}

// TestABootOfWhatRanEvictsNothing has a role that filled the disk: it runs on, and needs no room for that.
func TestABootOfWhatRanEvictsNothing(t *testing.T) {
	var s agentapitest.Server
	c, client, blobs := fullCache(t, &s)
	const all = "current previous old transfer a0 b0 d0"
	c.free = func() (int64, error) { return 0, nil }
	f := Fetch{Source: client, Blobs: blobs[:1], Deltas: []string{"d0"}}
	if n, err := c.Fetch(t.Context(), f); n != 0 || err != nil {
		t.Fatalf("Fetch of nothing: %d bytes, %v", n, err)
	}
	if diff := cmp.Diff(all, contents(t, c, blobs)); diff != "" {
		t.Errorf("on a full disk (-want +got):\n%s", diff)
	}
	f.Deltas = []string{"d0", "ee"}
	if n, err := c.Fetch(t.Context(), f); n != 0 || err != nil {
		t.Fatalf("Fetch for another node delta: %d bytes, %v", n, err)
	}
	if diff := cmp.Diff("current previous b0 d0", contents(t, c, blobs)); diff != "" {
		t.Errorf("for a new node delta (-want +got):\n%s", diff)
	}
}

// TestATransferIsKeptWhileThereIsRoom has a node that is told to run other things while it fetches a release.
func TestATransferIsKeptWhileThereIsRoom(t *testing.T) {
	var s agentapitest.Server
	c, client, blobs := fullCache(t, &s)
	other := s.Add(randomBytes(1000, 70))
	for _, f := range []Fetch{
		{Source: client, Blobs: blobs[:1], Deltas: []string{"ee"}},
		{Source: client, Blobs: []agentapi.Blob{other}, Deltas: []string{"ee"}},
	} {
		if _, err := c.Fetch(t.Context(), f); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff("current previous old transfer a0 b0 d0", contents(t, c, blobs)); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	}
	if n, err := c.Fetch(t.Context(), Fetch{Source: client, Blobs: blobs[3:]}); n != 1<<19 || err != nil {
		t.Errorf("the rest of the transfer: %d bytes, %v", n, err)
	}
}

func TestATransferGoesFirst(t *testing.T) {
	var s agentapitest.Server
	c, client, blobs := fullCache(t, &s)
	c.free = func() (int64, error) {
		tmp, err := os.ReadDir(c.path("images/tmp"))
		return reserve + 2000 - int64(1000*len(tmp)), err
	}
	b := s.Add(randomBytes(1500, 71))
	if _, err := c.Fetch(t.Context(), Fetch{Source: client, Blobs: []agentapi.Blob{b}}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("current previous old a0 b0 d0", contents(t, c, blobs)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
