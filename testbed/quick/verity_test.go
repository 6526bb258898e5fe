package quick_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/testbed/quick"
)

// TestFlippedBits has a bit flip in the base of a node, once while it runs from it and once while it is off. Each time the
// node says so, fetches what is damaged and nothing else, and is healthy in the end.
func TestFlippedBits(t *testing.T) {
	lab := quick.Start(t, quick.Config{})
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

	lab.Flip("n1", base, 4096*100)
	// What is in memory already is right; what is read from now on is checked. Some file cannot be read.
	lab.Run(n1, "sh", "-c", "echo 3 > /proc/sys/vm/drop_caches; find / -xdev -type f -exec cat {} + > /dev/null 2>&1; true")
	lab.Poll("the block is mended while the node runs", damaged(" 1 were mended"))
	lab.Run(n1, "sh", "-c", "echo 3 > /proc/sys/vm/drop_caches; find / -xdev -type f -exec cat {} + > /dev/null")

	before := lab.Host("n1").Boots[0].ID
	lab.Off("n1")
	lab.Flip("n1", base, 1024) // the magic number of EROFS: it does not mount
	lab.On("n1")
	lab.AwaitBoot("n1", before)
	lab.Poll("the block is mended before the switch of root", damaged(" 2 were mended"))
	if n := lab.Host("n1").Boots[0].Bytes; n != 0 {
		t.Errorf("%d bytes of images were fetched for it, want none but the block", n)
	}
}
