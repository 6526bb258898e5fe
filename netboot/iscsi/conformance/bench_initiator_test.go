package conformance

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
)

// An initiator is the least that logs in and reads: what programs of others cannot be asked for is how long one request took,
// and to keep a thousand sessions in one process. RFC 7143 section 11 has the layouts.
type initiator struct {
	conn   net.Conn
	in     *bufio.Reader
	lun    byte
	cmdSN  uint32
	statSN uint32 // ExpStatSN
	itt    uint32
	bhs    [48]byte // of the PDU that came last
	data   []byte   // its data segment
}

// dial logs in to the unit that a URL of ours or of tgt names.
func dial(url string, isid uint16) (*initiator, error) {
	parts := strings.Split(strings.TrimPrefix(url, "iscsi://"), "/")
	if len(parts) != 3 {
		return nil, fmt.Errorf("%q names no unit", url)
	}
	conn, err := net.Dial("tcp", parts[0])
	if err != nil {
		return nil, err
	}
	i := &initiator{conn: conn, in: bufio.NewReaderSize(conn, 4<<10), lun: parts[2][0] - '0', cmdSN: 1}
	if err := i.login(parts[1], isid); err != nil {
		conn.Close()
		return nil, fmt.Errorf("logging in to %s: %w", url, err)
	}
	return i, nil
}

func (i *initiator) login(target string, isid uint16) error {
	keys := strings.Join([]string{
		"InitiatorName=iqn.2026-11.dev.troupe:bench", "TargetName=" + target, "SessionType=Normal",
		"HeaderDigest=None", "DataDigest=None", "MaxRecvDataSegmentLength=262144", "InitialR2T=Yes", "ImmediateData=No", "",
	}, "\x00")
	var bhs [48]byte
	bhs[0] = 0x40 | 0x03     // Login Request, immediate
	bhs[1] = 0x80 | 1<<2 | 3 // T, from the operational stage to full feature phase
	bhs[8] = 0x80            // ISID of the random kind
	binary.BigEndian.PutUint16(bhs[12:], isid)
	binary.BigEndian.PutUint32(bhs[24:], i.cmdSN)
	if err := i.send(bhs, []byte(keys)); err != nil {
		return err
	}
	if err := i.receive(); err != nil {
		return err
	}
	if i.bhs[0] != 0x23 || i.bhs[36] != 0 || i.bhs[1]&0x83 != 0x83 {
		return fmt.Errorf("answer % x", i.bhs)
	}
	return nil
}

// read reads so many blocks of 512 bytes, at most 256 KiB. A unit attention is asked away.
func (i *initiator) read(lba uint32, blocks uint16) error {
	for {
		status, err := i.command(lba, blocks)
		if err != nil || status == 0 {
			return err
		}
		// Fixed-format sense data follows its length: the key is in its third byte.
		if status != 2 || len(i.data) < 5 || i.data[4]&0x0f != 6 {
			return fmt.Errorf("reading block %d: status %02x, sense % x", lba, status, i.data)
		}
	}
}

// command sends a READ (10) and takes its answer, to its status.
func (i *initiator) command(lba uint32, blocks uint16) (status byte, err error) {
	var bhs [48]byte
	bhs[0] = 0x01        // SCSI Command
	bhs[1] = 0x80 | 0x40 // F, R
	bhs[9] = i.lun
	binary.BigEndian.PutUint32(bhs[16:], i.itt)
	binary.BigEndian.PutUint32(bhs[20:], uint32(blocks)*512)
	binary.BigEndian.PutUint32(bhs[24:], i.cmdSN)
	binary.BigEndian.PutUint32(bhs[28:], i.statSN)
	bhs[32] = 0x28 // READ (10)
	binary.BigEndian.PutUint32(bhs[34:], lba)
	binary.BigEndian.PutUint16(bhs[39:], blocks)
	i.itt++
	i.cmdSN++
	if err := i.send(bhs, nil); err != nil {
		return 0, err
	}
	for {
		if err := i.receive(); err != nil {
			return 0, err
		}
		switch {
		case i.bhs[0] == 0x21: // SCSI Response
			return i.bhs[3], nil
		case i.bhs[0] == 0x25 && i.bhs[1]&0x01 != 0: // Data-In with the status in it
			return i.bhs[3], nil
		case i.bhs[0] != 0x25 && i.bhs[0] != 0x20: // neither Data-In nor NOP-In
			return 0, fmt.Errorf("PDU % x", i.bhs)
		}
	}
}

func (i *initiator) send(bhs [48]byte, data []byte) error {
	binary.BigEndian.PutUint32(bhs[4:], uint32(len(data))) // no additional header segments: the byte above is 0
	pdu := append(bhs[:], data...)
	pdu = append(pdu, make([]byte, -len(data)&3)...)
	_, err := i.conn.Write(pdu)
	return err
}

// receive takes one PDU, and counts its status.
func (i *initiator) receive() error {
	if _, err := io.ReadFull(i.in, i.bhs[:]); err != nil {
		return err
	}
	n := int(binary.BigEndian.Uint32(i.bhs[4:]) & 0xffffff)
	padded := n + -n&3
	if cap(i.data) < padded {
		i.data = make([]byte, padded)
	}
	i.data = i.data[:padded]
	if _, err := io.ReadFull(i.in, i.data); err != nil {
		return err
	}
	i.data = i.data[:n]
	i.statSN = binary.BigEndian.Uint32(i.bhs[24:]) + 1
	return nil
}
