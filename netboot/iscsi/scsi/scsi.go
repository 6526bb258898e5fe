// Package scsi is what a SCSI disk does with the commands that it is sent: SPC-4 and SBC-3, as far as Linux, Windows,
// iPXE, QEMU and the conformance tests of libiscsi use them. It knows no transport: package iscsi brings commands here
// and carries the outcome back.
//
// A Unit makes COMPARE AND WRITE and ORWRITE atomic against all other writes through the same Unit. A Medium that several
// targets write to therefore belongs to one Unit, which all of them have; only a Medium that is read may have many.
package scsi

import (
	"errors"
	"io"
)

// A Medium is what a Unit keeps its blocks on. Its methods may be called from several goroutines at once. Where two of
// them that overlap write at the same time, each 512 bytes are of one of them. What reads beside one that writes, and what
// the kernel sends of Segments then, may have bytes of before and of after it within one block, as the page cache gives
// them: an initiator that wants one of the two waits for one before it sends the other.
type Medium interface {
	// Size in bytes, a multiple of 512. It never changes.
	Size() int64
	ReadOnly() bool
	// ReadAt and WriteAt stay within Size, and are whole or fail.
	io.ReaderAt
	io.WriterAt
	// Sync returns when all that WriteAt, Zero and Unmap did before it was called outlives a loss of power.
	Sync() error
	// Zero makes n bytes at off read as zeros. With unmap their space is given back where that is possible.
	Zero(off, n int64, unmap bool) error
	// Mapped says whether the byte at off takes space of its own, and for how many bytes from there that is so; n > 0.
	Mapped(off int64) (n int64, mapped bool)
}

// A Mapper is a Medium that is also mapped into memory, so that it can be sent without being copied.
type Mapper interface {
	Medium
	// Segments appends to dst the memory that [off, off+n) lies in at this moment, in order; ok is false where that is
	// not possible now, and then ReadAt is. The memory is for the kernel alone, as in writev or vmsplice: it faults (SIGBUS)
	// if the process looks at it and the file below was cut short. It stays mapped until the Medium is closed. Pages that
	// the kernel has been given stay valid, and show what becomes of the file, until the other end has read them.
	Segments(dst [][]byte, off int64, n int) (segments [][]byte, ok bool)
	// Unmapped says that the kernel could not look at a segment (EFAULT): Segments gives none any more, and ReadAt says why.
	Unmapped()
}

// A Keeper keeps the persistent reservations of a Unit (SPC-4 5.13) over a restart.
type Keeper interface {
	Load() ([]byte, error) // nil, nil where nothing was ever kept
	Save([]byte) error     // durable when it returns
}

// A Port is one end of an I_T nexus, as SCSI sees an initiator.
type Port struct {
	// Name of the initiator port: over iSCSI "NAME,i,0xISID" (RFC 7143 section 4.4.6).
	Name string
	// Target is the name of the target port: "NAME,t,0xTPGT".
	Target string
	// RelativeID is the relative target port identifier.
	RelativeID uint16
}

// Config is what a Unit says of itself.
type Config struct {
	Vendor   string // 8 bytes of ASCII at most; default "TROUPE"
	Product  string // 16 bytes; default "VIRTUAL-DISK"
	Revision string // 4 bytes; default "1"
	// Serial is the unit serial number (VPD page 80h), and what the designators of page 83h are made of: two Units with
	// the same Serial are the same disk to an initiator. Needed.
	Serial string
	// PhysicalBlock is the size of a physical block in bytes, a power of two from 512 to 65536: writes of whole ones are
	// the cheap ones. Default 4096.
	PhysicalBlock int
	// Keep keeps persistent reservations; nil: they end with the process, and APTPL is refused.
	Keep Keeper
}

// A Status is the outcome of a command (SAM-5 5.3.1).
type Status byte

// The statuses that occur here.
const (
	Good                Status = 0x00
	CheckCondition      Status = 0x02
	Busy                Status = 0x08
	ReservationConflict Status = 0x18
	TaskSetFull         Status = 0x28
	ACAActive           Status = 0x30
	TaskAborted         Status = 0x40
)

// MaxTransfer is the most bytes that one command moves, as VPD page B0h says; more is refused.
const MaxTransfer = 8 << 20

// MaxRead is the most bytes that one READ may ask for. Not all who read look at VPD page B0h before: iPXE hands on what UEFI
// firmware asks it for, and that is a file as a whole.
const MaxRead = 32 << 20

// A Command is one CDB on its way through a Unit. The transport fills CDB and calls Prepare; where that leaves Done
// false, it brings Out and calls Execute. The same Command may be used again after Reset.
type Command struct {
	CDB []byte // 6 to 16 bytes, or a variable-length CDB
	// Expected is how many bytes of data-out the initiator means to send, whatever the command takes: over iSCSI the
	// expected data transfer length where the W bit is set, else 0. Only commands whose outcome hangs on it look at it.
	Expected int64
	// OutLength, set by Prepare, is how many bytes of data-out the command takes, from 0 to MaxTransfer.
	OutLength int
	// Out is the data-out, OutLength bytes; shorter where the initiator meant to send less (an overflow of the residual),
	// and then Unit does with it what SPC and SBC say.
	Out []byte

	// The outcome. Done says that there is one.
	Done   bool
	Status Status
	Sense  Sense // where Status is CheckCondition
	// In is data-in, to be sent where Status is Good, cut to what the initiator expects.
	In []byte
	// Read, where its N is not 0, is data-in in place of In: N bytes of the Unit's Medium at Off, which the transport
	// reads as it likes, and then tells ReadFailed if it could not.
	Read struct{ Off, N int64 }

	// What Prepare found in the CDB, for Execute.
	row    *command
	lba    uint64
	blocks uint64
	fua    bool
}

// Reset makes the command fit for another CDB.
func (c *Command) Reset() { *c = Command{} }

// succeed ends the command with status GOOD.
func (c *Command) succeed() { c.Done, c.Status = true, Good }

// reply ends the command with data-in, cut to the allocation length (SPC-4 4.2.5.6).
func (c *Command) reply(in []byte, allocation uint64) {
	c.In = in[:min(uint64(len(in)), allocation)]
	c.succeed()
}

// fail ends the command with status CHECK CONDITION.
func (c *Command) fail(s Sense) {
	c.end(CheckCondition)
	c.Sense = s
}

// end ends the command with a status and no data.
func (c *Command) end(s Status) {
	c.Done, c.Status, c.Sense = true, s, Sense{}
	c.OutLength, c.In, c.Read.Off, c.Read.N = 0, nil, 0, 0
}

// ErrMedium is in the chain of the errors of a Medium that cannot read or write a part of itself.
var ErrMedium = errors.New("medium error")
