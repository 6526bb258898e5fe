package qemu

import (
	"strings"
	"testing"
	"time"
)

func TestProbe(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	accel, why := ProbeAccel(t.Context())
	err := probeGuest(t.Context(), "kvm", bootSector(probeBoot), probeTime)
	switch {
	case accel == "kvm" && err != nil:
		t.Errorf("the probe says kvm (%s), and a guest cannot run: %v", why, err)
	case accel != "kvm" && (accel != "tcg" || err == nil || why == ""):
		t.Errorf("the probe says %q (%q), and a guest in KVM gave %v", accel, why, err)
	}
	if again, because := ProbeAccel(t.Context()); again != accel || because != why {
		t.Errorf("the second probe says %q (%q), the first one %q (%q)", again, because, accel, why)
	}
}

func TestProbeGuest(t *testing.T) {
	// With TCG it runs everywhere, if slowly under load.
	if err := probeGuest(t.Context(), "tcg", bootSector(probeBoot), time.Minute); err != nil {
		t.Errorf("the probe's guest: %v", err)
	}
	hangs := []byte{0xeb, 0xfe} // jmp to itself
	if err := probeGuest(t.Context(), "tcg", bootSector(hangs), 2*time.Second); err == nil || !strings.Contains(err.Error(), "hung") {
		t.Errorf("a guest that hangs: got %v", err)
	}
	falls := []byte{ // lidt [zero]; int3: a triple fault, as from a bad page table
		0x31, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov ds, ax
		0x0f, 0x01, 0x1e, 0x20, 0x7c, // lidt [0x7c20], where zeros are
		0xcc, // int3
	}
	if err := probeGuest(t.Context(), "tcg", bootSector(falls), time.Minute); err == nil || !strings.Contains(err.Error(), "fell over") {
		t.Errorf("a guest that falls over: got %v", err)
	}
}
