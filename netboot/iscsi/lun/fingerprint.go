package lun

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// What Fingerprint reads: the first and the last MiB, where partition tables and the superblocks of file systems lie, and
// some clusters spread evenly between.
const (
	fingerprintEnds    = 1 << 20
	fingerprintSamples = 256
)

// Fingerprint is an id for OpenDelta, of a base that nobody keeps a digest of. It is made of the size and of up to 3 MiB
// of the content, so that it takes no time on a large image, outlives moving and copying it, and tells almost any two images
// apart: a change elsewhere in the image is not seen.
func (m *Image) Fingerprint() (string, error) {
	sum := sha256.New()
	fmt.Fprintf(sum, "%d\n", m.len)
	buf := make([]byte, fingerprintEnds)
	read := func(off, n int64) error {
		_, err := m.ReadAt(buf[:n], off)
		sum.Write(buf[:n])
		return err
	}
	ends := min(m.size, fingerprintEnds)
	if err := read(0, ends); err != nil {
		return "", err
	}
	for i := range int64(fingerprintSamples) {
		at := (m.size - ends) / clusterSize * i / fingerprintSamples * clusterSize
		if err := read(at, min(clusterSize, m.size-at)); err != nil {
			return "", err
		}
	}
	if err := read(m.size-ends, ends); err != nil {
		return "", err
	}
	return "sampled-sha256:" + hex.EncodeToString(sum.Sum(nil)), nil
}
