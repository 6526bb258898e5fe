package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/images/artifact"
	"github.com/troupe-dev/troupe/images/filediff"
	"github.com/troupe-dev/troupe/images/store"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/api"
)

// troupe runs one command line, and gives its status and output.
func troupe(t *testing.T, args ...string) (status int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	status = run(t.Context(), args, streams{in: strings.NewReader(""), out: &out, err: &errs})
	return status, out.String(), errs.String()
}

// TestDirectoriesOffline copies between directories and verifies them with no server.
func TestDirectoriesOffline(t *testing.T) {
	from, to := t.TempDir(), filepath.Join(t.TempDir(), "usb")
	s, err := store.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	blob, err := s.Put(t.Context(), strings.NewReader("the bytes of a disk"))
	if err != nil {
		t.Fatal(err)
	}
	disk := images.Disk{Recipe: digest.Of([]byte("recipe")), Image: blob, Format: "raw"}
	desc, err := artifact.Record(t.Context(), s, artifact.OfDisk(disk), disk.Recipe, "cloud.disk")
	if err != nil {
		t.Fatal(err)
	}
	if status, out, errs := troupe(t, "image", "push", "cloud.disk", "--from", "oci:"+from, "--to", "oci:"+to); status != exitOK || out != "cloud.disk "+string(desc.Digest)+"\n" {
		t.Fatalf("push: status %d\n%s%s", status, out, errs)
	}
	status, out, errs := troupe(t, "image", "verify", "oci:"+to)
	if status != exitOK || !strings.HasPrefix(out, "all is well: 3 blobs") {
		t.Errorf("verify: status %d\n%s%s", status, out, errs)
	}
	if err := os.Truncate(filepath.Join(to, "blobs/sha256", digest.Digest(desc.Digest).Hex()), 10); err != nil {
		t.Fatal(err)
	}
	status, out, errs = troupe(t, "image", "verify", "oci:"+to, "-o", "json")
	if status != exitDiffers || !strings.Contains(out, `"what": "blob"`) || !strings.Contains(out, `"what": "manifest"`) {
		t.Errorf("verify of what is cut short: status %d\n%s%s", status, out, errs)
	}
	if status, out, errs := troupe(t, "image", "pull", "cloud.disk", "--from", "oci:"+from, "--to", "oci:"+to); status != exitOK {
		t.Errorf("pull: status %d\n%s%s", status, out, errs)
	}
	if status, out, errs := troupe(t, "image", "verify", "oci:"+to); status != exitOK {
		t.Errorf("verify after the pull: status %d\n%s%s", status, out, errs)
	}
	for _, args := range [][]string{{"image", "push", "x"}, {"image", "pull", "x", "--to", "oci:" + to}, {"image", "verify", "here"}} {
		if status, _, errs := troupe(t, args...); status != exitFailed || errs == "" {
			t.Errorf("%v: status %d, %q", args, status, errs)
		}
	}
}

func TestWriteDiff(t *testing.T) {
	d := api.Diff{
		Packages: api.DiffPackages([]string{"a=1", "b=1", "c=1"}, []string{"a=1", "b=2", "d=1"}),
		Files: []filediff.Change{
			{Path: "/etc/motd", Change: filediff.Changed, Before: &filediff.Attr{Mode: "-rw-r--r--", Size: 3}, After: &filediff.Attr{Mode: "-rw-------", UID: 1, Size: 4}},
			{Path: "/etc/link", Change: filediff.Added, After: &filediff.Attr{Mode: "Lrwxrwxrwx", Target: "motd"}},
		},
	}
	var out bytes.Buffer
	if err := writeDiff(&out, d); err != nil {
		t.Fatal(err)
	}
	var got [][]string
	for line := range strings.Lines(out.String()) {
		got = append(got, strings.Fields(line))
	}
	want := [][]string{
		{"CHANGE", "WHAT", "BEFORE", "AFTER"}, {"changed", "b", "1", "2"}, {"removed", "c", "1"}, {"added", "d", "1"},
		{"changed", "/etc/motd", "-rw-r--r--", "0:0", "3", "-rw-------", "1:0", "4"}, {"added", "/etc/link", "Lrwxrwxrwx", "0:0", "->", "motd"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the table (-want +got):\n%s", d)
	}
}

// TestArtifactVerbs asks a server that answers as the API says.
func TestArtifactVerbs(t *testing.T) {
	answers := map[string]string{
		"POST /api/v1/store/collect?dryRun=true": `{"dryRun":true,"artifacts":[{"kind":"base","name":"old","id":"sha256:` + strings.Repeat("a", 64) + `","bytes":1048576}],"blobs":3,"bytes":1048576,"kept":2}`,
		"POST /api/v1/store/verify":              `{"blobs":1,"bytes":5,"manifests":1,"images":0,"problems":[{"what":"blob","name":"sha256:00","error":"is cut short"}]}`,
		"GET /api/v1/images/web/contents":        `{"name":"web","kind":"delta","packages":["libc6=2.36","nginx=1.22"]}`,
		"GET /api/v1/releases/web/sbom":          `{"spdxVersion":"SPDX-2.3"}`,
		"GET /api/v1/diff?after=b&before=a":      `{"packages":[],"files":[]}`,
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, ok := answers[r.Method+" "+r.URL.RequestURI()]
		if !ok {
			http.Error(w, `{"error":"unknown"}`, http.StatusNotFound)
			return
		}
		_, _ = w.Write([]byte(answer))
	}))
	defer server.Close()
	for _, c := range []struct {
		args   string
		status int
		want   string
	}{
		{"image gc --dry-run", exitOK, "would free 1 MiB in 3 files; 2 artifacts stay"},
		{"image gc --dry-run", exitOK, "aaaaaaaaaaaa"},
		{"image verify", exitDiffers, "is cut short"},
		{"image show web --packages", exitOK, "libc6=2.36\nnginx=1.22\n"},
		{"image show web --sbom", exitOK, "SPDX-2.3"},
		{"image diff a b", exitOK, "they are the same"},
	} {
		status, out, errs := troupe(t, append(strings.Fields(c.args), "--server", server.URL)...)
		if status != c.status || !strings.Contains(out, c.want) {
			t.Errorf("%s: status %d, want %d and %q:\n%s%s", c.args, status, c.status, c.want, out, errs)
		}
	}
}
