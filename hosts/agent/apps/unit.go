package apps

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/troupe-dev/troupe/hosts/agentapi"
)

// wants is the directory of what systemd starts with the system.
const wants = "multi-user.target.wants"

// UnitOf is the name of an app's service; "" for an app without one.
func UnitOf(a agentapi.App) string {
	if len(a.Exec) == 0 {
		return ""
	}
	return "troupe-app-" + a.Name + ".service"
}

// WriteUnits makes the services of apps, to be started with the system. systemd has to be told where it runs already.
func (p Place) WriteUnits(list []agentapi.App) error {
	for _, a := range list {
		unit := UnitOf(a)
		if unit == "" {
			continue
		}
		if err := os.MkdirAll(filepath.Join(p.Units, wants), 0o755); err != nil {
			return fmt.Errorf("making the service of app %s: %w", a.Name, err)
		}
		if err := os.WriteFile(filepath.Join(p.Units, unit), []byte(Unit(a)), 0o644); err != nil {
			return fmt.Errorf("making the service of app %s: %w", a.Name, err)
		}
		err := os.Symlink("../"+unit, filepath.Join(p.Units, wants, unit))
		if err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("making the service of app %s: %w", a.Name, err)
		}
	}
	return nil
}

// RemoveUnits removes the services of apps.
func (p Place) RemoveUnits(list []agentapi.App) error {
	for _, a := range list {
		unit := UnitOf(a)
		if unit == "" {
			continue
		}
		for _, name := range []string{filepath.Join(p.Units, wants, unit), filepath.Join(p.Units, unit)} {
			if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("removing the service of app %s: %w", a.Name, err)
			}
		}
	}
	return nil
}

// Unit is the service of an app (systemd.service(5), systemd.exec(5)).
func Unit(a agentapi.App) string {
	data := path.Join(DataDir, a.Name)
	exec := append([]string{a.Exec[0]}, a.Exec[1:]...)
	dir := a.Mount
	if a.Root {
		dir = "/"
	}
	if !path.IsAbs(exec[0]) {
		exec[0] = path.Join(dir, exec[0])
	}
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Written at each boot by the troupe agent, from the role.")
	line("[Unit]")
	line("Description=app %s", a.Name)
	line("RequiresMountsFor=%s %s", quote(a.Mount), quote(data))
	line("After=network.target")
	line("[Service]")
	line("Restart=on-failure")
	line("RestartSec=1")
	if a.Root { // what it needs of the system is mounted into the image, over which a writable layer lies
		line("RootDirectory=%s", escape(a.Mount))
		line("MountAPIVFS=yes")
		line("BindPaths=%s", escape(data))
		line("BindReadOnlyPaths=-/etc/resolv.conf -/etc/hosts")
	}
	line("WorkingDirectory=%s", escape(dir))
	for _, v := range append([]string{"TROUPE_APP_NAME=" + a.Name, "TROUPE_APP_DIR=" + dir, "TROUPE_APP_DATA=" + data}, a.Env...) {
		line("Environment=%s", quote(v))
	}
	if a.User != "" {
		line("User=%s", a.User)
		if !a.Root { // who it is is known in the system; in another root it is whom that root says, and the data stay root's
			line("ExecStartPre=+/bin/chown -- %s: %s", a.User, quote(data))
		}
	}
	words := make([]string, len(exec))
	for i, w := range exec {
		words[i] = strings.ReplaceAll(quote(w), "$", "$$")
	}
	line("ExecStart=%s", strings.Join(words, " "))
	return b.String()
}

// escape makes a path of a line that takes one as it is: "%" begins a specifier of systemd.
func escape(s string) string { return strings.ReplaceAll(s, "%", "%%") }

// quote makes one word of s (systemd.syntax(7)).
func quote(s string) string {
	return `"` + strings.NewReplacer("%", "%%", `\`, `\\`, `"`, `\"`).Replace(s) + `"`
}
