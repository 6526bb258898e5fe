package agentapi_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
)

// rangesFrom asks a server that is h for ranges, and reads the answer with the bytes that came over the network counted.
func rangesFrom(t *testing.T, h http.HandlerFunc, ranges []agentapi.Range) (got []byte, wire int64, err error) {
	t.Helper()
	s := httptest.NewServer(h)
	defer s.Close()
	c, err := agentapi.NewClient(s.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseIdle()
	r, err := c.Ranges(t.Context(), digest.Of(nil), ranges, func(r io.Reader) io.Reader { return &countingReader{r, &wire} })
	if err != nil {
		return nil, wire, err
	}
	got, err = io.ReadAll(r)
	return got, wire, errors.Join(err, r.Close())
}

type countingReader struct {
	r io.Reader
	n *int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	*c.n += int64(n)
	return n, err
}

func TestRanges(t *testing.T) {
	content := []byte(strings.Repeat("0123456789", 1000))
	serve := func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
	}
	for _, tt := range []struct {
		ranges []agentapi.Range
		want   string
	}{
		{[]agentapi.Range{{Off: 3, Size: 4}}, "3456"},
		{[]agentapi.Range{{Off: 9998, Size: 2}}, "89"},
		{[]agentapi.Range{{Off: 0, Size: 1}, {Off: 15, Size: 3}, {Off: 9990, Size: 10}}, "05670123456789"},
	} {
		got, wire, err := rangesFrom(t, serve, tt.ranges)
		if err != nil || string(got) != tt.want || wire < int64(len(tt.want)) || wire > int64(len(tt.want)+len(tt.ranges)*250) {
			t.Errorf("%v: %q, %d bytes on the wire, %v", tt.ranges, got, wire, err)
		}
	}
}

// TestRangesOfAServerThatLies wants an error, and never the wrong bytes.
func TestRangesOfAServerThatLies(t *testing.T) {
	part := func(contentRange, body string) string {
		return "--B\r\nContent-Range: " + contentRange + "\r\n\r\n" + body + "\r\n"
	}
	multi := func(body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "multipart/byteranges; boundary=B")
			w.WriteHeader(http.StatusPartialContent)
			_, _ = io.WriteString(w, body)
		}
	}
	single := func(status int, contentRange string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Range", contentRange)
			w.WriteHeader(status)
			_, _ = io.WriteString(w, "0123456789")
		}
	}
	for _, tt := range []struct {
		name string
		h    http.HandlerFunc
		want error
	}{
		{"all of it", single(http.StatusOK, ""), agentapi.ErrRanges},
		{"one range of two", single(http.StatusPartialContent, "bytes 0-9/100"), agentapi.ErrRanges},
		{"another range", single(http.StatusPartialContent, "bytes 1-10/100"), agentapi.ErrRanges},
		{"parts in another order", multi(part("bytes 20-29/100", "0123456789") + part("bytes 0-9/100", "0123456789") + "--B--"), agentapi.ErrRanges},
		{"too few parts", multi(part("bytes 0-9/100", "0123456789") + "--B--"), io.ErrUnexpectedEOF},
		{"a part that is short", multi(part("bytes 0-9/100", "01234") + part("bytes 20-29/100", "0123456789") + "--B--"), io.ErrUnexpectedEOF},
		{"no parts", multi("nothing"), io.ErrUnexpectedEOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, _, err := rangesFrom(t, tt.h, []agentapi.Range{{Off: 0, Size: 10}, {Off: 20, Size: 10}})
			if !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
	many := make([]agentapi.Range, agentapi.MaxRanges+1)
	for i := range many {
		many[i] = agentapi.Range{Off: int64(10 * i), Size: 1}
	}
	if _, _, err := rangesFrom(t, single(http.StatusOK, ""), many); err == nil || !strings.Contains(err.Error(), fmt.Sprint(len(many))) {
		t.Errorf("too many ranges: %v", err)
	}
}
