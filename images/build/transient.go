package build

import (
	"io"
	"maps"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// emptied are directories that an image has, with nothing in them: what is there belongs to a running system, or is a
// cache that only makes images larger and different.
var emptied = []string{
	"boot", "dev", "proc", "run", "sys", "tmp", "var/tmp",
	"var/cache/apt", "var/lib/apt/lists",
	"var/lib/systemd/coredump", "var/lib/systemd/timers", "var/lib/systemd/timesync", "var/log/journal",
}

// hostKeys are the keys by which SSH knows a machine.
const hostKeys = "etc/ssh/ssh_host_*"

func isHostKey(name string) bool {
	ok, _ := path.Match(hostKeys, name) // the pattern is a constant
	return ok
}

// transient are files that differ from build to build and that nobody misses. Those of path.Match's patterns.
var transient = []string{
	"etc/.pwd.lock",
	"etc/.updated", "var/.updated",
	"etc/passwd-", "etc/group-", "etc/shadow-", "etc/gshadow-", "etc/subuid-", "etc/subgid-",
	hostKeys,
	"var/cache/debconf/*-old",
	"var/cache/ldconfig/aux-cache",
	"var/cache/man/*",
	"var/lib/apt/extended_states.*",
	"var/lib/dbus/machine-id",
	"var/lib/dpkg/*-old", "var/lib/dpkg/lock", "var/lib/dpkg/lock-frontend", "var/lib/dpkg/triggers/Lock",
	"var/lib/systemd/credential.secret",
	"var/lib/systemd/random-seed",
	"var/lib/systemd/timers", "var/lib/systemd/timesync", // made where a timer or the clock is first started
}

// isTransient says whether name, as a build left it, does not belong into an image.
func isTransient(name string, dir bool) bool {
	for _, d := range emptied {
		if strings.HasPrefix(name, d+"/") {
			return true
		}
	}
	if strings.HasPrefix(name, "var/log/") {
		return !dir // programs expect the directories that their packages made
	}
	return slices.ContainsFunc(transient, func(p string) bool {
		ok, _ := path.Match(p, name) // the patterns are constants
		return ok
	})
}

// idle are units that packages of every base enable and that have nothing to do on a node, but cost its boot time or its
// role disk and processor later: a node never installs anything, its root is read-only images, and its one file system
// that can be written lies on no LVM. They are there, only not enabled: a role may enable them.
//
// What is cheap or may be wanted stays: fstrim.timer trims the cache's disk, systemd-pstore.service keeps what a crashed
// kernel said.
var idle = []string{
	"apt-daily-upgrade.timer", "apt-daily.timer", // fetch and install upgrades
	"dpkg-db-backup.timer", // copies dpkg's database, which does not change
	"e2scrub_all.timer",    // checks ext4 in snapshots of LVM
	"e2scrub_reap.service", // removes such snapshots, and multi-user.target waits until it looked for them
}

// isIdle says whether name is a link that enables a unit of idle, whatever target wants it in this release of Debian.
func isIdle(name string) bool {
	dir, unit := path.Split(name)
	ok, _ := path.Match("etc/systemd/system/*.wants/", dir) // the pattern is a constant
	return ok && slices.Contains(idle, unit)
}

// sshKeyDropIn has sshd make the host keys that an image must not have, since all its machines would share them. They
// are made once, and stay in the node delta.
func sshKeyDropIn() map[string]entry {
	const conf = `# The image has no host keys: every machine makes its own.
[Service]
ExecStartPre=
ExecStartPre=/usr/bin/ssh-keygen -A
ExecStartPre=/usr/sbin/sshd -t
`
	dir := entry{mode: unix.S_IFDIR | 0o755, mtime: epoch}
	return map[string]entry{
		"etc/systemd/system/ssh.service.d":                   dir,
		"etc/systemd/system/ssh.service.d/50-host-keys.conf": regular(conf, 0o644),
	}
}

// regular is a file of root's with this content.
func regular(content string, mode uint32) entry {
	return entry{
		mode: unix.S_IFREG | mode, mtime: epoch,
		open: func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(content)), nil },
	}
}

// addAll adds entries to the image by path.
func addAll(entries map[string]entry, w *imageWriter) error {
	for _, name := range sortedKeys(entries) {
		if err := w.add(name, entries[name]); err != nil {
			return err
		}
	}
	return nil
}

// sortedKeys are the keys of m in order. That of an entry's directory comes before its own.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
