package source

import (
	"cmp"
	"crypto/sha1" // what Git ends packs with
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/go-git/go-billy/v5/osfs"
	"github.com/go-git/go-git/v5/plumbing"
	"github.com/go-git/go-git/v5/plumbing/cache"
	"github.com/go-git/go-git/v5/plumbing/format/packfile"
	"github.com/go-git/go-git/v5/plumbing/storer"
	"github.com/go-git/go-git/v5/storage/filesystem"
	"github.com/go-git/go-git/v5/storage/filesystem/dotgit"
)

// Anybody who can push to any branch says how big objects are, and go-git takes one whole into memory to copy or index
// it: a file of 8 GiB of zeros is a pack of 8 MiB. So a mirror leaves out what no tree would give anyway.
const (
	// batchBytes is how many bytes of objects are encoded at once, of which each waits for the others in memory.
	batchBytes = 32 << 20
	// maxReceived is how many bytes a file may have that a remote sends although it was asked not to, or cannot be asked.
	maxReceived = 256 << 20
)

// errHuge is in the chain of errors about objects that are too big for this process to look at.
var errHuge = errors.New("too big")

func hugeError(h plumbing.Hash, size int64) error {
	return fmt.Errorf("object %s has %d bytes: %w", h, size, errHuge)
}

// sizes finds how big objects are, without reading them, also in repositories that the first one borrows from.
type sizes []interface {
	EncodedObjectSize(h plumbing.Hash) (int64, error)
}

func newSizes(s *filesystem.Storage) sizes {
	all := sizes{s}
	dirs := []*dotgit.DotGit{dotgit.NewWithOptions(s.Filesystem(), dotgit.Options{AlternatesFS: osfs.New("/")})}
	for n := 0; n < len(dirs) && n < 16; n++ { // they may borrow from one another
		more, err := dirs[n].Alternates()
		if err != nil {
			continue // there are none
		}
		for _, dir := range more {
			all = append(all, filesystem.NewObjectStorage(dir, cache.NewObjectLRU(0)))
		}
		dirs = append(dirs, more...)
	}
	return all
}

func (s sizes) of(h plumbing.Hash) (int64, error) {
	for _, in := range s {
		n, err := in.EncodedObjectSize(h)
		if !errors.Is(err, plumbing.ErrObjectNotFound) {
			return n, err
		}
	}
	return 0, plumbing.ErrObjectNotFound
}

// batches leaves out of all what is bigger than MaxFileSize, and divides the rest so that no batch of more than one
// object has more than batchBytes. With partial, src is a mirror, which left out something before: what is not there is
// left out again.
func batches(src sizes, all []plumbing.Hash, partial bool) (out [][]plumbing.Hash, err error) {
	var batch []plumbing.Hash
	var size int64
	for _, h := range all {
		n, err := src.of(h)
		if partial && errors.Is(err, plumbing.ErrObjectNotFound) || err == nil && n > MaxFileSize {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading object %s: %w", h, err)
		}
		if size += n; size > batchBytes && len(batch) > 0 {
			out = append(out, batch)
			batch, size = nil, n
		}
		batch = append(batch, h)
	}
	if len(batch) > 0 {
		out = append(out, batch)
	}
	return out, nil
}

// writePack writes objects of src as one pack of dst, complete or not at all, and returns its checksum. A pack is a
// header, the objects of each batch, and a checksum (gitformat-pack(5)); deltas say how far back their base is, so
// batches that were encoded as packs of their own are as good behind one another.
func writePack(dst storer.PackfileWriter, src storer.EncodedObjectStorer, all [][]plumbing.Hash) (plumbing.Hash, error) {
	w, err := dst.PackfileWriter()
	if err != nil {
		return plumbing.ZeroHash, fmt.Errorf("%w: %w", errMirror, err)
	}
	sum := sha1.New()
	err = writeBatches(io.MultiWriter(w, sum), src, all)
	if err == nil {
		_, err = w.Write(sum.Sum(nil))
	}
	return plumbing.Hash(sum.Sum(nil)), errors.Join(err, w.Close())
}

func writeBatches(w io.Writer, src storer.EncodedObjectStorer, all [][]plumbing.Hash) error {
	n := 0
	for _, batch := range all {
		n += len(batch)
	}
	header := binary.BigEndian.AppendUint32([]byte("PACK\x00\x00\x00\x02"), uint32(n))
	if _, err := w.Write(header); err != nil {
		return err
	}
	for _, batch := range all {
		e := &entries{w: w, head: len(header)}
		if _, err := packfile.NewEncoder(e, plain{src}, false).Encode(batch, deltaWindow); err != nil {
			return err
		}
	}
	return nil
}

// entries passes on what lies between a pack's header and its checksum.
type entries struct {
	w    io.Writer
	head int    // bytes that are still to be dropped
	tail []byte // the last ones, which may be the checksum
}

func (e *entries) Write(p []byte) (int, error) {
	n := min(e.head, len(p))
	e.head -= n
	e.tail = append(e.tail, p[n:]...)
	if ready := len(e.tail) - sha1.Size; ready > 0 {
		if _, err := e.w.Write(e.tail[:ready]); err != nil {
			return 0, err
		}
		e.tail = append(e.tail[:0], e.tail[ready:]...)
	}
	return len(p), nil
}

// plain hides everything of a storage but whole objects: go-git reads stored deltas from several goroutines without a
// lock, and does not find those of alternates.
type plain struct{ storer.EncodedObjectStorer }

// receive takes a pack that a remote sends into dst, which is m's, if no file in it has more than most bytes: go-git takes
// each into memory to index it. So the pack is on the disk before go-git sees it.
func receive(m *mirror, dst *filesystem.Storage, pack io.Reader, most int64) (err error) {
	f, err := os.CreateTemp(filepath.Join(m.dir, "objects", "pack"), "tmp_pack_*") // which sweepPacks knows
	if err != nil {
		return fmt.Errorf("%w: %w", errMirror, err)
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	if _, err := io.Copy(f, pack); err != nil {
		return err
	}
	if err := checkSizes(f, cmp.Or(most, maxReceived)); err != nil {
		return err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return packfile.UpdateObjectStorage(dst, f)
}

// checkSizes refuses a pack with a file of more than most bytes, or with another object of more than MaxFileSize. What it
// is that a delta makes is not known here; how big it is, the delta says, and go-git makes no more of it.
func checkSizes(pack io.ReadSeeker, most int64) error {
	if _, err := pack.Seek(0, io.SeekStart); err != nil {
		return err
	}
	s := packfile.NewScanner(pack)
	_, count, err := s.Header()
	if err != nil {
		return err
	}
	for range count {
		h, err := s.NextObjectHeader()
		if err != nil {
			return err
		}
		size, limit := h.Length, most
		switch h.Type {
		case plumbing.BlobObject:
		case plumbing.OFSDeltaObject, plumbing.REFDeltaObject:
			if size > most {
				break
			}
			var d deltaHead
			if _, _, err := s.NextObject(&d); err != nil {
				return err
			}
			size = max(size, d.result())
		default:
			limit = min(most, MaxFileSize)
		}
		if size > limit {
			return fmt.Errorf("an object of %d bytes, more than %d: %w", size, limit, errHuge)
		}
	}
	return nil
}

// A deltaHead keeps the beginning of a delta: the sizes of its base and of its result, 7 bits a byte, low ones first.
type deltaHead []byte

func (d *deltaHead) Write(p []byte) (int, error) {
	const most = 2 * binary.MaxVarintLen64
	*d = append(*d, p[:min(len(p), most-len(*d))]...)
	return len(p), nil
}

func (d *deltaHead) result() int64 {
	_, n := binary.Uvarint(*d)
	if n <= 0 {
		return 0 // no delta, as go-git will find
	}
	size, _ := binary.Uvarint((*d)[n:])
	return int64(min(size, 1<<62)) //nolint:gosec // it fits
}
