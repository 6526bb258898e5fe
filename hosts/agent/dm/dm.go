// Package dm makes dm-verity devices: read-only block devices of which the kernel gives only blocks that are what the
// root hash says, and an error for any other one (Linux, include/uapi/linux/dm-ioctl.h and
// Documentation/admin-guide/device-mapper/verity.rst).
package dm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/verity"
)

// control is where the ioctls go; its module makes it.
const control = "/dev/mapper/control"

// prefix is what the names of our devices begin with: nobody else's is touched.
const prefix = "troupe-"

// The ioctls that are used, by number.
const (
	listDevices = 2
	devCreate   = 3
	devRemove   = 4
	devSuspend  = 6
	tableLoad   = 9
	tableStatus = 12
)

// Flags of struct dm_ioctl.
const (
	flagReadOnly       = 1 << 0
	flagStatusTable    = 1 << 4
	flagBufferFull     = 1 << 8
	flagSkipLockFS     = 1 << 10
	flagDeferredRemove = 1 << 17
)

// Sizes of the structures, in bytes, and the offsets in struct dm_ioctl:
//
//	 0  version, 3 numbers of 32 bits     28  open count
//	12  bytes in all                      32  flags
//	16  where the payload begins          40  device number, 64 bits
//	20  targets in the payload            48  name, 128 bytes
//
// struct dm_target_spec has first sector and length (64 bits each), status, offset of the next one, and the type (16 bytes).
const (
	headSize   = 312
	nameAt     = 48
	nameSize   = 128
	targetSize = 40
	bufferSize = 16 << 10 // a table of ours is one line, and a list of devices has some 50 bytes for each
)

// A request is a struct dm_ioctl with its payload.
type request struct{ b []byte }

func newRequest(name string, flags uint32) request {
	r := request{make([]byte, bufferSize)}
	for i, v := range []uint32{4, 0, 0, bufferSize, headSize} {
		binary.NativeEndian.PutUint32(r.b[4*i:], v)
	}
	binary.NativeEndian.PutUint32(r.b[28:], flags)
	copy(r.b[nameAt:nameAt+nameSize-1], name)
	return r
}

func (r request) setTarget(sectors int64, params string) {
	binary.NativeEndian.PutUint32(r.b[20:], 1)
	t := r.b[headSize:]
	binary.NativeEndian.PutUint64(t[8:], uint64(sectors)) //nolint:gosec // it is not negative
	copy(t[24:targetSize], "verity")
	copy(t[targetSize:], params)
}

func (r request) flags() uint32  { return binary.NativeEndian.Uint32(r.b[28:]) }
func (r request) device() uint64 { return binary.NativeEndian.Uint64(r.b[40:]) }

// call does one ioctl.
func (r request) call(number uintptr) error {
	f, err := os.OpenFile(control, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("asking the device mapper: %w", err)
	}
	defer f.Close()
	// _IOWR(0xfd, number, struct dm_ioctl)
	op := uintptr(3)<<30 | headSize<<16 | 0xfd<<8 | number
	for range 10 { // EINTR: a signal of the runtime
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), op, uintptr(unsafe.Pointer(&r.b[0])))
		if errno == 0 {
			return nil
		}
		if err = errno; !errors.Is(err, unix.EINTR) {
			break
		}
	}
	return err
}

// An Image says what a device is made of.
type Image struct {
	Device uint64 // number of the block device that has the image, as stat(2) gives it
	Data   int64  // bytes before the superblock
	Root   verity.Root
}

// A Device is a dm-verity device.
type Device struct{ name string }

// maxSame is how many devices of one image there may be at a time.
const maxSame = 16

// Open makes a device of an image. It is there, under Path, until it was told to Release and nobody has it open any more.
func Open(img Image) (*Device, error) {
	var d *Device
	err := error(unix.EBUSY)
	for i := 0; i < maxSame && errors.Is(err, unix.EBUSY); i++ { // EBUSY: the name is taken
		d = &Device{name: fmt.Sprintf("%s%s-%d", prefix, img.Root.String()[:32], i)}
		err = newRequest(d.name, 0).call(devCreate)
	}
	if err != nil {
		return nil, fmt.Errorf("making a dm-verity device: %w", err)
	}
	if err := d.load(img.Data/512, table(img)); err != nil {
		return nil, errors.Join(fmt.Errorf("making a dm-verity device: %w", err), d.remove(0))
	}
	return d, nil
}

// table is the line that the target "verity" takes. The tree begins behind the block of the superblock.
func table(img Image) string {
	dev := fmt.Sprintf("%d:%d", unix.Major(img.Device), unix.Minor(img.Device))
	blocks := img.Data / verity.BlockSize
	return fmt.Sprintf("1 %s %s %d %d %d %d sha256 %s -", dev, dev, verity.BlockSize, verity.BlockSize, blocks, blocks+1, img.Root)
}

// load gives the device a table, in place of the one that it has, and lets it go on.
func (d *Device) load(sectors int64, params string) error {
	r := newRequest(d.name, flagReadOnly)
	r.setTarget(sectors, params)
	if err := r.call(tableLoad); err != nil {
		return fmt.Errorf("loading its table: %w", err)
	}
	// Without the suspend flag this resumes with the new table. Nothing is to be frozen of a file system that is never written to.
	if err := newRequest(d.name, flagSkipLockFS).call(devSuspend); err != nil {
		return fmt.Errorf("starting it: %w", err)
	}
	return nil
}

// Path is the file of the device in /dev.
func (d *Device) Path() (string, error) {
	r := newRequest(d.name, 0)
	if err := r.call(tableStatus); err != nil {
		return "", fmt.Errorf("looking for dm-verity device %s: %w", d.name, err)
	}
	return fmt.Sprintf("/dev/dm-%d", unix.Minor(r.device())), nil
}

// Release has the device removed with its last user; at once where there is none.
func (d *Device) Release() error { return d.remove(flagDeferredRemove) }

func (d *Device) remove(flags uint32) error {
	if err := newRequest(d.name, flags).call(devRemove); err != nil && !errors.Is(err, unix.ENXIO) { // ENXIO: it is gone
		return fmt.Errorf("removing dm-verity device %s: %w", d.name, err)
	}
	return nil
}

// Corrupt lists the root hashes, as far as names have them (32 hex digits), of those of our devices that met a block that
// was not what it should be. On a kernel without device mapper there are none.
func Corrupt() ([]string, error) {
	all, err := devices()
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var bad []string
	for _, d := range all {
		_, text, err := d.status(0)
		switch {
		case errors.Is(err, unix.ENXIO): // it went meanwhile
		case err != nil:
			return nil, err
		case strings.HasPrefix(text, "C"):
			bad = append(bad, d.root())
		}
	}
	return bad, nil
}

// Refresh has the devices of an image forget what they have read: a block of the tree that was wrong stays in the
// kernel's memory, however right the disk is by now. Their status is a good one again.
func Refresh(root verity.Root) error {
	all, err := devices()
	if err != nil {
		return err
	}
	var errs []error
	for _, d := range all {
		if d.root() != root.String()[:32] {
			continue
		}
		sectors, params, err := d.status(flagStatusTable)
		if err == nil {
			err = d.load(sectors, params)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("refreshing dm-verity device %s: %w", d.name, err))
		}
	}
	return errors.Join(errs...)
}

func (d *Device) root() string {
	root, _, _ := strings.Cut(strings.TrimPrefix(d.name, prefix), "-")
	return root
}

// status is the length in sectors of the one target of the device, and what it says: its state, or with flagStatusTable
// its table.
func (d *Device) status(flags uint32) (int64, string, error) {
	r := newRequest(d.name, flags)
	if err := r.call(tableStatus); err != nil {
		return 0, "", fmt.Errorf("asking for the state of dm-verity device %s: %w", d.name, err)
	}
	t := r.b[headSize:]
	if binary.NativeEndian.Uint32(r.b[20:]) != 1 || r.flags()&flagBufferFull != 0 {
		return 0, "", fmt.Errorf("dm-verity device %s has not one target", d.name)
	}
	text, _, _ := bytes.Cut(t[targetSize:], []byte{0})
	return int64(binary.NativeEndian.Uint64(t[8:])), string(text), nil //nolint:gosec // the kernel's own number
}

// devices are ours. The payload of the answer is a chain: device number (64 bits), offset of the next one (32), name.
func devices() ([]*Device, error) {
	r := newRequest("", 0)
	if err := r.call(listDevices); err != nil {
		return nil, fmt.Errorf("listing the device mapper's devices: %w", err)
	}
	return parseList(r.b[headSize:])
}

func parseList(b []byte) ([]*Device, error) {
	var out []*Device
	for len(b) >= 12 && binary.NativeEndian.Uint64(b) != 0 {
		next := binary.NativeEndian.Uint32(b[8:])
		name, _, ok := bytes.Cut(b[12:], []byte{0})
		if !ok || int64(next) > int64(len(b)) || next != 0 && next < 12 {
			return nil, errors.New("listing the device mapper's devices: the answer is malformed")
		}
		if strings.HasPrefix(string(name), prefix) {
			out = append(out, &Device{name: string(name)})
		}
		if next == 0 {
			break
		}
		b = b[next:]
	}
	return out, nil
}
