package scsi

import "encoding/binary"

// What REPORT SUPPORTED OPERATION CODES is asked for, in byte 2 of its CDB (SPC-4 6.35.1).
const (
	reportAll      = 0
	reportOpcode   = 1 // one that has no service actions
	reportAction   = 2 // one that has
	reportEither   = 3
	reportTimeouts = 0x80 // RCTD
)

// What it answers (SPC-4 6.35.2 to 6.35.4).
const (
	hasAction       = 0x01 // SERVACTV of one command among all
	hasTimeouts     = 0x02 // CTDP of one among all
	hasTimeoutsOfOp = 0x80 // CTDP of the only one
	notSupported    = 1
	supportedAsSPC  = 3
	timeoutLength   = 12
)

// prepareReportOpcodes is REPORT SUPPORTED OPERATION CODES (SPC-4 6.35).
func prepareReportOpcodes(n *Nexus, c *Command) {
	allocation := uint64(binary.BigEndian.Uint32(c.CDB[6:]))
	t, timeouts := n.unit.commands, c.CDB[2]&reportTimeouts != 0
	option := c.CDB[2] & 7
	if option == reportAll {
		c.reply(t.describeAll(timeouts), allocation)
		return
	}
	if option > reportEither {
		c.fail(invalidCDB(2, 2))
		return
	}
	opcode, action := c.CDB[3], int(binary.BigEndian.Uint16(c.CDB[4:]))
	r := t.byOpcode[opcode]
	if r != nil && (option == reportOpcode && r.action != noAction || option == reportAction && r.action == noAction) {
		c.fail(invalidCDB(2, 2))
		return
	}
	switch {
	case r == nil || option == reportOpcode:
	case r.action == noAction && action != 0 || action > 0x1f:
		r = nil
	case r.action != noAction:
		r = t.byAction[actionKey(opcode, action)]
	}
	c.reply(r.describe(timeouts), allocation)
}

// describeAll has 8 bytes for each command, after the length of all: operation code, 0, service action (2), 0, CTDP and
// SERVACTV, length of the CDB (2).
func (t *table) describeAll(timeouts bool) []byte {
	b := make([]byte, 4)
	for _, r := range t.rows {
		d := [8]byte{r.opcode}
		if r.action != noAction {
			d[3] = r.actionByte()
			d[5] |= hasAction
		}
		if timeouts {
			d[5] |= hasTimeouts
		}
		d[7] = r.length()
		b = append(b, d[:]...)
		if timeouts {
			b = appendTimeouts(b)
		}
	}
	binary.BigEndian.PutUint32(b, uint32(len(b)-4)) //nolint:gosec // some 20 bytes a row
	return b
}

// describe has CTDP and SUPPORT, the length of the CDB (2), and the usage of its bits: an operation code and service action
// stand for themselves.
func (r *command) describe(timeouts bool) []byte {
	if r == nil {
		return []byte{0, notSupported, 0, 0}
	}
	b := []byte{0, supportedAsSPC, 0, r.length(), r.opcode}
	b = append(b, r.usage...)
	if r.action != noAction {
		b[5] |= r.actionByte()
	}
	if timeouts {
		b[1] |= hasTimeoutsOfOp
		b = appendTimeouts(b)
	}
	return b
}

// appendTimeouts appends a command timeouts descriptor that names no times (SPC-4 6.35.4).
func appendTimeouts(b []byte) []byte {
	return append(b, 0, timeoutLength-2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
}
