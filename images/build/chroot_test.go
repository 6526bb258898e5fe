package build

import (
	"os"
	"strings"
	"testing"
)

// TestChrootOfACopy works where the base's image cannot be mounted: here it is where nobody finds it. The result is the
// same as over the mounted image.
func TestChrootOfACopy(t *testing.T) {
	b, base := debianBase(t)
	root, closeRoot, err := b.openImage(t.Context(), base.Image.Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer closeRoot()
	for image, copied := range map[string]bool{"/nowhere": true, b.Store.Path(base.Image.Digest): false} {
		var rec recorder
		c := chroot{dir: t.TempDir(), base: root, image: image, s: newSteps(&rec)}
		if err := c.prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		if c.copy != copied {
			t.Errorf("image %s: copied %v, want %v", image, c.copy, copied)
		}
		if left, err := os.ReadDir(c.dir + "/lower"); err != nil || (len(left) > 0) != copied {
			t.Errorf("image %s: %d entries in the lower directory, %v", image, len(left), err)
		}
		c.s.begin("run")
		if err := c.sh(t.Context(), "cat /etc/debian_version; rm /etc/issue.net; stat -c '%a %U' /bin/su", false); err != nil {
			t.Fatalf("%v\n%s", err, rec.output.String())
		}
		if out := rec.output.String(); !strings.HasPrefix(out, "12.") || !strings.HasSuffix(out, "\n4755 root\n") {
			t.Errorf("image %s: output %q", image, out)
		}
		v, err := newView(root)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.scan(v, nil); err != nil || len(v.top) != 3 || !v.top["etc/issue.net"].isWhite() {
			t.Errorf("image %s: layer %v, %v", image, sortedKeys(v.top), err)
		}
	}
}
