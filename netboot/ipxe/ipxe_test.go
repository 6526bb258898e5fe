package ipxe

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var boot = Script{
	Title: "n1: web", Machine: "52:54:00:77:00:01 at 10.77.0.11", Server: "http://10.77.0.1:8080",
	Kernel:  "http://10.77.0.1:8080/blobs/sha256/aa?mac=52:54:00:77:00:01&boot=b1",
	Initrds: []string{"http://10.77.0.1:8080/blobs/sha256/bb?mac=52:54:00:77:00:01&boot=b1", "http://10.77.0.1:8080/blobs/sha256/cc?mac=52:54:00:77:00:01&boot=b1&last=1"},
	Args:    []string{"troupe.server=http://10.77.0.1:8080", "console=ttyS0", `foo="a b"`},
	Again:   "http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0",
}

var disk = Disk{
	Server: "10.77.0.1", Port: 3260, LUN: 10, Target: "iqn.2026-11.dev.troupe:n1", Initiator: "iqn.2026-11.dev.troupe:n1:initiator",
	User: "n1", Secret: "0123456789abcdef", MutualUser: "troupe", MutualSecret: "fedcba9876543210",
}

const head = `#!ipxe
echo
echo troupe: n1: web
echo Machine: 52:54:00:77:00:01 at 10.77.0.11
echo Server: http://10.77.0.1:8080
`

const load = `imgfree
kernel --name kernel http://10.77.0.1:8080/blobs/sha256/aa?mac=52:54:00:77:00:01&boot=b1 initrd=initrd0 initrd=initrd1 troupe.server=http://10.77.0.1:8080 console=ttyS0 foo="a b" || goto failed
initrd --name initrd0 http://10.77.0.1:8080/blobs/sha256/bb?mac=52:54:00:77:00:01&boot=b1 || goto failed
initrd --name initrd1 http://10.77.0.1:8080/blobs/sha256/cc?mac=52:54:00:77:00:01&boot=b1&last=1 || goto failed
boot || goto failed

:failed
echo
`

func TestRender(t *testing.T) {
	waiting := boot
	waiting.Kernel, waiting.Initrds, waiting.Title = "", nil, "n1: the image is being built"
	second, last := boot, boot
	second.Try, last.Try = 1, 9
	lastLocal := last
	lastLocal.Local = true
	fromDisk := boot
	fromDisk.Kernel, fromDisk.Initrds, fromDisk.Args, fromDisk.Disk = "", nil, nil, &disk
	tests := []struct {
		name   string
		script Script
		want   string
	}{
		{"first try", boot, head + load + `echo Could not boot. Trying again in 2 s ...
sleep 2
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=1 || echo No answer from the server.
sleep 12
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=1 || echo No answer from the server.
sleep 60
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=1 || echo No answer from the server.
reboot
`},
		{"second try", second, head + load + `echo Could not boot. Trying again in 4 s ...
sleep 4
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=2 || echo No answer from the server.
sleep 14
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=2 || echo No answer from the server.
sleep 60
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=2 || echo No answer from the server.
reboot
`},
		{"last try of a machine with a disk that boots", lastLocal, head + load + `echo Could not boot 10 times. Rebooting in 60 s ...
sleep 60
echo Starting what the disk has.
iseq ${platform} efi && exit 1 ||
sanboot --no-describe --drive 0x80 ||
reboot
`},
		{"last try", last, head + load + `echo Could not boot 10 times. Rebooting in 60 s ...
sleep 60
reboot
`},
		{"a disk", fromDisk, head + `imgfree
set initiator-iqn iqn.2026-11.dev.troupe:n1:initiator
set username n1
set password 0123456789abcdef
set reverse-username troupe
set reverse-password fedcba9876543210
sanboot iscsi:10.77.0.1::3260:a:iqn.2026-11.dev.troupe:n1 || goto failed

:failed
echo
echo Could not boot. Trying again in 2 s ...
sleep 2
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=1 || echo No answer from the server.
sleep 12
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=1 || echo No answer from the server.
sleep 60
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0&try=1 || echo No answer from the server.
reboot
`},
		{"nothing to boot yet", waiting, strings.Replace(head, "n1: web", "n1: the image is being built", 1) + `echo Asking again in 5 s ...
sleep 5
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0 || echo No answer from the server.
sleep 15
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0 || echo No answer from the server.
sleep 60
chain --replace --autofree http://10.77.0.1:8080/boot/ipxe?mac=52:54:00:77:00:01&arch=0 || echo No answer from the server.
reboot
`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := tt.script.Render()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("script (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBootstrap(t *testing.T) {
	const want = `#!ipxe
isset ${netX/mac} || dhcp ||
chain --replace --autofree http://10.77.0.1/boot/ipxe?mac=${netX/mac}&uuid=${uuid}&serial=${serial:uristring} ||
echo No answer from the server. Rebooting in 60 s ...
sleep 60
reboot
`
	if diff := cmp.Diff(want, Bootstrap("http://10.77.0.1/boot/ipxe")); diff != "" {
		t.Errorf("script (-want +got):\n%s", diff)
	}
}

func TestArgumentsThatNoScriptCanHold(t *testing.T) {
	for _, a := range []string{"", " a", "a  b", "a\tb", "a\nreboot", "a\rb", "x=${mac}", "a || reboot", "a && reboot", "ä", "a\x00"} {
		s := boot
		s.Args = []string{a}
		if got, err := s.Render(); err == nil {
			t.Errorf("%q was rendered:\n%s", a, got)
		}
	}
	for _, u := range []string{"http://x/a b", "http://x/\nreboot", "http://x/${mac}"} {
		s := boot
		s.Kernel = u
		if got, err := s.Render(); err == nil {
			t.Errorf("URL %q was rendered:\n%s", u, got)
		}
	}
}

// A setting is one word of a script. What is wrong with a secret is told without the secret.
func TestSettingsThatNoScriptCanHold(t *testing.T) {
	for _, bad := range []string{"", "a b", "a\nreboot", "${mac}", "||", "\xff"} {
		for _, set := range []func(*Disk){
			func(d *Disk) { d.Target = bad + " " },
			func(d *Disk) { d.Initiator = bad },
			func(d *Disk) { d.User = bad },
			func(d *Disk) { d.Secret = bad },
			func(d *Disk) { d.MutualUser = bad },
			func(d *Disk) { d.MutualSecret = bad },
		} {
			d := disk
			set(&d)
			s := boot
			s.Disk = &d
			got, err := s.Render()
			if err == nil {
				t.Errorf("%q was rendered:\n%s", bad, got)
			} else if d.Secret != disk.Secret && len(bad) > 2 && strings.Contains(err.Error(), bad) {
				t.Errorf("%v shows the secret", err)
			}
		}
	}
}

// FuzzRender: whatever a title says, the script has the lines that it has with a plain one.
func FuzzRender(f *testing.F) {
	f.Add("n1: web", "quiet")
	f.Add("a || reboot && sleep ${x}", "a\nb")
	f.Add("\n:failed\ngoto failed", "${${x}}")
	plain, err := boot.Render()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, title, arg string) {
		s := boot
		s.Title, s.Machine, s.Args = title, title, append(s.Args[:len(s.Args):len(s.Args)], arg)
		got, err := s.Render()
		if err != nil {
			return
		}
		lines, want := strings.Split(got, "\n"), strings.Split(plain, "\n")
		if len(lines) != len(want) {
			t.Fatalf("%d lines, want %d:\n%s", len(lines), len(want), got)
		}
		for i, l := range lines {
			switch {
			case strings.HasPrefix(want[i], "echo troupe:"), strings.HasPrefix(want[i], "echo Machine:"):
				if !strings.HasPrefix(l, want[i][:13]) || strings.Contains(l, "${") || strings.Contains(l, " || ") || strings.Contains(l, " && ") {
					t.Fatalf("line %d is %q", i, l)
				}
			case strings.HasPrefix(want[i], "kernel "):
				if l != strings.Replace(want[i], " || goto", " "+arg+" || goto", 1) || strings.Count(l, " || ") != 1 {
					t.Fatalf("line %d is %q", i, l)
				}
			case l != want[i]:
				t.Fatalf("line %d is %q, want %q", i, l, want[i])
			}
		}
	})
}
