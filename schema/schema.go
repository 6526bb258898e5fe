// Package schema has the words of a fleet as Go types: what a Git repo of CUE declares, after it was loaded, checked
// and had its defaults filled in. The CUE schema lies beside the types; package schema/load turns CUE into them.
package schema

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// A Fleet is everything that one commit declares. It is read-only once loaded: share it, do not change it.
type Fleet struct {
	Network Network          `json:"network"`
	Images  map[string]Image `json:"images"`
	Roles   map[string]Role  `json:"roles"`
	Hosts   map[string]Host  `json:"hosts"`

	// AllowEmpty lets a commit take the last host out of a fleet that had some.
	AllowEmpty bool `json:"allowEmpty,omitempty"`

	// Discovery says what machines boot that no host declares.
	Discovery Discovery `json:"discovery"`
}

// A Network is the one that the fleet's machines boot on.
type Network struct {
	Subnet  netip.Prefix `json:"subnet"`
	Router  netip.Addr   `json:"router,omitzero"`
	DNS     []netip.Addr `json:"dns,omitempty"`
	NTP     []netip.Addr `json:"ntp,omitempty"`
	Domain  string       `json:"domain,omitempty"`
	Dynamic Range        `json:"dynamic,omitzero"` // for machines that no host declares
	Lease   Duration     `json:"lease"`            // of an address; default 1h
}

// A Range is First to Last, both included; in CUE "10.77.0.100-10.77.0.199". The zero Range is empty.
type Range struct{ First, Last netip.Addr }

// Discovery is what a machine boots that no host declares.
type Discovery struct {
	OS string `json:"os,omitempty"` // the OS image whose kernel it gets; default: the first by name
}

// An Image is something that is built once, centrally, and never changed.
type Image struct {
	Name string `json:"name"`
	Kind string `json:"kind"` // "os", "disk": a whole disk with a boot loader of its own, or "app": an application
	From From   `json:"from"`
	// Rebuild, where it changes, has a new version made of what the archive has by then.
	Rebuild string `json:"rebuild,omitempty"`
}

// From says what an image is made of; exactly one field is set, but for Tree.
type From struct {
	Debian *Debian   `json:"debian,omitempty"` // of kind "os" or "app"
	Disk   *DiskFile `json:"disk,omitempty"`   // of kind "disk"
	Dir    string    `json:"dir,omitempty"`    // of kind "app": slash-separated, from the fleet's root
	Tar    *TarFile  `json:"tar,omitempty"`    // of kind "app"
	OCI    *OCI      `json:"oci,omitempty"`    // of kind "app"

	Compile *Compile `json:"compile,omitempty"` // of kind "app"

	// Tree names what Dir holds in this commit, as internal/treesum does. No file says it: it is found when the fleet is loaded.
	Tree string `json:"tree,omitempty"`
}

// TarFile is a tar archive that somebody else made.
type TarFile struct {
	URL    string `json:"url"`    // http, https, or file for one that lies on the server
	SHA256 string `json:"sha256"` // of the file as it lies there, 64 hex digits
}

// OCI is an image of the OCI image specification.
type OCI struct {
	Image string `json:"image"` // "docker://HOST/NAME…" or "oci:/DIR…", each with ":TAG" or "@sha256:…"
	Arch  string `json:"arch"`  // "amd64" or "arm64"; default amd64
}

// DiskFile is a disk image that somebody else made.
type DiskFile struct {
	URL    string `json:"url"`    // http, https, or file for one that lies on the server
	SHA256 string `json:"sha256"` // of the file as it lies there, 64 hex digits
	Format string `json:"format"` // "raw" or "qcow2"; default: by what the file begins with
}

// Debian is an OS made of Debian packages.
type Debian struct {
	Suite      string   `json:"suite"`
	Mirror     string   `json:"mirror"` // default http://deb.debian.org/debian
	Components []string `json:"components"`
	Arch       string   `json:"arch"` // "amd64" or "arm64"; default amd64
	Packages   []string `json:"packages"`
	Kernel     string   `json:"kernel,omitempty"` // the package whose kernel and modules boot the OS; none in an app
}

// A Role is what a host is for.
type Role struct {
	Name     string          `json:"name"`
	OS       string          `json:"os"`   // names an Image of kind "os"
	Boot     string          `json:"boot"` // "disk": from a cache on a local disk; "iscsi": from LUNs of the server; "ram": from memory
	ISCSI    ISCSI           `json:"iscsi,omitzero"`
	Delta    string          `json:"delta,omitempty"`    // "fresh": what a host writes goes with each boot; "" or "keep": not
	Persist  []string        `json:"persist,omitempty"`  // directories that outlive the release
	Activate string          `json:"activate,omitempty"` // how a host goes to another release: "kexec" or "restart" where it can; "" or "reboot"
	Apps     Apps            `json:"apps,omitempty"`
	Files    map[string]File `json:"files,omitempty"` // by absolute path
	Packages []string        `json:"packages,omitempty"`
	Services Services        `json:"services,omitzero"`
	Run      []string        `json:"run,omitempty"` // shell commands, run in order in the image when it is built
	Build    Build           `json:"build,omitzero"`
	Kernel   Kernel          `json:"kernel,omitzero"`
	Healthy  []Check         `json:"healthy,omitempty"`
	// HealthyWithin is for how long a host may fail these after it booted another release; 0 means 10m.
	HealthyWithin Duration `json:"healthyWithin,omitempty"`
}

// A File is a regular file of a role or of a host. In CUE a plain string is its content.
type File struct {
	Content string `json:"content"`
	Mode    uint32 `json:"mode"` // permission bits, and 0o7000; default 0o644
	UID     uint32 `json:"uid,omitempty"`
	GID     uint32 `json:"gid,omitempty"`
}

// Services are systemd units.
type Services struct {
	Enable []string `json:"enable,omitempty"`
}

// Build has what a role does at build time beside Run.
type Build struct {
	// Boot are shell commands, run in order in a machine that booted the OS with all else that the role adds to it.
	Boot []string `json:"boot,omitempty"`
}

// Kernel has what the kernel of a role gets on its command line, after troupe's own.
type Kernel struct {
	Args []string `json:"args,omitempty"`
}

// A Check must pass for a node to be healthy; exactly one of HTTP, TCP, Unit and Exec is set.
type Check struct {
	HTTP *HTTPCheck `json:"http,omitempty"`
	TCP  *TCPCheck  `json:"tcp,omitempty"`
	Unit string     `json:"unit,omitempty"` // a systemd unit that must be active
	Exec []string   `json:"exec,omitempty"` // a command, run on the node, that must exit 0

	Every   Duration `json:"every"`   // default 10s
	Timeout Duration `json:"timeout"` // of one try; default 5s
}

// HTTPCheck wants a GET on the node itself to be answered with Status.
type HTTPCheck struct {
	Port   uint16 `json:"port"`
	Path   string `json:"path"`   // default "/"
	Status int    `json:"status"` // default 200
}

// TCPCheck wants a port of the node to accept a connection.
type TCPCheck struct {
	Port uint16 `json:"port"`
}

// A Host is a declared machine. At least one of MAC, UUID and Serial is set.
type Host struct {
	Name    string            `json:"name"`
	MAC     string            `json:"mac,omitempty"`  // lower case, colons
	UUID    string            `json:"uuid,omitempty"` // of SMBIOS, lower case
	Serial  string            `json:"serial,omitempty"`
	Address netip.Addr        `json:"address,omitzero"`
	Role    string            `json:"role"`
	Labels  map[string]string `json:"labels,omitempty"`
	Disk    Disk              `json:"disk,omitzero"`
	Cache   Cache             `json:"cache,omitzero"`

	// Node is what only this host has: the role's node, computed with this host as #host, and the host's own.
	Node Node `json:"node,omitzero"`
}

// Cache says how a host fills its cache.
type Cache struct {
	Rate int64 `json:"rate,omitempty"` // bytes a second that may come while a role runs; 0: as many as come
}

// Disk says which disk of a host may hold the cache.
type Disk struct {
	Take   bool   `json:"take,omitempty"`   // also a disk that is not blank: what is on it is lost
	Device string `json:"device,omitempty"` // e.g. "/dev/nvme0n1" or "/dev/disk/by-id/…"; default: the first blank one
}

// ISCSI is what a role gets that boots with "iscsi".
type ISCSI struct {
	// Size of the disk that a host writes to, in bytes: its node delta, or the whole disk of an image of kind "disk". It
	// takes space only for what was written. Default 16 GiB, and never less than the image.
	Size int64 `json:"size,omitempty"`
}

// Node is the content with which a node delta starts.
type Node struct {
	Files map[string]File `json:"files,omitempty"`
}

// A Duration is a time.Duration that is written as in "1h30m".
type Duration time.Duration

// MarshalText writes d as time.Duration does.
func (d Duration) MarshalText() ([]byte, error) { return []byte(time.Duration(d).String()), nil }

// UnmarshalText reads what time.ParseDuration does.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	if err != nil {
		return err
	}
	*d = Duration(v)
	return nil
}

// IsZero says whether r is the empty Range.
func (r Range) IsZero() bool { return !r.First.IsValid() }

// Contains says whether a lies in r.
func (r Range) Contains(a netip.Addr) bool {
	return r.First.IsValid() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

// MarshalText writes r as "first-last", and the empty Range as nothing.
func (r Range) MarshalText() ([]byte, error) {
	if r.IsZero() {
		return nil, nil
	}
	return []byte(r.First.String() + "-" + r.Last.String()), nil
}

// UnmarshalText reads "first-last", with last not before first and both of one address family.
func (r *Range) UnmarshalText(b []byte) error {
	if len(b) == 0 {
		*r = Range{}
		return nil
	}
	first, last, ok := strings.Cut(string(b), "-")
	if !ok {
		return fmt.Errorf("range %q: want FIRST-LAST", b)
	}
	var v Range
	var err error
	if v.First, err = netip.ParseAddr(strings.TrimSpace(first)); err != nil {
		return fmt.Errorf("range %q: %w", b, err)
	}
	if v.Last, err = netip.ParseAddr(strings.TrimSpace(last)); err != nil {
		return fmt.Errorf("range %q: %w", b, err)
	}
	if v.First.BitLen() != v.Last.BitLen() || v.Last.Less(v.First) {
		return fmt.Errorf("range %q: last comes before first", b)
	}
	*r = v
	return nil
}

// A Problem is something wrong with a fleet, at a place in one of its files.
type Problem struct {
	File    string `json:"file,omitempty"` // slash-separated, from the fleet's root; "" where no file is to blame
	Line    int    `json:"line,omitempty"` // from 1
	Column  int    `json:"column,omitempty"`
	Message string `json:"message"`
}

// String is "file:line:col: message", without the parts that are not known.
func (p Problem) String() string {
	switch {
	case p.File == "":
		return p.Message
	case p.Line == 0:
		return p.File + ": " + p.Message
	}
	return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
}

// Problems are all that is wrong with a fleet. As an error it prints one problem a line.
type Problems []Problem //nolint:errname // it is first what was found, and then an error

func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.String()
	}
	return strings.Join(lines, "\n")
}
