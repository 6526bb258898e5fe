package load

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"

	"github.com/troupe-dev/troupe/schema"
)

// TestBig has hosts and roles that are just as big as they may be, and by one byte, or one character, bigger.
func TestBig(t *testing.T) {
	const (
		node = maxNode - 256<<10 - 2*fileJSON - len(`"/etc/role""/etc/own"""""`)
		word = maxHealthy - 3*checkJSON - len(`"a.service""""""a","",`)
	)
	parts := []struct {
		text string // with the number that may be big
		most int
		want string
	}{
		{`network: domain: "a" + strings.Repeat(".a", div(%d-1, 2))`, 254, "fleet.cue:3:18: network.domain: "},
		{
			`hosts: a: {serial: "a", role: "web", node: files: "/etc/own": strings.Repeat("o", %d)}`, node,
			`fleet.cue:4:8: hosts.a: its node files, with those of role "web", have 655361 bytes as JSON, more than the 655360 that a host may have; `,
		},
		{
			`hosts: b: {serial: "b", role: "web", node: files: "/etc/own": strings.Repeat("\n", div(%d, 2))}`, node - node%2 + 1,
			`fleet.cue:5:8: hosts.b: its node files, with those of role "web", have 655361 bytes as JSON, `,
		},
		{
			`hosts: c: {serial: "c", role: "web", node: files: "/etc/own": strings.Repeat("\u0001", div(%d, 6))}`, node - node%6 + 5,
			`fleet.cue:6:8: hosts.c: its node files, with those of role "web", have 655361 bytes as JSON, `,
		},
		{
			`roles: checked: {os: "debian", healthy: [{unit: "a.service"}, {exec: ["a", strings.Repeat("x", %d)]}, {tcp: port: 1}]}`, word,
			"fleet.cue:7:106: roles.checked.healthy.2: with this, the checks have 65537 bytes as JSON, more than the 65536 that a role may have; ",
		},
		{
			`roles: args: {os: "debian", kernel: args: ["quiet", strings.Repeat("x", %d)]}`, maxKernelArgs - len("quiet "),
			"fleet.cue:8:37: roles.args.kernel.args: 1537 bytes, with the spaces between them, are more than the 1536 that a kernel takes ",
		},
		{`roles: packages: {os: "debian", packages: ["a" + strings.Repeat("a", %d-1)]}`, 255, "fleet.cue:9:44: roles.packages.packages.0: "},
		{`roles: services: {os: "debian", services: enable: [strings.Repeat("a", %d-8) + ".service"]}`, 255, "fleet.cue:10:52: roles.services.services.enable.0: "},
		{`images: debian: from: debian: components: [strings.Repeat("a", %d)]`, 255, "images.debian.from.debian.components"},
		{`hosts: d: {serial: "d", role: "web", disk: device: "/dev/" + strings.Repeat("a", %d-5)}`, 255, "fleet.cue:12:52: hosts.d.disk.device: "},
	}
	fleet := func(more int) string {
		var b strings.Builder
		b.WriteString("-- fleet.cue --\npackage fleet\nimport \"strings\"\n")
		for _, p := range parts {
			fmt.Fprintf(&b, p.text+"\n", p.most+more)
		}
		return b.String() + `
-- root.cue --
package fleet
import "strings"
network: subnet: "10.77.0.0/24"
images: debian: {kind: "os", from: debian: {suite: "bookworm", kernel: "linux-image-cloud-amd64"}}
roles: web: {os: "debian", node: files: "/etc/role": strings.Repeat("r", 256*1024)}
`
	}
	var l Loader
	loadText(t, &l, fleet(0))
	_, err := l.Load(t.Context(), tree(t, txtar.Parse([]byte(fleet(1)))))
	var ps schema.Problems
	if !errors.As(err, &ps) || len(ps) != len(parts) {
		t.Errorf("got %d problems, want %d", len(ps), len(parts))
	}
	for _, p := range parts {
		if !strings.Contains(fmt.Sprint(err), p.want) {
			t.Errorf("got  %v\nwant %s…", err, p.want)
		}
	}
}

// asJSON is how the reconciler writes records.
func asJSON(t *testing.T, v any) []byte {
	t.Helper()
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		t.Fatal(err)
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n"))
}

// FuzzSize holds the sizes against what encoding/json makes of the same.
func FuzzSize(f *testing.F) {
	f.Add("")
	f.Add("/etc/motd")
	f.Add("\x00\b\t\n\f\r\"\\<>&\u007f\u2028\u2029\ufffd\xff\xc3é\U0001f600")
	f.Fuzz(func(t *testing.T, s string) {
		if got, want := jsonSize(s), len(asJSON(t, s)); got != want {
			t.Errorf("%q has %d bytes as JSON, got %d", s, want, got)
		}
		files := map[string]schema.File{}
		for i := range 3 {
			files["/"+strconv.Itoa(i)+s] = schema.File{Content: s, Mode: 0o7777, UID: 1<<32 - 1, GID: 1<<32 - 1}
		}
		if got, least := nodeSize(files), len(asJSON(t, files)); got < least {
			t.Errorf("three files with %q have %d bytes as JSON, got %d", s, least, got)
		}
		check := schema.Check{HTTP: &schema.HTTPCheck{Port: 1<<16 - 1, Path: s, Status: 599}, Unit: s, Exec: slices.Repeat([]string{s}, 3)}
		told := struct { // as an agent is
			HTTP    *schema.HTTPCheck `json:"http"`
			Unit    string            `json:"unit"`
			Exec    []string          `json:"exec"`
			Every   time.Duration     `json:"every"`
			Timeout time.Duration     `json:"timeout"`
		}{check.HTTP, check.Unit, check.Exec, 1<<63 - 1, 1<<63 - 1}
		if got, least := checkSize(check), len(asJSON(t, told)); got < least {
			t.Errorf("a check with %q has %d bytes as JSON, got %d", s, least, got)
		}
	})
}
