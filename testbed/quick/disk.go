package quick

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/digest"
)

// blockSize is that of ext4 as the agent makes it, of EROFS and of dm-verity.
const blockSize = 4096

// DiskPath is the file that is a machine's disk.
func (l *Lab) DiskPath(node string) string {
	return filepath.Join(l.Dir(), "nodes", node, "disk.raw")
}

// BlobPath is the file of a blob in the server's store.
func (l *Lab) BlobPath(d digest.Digest) string {
	return filepath.Join(l.data, "store", "blobs", "sha256", d.Hex())
}

// Flip changes one bit of a blob of the store wherever a machine's disk has the block around it, in the file at an offset. It
// finds the block by its bytes, so that no file system need be whole, and the machine may be on: what its kernel has not read yet, it reads
// as it is then. The test fails where the disk does not have the block. What is in the block must be in no other one.
func (l *Lab) Flip(node string, d digest.Digest, offset int64) {
	l.t.Helper()
	f, err := os.Open(l.BlobPath(d))
	if err != nil {
		l.t.Fatal(err)
	}
	defer f.Close()
	block := make([]byte, blockSize)
	if _, err := f.ReadAt(block, offset/blockSize*blockSize); err != nil && !errors.Is(err, io.EOF) {
		l.t.Fatal(err)
	}
	n, err := l.FlipBlock(node, block, int(offset%blockSize))
	if err == nil && n == 0 {
		err = errors.New("it is not there")
	}
	if err != nil {
		l.t.Fatalf("flipping a bit of %s at %d on the disk of %s: %v", d.Short(), offset, node, err)
	}
}

// FlipBlock changes one bit, at an offset in the block, of each block of a machine's disk that has these bytes, and returns how many
// those were.
func (l *Lab) FlipBlock(node string, block []byte, at int) (int, error) {
	f, err := os.OpenFile(l.DiskPath(node), os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	found := 0
	err = eachBlock(f, func(offset int64, b []byte) error {
		if !bytes.Equal(b, block) {
			return nil
		}
		found++
		_, err := f.WriteAt([]byte{b[at] ^ 1}, offset+int64(at))
		return err
	})
	return found, err
}

// eachBlock reads the blocks of a sparse file that are not holes.
func eachBlock(f *os.File, do func(offset int64, block []byte) error) error {
	buf := make([]byte, 256*blockSize)
	end := int64(0)
	for {
		start, err := f.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // no data behind
		}
		if err != nil {
			return err
		}
		if end, err = f.Seek(start, unix.SEEK_HOLE); err != nil {
			return err
		}
		for at := start / blockSize * blockSize; at < end; {
			n, err := f.ReadAt(buf, at)
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			n = n / blockSize * blockSize
			if n == 0 {
				break
			}
			for i := 0; i < n; i += blockSize {
				if err := do(at+int64(i), buf[i:i+blockSize]); err != nil {
					return err
				}
			}
			at += int64(n)
		}
	}
}

// cacheLabel is the name of the cache's partition.
const cacheLabel = "troupe-cache"

// WithCache mounts the cache of a machine that is off, and calls do with its directory. It needs root.
func (l *Lab) WithCache(node string, do func(dir string)) {
	l.t.Helper()
	disk := l.DiskPath(node)
	start, size, err := partition(disk, cacheLabel)
	if err != nil {
		l.t.Fatalf("the disk of %s: %v", node, err)
	}
	dir := l.t.TempDir()
	opts := fmt.Sprintf("loop,offset=%d,sizelimit=%d", start, size)
	if out, err := exec.CommandContext(l.t.Context(), "mount", "-t", "ext4", "-o", opts, disk, dir).CombinedOutput(); err != nil {
		l.t.Fatalf("mounting the cache of %s: %v: %s", node, err, out)
	}
	defer func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil { //nolint:noctx // also when the test is over
			l.t.Errorf("unmounting the cache of %s: %v: %s", node, err, out)
		}
	}()
	do(dir)
}

// partition finds a partition by its name in a GPT (UEFI specification 2.10, section 5.3), in bytes.
func partition(disk, name string) (start, size int64, err error) {
	f, err := os.Open(disk)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	const sector, entry, entries = 512, 128, 128
	table := make([]byte, entry*entries)
	if _, err := f.ReadAt(table, 2*sector); err != nil {
		return 0, 0, err
	}
	for e := table; len(e) >= entry; e = e[entry:] {
		var label []byte
		for _, c := range e[56:entry] { // UTF-16: of ASCII every other byte is zero
			if c != 0 {
				label = append(label, c)
			}
		}
		if string(label) == name {
			first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
			return int64(first) * sector, int64(last-first+1) * sector, nil //nolint:gosec // sectors of a disk
		}
	}
	return 0, 0, fmt.Errorf("it has no partition %s", name)
}
