package scsi

// The operation codes (SPC-4 annex E.3).
const (
	opTestUnitReady    = 0x00
	opRequestSense     = 0x03
	opRead6            = 0x08
	opWrite6           = 0x0a
	opInquiry          = 0x12
	opModeSense6       = 0x1a
	opReadCapacity10   = 0x25
	opRead10           = 0x28
	opWrite10          = 0x2a
	opSyncCache10      = 0x35
	opModeSense10      = 0x5a
	opRead16           = 0x88
	opWrite16          = 0x8a
	opSyncCache16      = 0x91
	opServiceActionIn  = 0x9e
	opReportLUNs       = 0xa0
	opRead12           = 0xa8
	opWrite12          = 0xaa
	actionReadCapacity = 0x10
)

// commands is the table of all that a Unit does. It never changes.
var commands = newTable([]command{
	{opTestUnitReady, noAction, legacy, []byte{0, 0, 0, 0, 0}, prepareNothing, nil},
	{opRequestSense, noAction, always, []byte{1, 0, 0, 0xff, 0}, prepareRequestSense, nil},
	{opRead6, noAction, reading, []byte{0x1f, 0xff, 0xff, 0xff, 0}, prepareRead, executeRead},
	{opWrite6, noAction, storing, []byte{0x1f, 0xff, 0xff, 0xff, 0}, prepareWrite, executeWrite},
	{opInquiry, noAction, always, []byte{1, 0xff, 0xff, 0xff, 0}, prepareInquiry, nil},
	{opModeSense6, noAction, reading, []byte{0x08, 0xff, 0xff, 0xff, 0}, prepareModeSense6, nil},
	{opReadCapacity10, noAction, asking, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0}, prepareReadCapacity10, nil},
	{opRead10, noAction, reading, []byte{0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0}, prepareRead, executeRead},
	{opWrite10, noAction, storing, []byte{0x18, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0}, prepareWrite, executeWrite},
	{opSyncCache10, noAction, writing, []byte{0, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0}, prepareSync, executeSync},
	{opModeSense10, noAction, reading, []byte{0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0}, prepareModeSense10, nil},
	{opRead16, noAction, reading, []byte{0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareRead, executeRead},
	{opWrite16, noAction, storing, []byte{0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareWrite, executeWrite},
	{opSyncCache16, noAction, writing, []byte{0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareSync, executeSync},
	{opServiceActionIn, actionReadCapacity, asking, []byte{0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareReadCapacity16, nil},
	{opReportLUNs, noAction, always, []byte{0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareReportLUNs, nil},
	{opRead12, noAction, reading, []byte{0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareRead, executeRead},
	{opWrite12, noAction, storing, []byte{0x18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareWrite, executeWrite},
})
