package iscsi

import (
	"bytes"
	"context"
	"strings"
	"sync"
	"testing"

	"github.com/troupe-dev/troupe/netboot/iscsi/scsi"
)

// other is a second session with the same target.
func (f *fixture) other() *initiator {
	f.t.Helper()
	i := f.dial()
	if status := i.login(loginOptions{name: nodeName + "2", isid: 0x800000000002}); status != loginOK {
		f.t.Fatalf("login status %#04x", status)
	}
	i.ready()
	return i
}

func (i *initiator) expectManaged(p *pdu, response byte) {
	i.t.Helper()
	r := i.expectOpcode(opTaskResp)
	if r.itt() != p.itt() || r.bhs[2] != response {
		i.t.Fatalf("response %d to request %d, want %d to %d", r.bhs[2], r.itt(), response, p.itt())
	}
}

// waiting sends a write and leaves the target waiting for its data.
func (i *initiator) waiting() (cmd, r2t *pdu) {
	i.t.Helper()
	cmd = i.command(write10(0, 8), 0, []byte{})
	cmd.setTTT(8 * 512)
	i.send(cmd)
	return cmd, i.expectOpcode(opR2T)
}

func TestAbortTask(t *testing.T) {
	t.Run("that waits for data", func(t *testing.T) {
		f := serve(t, nil)
		i := f.login()
		cmd, r2t := i.waiting()
		p := i.manage(taskAbort, cmd)
		i.send(p)
		i.expectManaged(p, taskComplete)
		i.send(dataOut(cmd, r2t.ttt(), 0, 0, pattern(8*512, 1), true))
		i.quiet()
		if !bytes.Equal(f.disk.bytes(0, 8*512), diskContent()[:8*512]) {
			t.Error("an aborted write was done")
		}
	})
	t.Run("that runs", func(t *testing.T) {
		f := serve(t, nil)
		g := newGate()
		f.disk.hook(g.holding("sync"))
		i := f.login()
		cmd := i.command(sync10(), 0, nil)
		i.send(cmd)
		<-g.came
		p := i.manage(taskAbort, cmd)
		i.send(p)
		i.quiet() // no answer as long as it runs
		again := i.command(testUnitReady(), 0, nil)
		again.setITT(cmd.itt())
		i.expectGood(i.do(again)) // the tag is free
		close(g.open)
		i.expectManaged(p, taskComplete)
		i.quiet()
	})
	t.Run("that is done", func(t *testing.T) {
		i := serve(t, nil).login()
		cmd := i.command(testUnitReady(), 0, nil)
		i.expectGood(i.do(cmd))
		p := i.manage(taskAbort, cmd)
		i.send(p)
		i.expectManaged(p, taskNotThere)
	})
	t.Run("that has not come", func(t *testing.T) {
		i := serve(t, nil).login()
		cmd := i.command(testUnitReady(), 0, nil)
		p := i.manage(taskAbort, cmd)
		i.send(p)
		i.expectManaged(p, taskComplete)
		// Its number is used up: the one behind it is done.
		i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
		i.send(cmd)
		i.quiet()
	})
	t.Run("that came too early", func(t *testing.T) {
		i := serve(t, nil).login()
		first := i.command(testUnitReady(), 0, nil)
		early := i.command(testUnitReady(), 0, nil)
		i.send(early)
		p := i.manage(taskAbort, early)
		i.send(p)
		i.expectManaged(p, taskComplete)
		i.expectGood(i.do(first))
		i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
	})
}

func TestAbortTaskSet(t *testing.T) {
	f := serve(t, nil)
	i, j := f.login(), f.other()
	i.waiting()
	i.waiting()
	cmd, r2t := j.waiting()
	p := i.manage(taskAbortSet, nil)
	i.send(p)
	i.expectManaged(p, taskComplete)
	i.quiet()
	// Those of another session go on.
	j.send(dataOut(cmd, r2t.ttt(), 0, 0, pattern(8*512, 1), true))
	j.expectGood(j.outcome(cmd))
}

func TestClearTaskSet(t *testing.T) {
	f := serve(t, nil)
	i, j := f.login(), f.other()
	i.waiting()
	cmd, r2t := j.waiting()
	p := i.manage(taskClearSet, nil)
	i.send(p)
	i.expectManaged(p, taskComplete)
	j.send(dataOut(cmd, r2t.ttt(), 0, 0, pattern(8*512, 1), true))
	j.quiet()
	i.expectGood(i.do(i.command(testUnitReady(), 0, nil)))
	if r := j.do(j.command(testUnitReady(), 0, nil)); r.sense != "6/2f00" {
		t.Errorf("status %#02x, sense %s for whose command was cleared, want COMMANDS CLEARED BY ANOTHER INITIATOR", r.status, r.sense)
	}
	i.send(p) // when it has none
	i.expectManaged(p, taskComplete)
	j.expectGood(j.do(j.command(testUnitReady(), 0, nil)))
}

func TestResets(t *testing.T) {
	for name, function := range map[string]byte{"LUN": taskLUNReset, "target warm": taskWarmReset} {
		t.Run(name, func(t *testing.T) {
			f := serve(t, nil)
			g := newGate()
			f.disk.hook(g.holding("sync"))
			i, j := f.login(), f.other()
			i.waiting()
			j.waiting()
			j.send(j.command(sync10(), 0, nil))
			<-g.came
			p := i.manage(function, nil)
			i.send(p)
			i.quiet() // until the other's command is done
			close(g.open)
			i.expectManaged(p, taskComplete)
			j.quiet()
			for _, k := range []*initiator{i, j} {
				if r := k.do(k.command(testUnitReady(), 0, nil)); r.status != byte(scsi.CheckCondition) || !strings.HasPrefix(r.sense, "6/29") {
					t.Errorf("after a reset: status %#02x, sense %s, want a unit attention", r.status, r.sense)
				}
			}
		})
	}
}

func TestTargetColdReset(t *testing.T) {
	f := serve(t, nil)
	i, j := f.login(), f.other()
	p := i.manage(taskColdReset, nil)
	i.send(p)
	i.expectManaged(p, taskComplete)
	for _, k := range []*initiator{i, j} {
		if got := k.closed(); len(got) > 0 {
			t.Errorf("opcode %#02x comes after a cold reset", got[0].opcode())
		}
	}
}

func TestTaskManagementRefusals(t *testing.T) {
	i := serve(t, nil).login()
	for _, tt := range []struct {
		name     string
		function byte
		lun      LUN
		response byte
	}{
		{"reassign", taskReassign, 0, taskNoReassign},
		{"clear ACA", taskClearACA, 0, taskUnsupported},
		{"function that is none", 99, 0, taskUnsupported},
		{"abort set of no unit", taskAbortSet, 3, taskNoLUN},
		{"reset of no unit", taskLUNReset, 300, taskNoLUN},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i.t = t
			p := i.manage(tt.function, nil)
			p.setLUN(formatLUN(tt.lun))
			i.send(p)
			i.expectManaged(p, tt.response)
		})
	}
}

// PREEMPT AND ABORT ends the tasks of the nexus that it is aimed at.
func TestPreemptAndAbort(t *testing.T) {
	f := serve(t, nil)
	i, j := f.login(), f.other()
	reserve := func(i *initiator, action, kind byte, key, with byte) result {
		cdb := make([]byte, 10)
		cdb[0], cdb[1], cdb[2], cdb[8] = opPersistentReserveOut, action, kind, 24
		list := make([]byte, 24)
		list[7], list[15] = key, with
		return i.do(i.command(cdb, 0, list))
	}
	i.expectGood(reserve(i, 0, 0, 0, 1)) // register 1
	j.expectGood(reserve(j, 0, 0, 0, 2)) // register 2
	j.expectGood(reserve(j, 1, 5, 2, 0)) // write exclusive, registrants only
	cmd, r2t := j.waiting()
	i.expectGood(reserve(i, 5, 5, 1, 2)) // preempt 2 and abort
	j.send(dataOut(cmd, r2t.ttt(), 0, 0, pattern(8*512, 1), true))
	j.quiet()
}

// A task that came too early may be ended in the moment in which its turn comes; it is then counted once.
func TestAbortWhenTheTurnComes(t *testing.T) {
	f := serve(t, nil)
	i := f.login()
	c := f.connOf(i)
	ctx, cancel := context.WithCancel(context.Background())
	var aborters sync.WaitGroup
	for range 4 {
		aborters.Go(func() {
			for ctx.Err() == nil {
				c.s.mu.Lock()
				c.abort(c.tasksOf(nil))
				c.s.mu.Unlock()
			}
		})
	}
	for range 1000 {
		first, early := i.command(testUnitReady(), 0, nil), i.command(testUnitReady(), 0, nil)
		ping := i.immediate(i.request(opNopOut, 0))
		ping.setTTT(noTag)
		i.together(early, first, ping)
		for i.recv().opcode() != opNopIn { // those that were not aborted are answered
		}
	}
	cancel()
	aborters.Wait()
	c.until(t, "all tasks have ended", func() bool { return c.alive == 0 })
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.underWay != 0 || len(c.s.held) != 0 {
		t.Errorf("%d tasks are under way, and %d numbers wait for their turn; want none", c.underWay, len(c.s.held))
	}
}
