package iscsi

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
)

// TestMain is also the program of a keeper, with a kernel that is none: it lies then in the keeper's directory.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == Argument {
		if err := testKeeper(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func testKeeper() error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	dir := filepath.Dir(exe)
	logFile, err := os.OpenFile(filepath.Join(dir, "log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(logFile, nil))
	p, lock, err := setApart(dir, log)
	if err != nil {
		return err
	}
	defer lock.Close()
	stayResident(p.proc, log)
	p.proc = p.run // from here on it is asked for what reboots a machine: not this one
	d := newFakeDriver()
	defer d.close()
	return serve(context.Background(), p, d, log)
}
