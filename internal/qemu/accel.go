// Package qemu has what all who run QEMU machines need to know alike: the program, and whether KVM really works here.
package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Binary is QEMU for amd64, of the Debian package qemu-system-x86.
const Binary = "qemu-system-x86_64"

// AccelArgs are the arguments that say how instructions are run, by "kvm" or "tcg".
func AccelArgs(accel string) []string {
	if accel == "kvm" {
		return []string{"-accel", "kvm", "-cpu", "host"}
	}
	return []string{"-accel", "tcg,thread=multi", "-cpu", "qemu64"}
}

// probeTime is how long the probe's guest may take. With KVM it needs some 0.3 s, with TCG 0.5 s.
const probeTime = 5 * time.Second

// ProbeAccel is "kvm" where KVM really runs guests, else "tcg", and why. That /dev/kvm can be opened proves nothing: there are
// hosts whose KVM gets through the firmware and hangs as soon as a kernel sets up paging. So a guest has to get that far.
// The result is kept until the host boots again, or has another QEMU.
func ProbeAccel(ctx context.Context) (accel, why string) {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return "tcg", "KVM is not there, or not for this user: " + err.Error()
	}
	f.Close()
	cache, key := probeCache()
	if b, err := os.ReadFile(cache); err == nil {
		if found, rest, _ := strings.Cut(string(b), "\n"); found == key {
			if accel, why, ok := strings.Cut(rest, "\n"); ok {
				return accel, why
			}
		}
	}
	accel, why = "kvm", "a guest ran"
	if err := probeGuest(ctx, "kvm", bootSector(probeBoot), probeTime); err != nil {
		accel, why = "tcg", "KVM does not work here: "+err.Error()
	}
	if cache != "" && ctx.Err() == nil {
		// Without a cache the next lab probes again.
		_ = os.MkdirAll(filepath.Dir(cache), 0o755)
		_ = os.WriteFile(cache, []byte(key+"\n"+accel+"\n"+why), 0o644)
	}
	return accel, why
}

// AccelText says for people what ProbeAccel chose, in brief: "tcg: KVM does not work here".
func AccelText(accel, why string) string {
	brief, _, _ := strings.Cut(why, ": ")
	return accel + ": " + brief
}

// probeCache is the file that remembers the probe's result, "" if there is no place for one, and what it is valid for.
func probeCache() (path, key string) {
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", ""
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", ""
	}
	qemu, err := exec.LookPath(Binary)
	if err != nil {
		return "", ""
	}
	info, err := os.Stat(qemu)
	if err != nil {
		return "", ""
	}
	return filepath.Join(dir, "troupe", "accel"),
		fmt.Sprintf("1 %s %s %d", strings.TrimSpace(string(boot)), info.ModTime().Format(time.RFC3339), info.Size())
}

// probeGuest runs a boot sector, with the CPU that AccelArgs gives, and wants it to end in time as
// probeBoot does.
func probeGuest(ctx context.Context, accel string, boot []byte, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	image, err := os.CreateTemp("", "troupe-probe-*.img")
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(image.Name()) }()
	defer image.Close()
	if _, err := image.Write(boot); err != nil {
		return err
	}
	args := []string{
		"-no-user-config", "-nodefaults", "-machine", "pc,graphics=off", "-display", "none", "-m", "16", "-no-reboot",
		"-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-drive", "if=floppy,format=raw,readonly=on,file=" + image.Name(),
	}
	out, err := exec.CommandContext(ctx, Binary, append(args, AccelArgs(accel)...)...).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("the guest hung for %v", limit)
	case errors.As(err, &exit) && exit.ExitCode() == probeStatus:
		return nil
	case err == nil:
		return errors.New("the guest fell over")
	}
	return fmt.Errorf("%w: %s", err, lastLine(out))
}

// lastLine is the last line of a program's output, without the space around it.
func lastLine(out []byte) string {
	out = bytes.TrimSpace(out)
	return string(out[bytes.LastIndexByte(out, '\n')+1:])
}

// probeStatus is QEMU's exit status after the guest wrote 0x10 to isa-debug-exit: twice that, plus one.
const probeStatus = 0x10<<1 | 1

// bootSector is code as a BIOS wants it.
func bootSector(code []byte) []byte {
	b := make([]byte, 512)
	copy(b, code)
	b[510], b[511] = 0x55, 0xaa
	return b
}

// probeBoot wants interrupts and paging to work and instructions to be run at a useful speed, then ends QEMU by
// isa-debug-exit. It is loaded at 0x7c00 and starts in real mode.
var probeBoot = []byte{
	0xfa,       // cli
	0x31, 0xc0, // xor ax, ax
	0x8e, 0xd8, // mov ds, ax
	0x8e, 0xc0, // mov es, ax
	0x8e, 0xd0, // mov ss, ax
	0xbc, 0x00, 0x7c, // mov sp, 0x7c00
	0xfb, // sti

	// Three ticks of the BIOS's clock.
	0x8b, 0x1e, 0x6c, 0x04, // mov bx, [0x46c]
	0x83, 0xc3, 0x03, // add bx, 3
	0xf4,                   // wait: hlt
	0x39, 0x1e, 0x6c, 0x04, // cmp [0x46c], bx
	0x75, 0xf9, // jne wait
	0xfa, // cli

	// Page tables at 0x1000, 0x2000 and 0x3000: the first 2 MiB, one to one.
	0xbf, 0x00, 0x10, // mov di, 0x1000
	0xb9, 0x00, 0x18, // mov cx, 0x1800
	0x31, 0xc0, // xor ax, ax
	0xf3, 0xab, // rep stosw
	0xc7, 0x06, 0x00, 0x10, 0x03, 0x20, // mov word [0x1000], 0x2003
	0xc7, 0x06, 0x00, 0x20, 0x03, 0x30, // mov word [0x2000], 0x3003
	0xc7, 0x06, 0x00, 0x30, 0x83, 0x00, // mov word [0x3000], 0x0083

	// Long mode.
	0x66, 0xb8, 0x00, 0x10, 0x00, 0x00, // mov eax, 0x1000
	0x0f, 0x22, 0xd8, // mov cr3, eax
	0x66, 0xb8, 0x20, 0x00, 0x00, 0x00, // mov eax, CR4.PAE
	0x0f, 0x22, 0xe0, // mov cr4, eax
	0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0, // mov ecx, EFER
	0x0f, 0x32, // rdmsr
	0x0d, 0x00, 0x01, // or ax, EFER.LME
	0x0f, 0x30, // wrmsr
	0x0f, 0x20, 0xc0, // mov eax, cr0
	0x66, 0x0d, 0x01, 0x00, 0x00, 0x80, // or eax, CR0.PG | CR0.PE
	0x0f, 0x22, 0xc0, // mov cr0, eax
	0x0f, 0x01, 0x16, 0x90, 0x7c, // lgdt [0x7c90]
	0xea, 0x6d, 0x7c, 0x08, 0x00, // jmp 8:0x7c6d

	// Fifty million rounds.
	0xb9, 0x80, 0xf0, 0xfa, 0x02, // mov ecx, 50000000
	0xff, 0xc9, // round: dec ecx
	0x75, 0xfc, // jnz round

	0x66, 0xba, 0xf4, 0x00, // mov dx, 0xf4
	0xb0, 0x10, // mov al, 0x10
	0xee,       // out dx, al
	0xf4,       // stop: hlt
	0xeb, 0xfd, // jmp stop

	// At 0x7c80, the descriptors: none, and 64-bit code. At 0x7c90, where they are.
	0, 0, 0, 0, 0, 0, 0, 0,
	0, 0, 0, 0, 0x00, 0x9a, 0x20, 0x00,
	15, 0, 0x80, 0x7c, 0, 0,
}
