package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/images/bootloader"
	"github.com/troupe-dev/troupe/images/store"
)

// putLoaders makes what machines start from their own disks, and keeps it in the store. Without GRUB, or for another
// processor, there is none: then machines boot while the server is there, and a warning says so.
func putLoaders(ctx context.Context, blobs *store.Store, arch string, log *slog.Logger) (*agentapi.Loaders, error) {
	if arch != "amd64" {
		log.Warn("machines boot only while this server is there: their own disks are made bootable for amd64 alone", "arch", arch)
		return nil, nil //nolint:nilnil // no loaders are no error
	}
	made, err := bootloader.Make(ctx)
	if errors.Is(err, bootloader.ErrMissing) {
		log.Warn("machines boot only while this server is there", "error", err)
		return nil, nil //nolint:nilnil // as above
	}
	if err != nil {
		return nil, err
	}
	var out agentapi.Loaders
	for _, l := range []struct {
		content []byte
		blob    *agentapi.Blob
	}{{made.EFI, &out.EFI}, {made.MBR, &out.MBR}, {made.Core, &out.Core}} {
		if *l.blob, err = putBytes(ctx, blobs, l.content); err != nil {
			return nil, fmt.Errorf("keeping the boot loaders of machines: %w", err)
		}
	}
	return &out, nil
}

func putBytes(ctx context.Context, blobs *store.Store, content []byte) (agentapi.Blob, error) {
	w, err := blobs.Create(ctx)
	if err != nil {
		return agentapi.Blob{}, err
	}
	defer func() { _ = w.Abort() }()
	if _, err := io.Copy(w, bytes.NewReader(content)); err != nil {
		return agentapi.Blob{}, err
	}
	b, err := w.Commit()
	return agentapi.Blob(b), err
}
