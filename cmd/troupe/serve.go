package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"oras.land/oras-go/v2"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/build"
	"github.com/troupe-dev/troupe/images/build/vm"
	"github.com/troupe-dev/troupe/images/initramfs"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/signing"
	"github.com/troupe-dev/troupe/netboot"
	"github.com/troupe-dev/troupe/netboot/dhcp"
	"github.com/troupe-dev/troupe/reconciler"
	"github.com/troupe-dev/troupe/reconciler/source"
	"github.com/troupe-dev/troupe/reconciler/state"
	"github.com/troupe-dev/troupe/reconciler/web"
	"github.com/troupe-dev/troupe/schema/load"
)

// serveOptions are the flags of troupe serve.
type serveOptions struct {
	repo, branch, path string
	credentials        string
	interval           time.Duration
	data               string
	store              string
	listen             string
	iscsi              string
	iface              string
	dhcp               string
	agent              string
	ipxe               []string
	jobs               int
	machines           int
	verbose            bool
}

func newServeCommand() *cobra.Command {
	var o serveOptions
	cmd := &cobra.Command{
		Use:   "serve --repo URL|PATH --data DIR",
		Short: "Run the server: follow a repo, build images, boot machines",
		Long: `Follows a branch of a Git repo, builds the images that its fleet needs, and
boots the fleet's machines with its own DHCP, TFTP and HTTP servers.

All state lies under --data. It may be killed at any time: the next start goes on.

DHCP answers nobody unless --interface is given. As "server" it is the only DHCP
server of that network; as "proxy" it leaves addresses to the one that is there and
only says what to boot; "off" leaves both to others.

What is built is kept in --data, as an OCI image layout. With --store it is pushed to
a registry, too, and what that has already is taken from it instead of built: servers
that have one registry build each image once. Credentials are docker's. A registry that
is away keeps nothing waiting.

Hosts without disks have theirs here, by iSCSI on port 3260. Where another program has
that port, and no host has a disk here yet, the server starts without; once some have,
it does not start until the port is free, or --iscsi-listen names another one.`,
		Example: `  troupe serve --repo /srv/fleet.git --data /var/lib/troupe --interface eth1
  troupe serve --repo https://git.example.com/fleet.git --data /var/lib/troupe --interface eth1 --dhcp proxy`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			level := slog.LevelInfo
			if o.verbose {
				level = slog.LevelDebug
			}
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: level}))
			return o.run(cmd.Context(), log)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.repo, "repo", "", "Git repo of the fleet: a path, or a URL (https, ssh, file)")
	f.StringVar(&o.branch, "branch", source.DefaultBranch, "branch to follow")
	f.StringVar(&o.path, "path", ".", "the fleet's directory in the repo")
	f.StringVar(&o.credentials, "credentials", "", "file with credentials for https, in the format of git-credential-store")
	f.DurationVar(&o.interval, "interval", source.DefaultInterval, "time between two looks at the repo")
	f.StringVar(&o.data, "data", "", "directory of all of the server's state")
	f.StringVar(&o.store, "store", "", "registry that takes what is built, and gives what was: oci://HOST/NAME (oci+http:// without TLS)")
	f.StringVar(&o.listen, "listen", ":8080", "address of the HTTP server")
	f.StringVar(&o.iscsi, "iscsi-listen", "", "address of the iSCSI target, or off (default: port 3260 of the HTTP server's address)")
	f.StringVar(&o.iface, "interface", "", "interface of the machines' network; without one only HTTP is served")
	f.StringVar(&o.dhcp, "dhcp", "server", "server, proxy or off")
	f.StringVar(&o.agent, "agent", "", "the troupe-agent program (default: beside this one)")
	f.StringSliceVar(&o.ipxe, "ipxe", nil, "directories of iPXE's boot files (default: where Debian has them)")
	f.IntVar(&o.jobs, "jobs", 2, "builds at a time")
	f.IntVar(&o.machines, "build-machines", 0, "machines that run for builds at a time (default: by processors and memory)")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "log what is done for whom")
	for _, name := range []string{"repo", "data"} {
		_ = cmd.MarkFlagRequired(name) // fails for unknown flags only
	}
	return cmd
}

// check refuses flags that no server can be run with, before anything is opened.
func (o serveOptions) check() error {
	if o.jobs < 1 {
		return fmt.Errorf("--jobs %d: want 1 or more", o.jobs)
	}
	if o.machines < 0 {
		return fmt.Errorf("--build-machines %d: want 1 or more", o.machines)
	}
	if _, err := o.registry(); err != nil {
		return err
	}
	_, err := dhcpMode(o.dhcp)
	return err
}

const (
	iscsiOff  = "off"
	iscsiPort = "3260" // RFC 7143 section 14: the one that initiators ask unless they are told another
)

// listenISCSI opens the iSCSI target's port; nil where there is to be no target. That the port which nobody asked for is
// taken, by another target perhaps, keeps a server from starting only if hosts have disks there: most fleets need none.
func (o serveOptions) listenISCSI(ctx context.Context, log *slog.Logger, records *state.Store) (net.Listener, error) {
	if o.iscsi == iscsiOff {
		return nil, nil //nolint:nilnil // no target is no error
	}
	at := o.iscsi
	if at == "" {
		host, _, err := net.SplitHostPort(o.listen)
		if err != nil {
			return nil, fmt.Errorf("--listen %s: %w", o.listen, err)
		}
		at = net.JoinHostPort(host, iscsiPort)
	}
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", at)
	if errors.Is(err, syscall.EADDRINUSE) && o.iscsi == "" {
		why, needed := o.hasDisks(ctx, records)
		if needed != nil {
			return nil, needed
		}
		if why == "" {
			log.Warn("no disks are served: the iSCSI target's port is taken (see --iscsi-listen)", "address", at)
			return nil, nil //nolint:nilnil // as above
		}
		err = fmt.Errorf("%w, and %s: end what has the port, or give another one, or off to start without those disks", err, why)
	}
	if err != nil {
		return nil, fmt.Errorf("opening the iSCSI target's port (see --iscsi-listen): %w", err)
	}
	return l, nil
}

// disksDir is where hosts' disks are.
func (o serveOptions) disksDir() string { return filepath.Join(o.data, "luns") }

// hasDisks says, for people, what hosts have on this server's disks; "" for nothing.
func (o serveOptions) hasDisks(ctx context.Context, records *state.Store) (string, error) {
	recs, err := state.LUNSets.List(ctx, records)
	if err != nil {
		return "", err
	}
	if len(recs) > 0 {
		return "hosts are on record to have disks here", nil
	}
	for _, kind := range []string{"*.disk", "*.delta"} {
		found, err := filepath.Glob(filepath.Join(o.disksDir(), "*", kind))
		if err != nil {
			return "", fmt.Errorf("looking for disks of hosts: %w", err)
		}
		if len(found) > 0 {
			return "there are disks of hosts in " + o.disksDir(), nil
		}
	}
	return "", nil
}

func addrOf(l net.Listener) string {
	if l == nil {
		return iscsiOff
	}
	return l.Addr().String()
}

// portOf is the TCP port that l listens on; 0 for no listener.
func portOf(l net.Listener) uint16 {
	if l == nil {
		return 0
	}
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return 0
	}
	return uint16(addr.Port) //nolint:gosec // a TCP port has 16 bits
}

// run puts the server together and runs it until ctx ends, or what it cannot run without fails.
func (o serveOptions) run(ctx context.Context, log *slog.Logger) error {
	if err := o.check(); err != nil {
		return err
	}
	if err := os.MkdirAll(o.data, 0o755); err != nil {
		return fmt.Errorf("making the data directory: %w", err)
	}
	records, err := state.Open(ctx, filepath.Join(o.data, "state"), log)
	if err != nil {
		return err
	}
	defer closeLogged(log, "the records", records.Close)
	blobs, err := store.Open(filepath.Join(o.data, "store"))
	if err != nil {
		return err
	}
	defer closeLogged(log, "the image store", blobs.Close)
	repo, err := source.Open(source.Config{
		Repo: o.repo, Branch: o.branch, Path: o.path, Dir: filepath.Join(o.data, "mirror"),
		Interval: o.interval, Credentials: o.credentials, Log: log,
	})
	if err != nil {
		return err
	}
	key, trusted, err := loadKeys(filepath.Join(o.data, "keys"))
	if err != nil {
		return err
	}
	agent, arch, err := putAgent(ctx, blobs, o.agent, trusted)
	if err != nil {
		return err
	}
	loaders, err := putLoaders(ctx, blobs, arch, log)
	if err != nil {
		return err
	}
	builder, err := o.builder(blobs, log)
	if err != nil {
		return err
	}
	if err := builder.Clean(); err != nil {
		return err
	}
	disks, err := o.listenISCSI(ctx, log, records)
	if err != nil {
		return err
	}
	if disks != nil {
		defer disks.Close() // a second time, once it was served
	}
	registry, err := o.registry()
	if err != nil {
		return err
	}
	rec, err := reconciler.New(reconciler.Config{
		Repo: repo, Branch: o.branch, Path: o.path, Loader: &load.Loader{}, Store: records, Blobs: blobs, Builder: builder,
		Registry: registry, Place: o.store,
		Logs: filepath.Join(o.data, "logs"), Agent: agentapi.Blob(agent), Loaders: loaders, Arch: arch, Key: key, Jobs: o.jobs, LUNs: o.disksDir(), ISCSIPort: portOf(disks), Log: log,
	})
	if err != nil {
		return err
	}
	return o.servers(ctx, log, rec, records, disks)
}

// registry is where what is built goes, too; nil for nowhere. It is not asked for anything yet: one that is away keeps no
// server from starting.
func (o serveOptions) registry() (oras.Target, error) {
	if o.store == "" {
		return nil, nil //nolint:nilnil // no registry is no error
	}
	repo, err := artifact.Registry(o.store)
	if err != nil {
		return nil, fmt.Errorf("--store: %w", err)
	}
	return repo, nil
}

// servers opens the other sockets and runs everything that listens, and the reconciler, until ctx ends or one of them fails.
// disks is the iSCSI target's, nil for none.
func (o serveOptions) servers(ctx context.Context, log *slog.Logger, rec *reconciler.Reconciler, records *state.Store, disks net.Listener) error {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("opening the HTTP server's port: %w", err)
	}
	boot, err := o.netboot(l, log, rec)
	if err != nil {
		_ = l.Close()
		return err
	}
	mux := http.NewServeMux()
	operators := rec.API().Handler()
	for _, path := range []string{"/api/", "/node/", "/healthz", "/metrics"} {
		mux.Handle(path, operators)
	}
	mux.Handle("/", web.Handler())
	mux.Handle("/boot/", boot.Handler())
	mux.Handle("/blobs/", boot.Handler())
	log.Info("serving", "http", l.Addr().String(), "iscsi", addrOf(disks), "interface", o.iface, "dhcp", o.dhcp, "repo", source.Redact(o.repo))

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return rec.Run(ctx) })
	if disks != nil {
		g.Go(func() error { return rec.ServeISCSI(ctx, disks) })
	}
	g.Go(func() error { return serveHTTP(ctx, l, mux) })
	g.Go(func() error { return o.serveBoot(ctx, boot) })
	g.Go(func() error { return watchRecords(ctx, records) })
	return g.Wait()
}

// watchRecords waits until ctx ends, or the records can no longer be kept: then the process should end, so that whoever
// started it starts it again.
func watchRecords(ctx context.Context, records interface {
	Done() <-chan struct{}
	Err() error
},
) error {
	select {
	case <-ctx.Done():
		return nil
	case <-records.Done():
		return fmt.Errorf("keeping records: %w", records.Err())
	}
}

// Bounds of a client of the HTTP server that does not say otherwise for itself, as the API and netboot's servers do.
const (
	slowHeader = 10 * time.Second
	slowBody   = 10 * time.Second // of a request that should have none
	slowAnswer = time.Minute
)

// bodies has h serve requests whose body may never come. http.Server reads what a handler left of a body, after it and
// without a deadline.
func bodies(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 {
			w.Header().Set("Connection", "close")
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(slowBody)) // a net.Conn has deadlines
		}
		h.ServeHTTP(w, r)
	})
}

// serveHTTP serves until ctx ends. Transfers and long polls get a moment to end by themselves: agents come back.
func serveHTTP(ctx context.Context, l net.Listener, h http.Handler) error {
	srv := &http.Server{
		Handler: bodies(h), ReadHeaderTimeout: slowHeader, WriteTimeout: slowAnswer, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	done := make(chan error, 1)
	go func() {
		<-ctx.Done()
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if srv.Shutdown(grace) != nil {
			_ = srv.Close()
		}
		done <- nil
	}()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serving HTTP: %w", err)
	}
	return <-done
}

// loadKeys is the key that releases are signed with, made at the first start, and those that machines are told to trust:
// this one, and those of the file trusted.pub beside it, where there is one. Whoever changes the key has it there before.
func loadKeys(dir string) (*signing.Key, signing.Keys, error) {
	key, err := signing.Load(filepath.Join(dir, "release.key"))
	if err != nil {
		return nil, nil, err
	}
	name := filepath.Join(dir, "trusted.pub")
	more, err := os.ReadFile(name)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("reading the keys that machines trust: %w", err)
	}
	trusted, err := signing.ParseKeys(key.Public() + "\n" + string(more))
	if err != nil {
		return nil, nil, fmt.Errorf("reading the keys that machines trust in %q: %w", name, err)
	}
	return key, trusted, nil
}

// putAgent makes the initramfs segment with the agent and the keys that it trusts, and keeps it in the store. arch is the
// agent's.
func putAgent(ctx context.Context, blobs *store.Store, name string, keys signing.Keys) (segment images.Blob, arch string, err error) {
	if name == "" {
		self, err := os.Executable()
		if err != nil {
			return images.Blob{}, "", fmt.Errorf("finding troupe-agent: %w", err)
		}
		name = filepath.Join(filepath.Dir(self), "troupe-agent")
	}
	f, err := os.Open(name)
	if err != nil {
		return images.Blob{}, "", fmt.Errorf("opening the agent that machines boot (see --agent): %w", err)
	}
	defer f.Close()
	if arch, err = initramfs.Arch(f); err != nil {
		return images.Blob{}, "", err
	}
	segment, err = putSegment(ctx, blobs, f, keys)
	if err != nil {
		return images.Blob{}, "", fmt.Errorf("writing the agent's initramfs: %w", err)
	}
	return segment, arch, nil
}

func putSegment(ctx context.Context, blobs *store.Store, agent io.Reader, keys signing.Keys) (images.Blob, error) {
	w, err := blobs.Create(ctx)
	if err != nil {
		return images.Blob{}, err
	}
	defer func() { _ = w.Abort() }()
	if err := initramfs.Agent(w, agent, keys.String()); err != nil {
		return images.Blob{}, err
	}
	return w.Commit()
}

func closeLogged(log *slog.Logger, what string, closer func() error) {
	if err := closer(); err != nil {
		log.Error("closing", "what", what, "error", err)
	}
}

func dhcpMode(flag string) (dhcp.Mode, error) {
	switch flag {
	case "server":
		return dhcp.ModeServer, nil
	case "proxy":
		return dhcp.ModeProxy, nil
	case "off":
		return dhcp.ModeOff, nil
	}
	return 0, fmt.Errorf("--dhcp %s: want server, proxy or off", flag)
}

// netboot is the server that machines boot from. Its HTTP part is served on l.
func (o serveOptions) netboot(l net.Listener, log *slog.Logger, rec *reconciler.Reconciler) (*netboot.Server, error) {
	mode, err := dhcpMode(o.dhcp)
	if err != nil {
		return nil, err
	}
	addr, ok := l.Addr().(*net.TCPAddr)
	if !ok {
		return nil, fmt.Errorf("--listen %s: not a TCP address", o.listen)
	}
	return &netboot.Server{
		Director: rec.Director(), Blobs: rec.Blobs(), Observer: rec.Observer(), Mode: mode,
		Addresses: rec.Addresses(), Leases: rec.Leases(), HTTPPort: uint16(addr.Port), //nolint:gosec // a TCP port has 16 bits
		LoaderDirs: o.ipxe, Log: log,
	}, nil
}

// serveBoot answers DHCP and TFTP on the machines' network until ctx ends.
func (o serveOptions) serveBoot(ctx context.Context, boot *netboot.Server) error {
	if o.iface == "" {
		return nil
	}
	socks, err := netboot.Listen(ctx, o.iface, boot.Mode)
	if err != nil {
		return fmt.Errorf("opening the ports of DHCP and TFTP on %s: %w", o.iface, err)
	}
	return boot.Serve(ctx, socks)
}

// builder makes images. Its machines run this program, which is static, as their init.
func (o serveOptions) builder(blobs *store.Store, log *slog.Logger) (*build.Builder, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("looking for this program: %w", err)
	}
	return &build.Builder{
		Store: blobs, Dir: filepath.Join(o.data, "build"), Log: log,
		VMs: vm.NewHost(self, o.machines), Compiled: filepath.Join(o.data, "compiled"),
	}, nil
}
