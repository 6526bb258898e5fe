package e2e

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"testing"
)

// stockFiles are what a stock disk is made of, beside Debian's packages.
const stockFiles = "testdata/stock"

// stockDisk is a disk with an OS that knows nothing of troupe, as qcow2; what boots from it says so on its console, see
// stockBoot. It takes a minute to build, and is kept for other runs in the user's cache, by what it is made of.
var stockDisk = sync.OnceValues(func() (string, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	key, err := hashFiles(stockFiles)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, "troupe")
	disk := filepath.Join(dir, "stock-"+key[:16]+".qcow2")
	if _, err := os.Stat(disk); err == nil {
		return disk, nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	work, err := os.MkdirTemp(dir, "stock-*")
	if err != nil {
		return "", err
	}
	return disk, errors.Join(buildStock(work, disk), os.RemoveAll(work))
})

// buildStock builds the disk in work, and gives it its name only when it is whole.
func buildStock(work, disk string) error {
	raw, qcow2 := filepath.Join(work, "raw"), filepath.Join(work, "qcow2")
	for _, args := range [][]string{
		{filepath.Join(stockFiles, "build"), raw},
		// Little is gained by more: most of the disk is a kernel, which is compressed.
		{"qemu-img", "convert", "-q", "-c", "-o", "compression_type=zstd", "-O", "qcow2", raw, qcow2},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil { //nolint:noctx // it is for all tests of the run
			return fmt.Errorf("building a stock disk: %s: %w\n%s", args[0], err, out)
		}
	}
	return os.Rename(qcow2, disk)
}

// hashFiles is a name for what the files of a directory say.
func hashFiles(dir string) (string, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil {
		return "", err
	}
	h := sha256.New()
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%s %d\n%s", filepath.Base(name), len(b), b)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// copyStock puts a stock disk of that format ("raw" or "qcow2") into dir.
func copyStock(t *testing.T, dir, format string) string {
	t.Helper()
	disk, err := stockDisk()
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, "stock."+format)
	args := []string{"qemu-img", "convert", "-q", "-O", format, disk, copied}
	if format == "qcow2" {
		args = []string{"cp", disk, copied}
	}
	if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", args[0], err, out)
	}
	return copied
}

// stockLine is what a stock disk says in each boot, when its root has the number of that boot for good.
var stockLine = regexp.MustCompile(`stock: boot (\d+), (bios|uefi), root on (\S+), target (\S+)\r?\n`)

// stockWrite is what it says after each write that its disk has.
var stockWrite = regexp.MustCompile(`stock: write \d+\r?\n`)

// A stockBoot is a boot of a stock disk.
type stockBoot struct {
	Number   int
	Firmware string
	Root     string // a device
	Target   string // of its iSCSI session, or "none"
}

// parseStock finds the first boot in what a console said.
func parseStock(said string) (stockBoot, bool) {
	m := stockLine.FindStringSubmatch(said)
	if m == nil {
		return stockBoot{}, false
	}
	n, err := strconv.Atoi(m[1])
	return stockBoot{Number: n, Firmware: m[2], Root: m[3], Target: m[4]}, err == nil
}
