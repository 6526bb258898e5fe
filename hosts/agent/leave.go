package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/u-root/u-root/pkg/mount"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }

// errNoInit says that a root cannot be switched to.
var errNoInit = errors.New("the root has no init: neither /sbin/init nor /lib/systemd/systemd")

// initOf is the path of the init that a root has.
func initOf(root string) (string, error) {
	r, err := os.OpenRoot(root)
	if err != nil {
		return "", err
	}
	defer r.Close()
	for _, p := range []string{"sbin/init", "usr/sbin/init", "lib/systemd/systemd", "usr/lib/systemd/systemd"} {
		// Lstat: the link is followed by the kernel later, with that root as its own.
		if _, err := r.Lstat(p); err == nil {
			return "/" + p, nil
		}
	}
	return "", errNoInit
}

// lastWord is how long the server may take for the last report of the first life.
const lastWord = 500 * time.Millisecond

// leave ends the first life: it leaves what the second one needs in /run, and lets the system's init take over. It
// returns only with an error, and after that error nothing can be done but to reboot.
func (b *boot) leave(ctx context.Context, m *mounted) error {
	a := m.assignment
	init, err := initOf(newRoot)
	if err != nil {
		return err
	}
	if a.ISCSI == nil {
		if err := saveLease(b.cache, b.lease.Load()); err != nil {
			b.log.Warn("a boot without a DHCP server would have no address", "error", err)
		}
	}
	<-b.copied
	if err := errors.Join(installService(), b.copyErr); err != nil {
		return err
	}
	b.rep.mark(agentapi.Mark{Stage: agentapi.StageSwitch, Detail: init})
	// The service would tell it, too, but only if the system comes up: where it does not, this is the last word.
	flush(ctx, b.rep, lastWord)
	armed := b.armWatchdog(a)
	keeper := stateKeeper{path: filepath.Join(runDir, stateFile)}
	err = keeper.change(func(s *RunState) {
		*s = RunState{
			Server: b.client.Server(), Identity: b.id, BootID: b.cmd.Boot, Kernel: b.cmd.Kernel, Inventory: b.inv,
			Assignment: a, Keys: b.keys.String(), Marks: b.rep.pending(), Marked: b.rep.stages(), Lease: b.lease.Load(), CacheDir: cacheDir, NodeDelta: m.delta.ID, Watchdog: armed, Order: orderID(a),
		}
	})
	if err != nil {
		return err
	}
	if b.luns != nil {
		if err := b.luns.session.Keep(); err != nil {
			return err
		}
	}
	if b.panics != "" {
		setPanic(b.panics)
	}
	b.endShells()
	stdlog.SetOutput(io.Discard) // u-root's SwitchRoot tells its steps there
	return fmt.Errorf("switching to the root of %s: %w", a.Host, mount.SwitchRoot(newRoot, init))
}

// unit runs the second life. It has no default dependencies, so that the shutdown does not stop it before it kills all
// that is left: until then it is what forces a reboot that hangs. It needs no network unit: its address is there since
// the initramfs.
const unit = `# Written at each boot by the troupe agent of the initramfs.
[Unit]
Description=troupe agent
DefaultDependencies=no
After=systemd-journald.socket
StartLimitIntervalSec=0
IgnoreOnIsolate=yes

[Service]
ExecStart=` + agentFile + ` service
Restart=always
RestartSec=2
KillMode=mixed
OOMScoreAdjust=-900
`

// keepMounts takes the default dependencies from what is mounted below /run/troupe, which all that runs stands on:
// systemd would try to unmount it early in the shutdown, and show that as failed.
const keepMounts = `[Unit]
DefaultDependencies=no
`

// installService makes systemd start the program. Units in /run are as good as
// those in /etc, survive daemon-reload, and are gone with the boot, so that no image and no node delta has one.
func installService() error {
	const units = "/run/systemd/system"
	wants := filepath.Join(units, "multi-user.target.wants")
	files := map[string]string{
		filepath.Join(units, "troupe-agent.service"):                unit,
		filepath.Join(units, "run-troupe-.mount.d", "10-keep.conf"): keepMounts,
	}
	for path, content := range files {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("installing the service: %w", err)
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return fmt.Errorf("installing the service: %w", err)
		}
	}
	if err := os.MkdirAll(wants, 0o755); err != nil {
		return fmt.Errorf("installing the service: %w", err)
	}
	err := os.Symlink("../troupe-agent.service", filepath.Join(wants, "troupe-agent.service"))
	if err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("installing the service: %w", err)
	}
	return nil
}

// copyProgram takes the program out of the initramfs, which is emptied at the switch.
func copyProgram(to string) error {
	src, err := os.Open("/proc/self/exe")
	if err != nil {
		return fmt.Errorf("copying the agent: %w", err)
	}
	defer src.Close()
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return fmt.Errorf("copying the agent: %w", err)
	}
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o755)
	if err != nil {
		return fmt.Errorf("copying the agent: %w", err)
	}
	_, err = io.Copy(dst, src)
	if err := errors.Join(err, dst.Close()); err != nil {
		return fmt.Errorf("copying the agent: %w", err)
	}
	return nil
}
