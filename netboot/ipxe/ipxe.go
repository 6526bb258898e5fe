// Package ipxe writes scripts for iPXE (https://ipxe.org/scripting). They keep to commands that the iPXE of 2019 has,
// which Debian and QEMU still ship.
package ipxe

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"time"
)

// A Script is what a machine shall do next, and what the person at its console reads meanwhile.
type Script struct {
	Title   string // one line, for people
	Machine string // one line: which machine this is
	Server  string // the server's URL, without a slash at its end

	Kernel  string   // its URL; "": there is nothing to boot yet, and the machine asks again
	Initrds []string // their URLs, in order
	Args    []string // of the kernel; each without white space at its ends. What no argument can hold is an error
	Disk    *Disk    // to boot in place of Kernel
	Local   bool     // the machine can start something from its own disk, where the server is gone

	Again string // the URL of this script. A number of tries is added to it
	Try   int    // how many times in a row the machine could not boot what it was told to
}

// A Disk is an iSCSI disk to boot from. What no word of a script can hold is an error.
type Disk struct {
	Server    string // address or name
	Port      uint16
	Target    string
	LUN       uint16
	Initiator string
	// User and Secret prove the machine to the target, MutualUser and MutualSecret the target to the machine.
	User, Secret, MutualUser, MutualSecret string
}

const (
	pollEvery = 5 * time.Second // while there is nothing to boot
	firstWait = 2 * time.Second // after the first failure; doubles with each
	longWait  = time.Minute
	maxTries  = 10 // then the machine reboots: its firmware or its network card may be stuck
)

// TryParam is the parameter of the query in which a machine tells how many times it failed.
const TryParam = "try"

// Render is the text of the script, which starts with "#!ipxe".
func (s Script) Render() (string, error) {
	var b strings.Builder
	b.WriteString("#!ipxe\n")
	s.head(&b)
	if s.Kernel == "" && s.Disk == nil {
		fmt.Fprintf(&b, "echo Asking again in %s ...\n", seconds(pollEvery))
		s.again(&b, pollEvery, 0)
		return b.String(), nil
	}
	boot := s.boot
	if s.Disk != nil {
		boot = s.Disk.boot
	}
	if err := boot(&b); err != nil {
		return "", err
	}
	b.WriteString("\n:failed\necho\n")
	if s.Try+1 >= maxTries {
		fmt.Fprintf(&b, "echo Could not boot %d times. Rebooting in %s ...\n", s.Try+1, seconds(longWait))
		fmt.Fprintf(&b, "sleep %d\n", int(longWait.Seconds()))
		s.giveUp(&b)
		return b.String(), nil
	}
	wait := backoff(s.Try)
	fmt.Fprintf(&b, "echo Could not boot. Trying again in %s ...\n", seconds(wait))
	s.again(&b, wait, s.Try+1)
	return b.String(), nil
}

func (s Script) head(b *strings.Builder) {
	fmt.Fprintf(b, "echo\necho troupe: %s\necho Machine: %s\necho Server: %s\n", text(s.Title), text(s.Machine), text(s.Server))
}

// boot gives each initrd a name that holds in both worlds: a BIOS kernel is handed all of them as one, and an EFI kernel
// opens each initrd= as a file that iPXE shows it.
func (s Script) boot(b *strings.Builder) error {
	args := make([]string, 0, len(s.Initrds)+len(s.Args))
	for i := range s.Initrds {
		args = append(args, fmt.Sprintf("initrd=initrd%d", i))
	}
	for _, a := range s.Args {
		if err := safe(a); err != nil {
			return fmt.Errorf("kernel argument %q: %w", a, err)
		}
		args = append(args, a)
	}
	for _, u := range append([]string{s.Kernel}, s.Initrds...) {
		if err := safeURL(u); err != nil {
			return fmt.Errorf("URL %q: %w", u, err)
		}
	}
	b.WriteString("imgfree\n")
	fmt.Fprintf(b, "kernel --name kernel %s %s || goto failed\n", s.Kernel, strings.Join(args, " "))
	for i, u := range s.Initrds {
		fmt.Fprintf(b, "initrd --name initrd%d %s || goto failed\n", i, u)
	}
	b.WriteString("boot || goto failed\n")
	return nil
}

// boot has iPXE log in to the disk, describe it to the system in the iBFT, and start the boot loader that is on it. Plain
// sanboot does both on a BIOS and on UEFI, seen with the iPXE of 2019; with --keep or --drive a failed one leaves the disk
// hooked, and each later try fails. The secrets stay out of the URI, which iPXE shows on the console.
func (d *Disk) boot(b *strings.Builder) error {
	at := fmt.Sprintf("iscsi:%s::%d:%x:%s", d.Server, d.Port, d.LUN, d.Target) // the LUN is hexadecimal (RFC 4173 section 5)
	if err := word(at); err != nil {
		return fmt.Errorf("disk %q: %w", at, err)
	}
	b.WriteString("imgfree\n")
	for _, set := range [...][2]string{
		{"initiator-iqn", d.Initiator},
		{"username", d.User},
		{"password", d.Secret},
		{"reverse-username", d.MutualUser},
		{"reverse-password", d.MutualSecret},
	} {
		if err := word(set[1]); err != nil {
			return fmt.Errorf("setting %s: %w", set[0], err) // without its value, which may be a secret
		}
		fmt.Fprintf(b, "set %s %s\n", set[0], set[1])
	}
	fmt.Fprintf(b, "sanboot %s || goto failed\n", at)
	return nil
}

// word says whether iPXE takes w for one word, and as it is.
func word(w string) error {
	if strings.Contains(w, " ") {
		return errors.New("has a space")
	}
	return safe(w)
}

// again runs this script anew, as the server has it by then. Three times no answer, and the machine reboots.
func (s Script) again(b *strings.Builder, wait time.Duration, try int) {
	next := s.Again
	if try > 0 {
		next += fmt.Sprintf("&%s=%d", TryParam, try)
	}
	for _, w := range []time.Duration{wait, wait + 10*time.Second, longWait} {
		fmt.Fprintf(b, "sleep %d\nchain --replace --autofree %s || echo No answer from the server.\n", int(w.Seconds()), next)
	}
	s.giveUp(b)
}

// giveUp leaves the network to the machine's own disk, where that has something: UEFI goes on with its next boot entry when
// iPXE ends with an error, and on a BIOS iPXE starts the first disk itself. Else the machine reboots.
func (s Script) giveUp(b *strings.Builder) {
	if s.Local {
		b.WriteString("echo Starting what the disk has.\niseq ${platform} efi && exit 1 ||\nsanboot --no-describe --drive 0x80 ||\n")
	}
	b.WriteString("reboot\n")
}

func backoff(try int) time.Duration { return min(firstWait<<min(try, maxTries), longWait) }

func seconds(d time.Duration) string { return fmt.Sprintf("%d s", int(d.Seconds())) }

// Bootstrap is the script for an iPXE that did not say which machine it runs on: it asks again, from the network card
// that was opened last, and says what it knows. script is the URL of the script, without a query.
func Bootstrap(script string) string {
	return "#!ipxe\n" +
		"isset ${netX/mac} || dhcp ||\n" +
		"chain --replace --autofree " + script + "?mac=${netX/mac}&uuid=${uuid}&serial=${serial:uristring} ||\n" +
		"echo No answer from the server. Rebooting in 60 s ...\nsleep 60\nreboot\n"
}

// safe says whether iPXE would hand a kernel argument on as it is. iPXE splits lines at white space, joins them with one
// space, knows no quotes, ends commands at || and &&, and expands ${…} again and again, so that no escape is possible.
func safe(a string) error {
	switch {
	case a == "":
		return errors.New("is empty")
	case strings.ContainsFunc(a, func(c rune) bool { return c < ' ' || c > '~' }):
		return errors.New("has characters that are not printable ASCII")
	case strings.Contains(a, "${"):
		return errors.New("has ${, which the boot loader would expand")
	case strings.Join(strings.Fields(a), " ") != a:
		return errors.New("has white space at an end, or more than one space in a row")
	}
	for f := range strings.FieldsSeq(a) {
		if f == "||" || f == "&&" {
			return fmt.Errorf("has %s, at which the boot loader would end the command", f)
		}
	}
	return nil
}

func safeURL(u string) error {
	if strings.Contains(u, " ") {
		return errors.New("has a space")
	}
	if _, err := url.Parse(u); err != nil {
		return err
	}
	return safe(u)
}

// text is s as echo can show it: one line of printable ASCII that iPXE takes for nothing else.
func text(s string) string {
	s = strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return '?'
		}
		return c
	}, strings.ReplaceAll(s, "${", "$ {"))
	var words []string
	for f := range strings.FieldsSeq(s) {
		if f != "||" && f != "&&" {
			words = append(words, f)
		}
	}
	const columns = 76
	s = strings.Join(words, " ")
	return s[:min(len(s), columns)]
}
