// Package e2e tries troupe as a whole: the real programs, Debian's packages, firmware and kernel, in the lab's QEMU
// machines. All of it is in its tests.
package e2e
