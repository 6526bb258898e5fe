package scsi

import (
	"bytes"
	"fmt"
	"sync"
	"testing"
)

// memory is a Medium that lies in memory, thin provisioned in clusters of 4 KiB.
type memory struct {
	mu       sync.RWMutex
	data     []byte
	mapped   []bool
	readOnly bool
	err      error // what all methods fail with
	syncs    int
}

const cluster = 4096

func newMemory(size int64) *memory {
	return &memory{data: make([]byte, size), mapped: make([]bool, (size+cluster-1)/cluster)}
}

func (m *memory) Size() int64    { return int64(len(m.data)) }
func (m *memory) ReadOnly() bool { return m.readOnly }

func (m *memory) check(off int64, n int) error {
	if off < 0 || n < 0 || off+int64(n) > int64(len(m.data)) {
		panic(fmt.Sprintf("%d bytes at %d, of a medium of %d", n, off, len(m.data)))
	}
	return m.err
}

func (m *memory) ReadAt(p []byte, off int64) (int, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if err := m.check(off, len(p)); err != nil {
		return 0, err
	}
	return copy(p, m.data[off:]), nil
}

func (m *memory) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.readOnly {
		panic("written, and read-only")
	}
	if err := m.check(off, len(p)); err != nil {
		return 0, err
	}
	for i := off / cluster; i*cluster < off+int64(len(p)); i++ {
		m.mapped[i] = true
	}
	return copy(m.data[off:], p), nil
}

func (m *memory) Sync() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.syncs++
	return m.err
}

func (m *memory) Zero(off, n int64, unmap bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.readOnly {
		panic("zeroed, and read-only")
	}
	if err := m.check(off, int(n)); err != nil {
		return err
	}
	clear(m.data[off : off+n])
	for i := off / cluster; i*cluster < off+n; i++ {
		m.mapped[i] = !unmap || i*cluster < off || (i+1)*cluster > off+n
	}
	return nil
}

func (m *memory) Mapped(off int64) (int64, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	_ = m.check(off, 1)
	first := off / cluster
	last := first
	for last < int64(len(m.mapped)) && m.mapped[last] == m.mapped[first] {
		last++
	}
	return min(last*cluster, int64(len(m.data))) - off, m.mapped[first]
}

// A bench is a unit on memory and a nexus to it, whose unit attention is over.
type bench struct {
	*testing.T
	unit  *Unit
	nexus *Nexus
	mem   *memory
}

// blocksOfBench is how many blocks a bench's medium has: not a multiple of a physical block, so that ends are met.
const blocksOfBench = 8*1024 + 3

func newBench(t *testing.T) *bench {
	t.Helper()
	m := newMemory(blocksOfBench * blockSize)
	return benchOn(t, m, Config{Serial: "0123456789"})
}

func benchOn(t *testing.T, m *memory, c Config) *bench {
	t.Helper()
	u, err := NewUnit(m, c)
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, unit: u, mem: m}
	b.nexus = b.attach("iqn.2026-11.dev.troupe:a,i,0x1")
	return b
}

// attach attaches an initiator port, and takes the unit attention that it begins with.
func (b *bench) attach(name string) *Nexus {
	b.Helper()
	n := b.unit.Attach(Port{Name: name, Target: "iqn.2026-11.dev.troupe:disks,t,0x0001", RelativeID: 1}, func() {})
	wantSense(b.T, do(n, opTestUnitReady6(), nil), attentionPowerOn)
	return n
}

func opTestUnitReady6() []byte { return make([]byte, 6) }

// do brings a command through the unit as a transport does.
func do(n *Nexus, cdb, out []byte) *Command {
	c := &Command{CDB: cdb, Expected: int64(len(out))}
	n.Prepare(c)
	if !c.Done {
		c.Out = out[:min(len(out), c.OutLength)]
		n.Execute(c)
	}
	return c
}

func (b *bench) do(cdb, out []byte) *Command { b.Helper(); return do(b.nexus, cdb, out) }

// good wants a command to succeed.
func (b *bench) good(cdb, out []byte) *Command {
	b.Helper()
	c := b.do(cdb, out)
	wantGood(b.T, c)
	return c
}

func wantGood(t *testing.T, c *Command) {
	t.Helper()
	if !c.Done || c.Status != Good {
		t.Fatalf("CDB % x: done %v, status %#x, sense %+v", c.CDB, c.Done, c.Status, c.Sense)
	}
}

func wantSense(t *testing.T, c *Command, want Sense) {
	t.Helper()
	if !c.Done || c.Status != CheckCondition || c.Sense != want {
		t.Fatalf("CDB % x: done %v, status %#x, sense %+v; want sense %+v", c.CDB, c.Done, c.Status, c.Sense, want)
	}
}

func wantStatus(t *testing.T, c *Command, want Status) {
	t.Helper()
	if !c.Done || c.Status != want {
		t.Fatalf("CDB % x: done %v, status %#x, sense %+v; want status %#x", c.CDB, c.Done, c.Status, c.Sense, want)
	}
}

// read gives what a READ found.
func (b *bench) read(c *Command) []byte {
	b.Helper()
	p := make([]byte, c.Read.N)
	if _, err := b.mem.ReadAt(p, c.Read.Off); err != nil {
		b.Fatal(err)
	}
	return p
}

// fill is n bytes of one value.
func fill(v byte, n int) []byte { return bytes.Repeat([]byte{v}, n) }
