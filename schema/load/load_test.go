package load

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"testing/fstest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/goleak"

	"github.com/troupe-dev/troupe/schema"
)

// TestMain lets this program be the evaluating child of its own tests.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == "eval" {
		if err := Evaluate(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(2)
		}
		os.Exit(0)
	}
	if len(os.Args) == 3 && os.Args[1] == "load-for-test" { // TestChildDiesWithParent
		var l Loader
		_, err := l.Load(context.Background(), os.DirFS(os.Args[2]))
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	goleak.VerifyTestMain(m)
}

// TestLoadFirst holds the whole meaning of a first fleet.
func TestLoadFirst(t *testing.T) {
	var l Loader
	got, err := l.Load(t.Context(), os.DirFS("testdata/first"))
	if err != nil {
		t.Fatal(err)
	}
	host := func(name string, n byte, role string) schema.Host {
		return schema.Host{
			Name: name, MAC: fmt.Sprintf("52:54:00:77:00:%02x", n), Address: netip.AddrFrom4([4]byte{10, 77, 0, 10 + n}), Role: role,
		}
	}
	web := func(h schema.Host) schema.Host {
		text := fmt.Sprintf("web on %s at %v\n", h.Name, h.Address)
		h.Node.Files = map[string]schema.File{"/srv/www/index.html": {Content: text, Mode: 0o644}}
		return h
	}
	unit := `[Unit]
Description=one page
After=network.target
[Service]
ExecStart=/bin/busybox httpd -f -p 80 -h /srv/www
[Install]
WantedBy=multi-user.target
`
	want := &schema.Fleet{
		Network: schema.Network{
			Subnet:  netip.MustParsePrefix("10.77.0.0/24"),
			Router:  netip.MustParseAddr("10.77.0.1"),
			DNS:     []netip.Addr{netip.MustParseAddr("10.77.0.1")},
			Dynamic: schema.Range{First: netip.MustParseAddr("10.77.0.100"), Last: netip.MustParseAddr("10.77.0.199")},
			Lease:   schema.Duration(time.Hour),
		},
		Images: map[string]schema.Image{"debian": {Name: "debian", Kind: "os", From: schema.From{Debian: &schema.Debian{
			Suite: "bookworm", Mirror: "http://deb.debian.org/debian", Components: []string{"main"}, Arch: "amd64",
			Packages: []string{"systemd-sysv", "udev", "iproute2", "busybox-static"}, Kernel: "linux-image-cloud-amd64",
		}}}},
		Roles: map[string]schema.Role{
			"web": {
				Name: "web", OS: "debian", Boot: "disk",
				Files: map[string]schema.File{
					"/etc/motd":                       {Content: "web\n", Mode: 0o644},
					"/etc/systemd/system/web.service": {Content: unit, Mode: 0o644},
				},
				Services: schema.Services{Enable: []string{"web.service"}},
				Healthy: []schema.Check{{
					HTTP:  &schema.HTTPCheck{Port: 80, Path: "/", Status: 200},
					Every: schema.Duration(10 * time.Second), Timeout: schema.Duration(5 * time.Second),
				}},
			},
			"idle": {
				Name: "idle", OS: "debian", Boot: "disk",
				Files: map[string]schema.File{"/etc/motd": {Content: "idle\n", Mode: 0o644}},
			},
		},
		Hosts: map[string]schema.Host{
			"n1": web(host("n1", 1, "web")),
			"n2": host("n2", 2, "idle"),
			"n3": web(host("n3", 3, "web")),
		},
		Discovery: schema.Discovery{OS: "debian"},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
		t.Errorf("the loaded fleet differs (-want +got):\n%s", d)
	}
}

// TestLoadDiskless holds what roles and images of machines without a disk are.
func TestLoadDiskless(t *testing.T) {
	var l Loader
	got, err := l.Load(t.Context(), fstest.MapFS{"fleet.cue": {Data: []byte(`package fleet
network: {subnet: "10.77.0.0/24"}
images: debian: {kind: "os", from: debian: {suite: "bookworm", kernel: "linux-image-cloud-amd64"}}
images: cloud: {kind: "disk", from: disk: {
	url:    "https://example.com/cloud.qcow2"
	sha256: "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"
}}
images: appliance: {kind: "disk", from: disk: {
	url: "file:///srv/images/a.img", format: "raw"
	sha256: "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
}}
roles: web: {os: "debian", boot: "iscsi"}
roles: vm: {os: "cloud", boot: "iscsi", iscsi: size: 32Gi}
`)}})
	if err != nil {
		t.Fatal(err)
	}
	const sum = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	want := &schema.Fleet{
		Network: got.Network,
		Images: map[string]schema.Image{
			"debian":    got.Images["debian"],
			"cloud":     {Name: "cloud", Kind: "disk", From: schema.From{Disk: &schema.DiskFile{URL: "https://example.com/cloud.qcow2", SHA256: sum}}},
			"appliance": {Name: "appliance", Kind: "disk", From: schema.From{Disk: &schema.DiskFile{URL: "file:///srv/images/a.img", SHA256: sum, Format: "raw"}}},
		},
		Roles: map[string]schema.Role{
			"web": {Name: "web", OS: "debian", Boot: "iscsi"},
			"vm":  {Name: "vm", OS: "cloud", Boot: "iscsi", ISCSI: schema.ISCSI{Size: 32 << 30}},
		},
		Hosts:     map[string]schema.Host{},
		Discovery: schema.Discovery{OS: "debian"}, // the first that is no disk
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})); d != "" {
		t.Errorf("the loaded fleet differs (-want +got):\n%s", d)
	}
}
