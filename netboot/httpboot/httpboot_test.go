package httpboot

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"mime"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/pipelisten"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	kernel = bytes.Repeat([]byte("kernel"), 1<<20) // more than socket buffers hold
	sum    = digest.Of(kernel)
)

type file struct{ *bytes.Reader }

func (file) Close() error { return nil }

// site is a server, and what it was asked and told.
type site struct {
	*httptest.Server
	requests chan Request
	sent     chan Transfer
}

func newSite(t *testing.T, edit func(*Handler)) *site {
	t.Helper()
	s := &site{requests: make(chan Request, 10), sent: make(chan Transfer, 10)}
	h := &Handler{
		Script: func(_ context.Context, r Request) (string, error) {
			s.requests <- r
			return "#!ipxe\n", nil
		},
		Files: func(name string) (io.ReadSeekCloser, error) {
			if name != "snponly.efi" {
				return nil, fs.ErrNotExist
			}
			return file{bytes.NewReader([]byte("MZ"))}, nil
		},
		Blobs: func(_ context.Context, d digest.Digest) (io.ReadSeekCloser, error) {
			switch d {
			case sum:
				return file{bytes.NewReader(kernel)}, nil
			case digest.Of(nil):
				return nil, errors.New("the disk is on fire")
			}
			return nil, fmt.Errorf("no such blob: %w", fs.ErrNotExist)
		},
		Sent: func(tr Transfer) { s.sent <- tr },
	}
	if edit != nil {
		edit(h)
	}
	mux := http.NewServeMux()
	h.Routes(mux)
	s.Server = httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s
}

// get returns the answer with its body read.
func (s *site) get(t *testing.T, path string, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := s.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

func TestScriptRequest(t *testing.T) {
	s := newSite(t, nil)
	base := "mac=02:00:00:00:00:01"
	tests := []struct {
		name, query string
		want        Request
	}{
		{"all", base + "&arch=7&uuid=11223344-5566-7788-99AA-bbccddeeff00&serial=SN%201&try=3", Request{
			Arch: 7, UUID: "11223344-5566-7788-99aa-bbccddeeff00", Serial: "SN 1", Try: 3,
			Again: "/boot/ipxe?mac=02:00:00:00:00:01&arch=7&uuid=11223344-5566-7788-99aa-bbccddeeff00&serial=SN+1",
		}},
		{"as iPXE writes a MAC", "mac=02%3A00%3A00%3A00%3A00%3A01&arch=0", Request{Again: "/boot/ipxe?mac=02:00:00:00:00:01&arch=0"}},
		{"settings that have no value", base + "&arch=&uuid=&serial=", Request{Again: "/boot/ipxe?mac=02:00:00:00:00:01&arch=0"}},
		{"settings that were not expanded", base + "&uuid=${uuid}&serial=${serial:uristring}", Request{Again: "/boot/ipxe?mac=02:00:00:00:00:01&arch=0"}},
		{"nonsense", base + "&arch=99999&uuid=11223344_5566_7788_99aa_bbccddeeff00&serial=a%0Ab&try=-1", Request{Again: "/boot/ipxe?mac=02:00:00:00:00:01&arch=0"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			// The Host header is what the machine says, and firmware leaves out the port (seen with OVMF 2022.11).
			resp, _ := s.get(t, "/boot/ipxe?"+tt.query, "Host", "elsewhere")
			if resp.StatusCode != http.StatusOK {
				t.Fatalf("status %d", resp.StatusCode)
			}
			got := <-s.requests
			if got.Peer.String() != "127.0.0.1" {
				t.Errorf("peer %s", got.Peer)
			}
			tt.want.MAC, tt.want.Base, tt.want.Again, tt.want.Peer = net.HardwareAddr{2, 0, 0, 0, 0, 1}, s.URL, s.URL+tt.want.Again, got.Peer
			if diff := cmp.Diff(fmt.Sprintf("%+v", tt.want), fmt.Sprintf("%+v", got)); diff != "" {
				t.Errorf("request (-want +got):\n%s", diff)
			}
		})
	}
}

func TestScriptWithoutMAC(t *testing.T) {
	s := newSite(t, nil)
	_, body := s.get(t, "/boot/ipxe")
	if !strings.HasPrefix(body, "#!ipxe\n") || !strings.Contains(body, s.URL+"/boot/ipxe?mac=${netX/mac}") {
		t.Errorf("got\n%s", body)
	}
}

func TestBadScriptRequests(t *testing.T) {
	s := newSite(t, nil)
	for query, want := range map[string]int{
		"mac=":                        http.StatusBadRequest,
		"mac=nonsense":                http.StatusBadRequest,
		"mac=02:00:00:00:00:00:00:01": http.StatusBadRequest, // InfiniBand
		"mac=02:00:00:00:00:01&serial=" + strings.Repeat("x", maxQuery): http.StatusRequestURITooLong,
	} {
		resp, body := s.get(t, "/boot/ipxe?"+query)
		if resp.StatusCode != want {
			t.Errorf("%.40s: status %d, want %d", query, resp.StatusCode, want)
		}
		wantProblem(t, resp, body)
	}
}

func wantProblem(t *testing.T, resp *http.Response, body string) {
	t.Helper()
	var p struct{ Error string }
	if err := json.Unmarshal([]byte(body), &p); err != nil || p.Error == "" || resp.Header.Get("Content-Type") != "application/json" {
		t.Errorf("body %q (%v), want an error as JSON", body, err)
	}
}

// TestScriptError: the person at the console reads what is wrong, and the machine asks again.
func TestScriptError(t *testing.T) {
	s := newSite(t, func(h *Handler) {
		h.Script = func(context.Context, Request) (string, error) { return "", errors.New("no fleet yet") }
	})
	resp, body := s.get(t, "/boot/ipxe?mac=02:00:00:00:00:01")
	if resp.StatusCode != http.StatusOK || !strings.Contains(body, "no fleet yet") || !strings.Contains(body, "chain --replace --autofree "+s.URL) {
		t.Errorf("status %d\n%s", resp.StatusCode, body)
	}
}

func TestConfiguredURL(t *testing.T) {
	s := newSite(t, func(h *Handler) { h.URL = "https://boot.example/" })
	s.get(t, "/boot/ipxe?mac=02:00:00:00:00:01")
	if got := (<-s.requests).Base; got != "https://boot.example" {
		t.Errorf("base %q", got)
	}
}

func TestBlob(t *testing.T) {
	s := newSite(t, nil)
	path := "/blobs/sha256/" + sum.Hex()
	resp, body := s.get(t, path+"?mac=02:00:00:00:00:01&boot=b1&last=1")
	if resp.StatusCode != http.StatusOK || body != string(kernel) || resp.ContentLength != int64(len(kernel)) {
		t.Errorf("status %d, %d bytes of %d", resp.StatusCode, len(body), resp.ContentLength)
	}
	if got := resp.Header.Get("ETag"); got != `"`+sum.String()+`"` {
		t.Errorf("ETag %s", got)
	}
	if got := resp.Header.Get("Cache-Control"); !strings.Contains(got, "immutable") {
		t.Errorf("Cache-Control %s", got)
	}
	tr := <-s.sent
	if tr.MAC.String() != "02:00:00:00:00:01" || tr.Boot != "b1" || !tr.Last || tr.Bytes != int64(len(kernel)) || tr.Err != nil {
		t.Errorf("told %+v", tr)
	}
}

// TestPartsOfABlob: an agent that goes on where it was cut off. Nobody is told of parts.
func TestPartsOfABlob(t *testing.T) {
	s := newSite(t, nil)
	path := "/blobs/sha256/" + sum.Hex() + "?mac=02:00:00:00:00:01"
	resp, body := s.get(t, path, "Range", "bytes=5-9", "If-Range", `"`+sum.String()+`"`)
	if resp.StatusCode != http.StatusPartialContent || body != string(kernel[5:10]) {
		t.Errorf("status %d, %q", resp.StatusCode, body)
	}
	if resp, _ := s.get(t, path, "Range", fmt.Sprintf("bytes=%d-", len(kernel))); resp.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("past the end: status %d", resp.StatusCode)
	}
	if resp, _ := s.get(t, path, "If-None-Match", `"`+sum.String()+`"`); resp.StatusCode != http.StatusNotModified {
		t.Errorf("what the client has: status %d", resp.StatusCode)
	}
	head, err := s.Client().Head(s.URL + path)
	if err != nil || head.ContentLength != int64(len(kernel)) {
		t.Errorf("HEAD: %v, %v", head, err)
	}
	if len(s.sent) != 0 {
		t.Errorf("told %+v", <-s.sent)
	}
}

// TestRangesOfABlob asks for several parts at once, and for more than anybody needs.
func TestRangesOfABlob(t *testing.T) {
	s := newSite(t, nil)
	path := "/blobs/sha256/" + digest.Of(kernel).Hex()
	resp, body := s.get(t, path, "Range", "bytes=5-9,100-199")
	kind, params, err := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	if err != nil || kind != "multipart/byteranges" || resp.StatusCode != http.StatusPartialContent {
		t.Fatalf("%s, %q, %v", resp.Status, resp.Header.Get("Content-Type"), err)
	}
	parts := multipart.NewReader(strings.NewReader(body), params["boundary"])
	for _, want := range [][]byte{kernel[5:10], kernel[100:200]} {
		p, err := parts.NextPart()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(p); err != nil || !bytes.Equal(got, want) {
			t.Errorf("part %q: %d bytes, %v", p.Header.Get("Content-Range"), len(got), err)
		}
	}
	many := "bytes=0-0" + strings.Repeat(",2-2", maxRanges)
	if resp, body := s.get(t, path, "Range", many); resp.StatusCode != http.StatusRequestedRangeNotSatisfiable {
		t.Errorf("%d ranges: %s, %d bytes", maxRanges+1, resp.Status, len(body))
	}
}

func TestMissingBlobs(t *testing.T) {
	s := newSite(t, nil)
	for hex, want := range map[string]int{
		strings.Repeat("0", 64):            http.StatusNotFound,
		"xyz":                              http.StatusBadRequest,
		strings.ToUpper(sum.Hex()):         http.StatusBadRequest,
		url.PathEscape("../../etc/passwd"): http.StatusBadRequest,
		digest.Of(nil).Hex():               http.StatusInternalServerError,
	} {
		resp, body := s.get(t, "/blobs/sha256/"+hex)
		if resp.StatusCode != want {
			t.Errorf("%s: status %d, want %d", hex, resp.StatusCode, want)
		}
		wantProblem(t, resp, body)
		if resp.Header.Get("Cache-Control") != "" {
			t.Errorf("%s: an error would be cached", hex)
		}
	}
}

func TestFiles(t *testing.T) {
	s := newSite(t, nil)
	resp, body := s.get(t, "/boot/files/snponly.efi")
	if resp.StatusCode != http.StatusOK || body != "MZ" || resp.Header.Get("Content-Type") != "application/efi" {
		t.Errorf("status %d, %q", resp.StatusCode, body)
	}
	if tr := <-s.sent; tr.Name != "snponly.efi" || tr.Bytes != 2 || tr.Err != nil {
		t.Errorf("told %+v", tr)
	}
	for _, name := range []string{"passwd", url.PathEscape("../passwd")} {
		if resp, _ := s.get(t, "/boot/files/"+name); resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: status %d", name, resp.StatusCode)
		}
	}
}

// TestMachineThatGoesAway in the middle of a file is told of as a failure.
func TestMachineThatGoesAway(t *testing.T) {
	s := newSite(t, nil)
	c, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(c, "GET /blobs/sha256/%s?mac=02:00:00:00:00:01&boot=b1 HTTP/1.1\r\nHost: x\r\n\r\n", sum.Hex()); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if err := c.(*net.TCPConn).SetLinger(0); err != nil { // a reset, as when the power goes
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if tr := <-s.sent; tr.Err == nil || tr.Bytes == int64(len(kernel)) {
		t.Errorf("told %+v, want a failure", tr)
	}
}

// askByPipe sends a request to h and returns what the answer is read from.
func askByPipe(t *testing.T, h *Handler, path string) net.Conn {
	t.Helper()
	l := pipelisten.New()
	mux := http.NewServeMux()
	h.Routes(mux)
	srv := &http.Server{Handler: mux}
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	ours, err := l.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = ours.Close()
		_ = srv.Close()
		<-done
	})
	if _, err := fmt.Fprintf(ours, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path); err != nil {
		t.Fatal(err)
	}
	return ours
}

// TestSlowMachines: one that takes a little now and then gets its blob; one that takes nothing is dropped.
func TestSlowMachines(t *testing.T) {
	path := "/blobs/sha256/" + sum.Hex() + "?mac=02:00:00:00:00:01"
	handler := func(sent chan Transfer) *Handler {
		return &Handler{
			Blobs: func(context.Context, digest.Digest) (io.ReadSeekCloser, error) {
				return file{bytes.NewReader(kernel)}, nil
			},
			Sent: func(tr Transfer) { sent <- tr },
		}
	}
	synctest.Test(t, func(t *testing.T) {
		sent := make(chan Transfer, 1)
		c := askByPipe(t, handler(sent), path)
		resp, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			time.Sleep(slowMachine/2 - time.Second) // on the bubble's clock; what is read may end one part and begin another
			_, err = io.CopyN(io.Discard, resp.Body, part)
		}
		if !errors.Is(err, io.EOF) {
			t.Error(err)
		}
		if tr := <-sent; tr.Err != nil || tr.Bytes != int64(len(kernel)) {
			t.Errorf("slow: told %+v", tr)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		sent := make(chan Transfer, 1)
		c := askByPipe(t, handler(sent), path)
		start := time.Now()
		if _, err := io.ReadFull(c, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		tr := <-sent
		if took := time.Since(start); !errors.Is(tr.Err, os.ErrDeadlineExceeded) || took != slowMachine {
			t.Errorf("stuck: told %+v after %s", tr, took)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		script := func(context.Context, Request) (string, error) { return "#!ipxe\n", nil }
		c := askByPipe(t, &Handler{Script: script}, "/boot/ipxe?mac=02:00:00:00:00:01")
		time.Sleep(slowMachine + time.Second)
		if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
			t.Errorf("stuck before its script: got %q, %v; want a closed connection", b, err)
		}
	})
}

// A kernelWriter stands for http.Server's: it notes whether the kernel could copy what it is given to read, as
// net.TCPConn decides that.
type kernelWriter struct {
	http.ResponseWriter
	parts, slow int
}

func (w *kernelWriter) ReadFrom(r io.Reader) (int64, error) {
	w.parts++
	if l, ok := r.(*io.LimitedReader); ok {
		r = io.LimitReader(l.R, l.N)
		if _, ok := l.R.(*os.File); ok {
			return io.Copy(w.ResponseWriter, r)
		}
	}
	w.slow++
	return io.Copy(w.ResponseWriter, r)
}

// TestKernelCopies: of a file every byte goes from file to socket without us.
func TestKernelCopies(t *testing.T) {
	name := filepath.Join(t.TempDir(), "blob")
	if err := os.WriteFile(name, kernel, 0o600); err != nil {
		t.Fatal(err)
	}
	h := &Handler{Blobs: func(context.Context, digest.Digest) (io.ReadSeekCloser, error) { return os.Open(name) }}
	mux := http.NewServeMux()
	h.Routes(mux)
	for _, want := range [][]byte{kernel, kernel[100 : len(kernel)-100]} {
		rec := httptest.NewRecorder()
		w := &kernelWriter{ResponseWriter: rec}
		r := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/blobs/sha256/"+sum.Hex(), nil)
		if len(want) < len(kernel) {
			r.Header.Set("Range", fmt.Sprintf("bytes=100-%d", len(kernel)-101))
		}
		mux.ServeHTTP(w, r)
		if !bytes.Equal(rec.Body.Bytes(), want) {
			t.Errorf("got %d bytes, want %d", rec.Body.Len(), len(want))
		}
		if w.parts < len(want)/part || w.slow > 0 {
			t.Errorf("%d parts, %d of which the kernel cannot copy", w.parts, w.slow)
		}
	}
}

// TestHTTP10: without a Host header, and with the connection closed at the end.
func TestHTTP10(t *testing.T) {
	s := newSite(t, nil)
	c, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "GET /boot/ipxe?mac=02:00:00:00:00:01 HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil || !strings.HasSuffix(string(b), "\r\n\r\n#!ipxe\n") || !strings.Contains(string(b), "Content-Length: 7") {
		t.Errorf("got %q, %v", b, err)
	}
	if got := (<-s.requests).Base; got != s.URL {
		t.Errorf("base %q, want %q", got, s.URL)
	}
}

func FuzzScript(f *testing.F) {
	f.Add("mac=02:00:00:00:00:01&arch=7&uuid=11223344-5566-7788-99aa-bbccddeeff00&serial=a&try=1")
	f.Add("mac=%zz&serial=${x}")
	f.Fuzz(func(t *testing.T, query string) {
		var got *Request
		h := &Handler{Script: func(_ context.Context, r Request) (string, error) { got = &r; return "", errors.New("x") }}
		w := httptest.NewRecorder()
		r := &http.Request{Method: http.MethodGet, URL: &url.URL{Path: "/boot/ipxe", RawQuery: query}, Host: "h", RemoteAddr: "10.0.0.1:1"}
		h.script(w, r)
		if got == nil {
			return
		}
		if len(got.MAC) != 6 || len(got.Serial) > 64 || len(got.UUID) != 36 && got.UUID != "" || strings.ContainsAny(got.Again, " \n\r") || strings.Contains(got.Again, "${") {
			t.Fatalf("request %+v", got)
		}
		if w.Code != http.StatusOK {
			t.Fatalf("status %d", w.Code)
		}
	})
}
