package source

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-git/go-git/v5/plumbing"
)

// zeros writes a file of n zero bytes, but for its beginning, that takes no room.
func (r *gitRepo) zeros(name string, n int64) {
	r.t.Helper()
	r.write(name, name)
	if err := os.Truncate(filepath.Join(r.dir, name), n); err != nil {
		r.t.Fatal(err)
	}
}

// allocated is how many bytes f allocates.
func allocated(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}

func has(r *Repo, hash string) bool {
	return openStorage(r.mirror.dir).HasEncodedObject(plumbing.NewHash(hash)) == nil
}

// Somebody pushes a file to another branch that would take the server's memory.
func TestBigFileOfAnotherBranch(t *testing.T) {
	const size = 192 << 20
	work := newGitRepo(t)
	head := work.commit("a", "1")
	work.git("checkout", "-q", "-b", "other")
	work.zeros("big", size)
	other := work.commit("b", "2")
	big := work.git("rev-parse", "HEAD:big")
	borrower := filepath.Join(t.TempDir(), "borrower")
	work.git("clone", "-q", "--shared", "--mirror", work.dir, borrower)
	packed := filepath.Join(t.TempDir(), "packed")
	work.git("clone", "-q", "--mirror", "file://"+work.dir, packed)
	for name, dir := range map[string]string{"loose objects": work.dir, "packed": packed, "alternates": borrower} {
		t.Run(name, func(t *testing.T) {
			r := open(t, Config{Repo: dir})
			if n := allocated(func() { want(t, fetch(t, r), head, "a", "1") }); n > size/2 {
				t.Errorf("a fetch took %d MiB for a file of %d MiB that nobody asks for", n>>20, size>>20)
			}
			rev, err := r.Revision(t.Context(), other)
			if err != nil || has(r, big) {
				t.Fatalf("of the other branch: %v, and the mirror has the file: %v", err, has(r, big))
			}
			want(t, rev, other, "b", "2")
			if _, err := fs.ReadFile(rev.Tree, "big"); !errors.Is(err, errTooBig) {
				t.Errorf("reading the file: %v", err)
			}
		})
	}
}

// A pack is encoded in parts, and what was left out of a mirror is left out when its packs become one, or it is made anew.
func TestPackInParts(t *testing.T) {
	work := newGitRepo(t)
	work.zeros("big", MaxFileSize+1)
	for i := range 3 {
		work.zeros(fmt.Sprint(i), 15<<20)
	}
	head := work.commit("a", "1")
	r := open(t, Config{Repo: work.dir})
	checked := func() {
		t.Helper()
		rev, err := r.Revision(t.Context(), head)
		if err != nil {
			t.Fatal(err)
		}
		want(t, rev, head, "a", "1")
		for i := range 3 {
			b, err := fs.ReadFile(rev.Tree, fmt.Sprint(i))
			if err != nil || len(b) != 15<<20 || string(b[:2]) != fmt.Sprint(i)+"\x00" {
				t.Errorf("file %d has %d bytes, %v", i, len(b), err)
			}
		}
		packs, _ := filepath.Glob(filepath.Join(r.mirror.dir, "objects/pack/*.idx"))
		for _, p := range packs {
			runGit(t, r.mirror.dir, "verify-pack", p)
		}
	}
	fetch(t, r)
	checked()
	for i := range maxPacks {
		work.commit("a", fmt.Sprint("and ", i))
		fetch(t, r)
	}
	if packs, _ := filepath.Glob(filepath.Join(r.mirror.dir, "objects/pack/*.pack")); len(packs) != 1 {
		t.Errorf("there are %d packs", len(packs))
	}
	checked()
	if err := errors.Join(r.mirror.rebuild(), os.RemoveAll(filepath.Join(work.dir, ".git"))); err != nil {
		t.Fatal(err)
	}
	checked()
}

// bigBranch commits a file that is too big to a branch called other, which is checked out then.
func (r *gitRepo) bigBranch() string {
	r.git("checkout", "-q", "-b", "other")
	r.zeros("big", MaxFileSize+1)
	return r.commit("b", "2")
}

// A server that can leave out big files is asked to; of one that cannot, the followed branch is taken alone.
func TestBigFileOverHTTP(t *testing.T) {
	work, root := served(t)
	head := work.git("rev-parse", "HEAD")
	other := work.bigBranch()
	big := work.git("rev-parse", "HEAD:big")
	work.git("push", "-q", "origin", "other")
	srv := httptest.NewServer(backend(root))
	defer srv.Close()

	r := open(t, Config{Repo: srv.URL + "/fleet.git"})
	r.remote.(*wire).most = MaxFileSize
	want(t, fetch(t, r), head, "fleet.cue", "one")
	if has(r, other) || has(r, big) {
		t.Error("the mirror has what is too big")
	}
	if left, _ := filepath.Glob(filepath.Join(r.mirror.dir, "objects/pack/tmp_*")); len(left) > 0 {
		t.Errorf("left %q", left)
	}
	work.git("checkout", "-q", "-b", "third", "main")
	third := work.commit("c", "3")
	work.git("push", "-q", "origin", "third")
	want(t, fetch(t, r), head, "fleet.cue", "one")
	rev, err := r.Revision(t.Context(), third)
	if err != nil {
		t.Fatal("a branch that came later: ", err)
	}
	want(t, rev, third, "c", "3")

	runGit(t, filepath.Join(root, "fleet.git"), "config", "uploadpack.allowFilter", "true")
	r = open(t, Config{Repo: srv.URL + "/fleet.git"})
	r.remote.(*wire).most = MaxFileSize
	want(t, fetch(t, r), head, "fleet.cue", "one")
	if rev, err = r.Revision(t.Context(), other); err != nil || has(r, big) {
		t.Fatalf("of the other branch: %v, and the mirror has the file: %v", err, has(r, big))
	}
	want(t, rev, other, "b", "2")

	// On the followed branch nothing can be left out.
	runGit(t, filepath.Join(root, "fleet.git"), "config", "uploadpack.allowFilter", "false")
	work.git("push", "-q", "-f", "origin", "other:main")
	r = open(t, Config{Repo: srv.URL + "/fleet.git"})
	r.remote.(*wire).most = MaxFileSize
	if _, err := r.Fetch(t.Context()); !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "uploadpack.allowFilter") {
		t.Errorf("got %v, want ErrUnreachable, with what to do", err)
	}
}

// A head that is too big is transferred once, however often it is asked for, until it moves or the server can leave files out.
func TestBigFileIsRefusedOnce(t *testing.T) {
	work, root := served(t)
	good := work.git("rev-parse", "HEAD")
	work.zeros("big", MaxFileSize+1)
	bad := work.commit("b", "2")
	work.git("push", "-q", "origin", "main")
	work.git("checkout", "-q", "-b", "side", good)
	side := work.commit("c", "3")
	work.git("push", "-q", "origin", "side")
	var transfers atomic.Int32
	git := backend(root)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasSuffix(r.URL.Path, "/git-upload-pack") {
			transfers.Add(1)
		}
		git.ServeHTTP(w, r)
	}))
	defer srv.Close()
	r := open(t, Config{Repo: srv.URL + "/fleet.git", Interval: 10 * time.Millisecond})
	r.remote.(*wire).most = MaxFileSize
	refused := func(n int32) {
		t.Helper()
		var first error
		transfers.Store(0)
		for range 2 {
			_, err := r.Fetch(t.Context())
			if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "uploadpack.allowFilter") {
				t.Fatalf("got %v, want ErrUnreachable, with what to do", err)
			}
			if first == nil {
				first = err
			}
			if err.Error() != first.Error() {
				t.Errorf("got first %v, then %v", first, err)
			}
		}
		if got := transfers.Load(); got != n {
			t.Errorf("%d transfers, want %d", got, n)
		}
	}

	refused(2) // with the other branches, then alone
	woken := watch(t, r)
	for range 3 {
		until(t, r, woken, "", ErrUnreachable)
	}
	if got := transfers.Load(); got != 2 {
		t.Errorf("%d transfers after some polls, want no more than 2", got)
	}

	work.git("push", "-q", "-f", "origin", good+":main")
	want(t, fetch(t, r), good, "fleet.cue", "one")
	if !has(r, side) {
		t.Error("a branch that is small enough was given up for good")
	}
	work.git("push", "-q", "origin", bad+":main")
	refused(1)
	work.git("checkout", "-q", "main")
	worse := work.commit("b", "4")
	work.git("push", "-q", "origin", "main")
	refused(1)

	runGit(t, filepath.Join(root, "fleet.git"), "config", "uploadpack.allowFilter", "true")
	until(t, r, woken, worse, nil)
}

// A server that learns to leave out files is asked again for the branches that were given up.
func TestBigFileOfAnotherBranchWithFilterLater(t *testing.T) {
	work, root := served(t)
	head := work.git("rev-parse", "HEAD")
	other := work.bigBranch()
	work.git("push", "-q", "origin", "other")
	srv := httptest.NewServer(backend(root))
	defer srv.Close()
	r := open(t, Config{Repo: srv.URL + "/fleet.git"})
	r.remote.(*wire).most = MaxFileSize
	want(t, fetch(t, r), head, "fleet.cue", "one")
	if has(r, other) {
		t.Fatal("the mirror has what is too big")
	}
	runGit(t, filepath.Join(root, "fleet.git"), "config", "uploadpack.allowFilter", "true")
	want(t, fetch(t, r), head, "fleet.cue", "one")
	if !has(r, other) {
		t.Error("the other branch did not come")
	}
}

// handmade is a pack of one object, whose checksum nobody has asked for yet.
func handmade(typ plumbing.ObjectType, size uint64, content []byte) []byte {
	b := []byte("PACK\x00\x00\x00\x02\x00\x00\x00\x01")
	first := byte(typ)<<4 | byte(size&15)
	if size >>= 4; size > 0 {
		b = binary.AppendUvarint(append(b, first|0x80), size)
	} else {
		b = append(b, first)
	}
	if typ == plumbing.REFDeltaObject {
		b = append(b, make([]byte, 20)...)
	}
	var z bytes.Buffer
	w := zlib.NewWriter(&z)
	_, _ = w.Write(content) // into memory
	_ = w.Close()
	return append(append(b, z.Bytes()...), make([]byte, 20)...)
}

func TestCheckSizes(t *testing.T) {
	delta := func(result uint64) []byte { return binary.AppendUvarint(binary.AppendUvarint(nil, 1<<40), result) }
	for name, tc := range map[string]struct {
		pack []byte
		huge bool
	}{
		"a file":             {handmade(plumbing.BlobObject, 4, []byte("1234")), false},
		"a big file":         {handmade(plumbing.BlobObject, 101, nil), true},
		"a bigger file":      {handmade(plumbing.BlobObject, 1<<50, nil), true},
		"a big tag":          {handmade(plumbing.TagObject, 101, nil), true},
		"a delta":            {handmade(plumbing.REFDeltaObject, uint64(len(delta(100))), delta(100)), false},
		"a delta of much":    {handmade(plumbing.REFDeltaObject, uint64(len(delta(101))), delta(101)), true},
		"a delta of more":    {handmade(plumbing.REFDeltaObject, uint64(len(delta(1<<63))), delta(1<<63)), true},
		"a delta with much":  {handmade(plumbing.REFDeltaObject, 101, nil), true},
		"a delta of nothing": {handmade(plumbing.REFDeltaObject, 0, nil), false},
	} {
		if err := checkSizes(bytes.NewReader(tc.pack), 100); errors.Is(err, errHuge) != tc.huge || err != nil && !tc.huge {
			t.Errorf("%s: got %v, want too big %v", name, err, tc.huge)
		}
	}
}

func FuzzCheckSizes(f *testing.F) {
	f.Add(handmade(plumbing.BlobObject, 4, []byte("1234")))
	f.Add(handmade(plumbing.REFDeltaObject, 3, []byte("\x80\x80\x01")))
	f.Fuzz(func(t *testing.T, pack []byte) {
		if err := checkSizes(bytes.NewReader(pack), 1<<10); err == nil && !bytes.HasPrefix(pack, []byte("PACK")) {
			t.Errorf("%q passed for a pack", pack)
		}
	})
}
