package quick_test

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"

	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/testbed/quick"
)

// rotFile is a file that nothing reads but this test: what runs keeps its own pages in memory.
const rotFile = "usr/share/quick/rot"

// TestFlippedBits has a bit flip in the base of a node, once while it runs from it and once while it is off. Each time the
// node says so, fetches what is damaged and nothing else, and is healthy in the end.
func TestFlippedBits(t *testing.T) {
	fleet := quick.Fleet()["fleet.cue"]
	fleet = strings.Replace(fleet, `packages: ["quick"]`, `packages: ["quick", "quick-rot-1024"]`, 1)
	lab := quick.Start(t, quick.Config{Files: map[string]string{"fleet.cue": fleet}})
	lab.On("n1")
	lab.AwaitHealthy("n1")
	if out := lab.Run(n1, "sh", "-c", "cat /proc/mounts"); !strings.Contains(out, "/dev/dm-") {
		t.Fatalf("the base is not read through dm-verity:\n%s", out)
	}
	base := lab.Running("n1").Content.Base.Digest
	damaged := func(mended string) func(context.Context) error {
		return func(context.Context) error {
			n := lab.Host("n1").Node
			if n == nil || !strings.Contains(strings.Join(n.Warnings, "\n"), mended) {
				return fmt.Errorf("the node reports %+v", n)
			}
			return nil
		}
	}

	content := fileOf(t, lab, base, rotFile)
	if n, err := lab.FlipBlock("n1", content[40*4096:41*4096], 7); n != 1 || err != nil {
		t.Fatalf("flipping a bit of %s: of %d blocks, %v", rotFile, n, err)
	}
	const read = "sha256sum /" + rotFile
	if out, status, err := lab.TryRun(t.Context(), n1, "sh", "-c", read); status == 0 || err != nil {
		t.Errorf("a file with a flipped bit was read: %q, status %d, %v", out, status, err)
	}
	lab.Poll("the block is mended while the node runs", damaged(" 1 were mended"))
	if out := lab.Run(n1, "sh", "-c", read); !strings.HasPrefix(out, digest.Of(content).Hex()) {
		t.Errorf("the mended file is %q, want %s", out, digest.Of(content))
	}

	before := lab.Host("n1").BootID
	lab.Off("n1")
	lab.Flip("n1", base, 1024) // the magic number of EROFS: it does not mount
	lab.On("n1")
	lab.AwaitBoot("n1", before)
	lab.Poll("the block is mended before the switch of root", damaged(" 2 were mended"))
	if n := lab.Host("n1").Boots[0].Bytes; n != 0 {
		t.Errorf("%d bytes of images were fetched for it, want none but the block", n)
	}
}

// fileOf is a file of an image in the server's store.
func fileOf(t *testing.T, lab *quick.Lab, image digest.Digest, name string) []byte {
	t.Helper()
	f, err := os.Open(lab.BlobPath(image))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	root, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := fs.ReadFile(root, name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
