// Package bootloader makes what firmware starts from a machine's own disk, when no server is there: GRUB, from the
// distribution's packages, with its commands built in. One loader for UEFI and BIOS, since it can hash what it starts:
// the stub of a unified kernel image cannot, and there is none for a BIOS.
package bootloader

import (
	"archive/tar"
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
)

//go:embed grub.cfg
var config []byte

// Loaders are GRUB for each firmware.
type Loaders struct {
	EFI  []byte // a program of UEFI, for x64
	MBR  []byte // boot.img, 512 bytes
	Core []byte // core.img
}

// common are GRUB's modules that the configuration needs; what a platform needs beside them comes after.
var common = []string{
	"part_gpt", "fat", "normal", "linux", "hashsum", "gcry_sha256", "regexp", "loadenv", "echo", "test", "sleep", "reboot",
	"memdisk", "tar", "configfile",
}

// ErrMissing says that GRUB is not installed; its text names the packages.
var ErrMissing = errors.New("GRUB is not installed (Debian packages grub-common, grub-pc-bin and grub-efi-amd64-bin)")

// prefix is where GRUB looks for its commands in the archive that is built in.
const prefix = "/boot/grub"

// modulesDir is where Debian has GRUB's modules.
const modulesDir = "/usr/lib/grub"

// Make makes them, in less than a second. The same packages give the same bytes.
func Make(ctx context.Context) (Loaders, error) {
	mbr, err := os.ReadFile(filepath.Join(modulesDir, "i386-pc", "boot.img"))
	if err != nil {
		return Loaders{}, missing(err)
	}
	dir, err := os.MkdirTemp("", "troupe-grub-")
	if err != nil {
		return Loaders{}, fmt.Errorf("making boot loaders: %w", err)
	}
	defer os.RemoveAll(dir)
	disk, err := memdisk()
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "memdisk"), disk, 0o600)
	}
	if err != nil {
		return Loaders{}, fmt.Errorf("making boot loaders: %w", err)
	}
	core, err := image(ctx, dir, "i386-pc", "biosdisk", "serial", "terminal")
	if err != nil {
		return Loaders{}, err
	}
	efi, err := image(ctx, dir, "x86_64-efi")
	return Loaders{EFI: efi, MBR: mbr, Core: core}, err
}

// image is GRUB for one platform.
func image(ctx context.Context, dir, platform string, modules ...string) ([]byte, error) {
	out := filepath.Join(dir, platform)
	args := append([]string{"-O", platform, "-o", out, "-p", "(memdisk)" + prefix, "-m", filepath.Join(dir, "memdisk")}, common...)
	said, err := exec.CommandContext(ctx, "grub-mkimage", append(args, modules...)...).CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("making GRUB for %s: %w: %s", platform, missing(err), bytes.TrimSpace(said))
	}
	return os.ReadFile(out)
}

// missing says so where an error comes from GRUB not being there.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, exec.ErrNotFound) {
		return fmt.Errorf("%w: %w", ErrMissing, err)
	}
	return err
}

// memdisk is the archive that GRUB finds its commands in.
func memdisk() ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: prefix[1:] + "/grub.cfg", Mode: 0o644, Size: int64(len(config)), Format: tar.FormatUSTAR})
	if err == nil {
		_, err = w.Write(config)
	}
	if err == nil {
		err = w.Close()
	}
	return b.Bytes(), err
}
