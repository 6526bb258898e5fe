package lun

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/internal/atomicfile"
)

// A Bases opens deltas over images whose digests nobody keeps. The digest of all of an image is the id of its deltas. It is
// computed when a delta is made, which takes as long as reading the image does, and kept beside the delta, in PATH.base,
// with what the file system says of the image's file: as long as that is the same, so is the image. Where it is not, as in
// an image that was copied or moved, the image is read again. The zero value is ready. It is not for use by several
// goroutines at once.
type Bases struct {
	// Progress is told how many bytes of an image were read; nil: nobody is.
	Progress func(image string, done, of int64)

	known map[string]string // digests by what stamp says
}

// OpenDelta is OpenDelta of this package, with the digest of base as id.
func (b *Bases) OpenDelta(ctx context.Context, base *Image, path string, size int64) (*Delta, error) {
	stamp, err := base.stamp()
	if err != nil {
		return nil, err
	}
	id, kept := readDigest(path+".base", stamp)
	if !kept {
		if id, err = b.digest(ctx, base, stamp); err != nil {
			return nil, fmt.Errorf("reading image %q, to know it again: %w", base.path, err)
		}
	}
	d, err := OpenDelta(base, path, size, id)
	if err == nil && !kept {
		// On a full file system, say, it is computed again the next time.
		_ = atomicfile.WriteFile(path+".base", []byte(stamp+"\n"+id+"\n"), 0o600)
	}
	return d, err
}

// readDigest is the digest that path has of the image with that stamp.
func readDigest(path, stamp string) (digest string, ok bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return "", false
	}
	digest, ok = strings.CutPrefix(string(b), stamp+"\n")
	digest = strings.TrimSuffix(digest, "\n")
	return digest, ok && len(digest) == len(digestPrefix)+2*sha256.Size && strings.HasPrefix(digest, digestPrefix)
}

// stamp is what the file system says of the file: who writes to it, or replaces it, changes that.
func (m *Image) stamp() (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(m.f.fd(), &st); err != nil {
		return "", fmt.Errorf("looking at image %q: %w", m.path, err)
	}
	return fmt.Sprintf("size %d modified %d.%09d changed %d.%09d inode %d device %d",
		st.Size, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec, st.Ino, st.Dev), nil
}

const digestPrefix = "sha256:"

// digest is that of all of the image.
func (b *Bases) digest(ctx context.Context, m *Image, stamp string) (string, error) {
	if id, ok := b.known[stamp]; ok {
		return id, nil
	}
	sum, buf := sha256.New(), make([]byte, dataUnit)
	for off := int64(0); off < m.size; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		part := buf[:min(int64(len(buf)), m.size-off)]
		if _, err := m.ReadAt(part, off); err != nil {
			return "", err
		}
		sum.Write(part)
		off += int64(len(part))
		if b.Progress != nil {
			b.Progress(m.path, off, m.size)
		}
	}
	if now, err := m.stamp(); err != nil || now != stamp {
		return "", fmt.Errorf("somebody changes it: it must stay as it is (%s, then %s)", stamp, now)
	}
	id := digestPrefix + hex.EncodeToString(sum.Sum(nil))
	if b.known == nil {
		b.known = map[string]string{}
	}
	b.known[stamp] = id
	return id, nil
}
