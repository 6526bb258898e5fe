package scsi

// The flags of a command: what may bar it. A Nexus has the same bits for what bars its commands at the moment.
const (
	// reads are commands that a persistent reservation of the exclusive access types keeps from others.
	reads uint32 = 1 << iota
	// writes are commands that the write exclusive types keep from others too.
	writes
	// reserve are commands that RESERVE (6) and (10) keep from others: all but a few (SPC-2 table 10).
	reserve
	// attention are commands that report a pending unit attention in place of what they do (SAM-5 5.14).
	attention
	// alters are commands that a write-protected unit refuses.
	alters
)

// The usual sets of flags.
const (
	always  = 0
	asking  = attention
	legacy  = reserve | attention
	reading = reads | reserve | attention
	writing = writes | reserve | attention
	storing = writing | alters
)

// noAction is the service action of commands that have none.
const noAction = -1

// A command is a row of the table that says what a Unit does with each operation code, and what REPORT SUPPORTED
// OPERATION CODES says of it.
type command struct {
	opcode byte
	action int
	flags  uint32
	// usage is the CDB usage data (SPC-4 6.35.3) without the operation code: the bits of each byte that the unit looks
	// at. Its length tells the CDB's.
	usage []byte
	// prepare looks at the CDB. It completes the command or leaves it to execute; it never blocks.
	prepare func(*Nexus, *Command)
	// execute completes the command, with its data-out; nil where prepare always does. It may block.
	execute func(*Nexus, *Command)
}

// length is that of the CDB.
func (r *command) length() byte { return byte(len(r.usage) + 1) } //nolint:gosec // at most 16

func (r *command) actionByte() byte { return byte(r.action & 0x1f) }

// A table finds the row of a CDB.
type table struct {
	rows     []command
	byOpcode [256]*command // with service actions: any row of the operation code
	byAction map[uint16]*command
}

func newTable(rows []command) *table {
	t := &table{rows: rows, byAction: map[uint16]*command{}}
	for i := range rows {
		r := &rows[i]
		t.byOpcode[r.opcode] = r
		if r.action != noAction {
			t.byAction[actionKey(r.opcode, r.action)] = r
		}
	}
	return t
}

func actionKey(opcode byte, action int) uint16 { return uint16(opcode)<<8 | uint16(action&0xff) }

// find finds the row of a CDB, or says why there is none.
func (t *table) find(cdb []byte) (*command, Sense) {
	if len(cdb) < 2 {
		return nil, senseInvalidOpcode
	}
	r := t.byOpcode[cdb[0]]
	if r != nil && r.action != noAction {
		r = t.byAction[actionKey(cdb[0], int(cdb[1]&0x1f))]
		if r == nil {
			return nil, invalidCDB(1, 4)
		}
	}
	if r == nil || len(cdb) <= len(r.usage) {
		return nil, senseInvalidOpcode
	}
	return r, Sense{}
}

// Prepare looks at a command before its data-out is there. It completes what is refused and what needs no time, or
// leaves c.Done false and sets c.OutLength.
func (n *Nexus) Prepare(c *Command) {
	row, refusal := n.unit.commands.find(c.CDB)
	if row == nil {
		n.refuse(c, refusal)
		return
	}
	c.row = row
	if n.barred.Load()&row.flags != 0 && n.bars(c) {
		return
	}
	// The NACA bit: there is no auto contingent allegiance here, as NORMACA of the INQUIRY data says (SAM-5 5.2).
	if c.CDB[len(row.usage)]&0x04 != 0 {
		n.refuse(c, invalidCDB(uint16(len(row.usage)&0xff), 2))
		return
	}
	if row.flags&alters != 0 {
		if s, protected := n.unit.protected(); protected {
			n.refuse(c, s)
			return
		}
	}
	row.prepare(n, c)
	if c.Done && c.Status == CheckCondition {
		n.dress(c)
	}
}

// bars completes a command that something bars, and says whether anything does. That the unit was reset comes before a
// reservation conflict, and that before all other unit attentions (SAM-5 5.3.3).
func (n *Nexus) bars(c *Command) bool {
	b := n.barred.Load() & c.row.flags
	conflict := b&^attention != 0
	if b&attention != 0 {
		if s, ok := n.attention(conflict); ok {
			n.refuse(c, s)
			return true
		}
	}
	if conflict {
		c.end(ReservationConflict)
	}
	return conflict
}

// Execute completes a command that Prepare left open, with c.Out. It may block on the Medium.
func (n *Nexus) Execute(c *Command) {
	if c.row == nil {
		n.Prepare(c)
	}
	if c.Done {
		return
	}
	c.row.execute(n, c)
	if c.Status == CheckCondition {
		n.dress(c)
	}
}

// ReadFailed turns the outcome of a command whose c.Read the transport could not read into that of a medium error.
func (n *Nexus) ReadFailed(c *Command, err error) {
	lba := uint64(c.Read.Off) / blockSize //nolint:gosec // Prepare set it
	n.refuse(c, mediumSense(err, senseReadError).information(lba))
}

// refuse ends the command with a sense, in the format that the unit is set to.
func (n *Nexus) refuse(c *Command, s Sense) {
	c.fail(s)
	n.dress(c)
}

func (n *Nexus) dress(c *Command) { c.Sense.Descriptor = n.unit.mode.descriptorSense.Load() }
