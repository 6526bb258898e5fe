package iscsi

// taskManagement does a task management function (section 11.5). The response comes when all tasks that it aborts have
// ended (section 4.2.3.3).
func (c *conn) taskManagement(p *pdu) error {
	if c.s.target == nil {
		c.header = p.bhs
		c.reject(rejectProtocol)
		return nil
	}
	m := &management{c: c, p: p, response: taskComplete}
	switch p.function() {
	case taskAbort:
		if err := m.abortTask(); err != nil {
			return err
		}
	case taskAbortSet:
		if n := m.nexus(); n != nil {
			m.abortSet(n)
		}
	case taskClearSet, taskLUNReset:
		if n := m.nexus(); n != nil {
			m.clear(n.unit)
		}
	case taskWarmReset, taskColdReset:
		c.s.target.mu.RLock()
		units := c.s.target.unitList()
		c.s.target.mu.RUnlock()
		for _, u := range units {
			m.clear(u)
		}
	case taskReassign:
		m.response = taskNoReassign
	default:
		m.response = taskUnsupported
	}
	m.end()
	return nil
}

// A management is a task management function that is being done.
type management struct {
	c        *conn
	p        *pdu
	response byte
	waits    waits
	reset    []*unit
}

// nexus is that of the LUN in the request, or nil where there is no such unit.
func (m *management) nexus() *nexus {
	if number, ok := parseLUN(m.p.lun()); ok {
		if n := m.c.s.nexus(number); n != nil {
			return n
		}
	}
	m.response = taskNoLUN
	return nil
}

// abortTask is ABORT TASK. A task that is not there, but whose number is still to come, counts as received (section
// 11.5.1 b).
func (m *management) abortTask() error {
	c, s := m.c, m.c.s
	s.mu.Lock()
	if t := c.tasks[m.p.refTag()]; t != nil && t.lun == m.p.lun() {
		m.waits = c.abort([]*task{t})
		s.mu.Unlock()
		return nil
	}
	number := m.p.refCmdSN()
	if !s.inWindow(number) || !before(number, m.p.cmdSN()) || s.holds(number) {
		m.response = taskNotThere
		s.mu.Unlock()
		return nil
	}
	s.held[number] = held{}
	s.mu.Unlock()
	return c.deliverHeld()
}

// abortSet is ABORT TASK SET: all older tasks of this nexus.
func (m *management) abortSet(n *nexus) {
	s := m.c.s
	s.mu.Lock()
	defer s.mu.Unlock()
	m.waits = append(m.waits, m.c.abort(m.older(m.c.tasksOf(n)))...)
}

// older leaves out what was sent after the request.
func (m *management) older(list []*task) []*task {
	kept := list[:0]
	for _, t := range list {
		if t.immediate || before(t.cmdSN, m.p.cmdSN()) {
			kept = append(kept, t)
		}
	}
	return kept
}

// clear aborts the tasks of all nexuses of a unit.
func (m *management) clear(u *unit) {
	for _, s := range m.c.s.target.sessionList() {
		s.mu.Lock()
		if n := s.nexuses[u.lun]; n != nil && n.unit == u {
			list := s.conn.tasksOf(n)
			if s == m.c.s {
				list = m.older(list)
			} else if len(list) > 0 && m.p.function() == taskClearSet {
				n.TasksCleared() // of a reset it is told with all others
			}
			m.waits = append(m.waits, s.conn.abort(list)...)
		}
		s.mu.Unlock()
	}
	if m.p.function() != taskClearSet {
		m.reset = append(m.reset, u)
	}
}

// end waits for the tasks, if there are any, without holding up the connection, and responds.
func (m *management) end() {
	c := m.c
	if len(m.waits) == 0 {
		m.respond()
		return
	}
	c.s.mu.Lock()
	full := c.managing >= maxManaging
	if !full {
		c.managing++
		c.background.Go(func() {
			m.waits.wait()
			c.s.mu.Lock()
			c.managing--
			c.s.mu.Unlock()
			m.respond()
			c.flush()
		})
	}
	c.s.mu.Unlock()
	if full {
		c.flush() // as in logout
		m.waits.wait()
		m.respond()
	}
}

func (m *management) respond() {
	for _, u := range m.reset {
		u.Reset()
	}
	r := &pdu{}
	r.bhs[0], r.bhs[1], r.bhs[2] = opTaskResp, flagFinal, m.response
	r.setITT(m.p.itt())
	m.c.send(r)
	if m.p.function() == taskColdReset {
		m.c.drain()
		for _, s := range m.c.s.target.sessionList() {
			s.kick()
		}
	}
}
