// Package iscsi is an iSCSI target: RFC 7143, error recovery level 0. It stands alone: package scsi says what a logical
// unit does with a command, package lun what its blocks lie on, and a Directory who may use which.
//
// # How data is sent
//
// A read of a file that is mapped into memory is answered with headers out of small buffers and data out of the mapping,
// many responses at a time. This process never looks at the mapping. Little data the kernel copies, by sendmsg; from 128 KiB
// on it gets the pages themselves, by vmsplice and splice (lend.go). Of the ways to send a file, these were measured to be
// the best (loopback, 2 cores, Linux 6.18): at 4 KiB, 32 responses in one call take a third of the processor time of sendfile
// behind a send with MSG_MORE, which needs two calls for each; at 256 KiB, pages that are lent are read at a third more a
// second than those that are copied. Reading into a buffer first would copy all data once more.
//
// Where a file was cut short below its mapping, a process that looks there gets SIGBUS, but what the kernel copies or takes
// from there fails with EFAULT. Then a part of a response may be out already, so that the connection ends; the medium is
// told (scsi.Mapper), and is read through ReadAt from then on, whose error becomes a MEDIUM ERROR when the initiator comes
// again. With data digests, which have to look at the data, and for what is not mapped, ReadAt is the way at once.
//
// Sending what is not in the page cache would wait for the disk, and all other commands of the connection with it. So the
// residency table (resident.go) is asked before, and what is not there is left to a worker.
package iscsi

import (
	"errors"
	"log/slog"
	"time"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// The errors of a Directory.
var (
	ErrNoTarget  = errors.New("no such target")                    // login status 0203h
	ErrForbidden = errors.New("initiator may not use this target") // login status 0202h
	ErrNotReady  = errors.New("target is not ready yet")           // login status 0301h: initiators try again
)

// A Directory says who may use what. It is asked at the beginning and at the end of each login, and at each discovery, and
// answers from memory.
type Directory interface {
	// Discover says how an initiator proves who it is before it is told of targets, and the names of those that it may use.
	Discover(initiator string) (*CHAP, []string)
	// Open gives the target to a session of that initiator. It fails with ErrNoTarget, ErrForbidden or ErrNotReady.
	Open(initiator, target string) (*Target, *CHAP, error)
}

// CHAP is how two ends of a login prove who they are (RFC 7143 section 12.1.3, RFC 1994). A nil CHAP asks for nothing.
type CHAP struct {
	User, Secret string // of the initiator
	// MutualUser and MutualSecret are the target's own, for an initiator that asks for them; both empty: it is refused.
	MutualUser, MutualSecret string
	// Next, where it is not nil, is how the user proves that it is done with what the target gives now. It is compared with
	// ==, and its values must allow that.
	Next NextSecrets
}

// NextSecrets are those of a target that is not there yet. An initiator that proves itself with them is not let in, but told
// to try again, as by ErrNotReady.
type NextSecrets interface {
	Secrets() (secret, mutual string)
	Proven() // is called at each such login; it must not block
}

// Config is what a Server works with. The zero value of a limit means its default.
type Config struct {
	Directory Directory
	// Portals are the addresses "IP:PORT" that discovery tells; none: the one that the initiator reached us at.
	Portals []string
	Log     *slog.Logger // nil means none
	// Changed, where it is set, is called after a session has begun or ended, when Sessions tells of it. It must not block.
	Changed func()

	MaxSessions int // without those of discovery; default 4096
	// InitiatorSessions is how many of them one initiator may have. Default a quarter; where initiators prove who they are,
	// so that a name is worth something, 8 is as many as one has ways to us.
	InitiatorSessions int
	MaxConnections    int           // of all kinds, in login included; default MaxSessions + 1280
	MaxMemory         int64         // bytes of data-out and of data-in that is no mapped memory, of all connections; default 256 MiB
	LoginTimeout      time.Duration // from accept to full feature phase; default 15 s
	IdleTimeout       time.Duration // after which a silent initiator is asked for a NOP-Out; default 30 s
	PingTimeout       time.Duration // for its answer, and for a peer that takes no more bytes; default 15 s
}

// A SessionInfo is how a session is.
type SessionInfo struct {
	Initiator string
	Target    string
	ISID      uint64 // 48 bits
	TSIH      uint16
	Peer      string // "IP:PORT"
	Since     time.Time
	Commands  uint64
	BytesIn   uint64 // of data that the initiator wrote
	BytesOut  uint64 // of data that it read
}

// A LUN is the number of a logical unit of a target, 0 to 16383.
type LUN = uint16

var _ = scsi.Good
