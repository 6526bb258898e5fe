// Package testbed is the lab: QEMU machines with BIOS or UEFI firmware on a network of their own, driven by the real
// server. Tests use it, and so does the command line.
//
// A lab has two halves. The outer half (Lab) stays where it was started. The inner half is a process in network, mount
// and process namespaces of its own, and in a user namespace where the lab was not started by root. It has the bridge br0
// with the server's address, a tap for each machine, the machines, and the server. No interface leads out: the host's
// network is never touched.
//
//	outer half                        files of Config.Dir          inner half
//	Client ─────────────────────────▶ control.sock ───────────────▶ power, link, server; CONNECT to an address inside
//	a proxy for HTTP ◀──────────────── uplink.sock ◀──────────────── 127.0.0.1:3128, told to the server
//	Config.Page, on the host ───────▶ control.sock ───────────────▶ port 8080 of the server
//	Client.Console ◀────────────────── nodes/NAME/console.log ◀───── QEMU
//
// The inner half ends when the outer one does, however that happens, and then the kernel ends every process in it and
// takes its network away. What is left are the files of Config.Dir.
package testbed
