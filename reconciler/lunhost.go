package reconciler

import (
	"context"
	"errors"
	"fmt"
	"maps"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// An openHost is what is open of one host's LUNs. A target is made for one disk and goes with it: a login that began before
// the disk was changed, with the secrets of the one before, ends in a target without LUNs.
type openHost struct {
	target  *iscsi.Target // nil while the current disk is not open
	current string        // id of the disk that is its LUN 0
	images  map[digest.Digest]uint16
	disks   map[string]medium // by id: those that are open, whether or not they are LUNs
}

// imageSerial is how many hex digits of an image's digest are the serial number of its units: a node compares them with those
// of the image that it was told of before it mounts it.
const imageSerial = 32

// serve opens what a host's record says, and publishes it. heard is the boot that the record was made after.
func (l *luns) serve(ctx context.Context, rec state.LUNs, of *state.ISCSI, heard *atBoot) error {
	h := l.hosts[rec.Host]
	if h == nil {
		h = &openHost{disks: map[string]medium{}}
		l.hosts[rec.Host] = h
	}
	wanted, _ := rec.Wanted(of)
	at := portal{other: wanted.ID != "" && wanted.ID != rec.Current, booted: rec.Boot != nil}
	var errs []error
	for _, d := range rec.Disks {
		if d.ID == rec.Current || d.ID == wanted.ID {
			errs = append(errs, l.openDisk(ctx, h, rec.Host, d))
		}
	}
	errs = append(errs, l.changeDisk(h, rec))
	waits := false
	for d, n := range rec.Images {
		img := l.image(ctx, d)
		waits = waits || img.opening
		errs = append(errs, img.err, h.addImage(img, n))
	}
	errs = append(errs, l.trim(h, rec))
	if err := errors.Join(errs...); err != nil {
		at.why = "its disk on the server: " + err.Error()
	}
	if cur, ok := rec.Disk(h.current); ok {
		at.current, at.file = cur, l.media.file(rec.Host, cur)
	}
	at.sizes = map[digest.Digest]int64{}
	for d := range h.images {
		at.sizes[d] = l.images[d].medium.Size()
	}
	at.ready = h.target != nil && !waits
	at.target, at.images = h.target, maps.Clone(h.images)
	if cur, ok := rec.Disk(rec.Current); ok {
		at.chap = chapOf(rec.Host, cur)
	}
	if h.disks[wanted.ID] != nil {
		at.disk = wanted
	}
	l.publish(rec.Host, at, heard)
	return errors.Join(errs...)
}

func chapOf(host string, d state.LUNDisk) iscsi.CHAP {
	return iscsi.CHAP{User: host, Secret: d.Secret, MutualUser: mutualUser, MutualSecret: d.MutualSecret}
}

// openDisk opens a disk that a host writes to, unless it is, or the image under it is not yet.
func (l *luns) openDisk(ctx context.Context, h *openHost, host string, d state.LUNDisk) error {
	if h.disks[d.ID] != nil {
		return nil
	}
	var base *lun.Image
	if d.Image != nil {
		img := l.image(ctx, d.Image.Digest)
		if base = img.medium; base == nil {
			return img.err
		}
	}
	m, err := l.media.disk(host, d, base)
	if err == nil {
		h.disks[d.ID] = m
	}
	return err
}

// changeDisk makes the record's current disk LUN 0 of a target of its own, where it is not, and ends all that goes on with
// the one before.
func (l *luns) changeDisk(h *openHost, rec state.LUNs) error {
	if h.current == rec.Current {
		return nil
	}
	if h.target != nil {
		l.unready(rec.Host)
		if err := l.endTarget(h, rec.Host); err != nil {
			return err
		}
	}
	m := h.disks[rec.Current]
	if m == nil {
		return nil // the image under it is being opened, or there is an error
	}
	d, _ := rec.Disk(rec.Current)
	unit, err := scsi.NewUnit(m, scsi.Config{Serial: d.ID, Keep: l.media.keeper(rec.Host, d)})
	if err != nil {
		return fmt.Errorf("making the disk of a host a logical unit: %w", err)
	}
	t := iscsi.NewTarget(targetName(rec.Host))
	if err := t.Add(0, unit); err != nil {
		return fmt.Errorf("adding LUN 0: %w", err)
	}
	h.target, h.current, h.images = t, d.ID, map[digest.Digest]uint16{}
	return nil
}

// endTarget ends a host's sessions and takes all LUNs from its target. The disks stay open.
func (l *luns) endTarget(h *openHost, host string) error {
	l.target.Drop(initiatorName(host))
	for _, n := range h.target.LUNs() {
		if err := h.target.Remove(n); err != nil {
			return fmt.Errorf("removing LUN %d: %w", n, err)
		}
	}
	h.target, h.current, h.images = nil, "", nil
	return nil
}

// addImage makes an image that is open a LUN, where it is not.
func (h *openHost) addImage(img *openImage, n uint16) error {
	if _, has := h.images[img.digest]; has || h.target == nil || img.medium == nil {
		return nil
	}
	unit, err := scsi.NewUnit(img.medium, scsi.Config{Serial: img.digest.Hex()[:imageSerial]})
	if err != nil {
		return fmt.Errorf("making an image a logical unit: %w", err)
	}
	if err := h.target.Add(n, unit); err != nil {
		return fmt.Errorf("adding LUN %d: %w", n, err)
	}
	h.images[img.digest] = n
	return nil
}

// trim takes from a host what its record does not have any more.
func (l *luns) trim(h *openHost, rec state.LUNs) error {
	for d, n := range h.images {
		if rec.Images[d] == n {
			continue
		}
		if err := h.target.Remove(n); err != nil {
			return fmt.Errorf("removing LUN %d: %w", n, err)
		}
		delete(h.images, d)
	}
	for id, m := range h.disks {
		if _, known := rec.Disk(id); known || id == h.current {
			continue
		}
		delete(h.disks, id)
		if err := m.Close(); err != nil {
			return err
		}
	}
	return nil
}

// closeHost closes all of a host's LUNs.
func (l *luns) closeHost(host string) error {
	h := l.hosts[host]
	if h == nil {
		return nil
	}
	delete(l.hosts, host)
	var errs []error
	if h.target != nil {
		errs = append(errs, l.endTarget(h, host))
	}
	for _, m := range h.disks {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
