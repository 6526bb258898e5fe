package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/atomicfile"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// lunMedia has the files behind LUNs: images in the store, and below dir what hosts write.
//
//	HOST/ID.disk          a disk that began blank
//	HOST/ID.delta         what was written to a disk that began as an image
//	HOST/ID.reservations  its persistent reservations (SPC-4 5.13)
type lunMedia struct {
	blobs interface {
		Stat(ctx context.Context, d digest.Digest) (images.Blob, error)
		Path(d digest.Digest) string
	}
	dir string
}

// A medium is what a logical unit keeps its blocks on.
type medium interface {
	scsi.Medium
	Close() error
}

// image opens an image of the store, whose bytes are hashed first where this process did not do so yet.
func (m lunMedia) image(ctx context.Context, d digest.Digest) (*lun.Image, error) {
	if _, err := m.blobs.Stat(ctx, d); err != nil {
		return nil, err
	}
	return lun.OpenImage(m.blobs.Path(d))
}

func (m lunMedia) path(host string, d state.LUNDisk, ext string) string {
	return filepath.Join(m.dir, host, d.ID+ext)
}

// disk opens what a host writes to, and makes its file where it is not there yet. base is the image that it begins as; nil:
// it begins blank.
func (m lunMedia) disk(host string, d state.LUNDisk, base *lun.Image) (medium, error) {
	if err := m.prepare(host, d); err != nil {
		return nil, err
	}
	if d.Image == nil {
		return lun.OpenDisk(m.file(host, d), d.Size)
	}
	return lun.OpenDelta(base, m.file(host, d), d.Size, d.Image.Digest.String())
}

// prepare makes the directory that a disk's file is made in. The file of a disk that was used before is not made: what the
// host wrote would be gone, and nobody would hear of it.
func (m lunMedia) prepare(host string, d state.LUNDisk) error {
	if !d.Opened.IsZero() {
		if _, err := os.Stat(m.file(host, d)); err != nil {
			return fmt.Errorf("what the host wrote is not there (troupe reset %s begins anew): %w", host, err)
		}
		return nil
	}
	if err := os.MkdirAll(filepath.Join(m.dir, host), 0o700); err != nil {
		return fmt.Errorf("making the directory of a host's disks: %w", err)
	}
	return atomicfile.SyncDir(m.dir)
}

// file is the name of the file with what a host wrote.
func (m lunMedia) file(host string, d state.LUNDisk) string {
	if d.Image == nil {
		return m.path(host, d, ".disk")
	}
	return m.path(host, d, ".delta")
}

// keeper keeps the reservations of a disk.
func (m lunMedia) keeper(host string, d state.LUNDisk) scsi.Keeper {
	return lun.KeepFile(m.path(host, d, ".reservations"))
}

// clear deletes those files of a host that belong to none of its disks. None of them may be open.
func (m lunMedia) clear(host string, rec state.LUNs) error {
	dir := filepath.Join(m.dir, host)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading the directory of a host's disks: %w", err)
	}
	gone := 0
	for _, e := range entries {
		id, _, _ := strings.Cut(e.Name(), ".")
		if _, known := rec.Disk(id); known {
			continue
		}
		if err := os.Remove(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("deleting what a host's disk was: %w", err)
		}
		gone++
	}
	if gone == len(entries) {
		err = os.Remove(dir)
	} else if gone > 0 {
		err = atomicfile.SyncDir(dir)
	}
	if err != nil {
		return fmt.Errorf("deleting what a host's disk was: %w", err)
	}
	return nil
}

// sweep deletes what no record knows: files whose records went before they could.
func (m lunMedia) sweep(recs map[string]state.LUNs) error {
	if err := os.MkdirAll(m.dir, 0o700); err != nil {
		return fmt.Errorf("making the directory of hosts' disks: %w", err)
	}
	entries, err := os.ReadDir(m.dir)
	if err != nil {
		return fmt.Errorf("reading the directory of hosts' disks: %w", err)
	}
	for _, e := range entries {
		if err := m.clear(e.Name(), recs[e.Name()]); err != nil {
			return err
		}
	}
	return nil
}

// room is how many bytes are free for what hosts write.
func (m lunMedia) room() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(m.dir, &st); err != nil {
		return 0, fmt.Errorf("asking for the free space of %q: %w", m.dir, err)
	}
	return int64(st.Bavail) * st.Bsize, nil //nolint:gosec // no file system has 2^63 bytes
}

// An openImage is an image that units of any number of hosts read.
type openImage struct {
	digest  digest.Digest
	medium  *lun.Image // nil while opening, and where err is set
	opening bool
	err     error
	retry   time.Time // when it is tried again, where err is set
}

func (i *openImage) close() error {
	if i.medium == nil {
		return nil
	}
	return i.medium.Close()
}

// image is the image d, which may be opening still. The caller looks again when the controller is told that it is open.
func (l *luns) image(ctx context.Context, d digest.Digest) *openImage {
	img := l.images[d]
	if img != nil && (img.err == nil || l.now().Before(img.retry)) {
		return img
	}
	img = &openImage{digest: d, opening: true}
	l.images[d] = img
	go func() {
		done := &openImage{digest: d}
		done.medium, done.err = l.media.image(ctx, d)
		l.opened <- done // run takes it, or settle
	}()
	return img
}

// took takes over an image that was opened, or could not be.
func (l *luns) took(img *openImage) {
	if img.err != nil {
		img.err = fmt.Errorf("opening image %s: %w", img.digest.Short(), img.err)
		img.retry = l.now().Add(assignAgain)
	}
	l.images[img.digest] = img
}

// closeImages closes the images that no host has any more.
func (l *luns) closeImages() error {
	needed := map[digest.Digest]bool{}
	for _, rec := range l.recs {
		for d := range rec.Images {
			needed[d] = true
		}
		for _, disk := range rec.Disks {
			if disk.Image != nil {
				needed[disk.Image.Digest] = true
			}
		}
	}
	for d, img := range l.images {
		if needed[d] || img.opening {
			continue
		}
		delete(l.images, d)
		if err := img.close(); err != nil {
			return err
		}
	}
	return nil
}

// leanRoom is below how many free bytes people are told that disks will fill up.
const leanRoom = 1 << 30

// checkRoom tells people when little room is left for what hosts write: a full disk is an error to them.
func (l *luns) checkRoom(ctx context.Context) error {
	free, err := l.media.room()
	if err != nil {
		return err
	}
	if lean := free < leanRoom; lean != l.lean {
		l.lean = lean
		if lean {
			l.events.note(ctx, state.Event{Kind: "disk", Subject: "server", Warning: true, Message: fmt.Sprintf(
				"%d MiB are free for the disks of hosts: when that is used up, what they write fails", free>>20)})
		}
	}
	return nil
}
