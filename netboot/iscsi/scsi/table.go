package scsi

// The operation codes (SPC-4 annex E.3), in rising order.
const (
	opTestUnitReady   = 0x00
	opRequestSense    = 0x03
	opRead6           = 0x08
	opWrite6          = 0x0a
	opInquiry         = 0x12
	opModeSelect6     = 0x15
	opReserve6        = 0x16
	opRelease6        = 0x17
	opModeSense6      = 0x1a
	opStartStop       = 0x1b
	opSendDiagnostic  = 0x1d
	opReadCapacity10  = 0x25
	opRead10          = 0x28
	opWrite10         = 0x2a
	opWriteVerify10   = 0x2e
	opVerify10        = 0x2f
	opPrefetch10      = 0x34
	opSyncCache10     = 0x35
	opReadDefects10   = 0x37
	opWriteSame10     = 0x41
	opUnmap           = 0x42
	opModeSelect10    = 0x55
	opReserve10       = 0x56
	opRelease10       = 0x57
	opModeSense10     = 0x5a
	opPersistentIn    = 0x5e
	opPersistentOut   = 0x5f
	opRead16          = 0x88
	opCompareAndWrite = 0x89
	opWrite16         = 0x8a
	opOrWrite16       = 0x8b
	opWriteVerify16   = 0x8e
	opVerify16        = 0x8f
	opPrefetch16      = 0x90
	opSyncCache16     = 0x91
	opWriteSame16     = 0x93
	opServiceActionIn = 0x9e
	opReportLUNs      = 0xa0
	opMaintenanceIn   = 0xa3
	opRead12          = 0xa8
	opWrite12         = 0xaa
	opWriteVerify12   = 0xae
	opVerify12        = 0xaf
	opReadDefects12   = 0xb7
)

// Service actions of SERVICE ACTION IN (16) and MAINTENANCE IN.
const (
	actionReadCapacity = 0x10
	actionLBAStatus    = 0x12
	actionOpcodes      = 0x0c
)

// usage6 and the others are the usage of the bits of CDBs that have address and length where READ has (SPC-4 6.35.3), without
// the operation code. GROUP NUMBER and CONTROL are not looked at.
func usage6(flags byte) []byte { return []byte{flags | 0x1f, 0xff, 0xff, 0xff, 0} }

func usage10(flags byte) []byte {
	return []byte{flags, 0xff, 0xff, 0xff, 0xff, 0, 0xff, 0xff, 0}
}

func usage12(flags byte) []byte {
	return []byte{flags, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}
}

func usage16(flags byte) []byte {
	return []byte{flags, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}
}

func usageIn() []byte  { return []byte{0, 0, 0, 0, 0, 0, 0xff, 0xff, 0} }
func usageOut() []byte { return []byte{0, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0} }

// The bits of byte 1 of CDBs.
const (
	dpoFUA    = 0x18
	dpoBYTCHK = 0x16
	dpoVerify = 0x12 // BYTCHK of one bit
)

// commands is the table of all that a Unit does, in rising order. It never changes.
var commands = newTable([]command{
	{opTestUnitReady, noAction, legacy, []byte{0, 0, 0, 0, 0}, prepareNothing, nil},
	{opRequestSense, noAction, always, []byte{1, 0, 0, 0xff, 0}, prepareRequestSense, nil},
	{opRead6, noAction, reading, usage6(0), prepareRead, executeRead},
	{opWrite6, noAction, storing, usage6(0), prepareWrite, executeWrite},
	{opInquiry, noAction, always, []byte{1, 0xff, 0xff, 0xff, 0}, prepareInquiry, nil},
	{opModeSelect6, noAction, writing, []byte{0x10, 0, 0, 0xff, 0}, prepareModeSelect, executeModeSelect},
	{opReserve6, noAction, legacy, []byte{0x13, 0, 0, 0, 0}, prepareLegacyReserve, executeReserve},
	{opRelease6, noAction, asking, []byte{0x13, 0, 0, 0, 0}, prepareLegacyReserve, executeRelease},
	{opModeSense6, noAction, reading, []byte{0x08, 0xff, 0xff, 0xff, 0}, prepareModeSense6, nil},
	{opStartStop, noAction, legacy, []byte{0, 0, 0, 0xf7, 0}, prepareStartStop, executeSync},
	{opSendDiagnostic, noAction, writing, []byte{0xe4, 0, 0xff, 0xff, 0}, prepareDiagnostic, nil},
	{opReadCapacity10, noAction, asking, []byte{0, 0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0}, prepareReadCapacity10, nil},
	{opRead10, noAction, reading, usage10(dpoFUA), prepareRead, executeRead},
	{opWrite10, noAction, storing, usage10(dpoFUA), prepareWrite, executeWrite},
	{opWriteVerify10, noAction, storing, usage10(dpoVerify), prepareWriteVerify, executeWriteVerify},
	{opVerify10, noAction, reading, usage10(dpoBYTCHK), prepareVerify, executeVerify},
	{opPrefetch10, noAction, reading, usage10(0), preparePrefetch, nil},
	{opSyncCache10, noAction, writing, usage10(0), prepareSync, executeSync},
	{opReadDefects10, noAction, reading, []byte{0, 0x1f, 0, 0, 0, 0, 0xff, 0xff, 0}, prepareDefects10, nil},
	{opWriteSame10, noAction, storing, usage10(sameUnmap), prepareWriteSame, executeWriteSame},
	{opUnmap, noAction, storing, []byte{0, 0, 0, 0, 0, 0, 0xff, 0xff, 0}, prepareUnmap, executeUnmap},
	{opModeSelect10, noAction, writing, []byte{0x10, 0, 0, 0, 0, 0, 0xff, 0xff, 0}, prepareModeSelect, executeModeSelect},
	{opReserve10, noAction, legacy, []byte{0x13, 0, 0, 0, 0, 0, 0, 0, 0}, prepareLegacyReserve, executeReserve},
	{opRelease10, noAction, asking, []byte{0x13, 0, 0, 0, 0, 0, 0, 0, 0}, prepareLegacyReserve, executeRelease},
	{opModeSense10, noAction, reading, []byte{0x18, 0xff, 0xff, 0, 0, 0, 0xff, 0xff, 0}, prepareModeSense10, nil},
	{opPersistentIn, inReadKeys, legacy, usageIn(), prepareReserveIn, nil},
	{opPersistentIn, inReadReservation, legacy, usageIn(), prepareReserveIn, nil},
	{opPersistentIn, inCapabilities, legacy, usageIn(), prepareReserveIn, nil},
	{opPersistentIn, inFullStatus, legacy, usageIn(), prepareReserveIn, nil},
	{opPersistentOut, outRegister, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opPersistentOut, outReserve, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opPersistentOut, outRelease, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opPersistentOut, outClear, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opPersistentOut, outPreempt, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opPersistentOut, outPreemptAbort, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opPersistentOut, outRegisterIgnore, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opPersistentOut, outRegisterMove, legacy, usageOut(), prepareReserveOut, executeReserveOut},
	{opRead16, noAction, reading, usage16(dpoFUA), prepareRead, executeRead},
	{opCompareAndWrite, noAction, storing, []byte{dpoFUA, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0xff, 0, 0}, prepareCompareAndWrite, executeCompareAndWrite},
	{opWrite16, noAction, storing, usage16(dpoFUA), prepareWrite, executeWrite},
	{opOrWrite16, noAction, storing, usage16(dpoFUA), prepareWrite, executeOrWrite},
	{opWriteVerify16, noAction, storing, usage16(dpoVerify), prepareWriteVerify, executeWriteVerify},
	{opVerify16, noAction, reading, usage16(dpoBYTCHK), prepareVerify, executeVerify},
	{opPrefetch16, noAction, reading, usage16(0), preparePrefetch, nil},
	{opSyncCache16, noAction, writing, usage16(0), prepareSync, executeSync},
	{opWriteSame16, noAction, storing, usage16(sameUnmap | sameNoData), prepareWriteSame, executeWriteSame},
	{opServiceActionIn, actionReadCapacity, asking, []byte{0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareReadCapacity16, nil},
	{opServiceActionIn, actionLBAStatus, reading, usage16(0), prepareLBAStatus, executeLBAStatus},
	{opReportLUNs, noAction, always, []byte{0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareReportLUNs, nil},
	{opMaintenanceIn, actionOpcodes, reading, []byte{0, 0x87, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareReportOpcodes, nil},
	{opRead12, noAction, reading, usage12(dpoFUA), prepareRead, executeRead},
	{opWrite12, noAction, storing, usage12(dpoFUA), prepareWrite, executeWrite},
	{opWriteVerify12, noAction, storing, usage12(dpoVerify), prepareWriteVerify, executeWriteVerify},
	{opVerify12, noAction, reading, usage12(dpoBYTCHK), prepareVerify, executeVerify},
	{opReadDefects12, noAction, reading, []byte{0x1f, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0}, prepareDefects12, nil},
})
