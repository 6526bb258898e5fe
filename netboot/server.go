package netboot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/quiet"
	"github.com/troupe-dev/troupe/netboot/dhcp"
	"github.com/troupe-dev/troupe/netboot/httpboot"
	"github.com/troupe-dev/troupe/netboot/ipxe"
	"github.com/troupe-dev/troupe/netboot/ndp"
	"github.com/troupe-dev/troupe/netboot/tftp"
)

// A Server answers the machines of one network. Its fields must not change once Serve or Handler was called.
type Server struct {
	Director Director // required
	Blobs    Blobs    // required
	Observer Observer // nil: nobody hears

	Mode      dhcp.Mode       // server, proxy beside a foreign one, or off
	Addresses dhcp.Addresses  // required in dhcp.ModeServer
	Leases    dhcp.LeaseStore // nil: leases are forgotten when the program ends

	// HTTPPort is where Handler is served; 0 is 80. Machines are told the address of ours that they came by. URL, e.g.
	// "http://boot.example:8080", is told instead if it is set.
	HTTPPort uint16
	URL      string

	LoaderDirs []string     // where iPXE is looked for; nil: where distributions install it
	Log        *slog.Logger // nil: nothing is logged

	macs    macs
	booting booting
}

// Sockets are what a Server listens on, apart from HTTP.
type Sockets struct {
	DHCP []dhcp.Transport
	TFTP net.PacketConn
	NDP  ndp.Transport    // nil: iPXE waits for an IPv6 router
	MAC  net.HardwareAddr // of NDP's interface
}

// Close closes the sockets, for a caller that never came to Serve.
func (s Sockets) Close() error {
	var errs []error
	for _, t := range s.DHCP {
		errs = append(errs, t.Close())
	}
	if s.TFTP != nil {
		errs = append(errs, s.TFTP.Close())
	}
	if s.NDP != nil {
		errs = append(errs, s.NDP.Close())
	}
	return errors.Join(errs...)
}

// Serve answers DHCP and TFTP on the sockets until ctx ends, and then returns nil; if one of them cannot go on, it
// stops the others and returns why. It closes the sockets. It may be called once.
func (s *Server) Serve(ctx context.Context, socks Sockets) error {
	g, ctx := errgroup.WithContext(ctx)
	if s.Mode != dhcp.ModeOff {
		g.Go(func() error {
			d := &dhcp.Server{
				Mode: s.Mode, Addresses: s.Addresses, Leases: s.Leases, URL: s.URL, HTTPPort: s.HTTPPort,
				HasFile: s.loaders().Has, Observe: s.offered, Booting: s.booting.put, Log: s.Log,
			}
			return d.Serve(ctx, socks.DHCP...)
		})
	}
	g.Go(func() error {
		t := &tftp.Server{Open: s.loaders().Open, Observe: s.loaded, Log: s.Log}
		return t.Serve(ctx, socks.TFTP)
	})
	if socks.NDP != nil {
		g.Go(func() error {
			n := &ndp.Server{MAC: socks.MAC, Booting: s.booting.has, Log: quiet.New(s.Log)}
			return n.Serve(ctx, socks.NDP)
		})
	}
	return g.Wait()
}

// Handler serves /boot/ and /blobs/.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	h := &httpboot.Handler{Script: s.script, Files: s.loaders().Open, Blobs: s.open, Sent: s.sent, URL: s.URL, Log: quiet.New(s.Log)}
	h.Routes(mux)
	return mux
}

func (s *Server) loaders() loaderSet {
	if s.LoaderDirs == nil {
		return defaultLoaderDirs
	}
	return s.LoaderDirs
}

func (s *Server) open(ctx context.Context, d digest.Digest) (io.ReadSeekCloser, error) {
	f, err := s.Blobs.Open(ctx, d)
	if errors.Is(err, ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", fs.ErrNotExist, err)
	}
	return f, err
}

// script asks the Director, writes its answer down for iPXE, and tells the Observer.
func (s *Server) script(ctx context.Context, r httpboot.Request) (string, error) {
	s.macs.put(r.Peer, r.MAC)
	boot, err := s.Director.Boot(ctx, Machine{MAC: r.MAC, UUID: r.UUID, Serial: r.Serial, Arch: Arch(r.Arch)})
	text := ""
	if err == nil {
		text, err = scriptOf(boot, r).Render()
	}
	e := Event{MAC: r.MAC, Peer: r.Peer, Stage: StageScript, Detail: boot.Title, Err: err}
	s.observe(e)
	return text, err
}

func scriptOf(b Boot, r httpboot.Request) ipxe.Script {
	sc := ipxe.Script{Title: b.Title, Machine: fmt.Sprintf("%s at %s", r.MAC, r.Peer), Server: r.Base, Again: r.Again, Try: r.Try, Local: b.Local}
	if d := b.Disk; d != nil {
		sc.Disk = &ipxe.Disk{
			Server: hostOf(r.Base), Port: d.Port, Target: d.Target, LUN: d.LUN, Initiator: d.Initiator,
			User: d.User, Secret: d.Secret, MutualUser: d.MutualUser, MutualSecret: d.MutualSecret,
		}
		return sc
	}
	if b.Kernel == "" {
		return sc
	}
	files := append([]digest.Digest{b.Kernel}, b.Initrds...)
	urls := make([]string, len(files))
	for i, d := range files {
		urls[i] = fmt.Sprintf("%s/blobs/sha256/%s?mac=%s&boot=%s", r.Base, d.Hex(), r.MAC, b.ID)
	}
	urls[len(urls)-1] += "&last=1"
	sc.Kernel, sc.Initrds = urls[0], urls[1:]
	sc.Args = append([]string{"troupe.server=" + r.Base, "troupe.mac=" + r.MAC.String(), "troupe.boot=" + b.ID}, b.Args...)
	return sc
}

// hostOf is the name or the address in a URL of ours.
func hostOf(base string) string {
	u, err := url.Parse(base)
	if err != nil {
		return base
	}
	return u.Hostname()
}

// offered hears of DHCP.
func (s *Server) offered(e dhcp.Event) {
	if e.Addr.IsValid() {
		s.macs.put(e.Addr, e.MAC)
	}
	s.observe(Event{MAC: e.MAC, Peer: e.Addr, Stage: StageOffer, Time: e.Time, Detail: e.Detail, Err: e.Err})
}

// loaded hears of TFTP.
func (s *Server) loaded(t tftp.Transfer) {
	e := Event{MAC: s.macs.get(t.Peer), Peer: t.Peer, Stage: StageTFTP, Err: t.Err}
	e.Detail = fmt.Sprintf("%s: %d bytes in %s", t.Name, t.Bytes, t.Duration.Round(time.Millisecond))
	s.observe(e)
}

// sent hears of HTTP. A boot loader that goes by HTTP is the same stage as one by TFTP.
func (s *Server) sent(t httpboot.Transfer) {
	e := Event{MAC: t.MAC, Peer: t.Peer, Stage: StageKernel, Err: t.Err}
	switch {
	case t.Name != "":
		e.MAC, e.Stage = s.macs.get(t.Peer), StageTFTP
		e.Detail = fmt.Sprintf("%s by HTTP: %d bytes in %s", t.Name, t.Bytes, t.Duration.Round(time.Millisecond))
	case t.MAC == nil || !t.Last && t.Err == nil:
		return // an agent fetches an image, or more is to come
	default:
		e.Detail = "boot " + t.Boot + ": last file of " + strconv.FormatInt(t.Bytes, 10) + " bytes"
	}
	s.observe(e)
}

func (s *Server) observe(e Event) {
	if s.Observer == nil {
		return
	}
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	e.Detail = strings.TrimSpace(e.Detail)
	s.Observer.Observe(e)
}

// macs remembers whose addresses are, since TFTP tells only an address. It is bounded, since anybody can make up MACs.
type macs struct {
	mu sync.Mutex
	by map[netip.Addr]net.HardwareAddr
}

const maxMACs = 1 << 16

func (m *macs) put(a netip.Addr, mac net.HardwareAddr) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.by == nil || len(m.by) >= maxMACs {
		m.by = map[netip.Addr]net.HardwareAddr{}
	}
	m.by[a] = mac
}

func (m *macs) get(a netip.Addr) net.HardwareAddr {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.by[a]
}

// booting knows which machines run iPXE just now.
type booting struct {
	mu sync.Mutex
	at map[string]time.Time // by MAC
}

// bootsFor is how long iPXE configures its network, with time to spare.
const bootsFor = time.Minute

func (b *booting) put(mac net.HardwareAddr) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.at == nil || len(b.at) >= maxMACs {
		b.at = map[string]time.Time{}
	}
	b.at[mac.String()] = time.Now()
}

func (b *booting) has(mac net.HardwareAddr) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	at, ok := b.at[mac.String()]
	return ok && time.Since(at) < bootsFor
}
