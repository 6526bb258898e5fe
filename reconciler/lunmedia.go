package reconciler

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/store"
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
//	HOST/ID.unknown       says by its time of modification since when no record knows the disk
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
	// Discard is a Close that does not wait for what was written: nobody needs that, or it is lost.
	Discard() error
	Lost() error // why all writes fail until it is opened anew; nil: they do not
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
	delta, err := lun.OpenDelta(base, m.file(host, d), d.Size, d.Image.Digest.String())
	if errors.Is(err, lun.ErrFormat) {
		err = fmt.Errorf("what the host wrote cannot be read (troupe reset %s begins anew): %w", host, err)
	}
	return delta, err
}

// prepare makes the directory that a disk's file is made in. The file of a disk that was used before is not made, nor filled
// where it is empty: what the host wrote would be gone, and nobody would hear of it.
func (m lunMedia) prepare(host string, d state.LUNDisk) error {
	if !d.Opened.IsZero() {
		fi, err := os.Stat(m.file(host, d))
		if err == nil && fi.Size() == 0 {
			err = fmt.Errorf("file %q is empty", m.file(host, d))
		}
		if err != nil {
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

// clear deletes the files of disks that a host has no more. None of them may be open.
func (m lunMedia) clear(host string, gone []state.LUNDisk) error {
	for _, d := range gone {
		if err := m.delete(host, d.ID); err != nil {
			return err
		}
	}
	if len(gone) == 0 {
		return nil
	}
	return m.synced(atomicfile.SyncDir(filepath.Join(m.dir, host)))
}

// diskFiles are how the names of a disk's files end, behind its id.
var diskFiles = []string{".disk", ".delta", ".reservations", ".unknown"}

// delete deletes the files of one disk. A crash leaves them to unknown: they go after a week.
func (m lunMedia) delete(host, id string) error {
	for _, ext := range diskFiles { // the mark comes last: without it the rest would be kept for another week
		if err := os.Remove(filepath.Join(m.dir, host, id+ext)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("deleting what a host's disk was: %w", err)
		}
	}
	return nil
}

// tidy removes the directory of a host where nothing is in it any more, and else has deletions be on stable storage. No disk
// of the host may be opened meanwhile.
func (m lunMedia) tidy(host string) error {
	dir := filepath.Join(m.dir, host)
	err := os.Remove(dir)
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) { // rmdir(2): it may be either
		err = atomicfile.SyncDir(dir)
	}
	return m.synced(err)
}

// synced is the error of having deletions be on stable storage.
func (m lunMedia) synced(err error) error {
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("deleting what a host's disk was: %w", err)
	}
	return nil
}

// A strayDisk is a disk of which there are files, and no record: its record went first, and the server died, or the records
// are older than the files, or were lost.
type strayDisk struct {
	host, id string
	found    time.Time // when it was first met
	fresh    bool      // which is now
}

// strays finds the disks that known does not know, marks them as met now where they were not met before, and takes the marks
// from those that are known again. It passes over whatever has not the name of a host's disk. What it cannot do is in err.
func (m lunMedia) strays(known func(host, id string) bool, now time.Time) (found []strayDisk, err error) {
	hosts, err := os.ReadDir(m.dir)
	if err != nil {
		return nil, fmt.Errorf("reading the directory of hosts' disks: %w", err)
	}
	var errs []error
	for _, h := range hosts {
		if !h.IsDir() || strings.Trim(h.Name(), hostChars) != "" {
			continue
		}
		files, err := os.ReadDir(filepath.Join(m.dir, h.Name()))
		if err != nil {
			errs = append(errs, fmt.Errorf("reading the directory of a host's disks: %w", err))
			continue
		}
		seen := ""
		for _, f := range files { // sorted: those of one disk are side by side
			id := diskOf(f)
			if id == "" || id == seen {
				continue
			}
			seen = id
			if known(h.Name(), id) {
				errs = append(errs, m.unmark(h.Name(), id))
				continue
			}
			s, err := m.mark(h.Name(), id, now)
			if errs = append(errs, err); err == nil {
				found = append(found, s)
			}
		}
	}
	return found, errors.Join(errs...)
}

// hostChars are those of the names of hosts (schema). What people move aside is often called something with a dot.
const hostChars = "abcdefghijklmnopqrstuvwxyz0123456789-"

// diskOf is the id of the disk that a file belongs to; "" where its name is not that of a disk's file.
func diskOf(f fs.DirEntry) string {
	id, _, _ := strings.Cut(f.Name(), ".")
	if !f.Type().IsRegular() || len(id) != 2*diskIDBytes || strings.Trim(id, "0123456789abcdef") != "" {
		return ""
	}
	if !slices.Contains(diskFiles, strings.TrimPrefix(f.Name(), id)) {
		return ""
	}
	return id
}

// mark has an empty file say, by when it was last modified, since when nobody knows a disk.
func (m lunMedia) mark(host, id string, now time.Time) (strayDisk, error) {
	name := filepath.Join(m.dir, host, id+".unknown")
	s := strayDisk{host: host, id: id, found: now}
	fi, err := os.Stat(name)
	if err == nil {
		s.found = fi.ModTime()
		return s, nil
	}
	if s.fresh = errors.Is(err, fs.ErrNotExist); s.fresh {
		if err = os.WriteFile(name, nil, 0o600); err == nil {
			err = os.Chtimes(name, now, now)
		}
	}
	if err != nil {
		return s, fmt.Errorf("marking a disk that no record knows: %w", err)
	}
	return s, nil
}

func (m lunMedia) unmark(host, id string) error {
	if err := os.Remove(filepath.Join(m.dir, host, id+".unknown")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("taking the mark from a disk that is known again: %w", err)
	}
	return nil
}

// sweepEvery is how often files are looked for that no record knows.
const sweepEvery = time.Hour

// sweep has the disks that no record knows deleted, a week after people were told of them: they may be all that there is of
// them, where the records were lost. Nothing that goes wrong in it keeps a host from its disk.
func (l *luns) sweep(ctx context.Context) {
	now := l.now()
	if !l.swept.IsZero() && now.Sub(l.swept) < sweepEvery {
		return
	}
	l.swept = now
	strays, err := l.media.strays(l.knows, now)
	warn := func(host, format string, args ...any) {
		l.events.note(ctx, state.Event{Kind: "disk", Subject: host, Message: fmt.Sprintf(format, args...), Warning: true})
	}
	for _, s := range strays {
		file := filepath.Join(l.media.dir, s.host, s.id)
		switch {
		case s.fresh:
			warn(s.host, "no record knows the disk %s.*: it is deleted on %s, unless it is on record again by then", file, s.found.Add(keepUnused).UTC().Format(time.DateOnly))
		case now.Sub(s.found) >= keepUnused:
			if gone := errors.Join(l.media.delete(s.host, s.id), l.media.tidy(s.host)); gone != nil {
				err = errors.Join(err, gone)
				continue
			}
			warn(s.host, "the disk %s.* is deleted: no record knew it for a week", file)
		}
	}
	if err != nil {
		l.log.Error("looking for disks that no record knows", "error", err)
	}
}

// knows says whether a disk is on record, or still open, or about to be deleted.
func (l *luns) knows(host, id string) bool {
	rec := l.recs[host]
	_, known := rec.Disk(id)
	if h := l.hosts[host]; h != nil {
		known = known || h.disks[id] != nil || slices.ContainsFunc(h.gone, func(d state.LUNDisk) bool { return d.ID == id })
	}
	return known
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
	err     error     // also while opening, where it could not be opened before: people were told
	retry   time.Time // when it is tried again, where err is set
	failed  time.Time // since when it could not be, where err is set
}

// lost says whether an image does not come back unless somebody makes it again: it is not in the store, or its bytes are
// wrong, or it could not be read for as long as a machine may go on that nobody wants.
func (i *openImage) lost(now time.Time) bool {
	if i.err == nil {
		return false
	}
	return errors.Is(i.err, store.ErrNotFound) || errors.Is(i.err, digest.ErrMismatch) || now.Sub(i.failed) >= leaveGrace
}

func (i *openImage) close() error {
	if i.medium == nil {
		return nil
	}
	return i.medium.Close()
}

// openings is how many images are opened at a time. Each is read whole for that, and more at a time are there no earlier.
const openings = 2

// image is the image d, which may be opening still. The caller looks again when the controller is told that it is open.
func (l *luns) image(ctx context.Context, d digest.Digest) *openImage {
	img := l.images[d]
	if img != nil && (img.opening || img.err == nil || l.now().Before(img.retry)) {
		return img
	}
	again := &openImage{digest: d, opening: true}
	if img != nil {
		again.err, again.failed = img.err, img.failed
	}
	l.images[d], l.queue = again, append(l.queue, d)
	l.openNext(ctx)
	return again
}

// openRunning has those images opened first that machines may have mounted: they wait for them.
func (l *luns) openRunning(ctx context.Context, all map[string]lunFacts) {
	for _, host := range slices.Sorted(maps.Keys(l.recs)) {
		rec, f := l.recs[host], all[host]
		for d := range rec.Images {
			if f.runs(&rec, d) {
				l.image(ctx, d)
			}
		}
		if cur, _ := rec.Disk(rec.Current); cur.Image != nil && !cur.Opened.IsZero() {
			l.image(ctx, cur.Image.Digest)
		}
	}
}

// openNext opens images that wait for that, as many as may be opened now.
func (l *luns) openNext(ctx context.Context) {
	for ; l.opening < openings && len(l.queue) > 0; l.opening++ {
		d := l.queue[0]
		l.queue = l.queue[1:]
		go func() {
			done := &openImage{digest: d}
			done.medium, done.err = l.media.image(ctx, d)
			l.opened <- done // run takes it, or settle
		}()
	}
}

// took takes over an image that was opened, or could not be.
func (l *luns) took(img *openImage) {
	l.opening--
	if img.err != nil {
		img.err = fmt.Errorf("opening image %s: %w", img.digest.Short(), img.err)
		img.retry, img.failed = l.now().Add(assignAgain), l.now()
		if before := l.images[img.digest]; before != nil && before.err != nil {
			img.failed = before.failed
		}
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
