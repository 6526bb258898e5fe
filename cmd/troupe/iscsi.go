package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/troupe-dev/troupe/netboot/iscsi"
	"github.com/troupe-dev/troupe/netboot/iscsi/lun"
	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
	"github.com/troupe-dev/troupe/reconciler/api"
)

func newISCSICommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "iscsi",
		Args:    cobra.NoArgs, // what is no verb below is a mistake
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		Short:   "Serve disks without a fleet",
		Example: "  troupe iscsi serve --lun ro:debian.img",
	}
	cmd.AddCommand(newISCSIServeCommand())
	return cmd
}

// diskTarget is the name of the target of troupe iscsi serve.
const diskTarget = "iqn.2026-11.dev.troupe:disks"

// lunForms is what --lun takes.
const lunForms = "ro:FILE, cow:BASE,DELTA or rw:FILE"

// iscsiOptions are the flags of troupe iscsi serve.
type iscsiOptions struct {
	listen                       string
	luns                         []string
	chapUser, chapSecret         string // the secrets are names of files
	chapMutualUser, mutualSecret string
	state                        string
	output                       string
	verbose                      bool
}

func newISCSIServeCommand() *cobra.Command {
	var o iscsiOptions
	cmd := &cobra.Command{
		Use:   "serve --lun ro:FILE|cow:BASE,DELTA|rw:FILE",
		Short: "Run an iSCSI target with disks of your own",
		Long: `Runs the iSCSI target that machines without disks boot from, without a fleet. Each
--lun is a disk, numbered from 0 in the order in which they are given:

  ro:FILE           an image that is only read
  cow:BASE,DELTA    a disk that begins as the image BASE, which is only read; what is
                    written to it goes to DELTA, which is made where it is not there.
                    BASE must stay as it is: DELTA cannot be used over another
  rw:FILE           a file that is read and written

Images and files are raw, the bytes of the disk as they are: of a qcow2 image
qemu-img convert -O raw makes one.

With ,size=10GiB behind DELTA or FILE, one that is not there is made of that size (a
DELTA has BASE's without); it takes space only for what is written. Making a DELTA
reads all of BASE once, to know it again; its digest is kept in DELTA.base.

Whoever reaches the address may use the disks, unless --chap-user says who may. What
initiators reserve for good is kept beside DELTA and FILE, as DELTA.reservations, or in
--state; it ends with the DELTA or FILE that it is of.

It may be killed at any time: initiators come back to the next one, and what they
wrote is there.`,
		Example: `  troupe iscsi serve --lun ro:debian.img
  troupe iscsi serve --listen 192.0.2.1:3260 --lun cow:debian.img,n1.delta --lun rw:data.img,size=10GiB
  troupe iscsi serve --lun rw:data.img --chap-user n1 --chap-secret-file n1.secret`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return o.run(cmd) },
	}
	f := cmd.Flags()
	f.StringVar(&o.listen, "listen", ":3260", "address of the target")
	f.StringArrayVar(&o.luns, "lun", nil, "a disk: "+lunForms+"; may be given again")
	f.StringVar(&o.chapUser, "chap-user", "", "user that initiators log in as, with CHAP; none: anybody may")
	f.StringVar(&o.chapSecret, "chap-secret-file", "", "file with the secret of --chap-user")
	f.StringVar(&o.chapMutualUser, "chap-mutual-user", "", "user that the target is to initiators that ask it who it is")
	f.StringVar(&o.mutualSecret, "chap-mutual-secret-file", "", "file with the secret of --chap-mutual-user")
	f.StringVar(&o.state, "state", "", "directory of the reservations of all disks (default: beside each that is written)")
	f.StringVarP(&o.output, "output", "o", "table", "table or json")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "log what is done for whom")
	return cmd
}

// run serves until the context of cmd ends, and closes what it opened when nobody uses it any more.
func (o *iscsiOptions) run(cmd *cobra.Command) (err error) {
	specs, err := o.specs()
	if err != nil {
		return err
	}
	chap, err := o.chap()
	if err != nil {
		return err
	}
	// Where the port cannot be had no disk is made. Who connects before they are open waits to be accepted.
	l, err := (&net.ListenConfig{}).Listen(cmd.Context(), "tcp", o.listen)
	if err != nil {
		return fmt.Errorf("opening the target's port (see --listen): %w", err)
	}
	defer l.Close()
	if o.state != "" {
		if err := os.MkdirAll(o.state, 0o755); err != nil {
			return fmt.Errorf("making the directory of --state: %w", err)
		}
	}
	shelf := &diskShelf{target: iscsi.NewTarget(diskTarget), chap: chap, errOut: cmd.ErrOrStderr()}
	reading := &readingProgress{w: shelf.errOut, now: time.Now}
	shelf.bases.Progress = reading.report
	defer func() { err = errors.Join(err, shelf.close()) }()
	for i, s := range specs {
		err := shelf.add(cmd.Context(), iscsi.LUN(i), s, o.state)
		switch {
		case errors.Is(err, context.Canceled):
			return nil // told to end while it read a base, which is no error
		case err != nil:
			return fmt.Errorf("--lun %s: %w", s.text, err)
		}
	}
	if err := o.print(cmd.OutOrStdout(), shelf, l.Addr()); err != nil {
		return err
	}
	return shelf.serve(cmd.Context(), l, o.log(cmd.ErrOrStderr()))
}

func (o *iscsiOptions) log(w io.Writer) *slog.Logger {
	level := slog.LevelInfo
	if o.verbose {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}

// maxDisks is how many --lun there may be: what initiators look for without being told otherwise.
const maxDisks = 256

// specs are the disks that are asked for; with them, flags that no target can be run with are refused.
func (o *iscsiOptions) specs() ([]diskSpec, error) {
	switch {
	case !slices.Contains([]string{"table", "json"}, o.output):
		return nil, fmt.Errorf("flag -o %q: want table or json", o.output)
	case len(o.luns) == 0:
		return nil, fmt.Errorf("no --lun: want at least one of %s", lunForms)
	case len(o.luns) > maxDisks:
		return nil, fmt.Errorf("%d --lun: want %d at most", len(o.luns), maxDisks)
	}
	var specs []diskSpec
	for _, text := range o.luns {
		s, err := parseDisk(text)
		if err != nil {
			return nil, fmt.Errorf("--lun %s: %w", text, err)
		}
		specs = append(specs, s)
	}
	return specs, nil
}

// A diskSpec is a --lun.
type diskSpec struct {
	text string // as it was given
	kind string // ro, cow or rw
	base string // of cow
	file string
	size int64 // 0: none given
}

// parseDisk reads a --lun.
func parseDisk(text string) (diskSpec, error) {
	s := diskSpec{text: text}
	kind, rest, ok := strings.Cut(text, ":")
	if !ok || !slices.Contains([]string{"ro", "cow", "rw"}, kind) {
		return s, fmt.Errorf("want %s", lunForms)
	}
	s.kind, s.file = kind, rest
	if at := strings.LastIndex(rest, ",size="); at >= 0 {
		var err error
		if s.size, err = parseDiskSize(rest[at+len(",size="):]); err != nil {
			return s, err
		}
		s.file = rest[:at]
	}
	switch {
	case kind == "ro" && s.size != 0:
		return s, errors.New("an image that is only read has the size that it has: leave out size=")
	case kind == "cow":
		if s.base, s.file, ok = strings.Cut(s.file, ","); !ok || s.base == "" {
			return s, errors.New("want the image and the file for what is written to it, as in cow:debian.img,n1.delta")
		}
	}
	if s.file == "" {
		return s, errors.New("no file is named")
	}
	return s, nil
}

// parseDiskSize reads a size as in 10GiB, 10G or 10737418240.
func parseDiskSize(text string) (int64, error) {
	short, ok := strings.CutSuffix(text, "iB")
	n, err := parseSize(short)
	if err != nil || n <= 0 || n%lun.BlockSize != 0 || ok && short == strings.TrimRight(short, "KMGT") {
		return 0, fmt.Errorf("size %q: want a whole number of bytes, or of K, M, G or T (also KiB to TiB: powers of 1024), as in 10GiB, that is a multiple of %d bytes",
			text, lun.BlockSize)
	}
	return n, nil
}

// minSecret and maxSecret bound secrets, in bytes: RFC 7143 section 12.1.3 wants 96 bits at least, and initiators are
// known that take no more than 16, but none that needs more than 255.
const minSecret, maxSecret = 12, 255

// chap is what initiators must know; nil: nothing.
func (o *iscsiOptions) chap() (*iscsi.CHAP, error) {
	switch {
	case (o.chapUser == "") != (o.chapSecret == ""):
		return nil, errors.New("want --chap-user and --chap-secret-file, or neither")
	case (o.chapMutualUser == "") != (o.mutualSecret == ""):
		return nil, errors.New("want --chap-mutual-user and --chap-mutual-secret-file, or neither")
	case o.chapUser == "" && o.chapMutualUser != "":
		return nil, errors.New("--chap-mutual-user: a target proves who it is to initiators that did: give --chap-user too")
	case o.chapUser == "":
		return nil, nil //nolint:nilnil // no CHAP is no error
	}
	c := &iscsi.CHAP{User: o.chapUser, MutualUser: o.chapMutualUser}
	var err error
	if c.Secret, err = readSecret(o.chapSecret); err != nil {
		return nil, fmt.Errorf("--chap-secret-file %s: %w", o.chapSecret, err)
	}
	if o.mutualSecret == "" {
		return c, nil
	}
	if c.MutualSecret, err = readSecret(o.mutualSecret); err != nil {
		return nil, fmt.Errorf("--chap-mutual-secret-file %s: %w", o.mutualSecret, err)
	}
	if c.MutualSecret == c.Secret {
		return nil, errors.New("--chap-mutual-secret-file: the secrets of the two directions must differ (RFC 7143 section 12.1.3)")
	}
	return c, nil
}

// readSecret reads a secret: a file's first and only line.
func readSecret(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", cause(err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSecret+3))
	if err != nil {
		return "", cause(err)
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	if len(secret) < minSecret || len(secret) > maxSecret || strings.ContainsAny(secret, "\r\n\x00") {
		return "", fmt.Errorf("want one line of %d to %d bytes", minSecret, maxSecret)
	}
	return secret, nil
}

// cause is err without the path, which the flag names already.
func cause(err error) error {
	if pe, ok := errors.AsType[*os.PathError](err); ok {
		return pe.Err
	}
	return err
}

// A diskShelf is a target with disks that the command line names, for whoever knows its secret.
type diskShelf struct {
	target *iscsi.Target
	chap   *iscsi.CHAP
	disks  []disk
	open   []io.Closer // in the order in which they were opened
	bases  lun.Bases
	errOut io.Writer
}

// A disk is a LUN as it is told of. It is a contract with scripts.
type disk struct {
	LUN      iscsi.LUN `json:"lun"`
	Kind     string    `json:"kind"` // ro, cow or rw
	Size     int64     `json:"size"` // bytes
	File     string    `json:"file"`
	Base     string    `json:"base,omitempty"`
	ReadOnly bool      `json:"readOnly"`
	Serial   string    `json:"serial"`
}

var _ iscsi.Directory = (*diskShelf)(nil)

// Discover implements iscsi.Directory.
func (s *diskShelf) Discover(string) (*iscsi.CHAP, []string) {
	return s.chap, []string{s.target.Name()}
}

// Open implements iscsi.Directory.
func (s *diskShelf) Open(_, target string) (*iscsi.Target, *iscsi.CHAP, error) {
	if target != s.target.Name() {
		return nil, nil, iscsi.ErrNoTarget
	}
	return s.target, s.chap, nil
}

// add opens a disk and makes it a LUN of the target. Its reservations are kept in state, or beside it.
func (s *diskShelf) add(ctx context.Context, n iscsi.LUN, spec diskSpec, state string) error {
	m, err := s.medium(ctx, spec)
	switch {
	case errors.Is(err, lun.ErrDelta) && spec.kind == "cow":
		return fmt.Errorf("%w: the base of a delta is an image", err)
	case errors.Is(err, lun.ErrDelta):
		return fmt.Errorf("%w: serve it as cow:BASE,%s", err, spec.file)
	case err != nil:
		return err
	}
	d := disk{
		LUN: n, Kind: spec.kind, Size: m.Size(), File: spec.file, Base: spec.base, ReadOnly: m.ReadOnly(),
		Serial: diskSerial(n, spec),
	}
	keep, err := s.keeper(d, m, state)
	if err != nil {
		return err
	}
	u, err := scsi.NewUnit(m, scsi.Config{Serial: d.Serial, Keep: keep})
	if err != nil {
		return err
	}
	s.disks = append(s.disks, d)
	return s.target.Add(n, u)
}

// medium opens what a disk keeps its blocks on.
func (s *diskShelf) medium(ctx context.Context, spec diskSpec) (scsi.Medium, error) {
	switch spec.kind {
	case "ro":
		return keepOpen(s, lun.OpenImage)(spec.file)
	case "cow":
		return s.delta(ctx, spec)
	}
	if _, err := os.Stat(spec.file); spec.size == 0 && errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("there is no such file: say how large it shall be to have it made, as in rw:%s,size=10GiB", spec.file)
	}
	return keepOpen(s, func(path string) (*lun.Disk, error) { return lun.OpenDisk(path, spec.size) })(spec.file)
}

func (s *diskShelf) delta(ctx context.Context, spec diskSpec) (scsi.Medium, error) {
	if sameFile(spec.base, spec.file) {
		return nil, fmt.Errorf("%s and %s are the same file: what is written to a disk cannot go to the image that it begins as", spec.base, spec.file)
	}
	base, err := keepOpen(s, lun.OpenImage)(spec.base)
	if err != nil {
		return nil, err
	}
	return keepOpen(s, func(path string) (*lun.Delta, error) { return s.bases.OpenDelta(ctx, base, path, spec.size) })(spec.file)
}

// sameFile says whether two names are of one file that is there.
func sameFile(a, b string) bool {
	fa, errA := os.Stat(a)
	fb, errB := os.Stat(b)
	return errA == nil && errB == nil && os.SameFile(fa, fb)
}

// A readingProgress says how far an image was read, where that takes long.
type readingProgress struct {
	w     io.Writer
	now   func() time.Time
	image string
	said  time.Time // the last time, or when the image was begun
}

// sayEvery is how often a readingProgress says something.
const sayEvery = 5 * time.Second

func (p *readingProgress) report(image string, done, of int64) {
	now := p.now()
	if p.image != image || p.said.IsZero() {
		p.image, p.said = image, now
	}
	if now.Sub(p.said) < sayEvery {
		return
	}
	p.said = now
	_, _ = fmt.Fprintf(p.w, "reading %s once, to know it again: %s of %s\n", image, api.Bytes(done), api.Bytes(of))
}

// keepOpen has s close what open opens.
func keepOpen[M io.Closer](s *diskShelf, open func(path string) (M, error)) func(path string) (M, error) {
	return func(path string) (M, error) {
		m, err := open(path)
		if err == nil {
			s.open = append(s.open, m)
		}
		return m, err
	}
}

// close closes all media, those that lie on others first.
func (s *diskShelf) close() error {
	var errs []error
	for _, m := range slices.Backward(s.open) {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// diskSerial names a disk to initiators: the same after each start, and another for each file of each machine. An image may be
// more than one disk.
func diskSerial(n iscsi.LUN, spec diskSpec) string {
	path, err := filepath.Abs(spec.file)
	if err != nil {
		path = spec.file // the working directory is gone
	}
	machine, _ := os.ReadFile("/etc/machine-id") // without one the path has to do
	text := fmt.Sprintf("%s\n%s\n%s\n", machine, spec.kind, path)
	if spec.kind == "ro" {
		text += fmt.Sprint(n)
	}
	sum := sha256.Sum256([]byte(text))
	return hex.EncodeToString(sum[:8])
}

// keeper is where the reservations of a disk are kept. Those of an image are not, without a directory for them: who only
// reads it may not be allowed to write beside it.
func (s *diskShelf) keeper(d disk, m scsi.Medium, state string) (scsi.Keeper, error) {
	path := d.File + ".reservations"
	if state != "" {
		path = filepath.Join(state, d.Serial+".reservations")
	}
	made, ok := m.(interface{ Making() (string, error) })
	switch {
	case !ok && state == "":
		return nil, nil //nolint:nilnil // that nothing is kept is no error
	case !ok:
		return lun.KeepFile(path), nil
	}
	making, err := made.Making()
	if err != nil {
		return nil, err
	}
	return lun.KeepFileOf(path, making, func(path string) {
		_, _ = fmt.Fprintf(s.errOut, "the reservations in %s are not of this %s, but of one that was there before: they are not used\n", path, d.File)
	}), nil
}

// print says what is served, once it is.
func (o *iscsiOptions) print(w io.Writer, s *diskShelf, at net.Addr) error {
	if o.output == "json" {
		return writeJSON(w, struct {
			Target string `json:"target"`
			Listen string `json:"listen"`
			CHAP   bool   `json:"chap"`
			LUNs   []disk `json:"luns"`
		}{s.target.Name(), at.String(), s.chap != nil, s.disks})
	}
	if _, err := fmt.Fprintf(w, "%s at %s\n", s.target.Name(), at); err != nil {
		return err
	}
	t := table{}
	for _, d := range s.disks {
		what := d.File
		if d.Base != "" {
			what = d.File + " over " + d.Base
		}
		t.add(fmt.Sprintf("lun %d", d.LUN), d.Kind, api.Bytes(d.Size), what)
	}
	return t.write(w, "")
}

// serve answers initiators until ctx ends.
func (s *diskShelf) serve(ctx context.Context, l net.Listener, log *slog.Logger) error {
	srv, err := iscsi.NewServer(iscsi.Config{Directory: s, Log: log})
	if err != nil {
		return err
	}
	return srv.Serve(ctx, l)
}
