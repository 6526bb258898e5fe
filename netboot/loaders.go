package netboot

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// defaultLoaderDirs are where distributions install iPXE: Debian's package "ipxe", Fedora's "ipxe-bootimgs", and the
// folders that people fill by hand.
var defaultLoaderDirs = []string{"/usr/lib/ipxe", "/usr/share/ipxe", "/usr/share/ipxe/arm64-efi", "/boot", "/srv/tftp"}

// loaderFiles has, for each boot loader that is ever served, the names that distributions give it.
var loaderFiles = map[string][]string{
	"undionly.kpxe":     {"undionly.kpxe"},
	"snponly.efi":       {"snponly.efi", "snponly-x86_64.efi", "ipxe-snponly-x86_64.efi"},
	"ipxe.efi":          {"ipxe.efi", "ipxe-x86_64.efi"},
	"snponly-arm64.efi": {"snponly-arm64.efi", "arm64-efi/snponly.efi"},
	"ipxe-arm64.efi":    {"ipxe-arm64.efi", "arm64-efi/ipxe.efi"},
}

// loaderSet finds boot loaders in some directories, the first first. It looks anew each time, since a package may be
// installed or replaced while we run.
type loaderSet []string

// Open returns fs.ErrNotExist for a name that is no boot loader's, and for a boot loader that is not installed.
func (dirs loaderSet) Open(name string) (io.ReadSeekCloser, error) {
	for _, dir := range dirs {
		for _, file := range loaderFiles[name] {
			f, err := openRegular(filepath.Join(dir, file))
			if err == nil {
				return f, nil
			}
		}
	}
	return nil, fmt.Errorf("boot loader %q: %w", name, fs.ErrNotExist)
}

func (dirs loaderSet) Has(name string) bool {
	f, err := dirs.Open(name)
	if err != nil {
		return false
	}
	_ = f.Close() // it was not even read
	return true
}

func openRegular(path string) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	return os.Open(path)
}
