package load

import (
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/internal/treesum"
	"github.com/troupe-dev/troupe/schema"
)

const appsFleet = `package fleet
network: {subnet: "10.77.0.0/24"}
images: debian: {kind: "os", from: debian: {suite: "bookworm", kernel: "linux-image-cloud-amd64"}}
images: site: {kind: "app", from: dir: "apps/site"}
images: tools: {kind: "app", from: tar: {
	url:    "https://example.com/tools.tar.gz"
	sha256: "E3B0C44298FC1C149AFBF4C8996FB92427AE41E4649B934CA495991B7852B855"
}}
images: redis: {kind: "app", from: oci: image: "docker://registry.example.com/redis:7"}
images: jq: {kind: "app", from: debian: {suite: "bookworm", packages: ["jq"]}}
roles: list: {os: "debian", apps: ["tools", "site"]}
roles: web: {
	os: "debian"
	activate: "restart"
	apps: {
		www: {image: "site", mount: "/srv/www", exec: ["bin/serve", "-p", "80"], env: {MODE: "fast"}, user: "www-data", data: "fresh"}
		redis: {exec: ["/usr/local/bin/redis-server"], root: true}
		jq: {}
	}
}
`

// TestLoadApps holds what apps of roles and their images are.
func TestLoadApps(t *testing.T) {
	var l Loader
	tree := fstest.MapFS{
		"fleet.cue": {Data: []byte(appsFleet)}, "apps/site/index.html": {Data: []byte("hello\n")}, "apps/site/bin/serve": {Mode: 0o755},
	}
	got, err := l.Load(t.Context(), tree)
	if err != nil {
		t.Fatal(err)
	}
	sum, err := treesum.Sum(t.Context(), tree, "apps/site")
	if err != nil {
		t.Fatal(err)
	}
	const file = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	delete(got.Images, "debian")
	wantImages := map[string]schema.Image{
		"site":  {Name: "site", Kind: "app", From: schema.From{Dir: "apps/site", Tree: sum.String()}},
		"tools": {Name: "tools", Kind: "app", From: schema.From{Tar: &schema.TarFile{URL: "https://example.com/tools.tar.gz", SHA256: file}}},
		"redis": {Name: "redis", Kind: "app", From: schema.From{OCI: &schema.OCI{Image: "docker://registry.example.com/redis:7", Arch: "amd64"}}},
		"jq": {Name: "jq", Kind: "app", From: schema.From{Debian: &schema.Debian{
			Suite: "bookworm", Mirror: "http://deb.debian.org/debian", Components: []string{"main"}, Arch: "amd64", Packages: []string{"jq"},
		}}},
	}
	if d := cmp.Diff(wantImages, got.Images); d != "" {
		t.Errorf("images (-want +got):\n%s", d)
	}
	wantRoles := map[string]schema.Role{
		"list": {Name: "list", OS: "debian", Boot: "disk", Apps: schema.Apps{
			{Name: "site", Image: "site", Mount: "/opt/site", Data: "keep"}, {Name: "tools", Image: "tools", Mount: "/opt/tools", Data: "keep"},
		}},
		"web": {Name: "web", OS: "debian", Boot: "disk", Activate: "restart", Apps: schema.Apps{
			{Name: "jq", Image: "jq", Mount: "/opt/jq", Data: "keep"},
			{Name: "redis", Image: "redis", Mount: "/opt/redis", Exec: []string{"/usr/local/bin/redis-server"}, Root: true, Data: "keep", Delta: "fresh"},
			{
				Name: "www", Image: "site", Mount: "/srv/www", Exec: []string{"bin/serve", "-p", "80"}, Env: map[string]string{"MODE": "fast"},
				User: "www-data", Data: "fresh",
			},
		}},
	}
	if d := cmp.Diff(wantRoles, got.Roles); d != "" {
		t.Errorf("roles (-want +got):\n%s", d)
	}
	if got.Discovery.OS != "debian" {
		t.Errorf("discovery boots %q", got.Discovery.OS)
	}

	tree["apps/site/index.html"].Data = []byte("other\n")
	again, err := l.Load(t.Context(), tree)
	if err != nil {
		t.Fatal(err)
	}
	if again.Images["site"].From.Tree == sum.String() {
		t.Error("a file of the directory changed, and the image did not")
	}
}

// byGit counts the reads of a tree that knows a name for what it holds.
type byGit struct {
	fstest.MapFS
	id string
}

func (b byGit) Hash(string) (string, bool) { return b.id, true }

func TestLoadReadsADirectoryOnce(t *testing.T) {
	var l Loader
	for i, id := range []string{"a", "a", "b"} {
		tree := fstest.MapFS{"fleet.cue": {Data: []byte(appsFleet)}}
		if i != 1 { // the second time it is known
			tree["apps/site/x"] = &fstest.MapFile{}
		}
		if _, err := l.Load(t.Context(), byGit{tree, id}); err != nil {
			t.Fatal(err)
		}
	}
}
