package vm

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/troupe-dev/troupe/images/initramfs"
)

// Files of a machine, in its job's scratch directory.
const (
	initrdFile = "initrd"
	orderFile  = "order"
	layerFile  = "layer"
	resultFile = "result"
)

// Names in the archive that a machine gets.
const (
	orderName  = "order.json"
	UpperNames = "upper/" // begins those of what the upper layer has
)

// An order is what a machine is told to do.
type order struct {
	Boot    bool          `json:"boot"`
	Steps   []string      `json:"steps"`
	Env     []string      `json:"env"`
	Dir     string        `json:"dir"`
	Limit   time.Duration `json:"limit"`
	Network bool          `json:"network"`
	Output  string        `json:"output"`
}

// An event is what a machine tells of its work, a line of JSON each. Exactly one of these is in it.
type event struct {
	Begin  *int   `json:"begin,omitempty"`  // this step begins
	Ended  *ended `json:"ended,omitempty"`  // this step failed, and the machine ends
	Failed string `json:"failed,omitempty"` // something else did, and the machine ends
	Leave  bool   `json:"leave,omitempty"`  // the steps are done, and what follows has its time
	Done   *int64 `json:"done,omitempty"`   // all is done; the result has so many bytes
}

type ended struct {
	Step   int `json:"step"`
	Status int `json:"status"`
}

// writeFiles makes the files that the machine has as disks, and its initramfs.
func (h *Host) writeFiles(ctx context.Context, j Job) error {
	if err := h.writeInitrd(j); err != nil {
		return err
	}
	if err := writeOrder(filepath.Join(j.Scratch, orderFile), j); err != nil {
		return err
	}
	if err := writeSparse(filepath.Join(j.Scratch, resultFile), resultSize); err != nil {
		return err
	}
	layer := filepath.Join(j.Scratch, layerFile)
	if err := writeSparse(layer, layerSize); err != nil {
		return err
	}
	// Nothing of it outlives the machine, so it has no journal; and a fixed name and hash seed, since what the order of names in a
	// directory depends on may show in what a step makes.
	cmd := exec.CommandContext(ctx, mke2fs(), "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-i", "16384",
		"-U", "74726f75-7065-4000-8000-000000000001", "-E", "lazy_itable_init=1,nodiscard,hash_seed=74726f75-7065-4000-8000-000000000002", layer)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("making a file system (Debian package e2fsprogs): %w: %s", err, out)
	}
	return nil
}

// mke2fs is that program, which is not in every user's PATH.
func mke2fs() string {
	const usual = "/usr/sbin/mke2fs"
	if _, err := exec.LookPath("mke2fs"); err != nil {
		return usual
	}
	return "mke2fs"
}

// writeInitrd puts the archive of the guest's init before that of the modules. It is not compressed: it never leaves this machine.
func (h *Host) writeInitrd(j Job) error {
	f, err := os.Create(filepath.Join(j.Scratch, initrdFile))
	if err != nil {
		return err
	}
	err = errors.Join(h.initrd(f, j), f.Close())
	if err != nil {
		return fmt.Errorf("writing its initramfs: %w", err)
	}
	return nil
}

func (h *Host) initrd(w io.Writer, j Job) error {
	prog, err := os.Open(h.init)
	if err != nil {
		return err
	}
	defer func() { _ = prog.Close() }() // it was only read
	if err := initramfs.Plain(w, prog); err != nil {
		return err
	}
	mods, err := os.Open(j.Modules)
	if err != nil {
		return err
	}
	defer func() { _ = mods.Close() }() // it was only read
	_, err = io.Copy(w, mods)
	return err
}

// writeOrder writes what the machine is told to do and what its layer begins with.
func writeOrder(name string, j Job) error {
	limit := j.Limit
	if limit == 0 {
		limit = DefaultLimit
	}
	text, err := json.Marshal(order{
		Boot: j.Boot, Steps: j.Steps, Env: j.Env, Dir: j.Dir, Limit: limit, Network: j.Network, Output: j.Output,
	})
	if err != nil {
		return err
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	w := tar.NewWriter(f)
	err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: orderName, Mode: 0o600, Size: int64(len(text)), Format: tar.FormatPAX})
	if err == nil {
		_, err = w.Write(text)
	}
	if err == nil && j.Files != nil {
		err = j.Files(w)
	}
	err = errors.Join(err, w.Close())
	if err == nil { // a disk has whole sectors
		var fi os.FileInfo
		if fi, err = f.Stat(); err == nil {
			err = f.Truncate((fi.Size() + 4095) &^ 4095)
		}
	}
	return errors.Join(err, f.Close())
}

func writeSparse(name string, size int64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}
