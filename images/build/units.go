package build

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// unitDirs are where systemd looks for units, first one first (systemd.unit(5), "UNIT FILE LOAD PATH").
var unitDirs = []string{
	"etc/systemd/system", "usr/local/lib/systemd/system", "usr/lib/systemd/system", "lib/systemd/system",
}

// An install is the [Install] section of a unit (systemd.unit(5)).
type install struct {
	wantedBy, requiredBy, upheldBy, alias, also []string
	defaultInstance                             string
}

func (i install) isEmpty() bool {
	return len(i.wantedBy)+len(i.requiredBy)+len(i.upheldBy)+len(i.alias)+len(i.also) == 0
}

// enable does what "systemctl enable" does with units, on files alone: it puts the links that their [Install] sections
// ask for into the layer, and goes on with the units that these name in Also=.
func (v *view) enable(units []string) error {
	isNamed, done := make(map[string]bool), make(map[string]bool)
	todo := make([]string, len(units))
	for i, u := range units {
		if !strings.Contains(u, ".") {
			u += ".service"
		}
		todo[i], isNamed[u] = u, true
	}
	for len(todo) > 0 {
		unit := todo[0]
		todo = todo[1:]
		if done[unit] {
			continue
		}
		done[unit] = true
		also, err := v.enableOne(unit, isNamed[unit])
		if err != nil {
			return fmt.Errorf("enabling unit %q: %w", unit, err)
		}
		todo = append(todo, also...)
	}
	return nil
}

// enableOne makes the links of one unit. A unit that was asked for by name, and not by another's Also=, must have some.
func (v *view) enableOne(unit string, named bool) (also []string, err error) {
	if strings.Contains(unit, "/") {
		return nil, errors.New("a unit is enabled by its name, not by a path")
	}
	file, err := v.findUnit(unit)
	if errors.Is(err, errNoUnit) && !named {
		return nil, nil // packages name units in Also= that come with others
	}
	if err != nil {
		return nil, err
	}
	if !strings.Contains(unit, "@") {
		unit = path.Base(file) // its own name, should it have been called by another
	}
	in, err := v.readInstall(unit, file)
	if err != nil {
		return nil, err
	}
	if in.isEmpty() {
		if !named {
			return nil, nil
		}
		return nil, errors.New("it has nothing in an [Install] section, so nothing would ever start it")
	}
	return in.also, v.linkInstalls(unit, file, in)
}

// linkInstalls makes the links that in, of the unit in file, asks for.
func (v *view) linkInstalls(unit, file string, in install) error {
	link := unit
	if prefix, isTemplate := cutTemplate(unit); isTemplate {
		if in.defaultInstance == "" && len(in.wantedBy)+len(in.requiredBy)+len(in.upheldBy) > 0 {
			return errors.New("it is a template without DefaultInstance=: enable NAME@INSTANCE")
		}
		link = prefix + "@" + in.defaultInstance + path.Ext(unit)
	}
	links := slices.Clone(in.alias)
	for _, t := range in.wantedBy {
		links = append(links, t+".wants/"+link)
	}
	for _, t := range in.requiredBy {
		links = append(links, t+".requires/"+link)
	}
	for _, t := range in.upheldBy {
		links = append(links, t+".upholds/"+link)
	}
	for _, l := range links {
		if err := v.linkUnit(l, link, file); err != nil {
			return err
		}
	}
	return nil
}

// cutTemplate splits a template's name, "foo@.service", and is false for any other.
func cutTemplate(unit string) (prefix string, ok bool) {
	prefix, rest, found := strings.Cut(unit, "@")
	return prefix, found && rest == path.Ext(unit)
}

var errNoUnit = errors.New("there is no such unit, neither in the base nor in the role's files and packages")

// findUnit is the path of the file that holds unit: its own, or else that of its template.
func (v *view) findUnit(unit string) (string, error) {
	names := []string{unit}
	if prefix, _, ok := strings.Cut(unit, "@"); ok {
		names = append(names, prefix+"@"+path.Ext(unit))
	}
	for _, name := range names {
		for _, dir := range unitDirs {
			file, err := v.resolve(path.Join(dir, name), true)
			if err != nil {
				return "", err
			}
			if file == "dev/null" {
				return "", errors.New("it is masked: its file is a link to /dev/null")
			}
			if _, ok, err := v.lstat(file); err != nil {
				return "", err
			} else if ok {
				return file, nil
			}
		}
	}
	return "", errNoUnit
}

// readInstall reads the [Install] sections of a unit's file and its drop-ins.
func (v *view) readInstall(unit, file string) (install, error) {
	dropins, err := v.dropins(unit)
	if err != nil {
		return install{}, err
	}
	values := make(map[string][]string)
	for _, name := range append([]string{file}, dropins...) {
		b, err := v.readFile(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a drop-in that is masked
		}
		if err != nil {
			return install{}, err
		}
		parseInstall(string(b), values)
	}
	for key, list := range values {
		for i := range list {
			if list[i], err = expand(list[i], unit); err != nil {
				return install{}, fmt.Errorf("%s= in its [Install] section: %w", key, err)
			}
		}
	}
	in := install{
		wantedBy: values["WantedBy"], requiredBy: values["RequiredBy"], upheldBy: values["UpheldBy"],
		alias: values["Alias"], also: values["Also"],
	}
	if d := values["DefaultInstance"]; len(d) > 0 {
		in.defaultInstance = d[len(d)-1]
	}
	for _, n := range slices.Concat(in.wantedBy, in.requiredBy, in.upheldBy, in.alias, in.also, []string{in.defaultInstance}) {
		if strings.Contains(n, "/") {
			return install{}, fmt.Errorf("%q in its [Install] section is not the name of a unit", n)
		}
	}
	return in, nil
}

// dropins are the files that add to a unit's own, in the order in which they are read: by name, and of those with the
// same name the one in the first of unitDirs.
func (v *view) dropins(unit string) ([]string, error) {
	dirs := []string{unit + ".d"}
	if prefix, rest, ok := strings.Cut(unit, "@"); ok && rest != path.Ext(unit) {
		dirs = append(dirs, prefix+"@"+path.Ext(unit)+".d")
	}
	files := make(map[string]string)
	for _, d := range dirs {
		for _, unitDir := range unitDirs {
			dir := path.Join(unitDir, d)
			names, err := v.readDir(dir)
			if err != nil {
				return nil, err
			}
			for _, n := range names {
				if _, ok := files[n]; !ok && strings.HasSuffix(n, ".conf") {
					files[n] = path.Join(dir, n)
				}
			}
		}
	}
	var list []string
	for _, n := range sortedKeys(files) {
		list = append(list, files[n])
	}
	return list, nil
}

// parseInstall adds what the [Install] sections of a unit file have to values. An empty value takes back those before.
func parseInstall(text string, values map[string][]string) {
	text = strings.ReplaceAll(text, "\\\n", " ")
	in := false
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		switch {
		case line == "" || line[0] == '#' || line[0] == ';':
		case line[0] == '[':
			in = line == "[Install]"
		case in:
			key, value, ok := strings.Cut(line, "=")
			key = strings.TrimSpace(key)
			if words := strings.Fields(value); ok && len(words) > 0 {
				values[key] = append(values[key], words...)
			} else if ok {
				delete(values, key)
			}
		}
	}
}

// expand replaces the specifiers that a unit's name answers (systemd.unit(5), "SPECIFIERS").
func expand(s, unit string) (string, error) {
	name := strings.TrimSuffix(unit, path.Ext(unit))
	prefix, instance, _ := strings.Cut(name, "@")
	final := prefix[strings.LastIndex(prefix, "-")+1:]
	known := map[byte]string{'n': unit, 'N': name, 'p': prefix, 'i': instance, 'j': final, '%': "%"}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '%' {
			b.WriteByte(s[i])
			continue
		}
		if i++; i == len(s) {
			return "", fmt.Errorf("%q ends in %%", s)
		}
		v, ok := known[s[i]]
		if !ok {
			return "", fmt.Errorf("%q: %%%c is not known before a machine runs", s, s[i])
		}
		b.WriteString(v)
	}
	return b.String(), nil
}

// linkUnit puts a link to a unit's file into /etc/systemd/system, unless the very same is there.
func (v *view) linkUnit(link, unit, file string) error {
	name := path.Join(unitDirs[0], link)
	if name == path.Join(unitDirs[0], unit) && name == file {
		return nil // an alias that is the unit itself
	}
	name, err := v.resolve(name, false)
	if err != nil {
		return err
	}
	old, ok, err := v.lstat(name)
	if err != nil {
		return err
	}
	if ok {
		there, err := v.resolve(name, true)
		if err != nil {
			return err
		}
		if old.isLink() && there == file {
			return nil
		}
		return fmt.Errorf("its link %q would replace something else", "/"+name)
	}
	_, _, err = v.put(name, entry{mode: unix.S_IFLNK | 0o777, mtime: epoch, target: "/" + file})
	return err
}
