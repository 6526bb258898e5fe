package images

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/schema"
)

func baseRecipe() BaseRecipe {
	return BaseRecipe{
		Suite:      "bookworm",
		Mirror:     "http://deb.debian.org/debian",
		Components: []string{"main"},
		Arch:       "amd64",
		Packages:   []string{"iproute2", "udev"},
		Kernel:     "linux-image-cloud-amd64",
		Rebuild:    "2026-11",
	}
}

func deltaRecipe() DeltaRecipe {
	return DeltaRecipe{
		Base:     digest.Of([]byte("base")),
		Files:    map[string]File{"/etc/motd": {Content: "hi\n", Mode: 0o644}, "/bin/x": {Mode: 0o4755, UID: 1, GID: 2}},
		Packages: []string{"hello"},
		Enable:   []string{"web.service"},
		Run:      []string{"true", "echo"},
		Boot:     []string{"systemctl", "true"},
	}
}

func compileRecipe() CompileRecipe {
	return CompileRecipe{
		Source: digest.Of([]byte("source")), URL: "https://example.com/x.tar.gz", Base: digest.Of([]byte("base")),
		Run: []string{"make", "make install"}, Output: "/out",
	}
}

func appRecipe() AppRecipe {
	return AppRecipe{Tree: digest.Of([]byte("tree")), URL: "https://example.com/x.tar", SHA256: "00", OCI: "oci:/x:1", Arch: "amd64", Debian: baseRecipe()}
}

func release() Release {
	blob := func(s string) Blob { return Blob{Digest: digest.Of([]byte(s)), Size: int64(len(s))} }
	img := func(s string) Image {
		return Image{Blob: blob(s), Data: 4096, Root: digest.Of([]byte(s)).Hex(), Chunks: blob(s + " chunks")}
	}
	return Release{
		Base: img("base"), Delta: img("delta"), Kernel: blob("kernel"), Modules: blob("mods"),
		KernelArgs: []string{"quiet"},
		Apps: []ReleaseApp{{
			Name: "web", Image: img("web"), Mount: "/opt/web", Exec: []string{"bin/serve"}, Env: []string{"A=b"}, User: "www", Root: true,
			Data: "keep", Delta: "fresh",
		}},
	}
}

// The ids of what a fleet built must not change under it: a new id builds every image again and reboots every machine.
func TestGolden(t *testing.T) {
	const wantBytes = "000000000000001474726f7570652062617365207265636970652034" +
		"0000000000000008626f6f6b776f726d" +
		"000000000000001c687474703a2f2f6465622e64656269616e2e6f72672f64656269616e" +
		"000000000000000100000000000000046d61696e" +
		"0000000000000005616d643634" +
		"000000000000000200000000000000086970726f75746532000000000000000475646576" +
		"00000000000000176c696e75782d696d6167652d636c6f75642d616d643634" +
		"0000000000000007323032362d3131"
	if got := hex.EncodeToString(baseRecipe().canonical()); got != wantBytes {
		t.Errorf("canonical bytes of a base recipe:\n got %s\nwant %s", got, wantBytes)
	}
	for _, c := range []struct{ name, got, want string }{
		{"base", baseRecipe().ID().Hex(), "114bae5ca6437b0b54d57f9e08cb64e933fe0d2b90cbe7d47b5de256e425ec4b"},
		{"delta", deltaRecipe().ID().Hex(), "28b3fb14e0835fea67b79621f2b0551e56553bf202db0142a55c5a4cabb53daa"},
		{"empty delta", DeltaRecipe{Base: digest.Of([]byte("base"))}.ID().Hex(), "e848fe7c44213630a50993017153bbcd0750099e8215180f1889421b35e37de2"},
		{"disk", DiskRecipe{URL: "https://example.com/x.qcow2", SHA256: strings.Repeat("0", 64)}.ID().Hex(), "4d0a9f5683b7395ba7c371619581287a1f31bcdeda7aa614f7687877d2222257"},
		{"disk release", Release{Disk: Blob{Digest: digest.Of([]byte("disk")), Size: 4}}.ID().Hex(), "3c626a93df6210cd34524746de6306fa6605de7087ecdb030a5a99580ca5d753"},
		{"app", appRecipe().ID().Hex(), "5d798e955a9481f7eb97d9db5568f39afa1a8686706400ae251aa17ecd47507f"},
		{"release", release().ID().Hex(), "c1557d3c4356f88ca48c56ae3c5f756781873f71f9ff06084c2340d8e1033ebc"},
	} {
		if c.got != c.want {
			t.Errorf("id of %s: got %s, want %s", c.name, c.got, c.want)
		}
	}
}

func TestOrderWithoutMeaningChangesNothing(t *testing.T) {
	b := baseRecipe()
	b.Packages = []string{"udev", "iproute2", "udev"}
	if b.ID() != baseRecipe().ID() {
		t.Error("order or repeats of packages changed the id of a base recipe")
	}
	d := deltaRecipe()
	d.Enable = []string{"web.service", "web.service"}
	if d.ID() != deltaRecipe().ID() {
		t.Error("a repeated unit changed the id of a delta recipe")
	}
	d.Run = []string{"echo", "true"}
	if d.ID() == deltaRecipe().ID() {
		t.Error("another order of run steps did not change the id of a delta recipe")
	}
}

// TestEveryFieldCounts walks the fields by reflection, so that a field that is added later and forgotten in canonical
// fails here.
func TestEveryFieldCounts(t *testing.T) {
	checkFields(t, baseRecipe, BaseRecipe.ID)
	checkFields(t, deltaRecipe, DeltaRecipe.ID)
	checkFields(t, compileRecipe, CompileRecipe.ID)
	checkFields(t, release, Release.ID)
	checkFields(t, appRecipe, AppRecipe.ID)
	checkFields(t, func() Release {
		return Release{Disk: Blob{Digest: digest.Of([]byte("disk")), Size: 4}, KernelArgs: []string{"quiet"}}
	}, Release.ID)
	checkFields(t, func() DiskRecipe { return DiskRecipe{URL: "https://example.com/x", SHA256: "00", Format: "raw"} }, DiskRecipe.ID)
}

func checkFields[T any](t *testing.T, value func() T, id func(T) digest.Digest) {
	t.Helper()
	v := value()
	seen := map[digest.Digest]string{id(v): "nothing"}
	for i := range mutations(reflect.ValueOf(&v).Elem(), fmt.Sprintf("%T", v)) {
		v := value()
		m := mutations(reflect.ValueOf(&v).Elem(), fmt.Sprintf("%T", v))[i]
		m.apply()
		got := id(v)
		if other, dup := seen[got]; dup {
			t.Errorf("changing %s gives the same id as changing %s", m.name, other)
		}
		seen[got] = m.name
	}
}

type mutation struct {
	name  string
	apply func()
}

// mutations are all the ways to change one thing in v.
func mutations(v reflect.Value, name string) []mutation {
	switch v.Kind() {
	case reflect.String:
		return []mutation{{name, func() { v.SetString(v.String() + "x") }}}
	case reflect.Bool:
		return []mutation{{name, func() { v.SetBool(!v.Bool()) }}}
	case reflect.Int64:
		return []mutation{{name, func() { v.SetInt(v.Int() + 1) }}}
	case reflect.Uint32:
		return []mutation{{name, func() { v.SetUint(v.Uint() + 1) }}}
	case reflect.Struct:
		var all []mutation
		for i := range v.NumField() {
			all = append(all, mutations(v.Field(i), name+"."+v.Type().Field(i).Name)...)
		}
		return all
	case reflect.Slice:
		if v.Len() == 0 {
			return nil
		}
		all := []mutation{{name + " minus one", func() { v.SetLen(v.Len() - 1) }}}
		for i := range v.Len() {
			all = append(all, mutations(v.Index(i), fmt.Sprintf("%s[%d]", name, i))...)
		}
		return all
	case reflect.Map:
		return mapMutations(v, name)
	}
	panic("no way to change a " + v.Kind().String())
}

func mapMutations(v reflect.Value, name string) []mutation {
	var all []mutation
	keys := v.MapKeys()
	slices.SortFunc(keys, func(a, b reflect.Value) int { return strings.Compare(a.String(), b.String()) })
	for _, k := range keys {
		at := name + "[" + k.String() + "]"
		all = append(all, mutation{at + " gone", func() { v.SetMapIndex(k, reflect.Value{}) }})
		elem := reflect.New(v.Type().Elem()).Elem()
		elem.Set(v.MapIndex(k))
		for _, m := range mutations(elem, at) {
			all = append(all, mutation{m.name, func() { m.apply(); v.SetMapIndex(k, elem) }})
		}
	}
	return all
}

func TestRecipesOfSchema(t *testing.T) {
	img := schema.Image{Name: "debian", Kind: "os", Rebuild: "2026-11", From: schema.From{Debian: &schema.Debian{
		Suite: "bookworm", Mirror: "http://deb.debian.org/debian", Components: []string{"main"}, Arch: "amd64",
		Packages: []string{"udev", "iproute2", "udev"}, Kernel: "linux-image-cloud-amd64",
	}}}
	if diff := cmp.Diff(baseRecipe(), BaseRecipeOf(img)); diff != "" {
		t.Errorf("base recipe (-want +got):\n%s", diff)
	}
	role := schema.Role{
		Name: "web", OS: "debian", Boot: "disk",
		Files: map[string]schema.File{
			"/etc/motd": {Content: "hi\n", Mode: 0o644}, "/bin/x": {Mode: 0o4755, UID: 1, GID: 2},
		},
		Packages: []string{"hello"},
		Services: schema.Services{Enable: []string{"web.service"}},
		Run:      []string{"true", "echo"},
		Build:    schema.Build{Boot: []string{"systemctl", "true"}},
	}
	if diff := cmp.Diff(deltaRecipe(), DeltaRecipeOf(digest.Of([]byte("base")), role)); diff != "" {
		t.Errorf("delta recipe (-want +got):\n%s", diff)
	}
	role.Name, role.Healthy, role.Kernel.Args = "other", []schema.Check{{Unit: "x"}}, []string{"quiet"}
	if DeltaRecipeOf(digest.Of([]byte("base")), role).ID() != deltaRecipe().ID() {
		t.Error("a name, a check or a kernel argument changed the id of a delta: it would be built twice")
	}
}

// TestCompiledResult holds that only what may change what comes out of a compilation gives it another name.
func TestCompiledResult(t *testing.T) {
	base, want := digest.Of([]byte("image")), compileRecipe().Result(digest.Of([]byte("image")))
	same := compileRecipe()
	same.URL, same.Base = "https://example.org/other", digest.Of([]byte("another recipe for the same image"))
	if same.Result(base) != want {
		t.Error("what is the same source on the same image is compiled twice")
	}
	seen := map[digest.Digest]string{want: "nothing"}
	for name, change := range map[string]func(r *CompileRecipe){
		"source":  func(r *CompileRecipe) { r.Source = digest.Of(nil) },
		"run":     func(r *CompileRecipe) { r.Run = []string{"make install", "make"} },
		"output":  func(r *CompileRecipe) { r.Output = "/other" },
		"network": func(r *CompileRecipe) { r.Network = true },
	} {
		r := compileRecipe()
		change(&r)
		if other, dup := seen[r.Result(base)]; dup {
			t.Errorf("changing %s is as changing %s", name, other)
		}
		seen[r.Result(base)] = name
	}
	if _, dup := seen[same.Result(digest.Of([]byte("newer image")))]; dup {
		t.Error("another base gives nothing new")
	}
}

func TestCompileRecipeOf(t *testing.T) {
	base := digest.Of([]byte("base"))
	if diff := cmp.Diff(CompileRecipe{}, CompileRecipeOf(base, nil)); diff != "" {
		t.Errorf("of nothing (-want +got):\n%s", diff)
	}
	c := &schema.Compile{In: "debian", Run: []string{"make"}, Output: "/out", Network: true}
	want := CompileRecipe{Base: base, Run: []string{"make"}, Output: "/out", Network: true}
	tree := digest.Of([]byte("tree"))
	c.Source, want.Source = schema.CompileSource{Dir: "src/x", Tree: tree.String()}, tree
	if diff := cmp.Diff(want, CompileRecipeOf(base, c)); diff != "" {
		t.Errorf("of a directory (-want +got):\n%s", diff)
	}
	c.Source = schema.CompileSource{URL: "https://example.com/x", SHA256: tree.Hex()}
	want.URL = c.Source.URL
	if diff := cmp.Diff(want, CompileRecipeOf(base, c)); diff != "" {
		t.Errorf("of an archive (-want +got):\n%s", diff)
	}
}

// FuzzDeltaCanonical reads the canonical bytes back: since they say everything, no two recipes share them.
func FuzzDeltaCanonical(f *testing.F) {
	f.Add("sha256:00", "/etc/a", "x", uint32(0o644), uint32(0), "p", "u.service", "echo")
	f.Add("", "", "", uint32(0), uint32(0), "", "", "")
	f.Add("a\x00b", "/\xff", "\x00\x00\x00\x00\x00\x00\x00\x01", uint32(1<<31), uint32(7), "a b", "\n", "\x00")
	f.Fuzz(func(t *testing.T, base, path, content string, mode, uid uint32, pkg, unit, run string) {
		want := DeltaRecipe{
			Base:     RecipeID(base),
			Files:    map[string]File{path: {content, mode, uid, mode ^ uid}, content: {path, uid, mode, 0}},
			Packages: sorted([]string{pkg, unit}),
			Enable:   sorted([]string{unit, run}),
			Run:      []string{run, pkg, ""},
			Boot:     []string{unit, "", run},
		}
		d := decoder{want.canonical()}
		if got := d.str(); got != formatDelta {
			t.Fatalf("format %q", got)
		}
		got := d.delta()
		if len(d.b) > 0 {
			t.Fatalf("%d bytes left over", len(d.b))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("read back (-want +got):\n%s", diff)
		}
	})
}

// FuzzBaseCanonical is FuzzDeltaCanonical for base recipes.
func FuzzBaseCanonical(f *testing.F) {
	f.Add("bookworm", "http://deb.debian.org/debian", "main", "contrib", "amd64", "udev", "linux-image-cloud-amd64", "2026-11")
	f.Add("", "\x00", "", "", "a", "", "", "")
	f.Fuzz(func(t *testing.T, suite, mirror, comp1, comp2, arch, pkg, kernel, rebuild string) {
		want := BaseRecipe{suite, mirror, sorted([]string{comp1, comp2}), arch, sorted([]string{pkg, comp1}), kernel, rebuild}
		d := decoder{want.canonical()}
		if got := d.str(); got != formatBase {
			t.Fatalf("format %q", got)
		}
		got := BaseRecipe{d.str(), d.str(), d.list(), d.str(), d.list(), d.str(), d.str()}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" || len(d.b) > 0 {
			t.Fatalf("%d bytes left over; read back (-want +got):\n%s", len(d.b), diff)
		}
	})
}

// A decoder reads canonical bytes; it panics on others.
type decoder struct{ b []byte }

func (d *decoder) num() uint64 {
	n := binary.BigEndian.Uint64(d.b)
	d.b = d.b[8:]
	return n
}

func (d *decoder) str() string {
	n := d.num()
	s := string(d.b[:n])
	d.b = d.b[n:]
	return s
}

func (d *decoder) list() []string {
	var l []string
	for range d.num() {
		l = append(l, d.str())
	}
	return l
}

func (d *decoder) delta() DeltaRecipe {
	r := DeltaRecipe{Base: RecipeID(d.str()), Files: map[string]File{}}
	for range d.num() {
		path := d.str()
		r.Files[path] = File{d.str(), uint32(d.num()), uint32(d.num()), uint32(d.num())}
	}
	r.Packages, r.Enable, r.Run, r.Boot = d.list(), d.list(), d.list(), d.list()
	return r
}

// An image without the word has the same recipe whatever the word would be, and each word is another one.
func TestRebuildMakesAnotherRecipe(t *testing.T) {
	seen := map[RecipeID]string{}
	for _, word := range []string{"", "2026-11", "2026-12"} {
		r := baseRecipe()
		r.Rebuild = word
		if other, had := seen[r.ID()]; had {
			t.Errorf("%q and %q are one recipe", word, other)
		}
		seen[r.ID()] = word
		if again := r; again.ID() != r.ID() {
			t.Errorf("%q has two recipes", word)
		}
	}
}
