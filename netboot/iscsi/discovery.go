package iscsi

import (
	"fmt"
	"slices"
	"strconv"
)

const keySendTargets = "SendTargets"

// A negotiation in Text Requests has at most so many rows, and so many bytes in all, as a login has.
const (
	maxTextRows  = 32
	maxTextBytes = 64 << 10
)

// A textPhase answers the Text Requests of one connection in its full feature phase (RFC 7143 sections 11.10 and 11.11).
// Of the keys that are allowed there it knows SendTargets (appendix C) and the declarations of section 13. A row of the
// initiator or of ours that does not fit one PDU goes on in the next, held together by the target transfer tag:
//
//	Text Request  F=0 C=1 TTT=FFFFFFFF  SendT          Text Response F=0 C=0 TTT=1  (go on)
//	Text Request  F=1 C=0 TTT=1         argets=All     Text Response F=0 C=1 TTT=2  TargetName=... (more to come)
//	Text Request  F=1 C=0 TTT=2                        Text Response F=1 C=0 TTT=FFFFFFFF  ...
type textPhase struct {
	directory Directory
	initiator string
	target    string // of the session; "" in a discovery session
	portals   []string

	// maxSend is the initiator's MaxRecvDataSegmentLength, after its last declaration; that may come with any request.
	maxSend int

	tag  uint32 // of the last response that wants a request
	open bool   // there is such a response
	itt  uint32 // of the requests that belong together
	size int    // of their text
	in   []byte
	out  []byte
	keys *negotiation
}

// newTextPhase begins where a login ended. The portals are those that the initiator may be told, "IP:PORT".
func newTextPhase(l *login, portals []string) *textPhase {
	t := &textPhase{
		directory: l.cfg.directory,
		initiator: l.initiator,
		portals:   portals,
		maxSend:   l.params.maxSend,
	}
	if !l.discovery {
		t.target = l.keys.names.target
	}
	return t
}

// step answers one Text Request. With reject it is against the protocol, and all that came before it is forgotten:
// the caller sends a Reject with reason "protocol error". StatSN and the window of commands are the caller's.
func (t *textPhase) step(req *pdu) (resp *pdu, reject bool) {
	resp = &pdu{}
	resp.bhs[0] = opTextResp
	resp.setLUN(req.lun())
	resp.setITT(req.itt())
	if err := t.advance(req, resp); err != nil {
		t.reset()
		return nil, true
	}
	return resp, false
}

func (t *textPhase) reset() {
	t.open, t.size, t.in, t.out, t.keys = false, 0, nil, nil, nil
}

func (t *textPhase) advance(req, resp *pdu) error {
	if req.final() && req.cont() {
		return fmt.Errorf("%w: F and C bits together", errText)
	}
	if req.ttt() == noTag {
		// A new row; what was not brought to an end before is given up (section 11.10.4).
		t.reset()
		t.itt, t.keys = req.itt(), newNegotiation(false)
		t.keys.params.maxSend = t.maxSend
	} else if !t.open || req.ttt() != t.tag || req.itt() != t.itt {
		return fmt.Errorf("%w: nothing goes by this tag", errText)
	}
	if len(t.out) > 0 {
		if len(req.data) > 0 || req.cont() {
			return fmt.Errorf("%w: text before the answer is over", errText)
		}
		t.send(req, resp)
		return nil
	}
	if t.size += len(req.data); t.size > maxTextBytes || t.keys.rows >= maxTextRows {
		return fmt.Errorf("%w: more than %d rows or %d bytes", errText, maxTextRows, maxTextBytes)
	}
	if t.in = append(t.in, req.data...); len(t.in) > maxText {
		return fmt.Errorf("%w: row of more than %d bytes", errText, maxText)
	}
	if req.cont() {
		t.goOn(resp)
		return nil
	}
	pairs, err := parseText(t.in)
	if err != nil {
		return err
	}
	t.in = nil
	if err := t.take(pairs); err != nil {
		return err
	}
	t.send(req, resp)
	return nil
}

func (t *textPhase) take(pairs []pair) error {
	if err := t.keys.take(stageFullFeature, pairs); err != nil {
		return err
	}
	t.maxSend = t.keys.params.maxSend
	t.out, t.keys.out = append(t.out, t.keys.out...), nil
	for _, p := range pairs {
		if p.key == keySendTargets {
			t.sendTargets(p.value)
		}
	}
	return nil
}

// sendTargets writes the records of appendix C. In a normal session an initiator may only ask for the target that it is
// talking to; in a discovery session for all that it may use, or for one of them.
func (t *textPhase) sendTargets(value string) {
	_, names := t.directory.Discover(t.initiator)
	switch {
	case t.target != "" && (value == "" || value == t.target):
		names = []string{t.target}
	case t.target == "" && value == "All":
	case t.target == "" && checkName(value) == nil:
		names = slices.DeleteFunc(slices.Clone(names), func(name string) bool { return name != value })
	default:
		t.out = appendText(t.out, keySendTargets, valueReject)
		return
	}
	for _, name := range names {
		t.out = appendText(t.out, "TargetName", name)
		for _, portal := range t.portals {
			t.out = appendText(t.out, "TargetAddress", portal+","+strconv.Itoa(ourPortalGroup))
		}
	}
}

// send puts as much of the answer into a response as the initiator takes. The last response of all is final, unless the
// initiator itself has more to say.
func (t *textPhase) send(req, resp *pdu) {
	n := min(len(t.out), t.maxSend)
	resp.data, t.out = t.out[:n:n], t.out[n:]
	switch {
	case len(t.out) > 0:
		resp.bhs[1] = flagContinue
		t.goOn(resp)
	case !req.final():
		t.goOn(resp)
	default:
		resp.bhs[1] = flagFinal
		resp.setTTT(noTag)
		t.reset()
	}
}

// goOn asks for the next request. Tags are never used twice in a row, so that a request that comes late is known.
func (t *textPhase) goOn(resp *pdu) {
	t.tag++
	if t.tag == noTag {
		t.tag = 0
	}
	t.open = true
	resp.setTTT(t.tag)
}
