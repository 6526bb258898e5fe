package agentapi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"mime/multipart"
	"net/http"
	"strings"

	"github.com/troupe-dev/troupe/internal/digest"
)

// A Range is bytes of a blob: Size of them, more than none, from Off on.
type Range struct{ Off, Size int64 }

func (r Range) String() string { return fmt.Sprintf("%d-%d", r.Off, r.Off+r.Size-1) }

// MaxRanges is how many ranges one request may ask for.
const MaxRanges = 256

// ErrRanges is in the chain of errors about servers that do not send the ranges that they were asked for.
var ErrRanges = errors.New("the server does not send the ranges that it was asked for")

// Ranges opens bytes of the blob that d names: those of all ranges, one behind the other, as io.Reader gives them. The ranges
// ascend and do not overlap, and there are MaxRanges at most (RFC 9110 section 14.2). tap sees what comes over the network: the
// bytes of the ranges, and what separates them. The caller closes what it gets, and verifies what it reads.
func (c *Client) Ranges(ctx context.Context, d digest.Digest, ranges []Range, tap func(io.Reader) io.Reader) (io.ReadCloser, error) {
	if len(ranges) == 0 || len(ranges) > MaxRanges {
		return nil, fmt.Errorf("asking for %d ranges of %s: not between 1 and %d", len(ranges), d, MaxRanges)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.server+PathBlobs+d.Hex(), nil)
	if err != nil {
		return nil, fmt.Errorf("asking for %s: %w", d, err)
	}
	texts := make([]string, len(ranges))
	for i, r := range ranges {
		texts[i] = r.String()
	}
	req.Header.Set("Range", "bytes="+strings.Join(texts, ","))
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	switch resp.StatusCode {
	case http.StatusPartialContent:
	case http.StatusOK:
		_ = resp.Body.Close() // all of it, which nobody asked for
		return nil, fmt.Errorf("asking for %d ranges of %s: %w", len(ranges), d, ErrRanges)
	default:
		defer drain(resp.Body)
		return nil, statusError(resp)
	}
	out := &rangesReader{body: resp.Body, rest: ranges}
	kind, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err == nil && kind == "multipart/byteranges" {
		out.parts = multipart.NewReader(tap(resp.Body), params["boundary"])
		return out, nil
	}
	if err := out.begin(resp.Header.Get("Content-Range"), tap(resp.Body)); err != nil {
		_ = resp.Body.Close() // it is of no use
		return nil, err
	}
	return out, nil
}

// A rangesReader puts the parts of an answer together.
type rangesReader struct {
	body  io.ReadCloser
	parts *multipart.Reader // nil where the answer is one range
	rest  []Range           // that are still to come
	part  io.Reader         // of the one that is read
	left  int64             // bytes of it
}

// begin begins the next range, which an answer calls text.
func (r *rangesReader) begin(text string, part io.Reader) error {
	want := "bytes " + r.rest[0].String() + "/"
	if !strings.HasPrefix(text, want) {
		return fmt.Errorf("%w: %q in place of %q", ErrRanges, text, want)
	}
	r.part, r.left, r.rest = part, r.rest[0].Size, r.rest[1:]
	return nil
}

func (r *rangesReader) Read(p []byte) (int, error) {
	for r.left == 0 {
		if len(r.rest) == 0 {
			return 0, io.EOF
		}
		if r.parts == nil {
			return 0, fmt.Errorf("%w: one of %d", ErrRanges, len(r.rest)+1)
		}
		part, err := r.parts.NextRawPart()
		if err != nil {
			return 0, fmt.Errorf("reading the next of %d ranges: %w", len(r.rest), noEOF(err))
		}
		if err := r.begin(part.Header.Get("Content-Range"), part); err != nil {
			return 0, err
		}
	}
	n, err := r.part.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	if r.left == 0 {
		return n, nil
	}
	return n, noEOF(err)
}

// noEOF is err where the end of the input comes too early.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Close reads the little that stands behind the last range, so that the connection serves again.
func (r *rangesReader) Close() error {
	if r.left == 0 && len(r.rest) == 0 {
		drain(r.body)
		return nil
	}
	return r.body.Close()
}
