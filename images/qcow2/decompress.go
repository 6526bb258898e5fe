package qcow2

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
)

// A decompressor is used again for each cluster. Its zero value is ready.
type decompressor struct {
	flate io.ReadCloser
	zstd  *zstd.Decoder
}

// into fills dst with what src decompresses to. src may have more behind its data: it ends at a sector, they anywhere.
func (d *decompressor) into(dst, src []byte, isZstd bool) error {
	r, err := d.open(bytes.NewReader(src), isZstd)
	if err != nil {
		return err
	}
	if _, err := io.ReadFull(r, dst); err != nil {
		return fmt.Errorf("decompressing: %w", err)
	}
	return nil
}

// open begins to decompress r. With "zlib" QEMU writes raw deflate data (RFC 1951), without the head that RFC 1950 has.
func (d *decompressor) open(r io.Reader, isZstd bool) (io.Reader, error) {
	if !isZstd {
		if d.flate == nil {
			d.flate = flate.NewReader(r)
			return d.flate, nil
		}
		resetter, ok := d.flate.(flate.Resetter)
		if !ok {
			return nil, fmt.Errorf("package flate made a %T, which cannot be used again", d.flate)
		}
		return d.flate, resetter.Reset(r, nil)
	}
	if d.zstd == nil {
		dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		d.zstd = dec
		return dec, err
	}
	return d.zstd, d.zstd.Reset(r)
}

// maxWindow bounds the memory of a zstd decoder, in bytes: a cluster has no more.
const maxWindow = 1 << maxClusterBits

func (d *decompressor) close() {
	if d.zstd != nil {
		d.zstd.Close()
	}
	*d = decompressor{}
}
