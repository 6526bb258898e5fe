// Package httpboot serves what machines boot over HTTP: iPXE itself for UEFI HTTP boot, iPXE's scripts, and bytes by
// digest.
//
//	GET /boot/ipxe?mac=MAC&arch=N&uuid=UUID&serial=SERIAL  the script of one machine; without mac, one that asks again with it
//	GET /boot/files/NAME                                   a boot loader
//	GET /blobs/sha256/HEX                                  bytes, with Range, also several of them; mac, boot and last tell which boot they are of
package httpboot

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/netboot/ipxe"
)

// A Handler serves machines. Its fields must not change once it is in use.
type Handler struct {
	// Script is the script for a machine. An error is shown to the person at the machine, which asks again. Required.
	Script func(ctx context.Context, r Request) (string, error)
	// Files opens a boot loader by name; an unknown name is fs.ErrNotExist. Required.
	Files func(name string) (io.ReadSeekCloser, error)
	// Blobs opens bytes by digest; an unknown digest is fs.ErrNotExist. Required.
	Blobs func(ctx context.Context, d digest.Digest) (io.ReadSeekCloser, error)
	// Sent is told of each whole file that was sent, or wasn't. It must not block. nil: nobody is told.
	Sent func(Transfer)

	URL string       // where machines reach this server; "": the address that they reached it at
	Log *slog.Logger // of lines that anybody on the network can cause. nil: nothing is logged
}

// A Request is what a machine says when it asks for its script.
type Request struct {
	MAC    net.HardwareAddr // six bytes
	UUID   string           // "" where the machine did not say
	Serial string
	Arch   uint16
	Try    int        // how many times in a row it failed to boot
	Peer   netip.Addr // the address that it asked from
	Base   string     // the URL at which it reaches this server
	Again  string     // the URL with which it asks for the script again
}

// A Transfer is one file that a machine fetched for a boot, whole.
type Transfer struct {
	Name     string           // of a boot loader; "" for bytes by digest
	MAC      net.HardwareAddr // nil where the URL did not say
	Boot     string           // as in the URL
	Last     bool             // it is the last one that the boot needs
	Peer     netip.Addr
	Bytes    int64
	Duration time.Duration
	Err      error // nil: all bytes went to the machine
}

const (
	maxQuery = 2048 // bytes

	// maxRanges is how many ranges one request for bytes may ask for: each costs a seek and a header of its own (RFC 9110
	// section 17.15). An agent asks for half as many.
	maxRanges = 512

	// slowMachine is how long a machine may take next to nothing of what is sent to it before it is dropped. An agent that
	// writes an image at idle priority beside a busy disk stops for long, and goes on. And the kernel tells of room only when a
	// third of its send buffer is free: over loopback, with 4 MB of it, nothing was heard for a minute of a client that took
	// 10 KiB a second, which this would drop at 4.
	slowMachine = 5 * time.Minute
	// part is how many bytes are sent before a machine gets slowMachine anew.
	part = 256 << 10
)

// Routes adds the handler's URLs to mux. Its answers move the connection's deadline for writing, and leave it behind: what
// else is served on the same connections needs one of its own, such as http.Server's WriteTimeout.
func (h *Handler) Routes(mux *http.ServeMux) {
	mux.HandleFunc("GET /boot/ipxe", bounded(h.script))
	mux.HandleFunc("GET /boot/files/{name}", bounded(h.file))
	mux.HandleFunc("GET /blobs/sha256/{hex}", bounded(h.blob))
}

// bounded gives a small answer its deadline, which is also that of what http.Server sends after serve has returned.
func bounded(serve http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		extend(w)
		serve(w, r)
	}
}

// extend gives w slowMachine from now on for its next bytes.
func extend(w http.ResponseWriter) {
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(slowMachine)) // only a test's writer has none
}

func (h *Handler) log() *slog.Logger {
	if h.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return h.Log
}

func (h *Handler) script(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	if len(r.URL.RawQuery) > maxQuery {
		problem(w, http.StatusRequestURITooLong, "the query is too long")
		return
	}
	base := h.base(r)
	q := r.URL.Query()
	if !q.Has("mac") {
		writeScript(w, ipxe.Bootstrap(base+"/boot/ipxe"))
		return
	}
	mac, err := parseMAC(q.Get("mac"))
	if err != nil {
		problem(w, http.StatusBadRequest, "mac: "+err.Error())
		return
	}
	req := requestOf(q, mac)
	req.Peer, req.Base = peer(r), base
	req.Again = base + "/boot/ipxe?" + req.query()
	text, err := h.Script(r.Context(), req)
	if err != nil {
		h.log().Warn("no script for a machine", "mac", mac, "err", err)
		text, err = ipxe.Script{
			Title: "the server cannot say what to boot: " + err.Error(), Machine: mac.String(), Server: base, Again: req.Again,
		}.Render()
	}
	if err != nil {
		problem(w, http.StatusInternalServerError, err.Error())
		return
	}
	writeScript(w, text)
}

// requestOf takes what is well formed and leaves out the rest: an iPXE that has no value for a setting sends nothing, or
// the name of the setting.
func requestOf(q url.Values, mac net.HardwareAddr) Request {
	const maxSerial, maxTry = 64, 1000
	req := Request{MAC: mac}
	if n, err := strconv.ParseUint(q.Get("arch"), 10, 16); err == nil {
		req.Arch = uint16(n)
	}
	if n, err := strconv.Atoi(q.Get(ipxe.TryParam)); err == nil {
		req.Try = min(max(n, 0), maxTry)
	}
	if u := strings.ToLower(q.Get("uuid")); isUUID(u) {
		req.UUID = u
	}
	serial := strings.TrimSpace(q.Get("serial"))
	if len(serial) <= maxSerial && !strings.ContainsFunc(serial, func(c rune) bool { return c < ' ' || c > '~' }) && !strings.Contains(serial, "${") {
		req.Serial = serial
	}
	return req
}

func (r Request) query() string {
	v := "mac=" + r.MAC.String() + "&arch=" + strconv.Itoa(int(r.Arch))
	if r.UUID != "" {
		v += "&uuid=" + r.UUID
	}
	if r.Serial != "" {
		v += "&serial=" + url.QueryEscape(r.Serial)
	}
	return v
}

func isUUID(s string) bool {
	if len(s) != 36 {
		return false
	}
	for i, c := range s {
		if dash := i == 8 || i == 13 || i == 18 || i == 23; dash != (c == '-') || !dash && !strings.ContainsRune("0123456789abcdef", c) {
			return false
		}
	}
	return true
}

func parseMAC(s string) (net.HardwareAddr, error) {
	mac, err := net.ParseMAC(s)
	if err == nil && len(mac) != 6 {
		err = errors.New("is not an Ethernet address")
	}
	return mac, err
}

// base is the URL at which the machine reached us: our own end of its connection, since a machine can be trusted to have
// reached that, and the Host header is only what it says.
func (h *Handler) base(r *http.Request) string {
	if h.URL != "" {
		return strings.TrimSuffix(h.URL, "/")
	}
	if a, ok := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr); ok {
		ap := a.AddrPort()
		return "http://" + netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()).String()
	}
	return "http://" + r.Host
}

func peer(r *http.Request) netip.Addr {
	ap, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{} // not TCP
	}
	return ap.Addr().Unmap()
}

func writeScript(w http.ResponseWriter, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(len(text))) // the iPXE of 2019 shows no progress without
	_, _ = io.WriteString(w, text)                            // the machine asks again
}

func (h *Handler) file(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	f, err := h.Files(name)
	if err != nil {
		h.openProblem(w, err, "boot loader "+name)
		return
	}
	defer f.Close()
	w.Header().Set("Content-Type", "application/efi") // EDK2 goes by this, or by the name's ending
	h.serve(w, r, f, Transfer{Name: name, Peer: peer(r)})
}

func (h *Handler) blob(w http.ResponseWriter, r *http.Request) {
	d, err := digest.FromHex(r.PathValue("hex"))
	if err != nil {
		problem(w, http.StatusBadRequest, "digest: "+err.Error())
		return
	}
	f, err := h.Blobs(r.Context(), d)
	if err != nil {
		h.openProblem(w, err, "blob "+d.String())
		return
	}
	defer f.Close()
	if n := strings.Count(r.Header.Get("Range"), ",") + 1; n > maxRanges {
		problem(w, http.StatusRequestedRangeNotSatisfiable, "the request asks for "+strconv.Itoa(n)+" ranges, more than "+strconv.Itoa(maxRanges))
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("ETag", `"`+d.String()+`"`)
	w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	t := Transfer{Peer: peer(r)}
	if q := r.URL.Query(); len(r.URL.RawQuery) <= maxQuery && q.Has("mac") {
		if mac, err := parseMAC(q.Get("mac")); err == nil {
			t.MAC, t.Boot, t.Last = mac, q.Get("boot"), q.Get("last") == "1"
		}
	}
	h.serve(w, r, f, t)
}

func (h *Handler) openProblem(w http.ResponseWriter, err error, what string) {
	if errors.Is(err, fs.ErrNotExist) {
		problem(w, http.StatusNotFound, "no "+what)
		return
	}
	h.log().Error("opening a file to send", "what", what, "err", err)
	problem(w, http.StatusInternalServerError, what+" cannot be read")
}

// serve sends f, and tells of it if it was asked for whole.
func (h *Handler) serve(w http.ResponseWriter, r *http.Request, f io.ReadSeeker, t Transfer) {
	c := &counter{ResponseWriter: w, status: http.StatusOK}
	start := time.Now()
	http.ServeContent(c, r, "", time.Time{}, f)
	if h.Sent == nil || r.Method != http.MethodGet || c.status != http.StatusOK {
		return
	}
	t.Bytes, t.Duration, t.Err = c.n, time.Since(start), c.err
	if want, err := strconv.ParseInt(c.Header().Get("Content-Length"), 10, 64); t.Err == nil && err == nil && want != c.n {
		t.Err = io.ErrShortWrite
	}
	h.Sent(t)
}

// A counter notes how a response went, and bounds how long each part of it may take. It has ReadFrom so that the kernel can
// still copy from file to socket.
type counter struct {
	http.ResponseWriter
	status int
	n      int64
	err    error
}

func (c *counter) WriteHeader(status int) {
	c.status = status
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(p []byte) (int, error) {
	extend(c.ResponseWriter)
	n, err := c.ResponseWriter.Write(p)
	c.note(int64(n), err)
	return n, err
}

// ReadFrom implements io.ReaderFrom. The kernel copies from a file, or from an io.LimitedReader over a file, but not from
// one over another: http.ServeContent's is taken apart.
func (c *counter) ReadFrom(r io.Reader) (int64, error) {
	all, ok := r.(*io.LimitedReader)
	if !ok {
		all = &io.LimitedReader{R: r, N: math.MaxInt64}
	}
	for sent := int64(0); ; {
		extend(c.ResponseWriter)
		want := min(part, all.N)
		n, err := io.Copy(c.ResponseWriter, &io.LimitedReader{R: all.R, N: want})
		c.note(n, err)
		sent, all.N = sent+n, all.N-n
		if err != nil || n < want || all.N == 0 {
			return sent, err
		}
	}
}

// Unwrap is for http.ResponseController.
func (c *counter) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *counter) note(n int64, err error) {
	c.n += n
	if c.err == nil {
		c.err = err
	}
}

// problem is an error as JSON.
func problem(w http.ResponseWriter, status int, msg string) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Del("Cache-Control")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]string{"error": msg}) // whoever asked has gone
}
