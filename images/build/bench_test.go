package build

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/images"
)

// BenchmarkBuild builds the base of a small fleet from the archive and then roles on it, each again after one of its files
// changed. It reports what was built and the time against that of the base. The goal for a changed file is 3 s, and that nothing but the
// role's own image is built.
func BenchmarkBuild(b *testing.B) {
	for b.Loop() {
		bench := newBuilder(b)
		began := time.Now()
		base, err := bench.Base(b.Context(), firstFleet(), nil)
		if err != nil {
			b.Fatal(err)
		}
		cold := time.Since(began)
		var lines []string
		row := func(what string, took time.Duration, blobs int) {
			lines = append(lines, fmt.Sprintf("│ %-46s │ %8.2f s │ %8.4f │ %5d │", what, took.Seconds(), took.Seconds()/cold.Seconds(), blobs))
		}
		row("cold: the base", cold, len(storeBlobs(b, bench)))
		for _, role := range []struct {
			name   string
			recipe images.DeltaRecipe
		}{
			{"a role of files and units", images.DeltaRecipe{Enable: []string{"web.service"}}},
			{"a role with run steps", images.DeltaRecipe{Enable: []string{"web.service"}, Run: []string{"cp /etc/motd /etc/issue"}}},
		} {
			for _, motd := range []string{"web\n", "another\n"} {
				r := role.recipe
				r.Base = base.Recipe
				r.Files = map[string]images.File{
					"/etc/motd":                       {Content: motd, Mode: 0o644},
					"/etc/systemd/system/web.service": {Content: "[Service]\nExecStart=/bin/busybox httpd -f\n[Install]\nWantedBy=multi-user.target\n", Mode: 0o644},
				}
				before := len(storeBlobs(b, bench))
				began := time.Now()
				d, err := bench.Delta(b.Context(), r, base, nil)
				if err != nil {
					b.Fatal(err)
				}
				took := time.Since(began)
				if d.Base != base.Image.Blob {
					b.Errorf("%s lies over another base", role.name)
				}
				what := role.name + ", first"
				if motd != "web\n" {
					what = role.name + ", one file changed"
					b.ReportMetric(took.Seconds(), "s/"+strings.ReplaceAll(role.name, " ", "-"))
				}
				row(what, took, len(storeBlobs(b, bench))-before)
			}
		}
		fmt.Printf("\n│ %-46s │ %10s │ %8s │ %5s │\n%s\n", "build", "time", "of cold", "blobs", strings.Join(lines, "\n"))
	}
}

// storeBlobs are the blobs in the store.
func storeBlobs(b *testing.B, bench *Builder) []images.Blob {
	b.Helper()
	all, err := bench.Store.List(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	return all
}
