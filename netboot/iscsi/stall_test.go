package iscsi

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// What comes before its turn has memory for what has come, not for what it is to move.
func TestMemoryBehindHole(t *testing.T) {
	const memory, writes = 4 * scsi.MaxTransfer, 8
	f := serve(t, func(c *Config) { c.MaxMemory = memory })
	i := f.login("ImmediateData=Yes")
	data := pattern(64<<10, 4)
	first := i.command(testUnitReady(), 0, nil)
	var early []*pdu
	for n := range uint32(writes) {
		p := i.command(write10(n*128, 128), 0, data[:512])
		p.setTTT(uint32(len(data)))
		i.send(p)
		early = append(early, p)
	}
	i.quiet()
	const rest = memory - writes<<minBufferShift
	if !f.srv.memory.TryAcquire(rest) {
		t.Fatal("they hold more than what they brought takes")
	}
	f.srv.memory.Release(rest)
	i.send(first)
	i.expectGood(i.outcome(first))
	for _, cmd := range early {
		r2t := i.expectOpcode(opR2T)
		if r2t.itt() != cmd.itt() || r2t.bufferOff() != 512 {
			t.Fatalf("R2T at %d of task %d, want 512 of %d", r2t.bufferOff(), r2t.itt(), cmd.itt())
		}
		cmd.setTTT(r2t.ttt())
	}
	for n, cmd := range early {
		i.send(dataOut(cmd, cmd.ttt(), 0, 512, data[512:], true))
		i.expectGood(i.outcome(cmd))
		if !bytes.Equal(f.disk.bytes(n<<16, len(data)), data) {
			t.Errorf("write %d: the disk has other bytes than were written", n)
		}
	}
}

// A write that has memory of data that came unasked does not wait for more of it for ever.
func TestNoMemoryToGrow(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory, c.PingTimeout = scsi.MaxTransfer, 2*patience })
	i := f.login("ImmediateData=Yes")
	first := i.command(testUnitReady(), 0, nil)
	early := i.command(write10(0, 128), 0, pattern(512, 4))
	early.setTTT(128 * 512)
	i.send(early)
	i.quiet()
	const rest = scsi.MaxTransfer - 1<<minBufferShift
	if !f.srv.memory.TryAcquire(rest) {
		t.Fatal("it holds more than what it brought takes")
	}
	i.send(first)
	i.expectGood(i.outcome(first))
	if r := i.outcome(early); r.status != byte(scsi.Busy) {
		t.Errorf("status %#02x, want BUSY", r.status)
	}
	f.srv.memory.Release(rest)
	i.expectGood(i.do(i.command(write10(0, 1), 0, pattern(512, 4))))
}

// The reader waits for memory once, and not for each command.
func TestReaderWaitsOnce(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory, c.PingTimeout = scsi.MaxTransfer, patience })
	i := f.login("ImmediateData=Yes")
	if !f.srv.memory.TryAcquire(scsi.MaxTransfer) {
		t.Fatal("there is no memory at first")
	}
	for range 2 * patience / memoryPatience {
		if r := i.do(i.command(write10(0, 1), 0, pattern(512, 1))); r.status != byte(scsi.Busy) {
			t.Fatalf("status %#02x, want BUSY", r.status)
		}
	}
	f.srv.memory.Release(scsi.MaxTransfer)
	i.expectGood(i.do(i.command(write10(0, 1), 0, pattern(512, 1))))
}

// Requests may wait for one before them, but not for the same one for ever.
func TestHoleThatStays(t *testing.T) {
	const deadlines = 20
	for name, tt := range map[string]struct {
		held  bool
		moves uint32 // what ExpCmdSN goes on by in the time of one deadline
		ends  bool
	}{
		"nothing waits":      {false, 0, false},
		"for the same":       {true, 0, true},
		"for another always": {true, 1, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &session{held: map[uint32]held{}}
			if tt.held {
				s.held[1000] = held{}
			}
			c := &conn{s: s}
			ends := false
			for range deadlines {
				ends = ends || c.stalled()
				s.expCmdSN += tt.moves
			}
			if ends != tt.ends {
				t.Errorf("stalled %v, want %v", ends, tt.ends)
			}
		})
	}
}

// A task may wait for its data as long as the connection brings some of it, and enough of all.
func TestCrawlingData(t *testing.T) {
	srv, err := NewServer(Config{Directory: directory{NewTarget(diskTarget)}, IdleTimeout: time.Second, PingTimeout: 2 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	const deadlines = 20
	for name, tt := range map[string]struct {
		each uint64 // bytes of data in the time of one deadline
		ends bool
	}{
		"a byte at a time": {1, true},
		"too little":       {slowest / 2, true},
		"enough":           {slowest, false},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := &task{receiving: true}
			c := &conn{srv: srv, s: &session{}, tasks: map[uint32]*task{1: cmd}}
			ends := false
			for range deadlines {
				c.watch.data += tt.each
				cmd.touched = c.ticks
				ends = ends || c.stalled()
			}
			if ends != tt.ends {
				t.Errorf("%d bytes a second: stalled %v, want %v", tt.each, ends, tt.ends)
			}
		})
	}
}

// An initiator that says nothing is asked whether it is there, and has to answer, unless it is still taking data.
func TestSilence(t *testing.T) {
	srv, err := NewServer(Config{Directory: directory{NewTarget(diskTarget)}})
	if err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		each uint64 // bytes written in the time of one deadline, beside the ping
		pdus uint64 // that came
		ends int    // the deadline at which it does; 0: never
	}{
		"the ping alone": {0, 0, 2},
		"data is taken":  {64 << 10, 0, 0},
		"PDUs come":      {0, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			here, there := net.Pipe()
			drained := make(chan struct{})
			go func() {
				_, _ = io.Copy(io.Discard, there) // to its end
				close(drained)
			}()
			c := newConn(t.Context(), srv, here, &crowd{})
			c.s = &session{conn: c}
			c.changed.L = &c.s.mu
			ended := 0
			for n := 1; n <= 20 && ended == 0; n++ {
				c.wire.sent.Add(tt.each)
				c.watch.pdus += tt.pdus
				if err := c.silent(); err != nil {
					ended = n
				}
			}
			if ended != tt.ends {
				t.Errorf("ended at deadline %d, want %d", ended, tt.ends)
			}
			c.close()
			<-drained
		})
	}
}

// All sessions of an initiator have one share of the memory.
func TestMemoryOfInitiator(t *testing.T) {
	f := serve(t, func(c *Config) { c.MaxMemory = 2 * scsi.MaxTransfer })
	f.add(1, &disk{data: make([]byte, scsi.MaxTransfer)})
	i, j := f.login("ImmediateData=Yes"), f.other()
	i.do(i.on(1, i.command(testUnitReady(), 0, nil)))
	all := i.on(1, i.command(write10(0, scsi.MaxTransfer/512), 0, []byte{}))
	all.setTTT(scsi.MaxTransfer)
	i.send(all)
	i.expectOpcode(opR2T)
	second := f.dial()
	if status := second.login(loginOptions{isid: 0x800000000009}); status != loginOK {
		t.Fatalf("login status %#04x", status)
	}
	second.ready()
	if r := second.do(second.command(write10(0, 1), 0, pattern(512, 1))); r.status != byte(scsi.Busy) {
		t.Errorf("status %#02x, want BUSY", r.status)
	}
	j.expectGood(j.do(j.command(write10(0, 1), 0, pattern(512, 1))))
}
