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
	if !v.Exists() {
		return
	}
	it := &item[schema.Network]{At: e.places(v, networkFields, "network")}
	e.out.Network = it
	before := len(e.out.Problems)
	if e.check(v) && e.networkTexts(v) {
		e.decode(v, &it.Value, "network")
	}
	if len(e.out.Problems) == before {
		e.networkRanges(it.Value)
	}
	it.Bad = len(e.out.Problems) > before
}

// networkTexts says whether the texts in a network can be decoded.
func (e *evaluation) networkTexts(v cue.Value) bool {
	before := len(e.out.Problems)
	if s, err := e.lookup(v, "subnet").String(); err == nil {
		switch p, err := netip.ParsePrefix(s); {
		case err != nil || !p.Addr().Is4():
			e.complain([]string{"network", "subnet"}, "%q is not an IPv4 subnet like \"10.77.0.0/24\"", s)
		case p != p.Masked():
			e.complain([]string{"network", "subnet"}, "%q has bits set after its prefix; the subnet is %q", s, p.Masked())
		case p.Bits() > 30 || p.Bits() < 8:
			e.complain([]string{"network", "subnet"}, "%q has a prefix of %d bits; want 8 to 30", s, p.Bits())
		}
	}
	if s, err := e.lookup(v, "dynamic").String(); err == nil {
		var r schema.Range
		if err := r.UnmarshalText([]byte(s)); err != nil {
			e.complain([]string{"network", "dynamic"}, "%v", err)
		}
	}
	e.duration(v, time.Minute, "network", "lease")
	return len(e.out.Problems) == before
}

func (e *evaluation) networkRanges(n schema.Network) {
	if n.Router.IsValid() {
		if why := notAHost(n.Subnet, n.Router); why != "" {
			e.complain([]string{"network", "router"}, "%v %s", n.Router, why)
		}
	}
	d := n.Dynamic
	if d.IsZero() {
		return
	}
	at := []string{"network", "dynamic"}
	for _, a := range []netip.Addr{d.First, d.Last} {
		if why := notAHost(n.Subnet, a); why != "" {
			e.complain(at, "%v %s", a, why)
		}
	}
	if n.Router.IsValid() && d.Contains(n.Router) {
		e.complain(at, "the router %v lies inside the range", n.Router)
	}
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

// duration complains about a time at the end of path, in v, that cannot be decoded or is less than least.
func (e *evaluation) duration(v cue.Value, least time.Duration, path ...string) {
	s, err := e.lookup(v, path[len(path)-1]).String()
	if err != nil {
		return
	}
	var d schema.Duration
	switch err := d.UnmarshalText([]byte(s)); {
	case err != nil:
		e.complain(path, "%q is not a time like \"1m30s\"", s)
	case time.Duration(d) < least:
		e.complain(path, "%q is too short: want at least %q", s, least)
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
	if it.Value.From.Debian == nil {
		e.complain([]string{"images", name, "from"}, "says nothing: want debian: {…}")
	}
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
	iter, err := v.Fields()
	if err != nil {
		e.explain(err)
		return
	}
	parts := map[string]json.RawMessage{}
	for iter.Next() {
		field := iter.Selector().Unquoted()
		if field == "node" {
			continue
		}
		b, err := iter.Value().MarshalJSON()
		if err != nil {
			e.explain(err)
			return
		}
		parts[field] = b
	}
	b, err := json.Marshal(parts)
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
	e.checkPaths(slices.Collect(maps.Keys(it.Value.Files)), "roles", name, "files")
	for i := range it.Value.Apps {
		it.At["apps."+strconv.Itoa(i)] = e.place(e.posOf("roles", name, "apps", strconv.Itoa(i)))
	}
}

// checkRole checks a role. Only its node may be without definite values, as that is computed for each host.
func (e *evaluation) checkRole(name string, v, node cue.Value) bool {
	before := len(e.out.Problems)
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
	e.checkHealthy(name, e.lookup(v, "healthy"))
	return len(e.out.Problems) == before
}

func (e *evaluation) checkHealthy(role string, v cue.Value) {
	iter, err := v.List()
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
		e.duration(iter.Value(), time.Second, append(slices.Clone(at), "every")...)
		e.duration(iter.Value(), 100*time.Millisecond, append(slices.Clone(at), "timeout")...)
	}
}

func (e *evaluation) host(name string, v cue.Value, it *item[schema.Host]) {
	if !e.check(v) {
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
	e.checkPaths(slices.Collect(maps.Keys(h.Node.Files)), "hosts", name, "node", "files")
	e.addRoleNode(name, v, h)
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
				e.complain(append(slices.Clone(at), p), "%q is a file, so nothing can lie below it", d)
			}
		}
	}
}

// badPath says what is wrong with the path of a file, or "".
func badPath(p string) string {
	switch {
	case !strings.HasPrefix(p, "/"):
		return "the path of a file is absolute: it begins with \"/\""
	case slices.Contains(strings.Split(p, "/"), ".."):
		return "the path of a file has no \"..\""
	case p == "/" || strings.HasSuffix(p, "/"):
		return "this is the path of a directory, not of a file"
	case path.Clean(p) != p:
		return fmt.Sprintf("the path of a file is clean: want %q", path.Clean(p))
	case strings.ContainsRune(p, 0) || len(p) > 4000 || slices.ContainsFunc(strings.Split(p, "/"), func(s string) bool { return len(s) > 255 }):
		return "this cannot be the path of a file: it is too long or has a NUL"
	}
	return ""
}
