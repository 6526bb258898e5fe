package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/hosts/agent/cache"
	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/hosts/agentapi/agentapitest"
)

// A base that rotted in the cache is mended before a release of it is staged, and the server is told.
func TestStagingMendsWhatIsCached(t *testing.T) {
	var s agentapitest.Server
	now := assigned(&s, "web", 1)
	n := newNode(t, now, &s)
	n.fetched(n.booted(now, now), now)
	c, err := cache.Open(filepath.Join(n.dir, "cache"), nothing)
	if err != nil {
		t.Fatal(err)
	}
	base := c.Path(now.Release.Base.Digest)
	good, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	bad := append([]byte{good[0] ^ 1}, good[1:]...)
	if err := os.WriteFile(base, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	reboots, stop := n.start()
	s.Assign(assigned(&s, "idle", 2)) // of the same base
	<-reboots
	if err := stop(); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if b, err := os.ReadFile(base); err != nil || string(b) != string(good) {
		t.Errorf("the base is not mended: %v", err)
	}
	n.wait("the count", func(r agentapi.Report) bool {
		return strings.Contains(strings.Join(r.Warnings, "\n"), "1 damaged blocks of images, 1 were mended")
	})
}
