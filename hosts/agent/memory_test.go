package agent

import (
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// TestMemoryFor refuses what does not fit, and says by how much.
func TestMemoryFor(t *testing.T) {
	a := agentapi.Assignment{Role: "web", Release: &agentapi.Release{}}
	a.Release.Base.Size, a.Release.Delta.Size = 300<<20, 20<<20
	if got, err := memoryFor(1<<30, a); err != nil || got != 768<<20 {
		t.Errorf("of 1 GiB: got %d, %v", got, err)
	}
	if got, err := memoryFor(512<<20, a); err != nil || got != 384<<20 {
		t.Errorf("of 512 MiB, which is just enough: got %d, %v", got, err)
	}
	_, err := memoryFor(511<<20, a)
	if err == nil || !strings.Contains(err.Error(), "role web") || !strings.Contains(err.Error(), "need 384 MiB") {
		t.Errorf("of 511 MiB: %v", err)
	}
}
