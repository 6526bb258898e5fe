package quick_test

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/testbed/quick"
)

// faulty are roles that do not come to run, beside a and b of the default fleet.
const faulty = `package fleet

roles: a: kernel: args: ["troupe.alone=5"]
roles: sick: {files: "/etc/quick": "unhealthy\n", healthyWithin: "10s"}
roles: hangs: {files: "/etc/quick": "hang\n", kernel: args: ["troupe.watchdog=8"]}
roles: panics: kernel: args: ["rdinit=/nonexistent", "panic=1"]
`

// rolledBack waits until the host runs the role to again, healthily, though another one is wanted, and returns why.
func rolledBack(lab *quick.Lab, role, to string) string {
	snap := lab.Await("the host going back from role "+role, func(s *api.Snapshot) bool {
		h, _ := s.Host("n1")
		return h.Role == role && h.State == api.HostBad && h.RunningRole == to && h.Healthy
	})
	h, _ := snap.Host("n1")
	return h.Detail
}

// answersAs looks whether the system of the host runs as a role.
func answersAs(lab *quick.Lab, role string) func(context.Context) error {
	return func(ctx context.Context) error {
		out, status, err := lab.TryRun(ctx, n1, "cat", "/etc/role")
		if err != nil || status != 0 || strings.TrimSpace(out) != role {
			return fmt.Errorf("it answers %q, status %d, %w", out, status, err)
		}
		return nil
	}
}

// TestRollback has releases that do not work, of each kind; the power cut while a boot is counted; and the server gone.
func TestRollback(t *testing.T) {
	lab := quick.Start(t, quick.Config{Files: map[string]string{"faulty.cue": faulty}})
	lab.On("n1")
	lab.AwaitHealthy("n1")

	lab.Role("n1", "sick")
	if why := rolledBack(lab, "sick", "a"); !strings.Contains(why, "http :80/") || !strings.Contains(why, "not passed within 10s") {
		t.Errorf("why it went back: %q", why)
	}
	if out, _ := lab.Troupe("describe", "host", "n1"); !strings.Contains(out, "rolled-back") || !strings.Contains(out, "not passed within 10s") {
		t.Errorf("describe does not name the cause:\n%s", out)
	}
	if out, status := lab.Troupe("status"); !strings.Contains(out, "1 host rolled-back: n1") || strings.Contains(out, "is converged") {
		t.Errorf("status %d:\n%s", status, out)
	}
	// It is not tried again, also with no server; and what is wanted next is.
	boot := lab.Host("n1").BootID
	lab.StopServer()
	lab.Cycle("n1")
	lab.Poll("the role with no server", answersAs(lab, "a"))
	lab.StartServer()
	lab.Await("a report of another boot", func(s *api.Snapshot) bool {
		h, _ := s.Host("n1")
		return h.BootID != boot && h.Healthy && h.State == api.HostBad
	})
	if h := lab.Host("n1"); h.State != api.HostBad || h.RunningRole != "a" {
		t.Errorf("after a boot with no server: %s (%s), runs %s", h.State, h.Detail, h.RunningRole)
	}
	// One cut of the power as a boot is counted is no reason not to try it again.
	said, err := lab.Console("n1")
	if err != nil {
		t.Fatal(err)
	}
	lab.Role("n1", "b")
	if _, err := lab.WaitConsole(t.Context(), "n1", int64(len(said)), regexp.MustCompile("stage reached.*stage=mount")); err != nil {
		t.Fatal(err)
	}
	lab.Cycle("n1")
	lab.AwaitRole("n1", "b")

	lab.Role("n1", "hangs")
	if why := rolledBack(lab, "hangs", "b"); !strings.Contains(why, "2 boots of it in a row did not become healthy") {
		t.Errorf("why it went back: %q", why)
	}
	lab.Role("n1", "panics")
	if why := rolledBack(lab, "panics", "b"); !strings.Contains(why, "its kernel was loaded and did not come as far as the agent") {
		t.Errorf("why it went back: %q", why)
	}
}
