package quick_test

import (
	"strings"
	"testing"

	"github.com/troupe-dev/troupe/testbed/quick"
)

// TestPersist is what outlives a boot, and what outlives a release.
func TestPersist(t *testing.T) {
	roles := strings.Replace(quick.Fleet()["roles.cue"], "roles: b: {}", `roles: b: {delta: "fresh", persist: ["/var/lib/app"]}`, 1)
	lab := quick.Start(t, quick.Config{Files: map[string]string{"roles.cue": roles}})
	lab.On("n1")
	lab.AwaitHealthy("n1")
	lab.Run(n1, "sh", "-c", "mkdir -p /var/lib/app && echo before > /var/lib/app/state && echo x > /var/other && sync")

	first := lab.Host("n1").Boots[0].ID
	lab.Edit("roles.cue", "roles: a: {}", `roles: a: persist: ["/var/lib/app"]`) // takes over what is there
	lab.AwaitBoot("n1", first)
	wantFiles(t, lab, "before\nx\n", "/var/lib/app/state", "/var/other")

	lab.Role("n1", "b")
	lab.AwaitRole("n1", "b")
	wantFiles(t, lab, "before\nb\n", "/var/lib/app/state", "/etc/role")
	if out, status, err := lab.TryRun(t.Context(), n1, "cat", "/var/other"); err != nil || status == 0 {
		t.Errorf("what was written over another release: status %d, %v: %s", status, err, out)
	}
	lab.Run(n1, "sh", "-c", "echo after > /var/lib/app/state && echo x > /var/other && sync")

	boot := lab.Host("n1").Boots[0].ID
	lab.Cycle("n1")
	lab.AwaitBoot("n1", boot)
	wantFiles(t, lab, "after\n", "/var/lib/app/state")
	if out, status, err := lab.TryRun(t.Context(), n1, "cat", "/var/other"); err != nil || status == 0 {
		t.Errorf("what the boot before wrote: status %d, %v: %s", status, err, out)
	}

	boot = lab.Host("n1").Boots[0].ID
	if out, status := lab.Troupe("reset", "n1"); status != 0 {
		t.Fatalf("reset: status %d: %s", status, out)
	}
	lab.AwaitBoot("n1", boot)
	if out, status, err := lab.TryRun(t.Context(), n1, "cat", "/var/lib/app/state"); err != nil || status == 0 {
		t.Errorf("what was kept, after a reset: status %d, %v: %s", status, err, out)
	}
}

// wantFiles checks what files of n1 have, one after the other.
func wantFiles(t *testing.T, lab *quick.Lab, want string, names ...string) {
	t.Helper()
	if got := lab.Run(n1, append([]string{"cat"}, names...)...); got != want {
		t.Errorf("%s: got %q, want %q", strings.Join(names, ", "), got, want)
	}
}
