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

// TestBig has hosts and roles that are just as big as they may be, and by one byte bigger.
func TestBig(t *testing.T) {
	const root = `
-- fleet.cue --
package fleet
import "strings"
network: subnet: "10.77.0.0/24"
images: debian: {kind: "os", from: debian: {suite: "bookworm", kernel: "linux-image-cloud-amd64"}}
roles: web: {os: "debian", node: files: "/etc/role": strings.Repeat("r", 256*1024)}
hosts: small: {serial: "s1", role: "web"}
-- more.cue --
package fleet
import "strings"
`
	const (
		node = maxNode - 256<<10 - 2*fileJSON - len(`"/etc/role""/etc/own"""""`)
		word = maxHealthy - 3*checkJSON - len(`"a.service""""""a","",`)
	)
	for _, tc := range []struct {
		text string // with the number that may be big
		most int
		want string
	}{
		{`hosts: big: {serial: "s2", role: "web", node: files: "/etc/own": strings.Repeat("o", %d)}`, node,
			`more.cue:3:8: hosts.big: its node files, with those of role "web", have 655361 bytes as JSON, more than the 655360 that a host may have`},
		{`hosts: big: {serial: "s2", role: "web", node: files: "/etc/own": strings.Repeat("\n", div(%d, 2))}`, node - node%2 + 1,
			`more.cue:3:8: hosts.big: its node files, with those of role "web", have 655`},
		{`hosts: big: {serial: "s2", role: "web", node: files: "/etc/own": strings.Repeat("\u0001", div(%d, 6))}`, node - node%6 + 5,
			`more.cue:3:8: hosts.big: its node files, with those of role "web", have 655`},
		{`roles: web: healthy: [{unit: "a.service"}, {exec: ["a", strings.Repeat("x", %d)]}, {tcp: port: 1}]`, word,
			"more.cue:3:87: roles.web.healthy.2: with this, the checks have 65537 bytes as JSON, more than the 65536 that a role may have"},
		{`roles: web: kernel: args: ["quiet", strings.Repeat("x", %d)]`, maxKernelArgs - len("quiet "),
			"more.cue:3:21: roles.web.kernel.args: 1537 bytes, with the spaces between them, are more than the 1536 that a kernel takes"},
		{`network: domain: "a" + strings.Repeat(".a", div(%d-1, 2))`, 254, "more.cue:3:18: network.domain: "},
		{`roles: web: packages: ["a" + strings.Repeat("a", %d-1)]`, 255, "more.cue:3:24: roles.web.packages.0: "},
		{`roles: web: services: enable: [strings.Repeat("a", %d-8) + ".service"]`, 255, "more.cue:3:32: roles.web.services.enable.0: "},
		{`images: debian: from: debian: components: [strings.Repeat("a", %d)]`, 255, "images.debian.from.debian.components"},
		{`hosts: small: disk: device: "/dev/" + strings.Repeat("a", %d-5)`, 255, "more.cue:3:29: hosts.small.disk.device: "},
	} {
		t.Run(tc.text, func(t *testing.T) {
			var l Loader
			loadText(t, &l, root+fmt.Sprintf(tc.text, tc.most)+"\n")
			_, err := l.Load(t.Context(), tree(t, txtar.Parse([]byte(root+fmt.Sprintf(tc.text, tc.most+1)+"\n"))))
			var ps schema.Problems
			if !errors.As(err, &ps) || len(ps) != 1 || !strings.Contains(ps[0].String(), tc.want) {
				t.Errorf("got  %v\nwant %s…", err, tc.want)
			}
		})
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
