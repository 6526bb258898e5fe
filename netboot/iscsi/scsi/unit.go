package scsi

// A Sense is why a command was refused or failed (SPC-4 4.5).
type Sense struct {
	Key       byte
	ASC, ASCQ byte
}
