package load

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"cuelang.org/go/cue"
	cueerrors "cuelang.org/go/cue/errors"

	"github.com/troupe-dev/troupe/schema"
)

// This file checks and decodes each part of a fleet by itself, where the schema's patterns do not say enough.

func (e *evaluation) lookup(v cue.Value, name string) cue.Value {
	return v.LookupPath(cue.MakePath(cue.Str(name)))
}

// decode decodes v, which was checked, into out.
func (e *evaluation) decode(v cue.Value, out any, at ...string) {
	b, err := v.MarshalJSON()
	if err == nil {
		err = json.Unmarshal(b, out)
	}
	if err != nil {
		e.complain(at, "%v", err)
	}
}

func (e *evaluation) network() {
	v := e.lookup(e.unified, "network")
	if !e.lookup(e.user, "network").Exists() {
		return
	}
	it := &item[schema.Network]{At: e.places(v, networkFields, "network")}
	e.out.Network = it
	before := e.faults
	e.check(v)
	e.networkRanges()
	e.duration(time.Minute, "network", "lease")
	if it.Bad = e.faults > before; it.Bad {
		e.walk(e.lookup(e.user, "network"), "network")
		return
	}
	e.decode(v, &it.Value, "network")
}

// networkRanges checks how the addresses of a network lie to one another.
func (e *evaluation) networkRanges() {
	subnet, ok := parse(e, e.subnet, "network", "subnet")
	if !ok {
		return
	}
	router, hasRouter := parse(e, netip.ParseAddr, "network", "router")
	if hasRouter {
		if why := notAHost(subnet, router); why != "" {
			e.complain([]string{"network", "router"}, "%v %s", router, why)
		}
	}
	at := []string{"network", "dynamic"}
	dynamic, ok := parse(e, func(s string) (r schema.Range, err error) { return r, r.UnmarshalText([]byte(s)) }, at...)
	if !ok {
		return
	}
	for _, a := range []netip.Addr{dynamic.First, dynamic.Last} {
		if why := notAHost(subnet, a); why != "" {
			e.complain(at, "%v %s", a, why)
		}
	}
	if hasRouter && dynamic.Contains(router) {
		e.complain(at, "the router %v lies inside the range", router)
	}
}

// subnet parses a subnet on which machines can boot.
func (e *evaluation) subnet(s string) (netip.Prefix, error) {
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || !p.Addr().Is4():
		return p, fmt.Errorf("%q is not an IPv4 subnet like \"10.77.0.0/24\"", s)
	case p != p.Masked():
		return p, fmt.Errorf("%q has bits set after its prefix; the subnet is %q", s, p.Masked())
	case p.Bits() > 30 || p.Bits() < 8:
		return p, fmt.Errorf("%q has a prefix of %d bits; want 8 to 30", s, p.Bits())
	}
	return p, nil
}

// parse parses the text that the user's files have at path. It complains about one that cannot be parsed, unless
// somebody did already.
func parse[T any](e *evaluation, one func(string) (T, error), path ...string) (T, bool) {
	var none T
	s, err := e.at(path).String()
	if err != nil {
		return none, false
	}
	v, err := one(s)
	if err != nil && len(s) > maxLabel {
		err = fmt.Errorf("%s is too long", brief(strconv.Quote(s)))
	}
	if err != nil {
		if !e.told(path) {
			e.complain(path, "%v", err)
		}
		return none, false
	}
	return v, true
}

// told says whether there is a problem with the field at path already.
func (e *evaluation) told(path []string) bool {
	return slices.ContainsFunc(e.out.Problems, func(p schema.Problem) bool { return strings.HasPrefix(p.Message, pathText(path)+": ") })
}

// notAHost says why no machine of subnet can have the address a, or "".
func notAHost(subnet netip.Prefix, a netip.Addr) string {
	switch {
	case !subnet.Contains(a):
		return fmt.Sprintf("is outside the subnet %v", subnet)
	case a == subnet.Addr():
		return fmt.Sprintf("is the network address of %v", subnet)
	case a == broadcast(subnet):
		return fmt.Sprintf("is the broadcast address of %v", subnet)
	}
	return ""
}

// broadcast is the last address of an IPv4 subnet.
func broadcast(p netip.Prefix) netip.Addr {
	b := p.Addr().As4()
	for i := range b {
		keep := min(max(p.Bits()-8*i, 0), 8)
		b[i] |= byte(0xff >> keep)
	}
	return netip.AddrFrom4(b)
}

// duration complains about a time that is less than least.
func (e *evaluation) duration(least time.Duration, path ...string) {
	d, ok := parse(e, time.ParseDuration, path...)
	if ok && d < least {
		e.complain(path, "%q is too short: want at least %q", d, least)
	}
}

func (e *evaluation) discovery() {
	v := e.lookup(e.unified, "discovery")
	if !v.Exists() || !e.check(v) {
		return
	}
	it := &item[schema.Discovery]{At: e.places(v, []string{"os"}, "discovery")}
	e.decode(v, &it.Value, "discovery")
	e.out.Discovery = it
}

func (e *evaluation) allowEmpty() {
	if v := e.lookup(e.unified, "allowEmpty"); e.check(v) {
		e.decode(v, &e.out.AllowEmpty, "allowEmpty")
	}
}

func (e *evaluation) image(name string, v cue.Value, it *item[schema.Image]) {
	if !e.check(v) {
		return
	}
	e.decode(v, &it.Value, "images", name)
	it.Value.Name = name
	e.imageFrom(it.Value)
	if d := it.Value.From.Disk; d != nil {
		d.SHA256 = strings.ToLower(d.SHA256)
	}
	if t := it.Value.From.Tar; t != nil {
		t.SHA256 = strings.ToLower(t.SHA256)
	}
	if c := it.Value.From.Compile; c != nil {
		c.Source.SHA256 = strings.ToLower(c.Source.SHA256)
		if why := badPath(c.Output); why != "" {
			e.complain([]string{"images", name, "from", "compile", "output"}, "%s", why)
		}
		for field, at := range map[string]string{"in": atIn, "source": atSource} {
			it.At[at] = e.place(e.posOf("images", name, "from", "compile", field))
		}
	}
	if it.Value.From.Dir != "" {
		it.At[atDir] = e.place(e.posOf("images", name, "from", "dir"))
	}
}

// atDir is where an image names a directory of the repo.
const (
	atDir    = "from.dir"
	atSource = "from.compile.source"
	atIn     = "from.compile.in"
)

// madeOf are what an image of each kind can be made of.
var madeOf = map[string][]string{"os": {"debian"}, diskKind: {"disk"}, appKind: {"dir", "tar", "debian", "oci", "compile"}}

// imageFrom checks that an image is made of what its kind is made of, and of nothing else.
func (e *evaluation) imageFrom(img schema.Image) {
	from := img.From
	has := map[string]bool{
		"debian": from.Debian != nil, "disk": from.Disk != nil, "dir": from.Dir != "", "tar": from.Tar != nil, "oci": from.OCI != nil,
		"compile": from.Compile != nil,
	}
	at := []string{"images", img.Name, "from"}
	want := madeOf[img.Kind]
	var said []string
	for _, source := range slices.Sorted(maps.Keys(has)) {
		switch {
		case has[source] && !slices.Contains(want, source):
			e.complain(append(at, source), "an image of kind %q is not made of it: want %s", img.Kind, sourceText(want))
			return
		case has[source]:
			said = append(said, source)
		}
	}
	switch {
	case len(said) == 0:
		e.complain(at, "says nothing: want %s", sourceText(want))
	case len(said) > 1:
		e.complain(append(at, said[1]), "an image is made of one thing, and this one of %s", strings.Join(said, " and "))
	case img.Kind == "os" && from.Debian.Kernel == "":
		e.complain(append(at, "debian", "kernel"), "missing")
	case img.Kind == appKind && from.Debian != nil && from.Debian.Kernel != "":
		e.complain(append(at, "debian", "kernel"), "an app runs on the kernel of its OS")
	case img.Kind == appKind && from.Debian != nil && len(from.Debian.Packages) == 0:
		e.complain(append(at, "debian", "packages"), "missing: an app of no packages is empty")
	}
}

// sourceText is how what an image is made of is written.
func sourceText(sources []string) string {
	var out []string
	for _, s := range sources {
		if s == "dir" {
			out = append(out, `dir: "PATH"`)
			continue
		}
		out = append(out, s+": {…}")
	}
	return strings.Join(out, " or ")
}

func (e *evaluation) role(name string, v cue.Value, it *item[schema.Role]) {
	node := e.lookup(v, "node")
	if node.Exists() {
		e.perHostRole(name)
		it.PerHost = true
	}
	if !e.checkRole(name, v, node) {
		delete(e.perHost, name)
		return
	}
	b, err := marshalBut(v, "node")
	wire := struct {
		*schema.Role
		Files wireFiles `json:"files"`
	}{Role: &it.Value}
	if err == nil {
		err = json.Unmarshal(b, &wire)
	}
	if err != nil {
		e.complain([]string{"roles", name}, "%v", err)
		return
	}
	it.Value.Files = wire.Files.files()
	it.Value.Name = name
	e.roleSize(it.Value)
	e.roleApps(name, it)
}

// marshalBut is the JSON of a struct without one of its fields.
func marshalBut(v cue.Value, but string) ([]byte, error) {
	iter, err := v.Fields()
	if err != nil {
		return nil, err
	}
	parts := map[string]json.RawMessage{}
	for iter.Next() {
		field := iter.Selector().Unquoted()
		if field == but {
			continue
		}
		if parts[field], err = iter.Value().MarshalJSON(); err != nil {
			return nil, err
		}
	}
	return json.Marshal(parts)
}

// checkRole checks a role. Only its node may be without definite values, as that is computed for each host.
func (e *evaluation) checkRole(name string, v, node cue.Value) bool {
	before := e.faults
	if err := v.Validate(cue.Concrete(true), cue.All()); err != nil {
		e.explainSome(err, notInNode)
	}
	if !e.lookup(v, "os").Exists() || !e.lookup(e.lookup(e.user, "roles"), name).LookupPath(cue.MakePath(cue.Str("os"))).Exists() {
		e.complain([]string{"roles", name, "os"}, "missing")
	}
	for _, err := range cueerrors.Errors(node.Validate(cue.All())) {
		if node.Exists() && isClosed(err) { // others may come of a #host that is not known yet
			e.explain(err)
		}
	}
	e.checkHealthy(name)
	e.checkFiles("roles", name, "files")
	e.checkDiskSize(name)
	return e.faults == before
}

// sector is what the size of a disk is a multiple of, in bytes: the physical block that initiators are told of.
const sector = 4096

// checkDiskSize complains about a size that no disk has. That it is too small or too big, the schema says.
func (e *evaluation) checkDiskSize(role string) {
	at := []string{"roles", role, "iscsi", "size"}
	if size, err := e.at(at).Int64(); err == nil && size%sector != 0 && !e.told(at) {
		e.complain(at, "%d is not a multiple of %d", size, sector)
	}
}

func (e *evaluation) checkHealthy(role string) {
	if within := []string{"roles", role, "healthyWithin"}; e.at(within).Exists() {
		e.duration(time.Second, within...)
	}
	iter, err := e.at([]string{"roles", role, "healthy"}).List()
	if err != nil {
		return // there is none, or it was complained about
	}
	for i := 0; iter.Next(); i++ {
		at := []string{"roles", role, "healthy", strconv.Itoa(i)}
		var has []string
		for _, f := range []string{"http", "tcp", "unit", "exec"} {
			if e.lookup(iter.Value(), f).Exists() {
				has = append(has, f)
			}
		}
		switch {
		case len(has) == 0:
			e.complain(at, "a check is one of http, tcp, unit and exec; this is none")
		case len(has) > 1:
			e.complain(at, "a check is one of http, tcp, unit and exec; this has %s: make a check of each", strings.Join(has, " and "))
		}
		e.duration(time.Second, append(slices.Clone(at), "every")...)
		e.duration(100*time.Millisecond, append(slices.Clone(at), "timeout")...)
	}
}

func (e *evaluation) host(name string, v cue.Value, it *item[schema.Host]) {
	ok := e.check(v)
	if e.lookup(v, "node").Exists() {
		e.checkFiles("hosts", name, "node", "files")
	}
	if !ok {
		return
	}
	h := &it.Value
	wire := struct {
		*schema.Host
		Node wireNode `json:"node"`
	}{Host: h}
	e.decode(v, &wire, "hosts", name)
	h.Node.Files = wire.Node.Files.files()
	h.MAC, h.UUID = strings.ToLower(h.MAC), strings.ToLower(h.UUID)
	at := []string{"hosts", name}
	if h.MAC == "" && h.UUID == "" && h.Serial == "" {
		e.complain(at, "nothing says which machine it is: want mac, uuid or serial")
	}
	if first, err := strconv.ParseUint(strings.Split(h.MAC, ":")[0], 16, 8); err == nil && first&1 == 1 {
		e.complain([]string{"hosts", name, "mac"}, "%q is a group address, not that of one interface", h.MAC)
	}
	e.addRoleNode(name, v, h)
}

// checkFiles checks the paths of the files that the user's files have at path.
func (e *evaluation) checkFiles(path ...string) {
	iter, err := e.at(path).Fields()
	if err != nil {
		return // there are none, or it was complained about
	}
	var paths []string
	for iter.Next() {
		paths = append(paths, iter.Selector().Unquoted())
	}
	e.checkPaths(paths, path...)
}

// checkPaths checks the paths of files that come together.
func (e *evaluation) checkPaths(paths []string, at ...string) {
	set := map[string]bool{}
	for _, p := range paths {
		set[p] = true
	}
	for _, p := range paths {
		if why := badPath(p); why != "" {
			e.complain(append(slices.Clone(at), p), "%s", why)
			continue
		}
		for d := path.Dir(p); d != "/"; d = path.Dir(d) {
			if set[d] {
				e.complain(append(slices.Clone(at), p), "%s is a file, so nothing can lie below it", brief(strconv.Quote(d)))
			}
		}
	}
}

// badPath says what is wrong with the path of a file, or "".
func badPath(p string) string {
	long := func(name string) bool { return len(name) > 255 }
	switch {
	case len(p) > 4000 || slices.ContainsFunc(strings.Split(p, "/"), long):
		return "this cannot be the path of a file: it is too long"
	case strings.ContainsFunc(p, unicode.IsControl):
		return "the path of a file has no control characters"
	case !strings.HasPrefix(p, "/"):
		return "the path of a file is absolute: it begins with \"/\""
	case slices.Contains(strings.Split(p, "/"), ".."):
		return "the path of a file has no \"..\""
	case p == "/" || strings.HasSuffix(p, "/"):
		return "this is the path of a directory, not of a file"
	case path.Clean(p) != p:
		return fmt.Sprintf("the path of a file is clean: want %s", brief(strconv.Quote(path.Clean(p))))
	}
	return ""
}
