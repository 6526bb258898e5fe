package initramfs

import (
	"bytes"
	"compress/gzip"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// suffixes are those of compressed modules and firmware, in the order in which they are looked for.
var suffixes = []string{"", ".zst", ".xz", ".gz"}

// plain cuts the suffix of a compressed file from its name.
func plain(name string) string {
	for _, s := range suffixes[1:] {
		if p, ok := strings.CutSuffix(name, s); ok {
			return p
		}
	}
	return name
}

// readPlain reads a file and undoes the compression that its name tells.
func (r rootFS) readPlain(name string) ([]byte, error) {
	b, err := r.read(name)
	if err != nil {
		return nil, err
	}
	if b, err = decompress(name, b); err != nil {
		return nil, fmt.Errorf("decompressing %q: %w", name, err)
	}
	return b, nil
}

func decompress(name string, b []byte) ([]byte, error) {
	switch {
	case strings.HasSuffix(name, ".zst"):
		z, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxFile))
		if err != nil {
			return nil, err
		}
		defer z.Close()
		return readAtMost(z, maxFile)
	case strings.HasSuffix(name, ".xz"):
		return through(xz.NewReader(bytes.NewReader(b)))
	case strings.HasSuffix(name, ".gz"):
		return through(gzip.NewReader(bytes.NewReader(b)))
	}
	return b, nil
}

// through reads all of what a constructor made, unless that went wrong.
func through[R io.Reader](r R, err error) ([]byte, error) {
	if err != nil {
		return nil, err
	}
	return readAtMost(r, maxFile)
}
