package iscsi

import (
	"net"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// How much the kernel holds of what was written and the peer has not acknowledged. Left to itself it lets that grow to
// 4 MiB, which no longer lie in the processor's cache when they are sent: reads over loopback are a fifth faster so. A near
// peer gets nearHeld in a round trip, some 14 Gbit/s at nearRTT; for others the kernel's way is the right one.
const (
	nearRTT  = 300 // µs
	nearHeld = 512 << 10
)

// unpace has connections of a listener begin without BBR, where the system has it as its congestion control, and gives the
// name of that one. BBR spreads what it sends over time, by a timer for each segment of 64 KiB at most: for a peer that is
// near this is a third of the processor time of a read, and saves nothing. A connection that had it once keeps the timers
// (Linux does not take sk_pacing_status back), so that it has to begin without. The answer is "" where nothing was changed.
func unpace(l net.Listener) (usual string) {
	sc, ok := l.(syscall.Conn)
	if !ok {
		return ""
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return ""
	}
	// Nothing but speed depends on it, so that errors do not matter.
	_ = raw.Control(func(fd uintptr) {
		now, err := unix.GetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION)
		if err != nil || !strings.HasPrefix(now, "bbr") {
			return
		}
		for _, other := range []string{"cubic", "reno"} { // reno is always there, and for everybody (tcp(7))
			if unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, other) == nil {
				usual = now
				return
			}
		}
	})
	return usual
}

// keepNear bounds what the kernel holds, for a peer that is as near as rtt, in µs; one that is not gets its usual congestion
// control back, where unpace took that away. It is called when both sides have said something.
func (w *wire) keepNear(rtt uint32, usual string) {
	if w.raw == nil {
		return
	}
	// Errors matter as little as above.
	_ = w.raw.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		switch {
		case err == nil && info.Min_rtt <= rtt:
			_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF, nearHeld/2) // Linux takes it twice (socket(7))
		case usual != "":
			_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, usual)
		}
	})
}
