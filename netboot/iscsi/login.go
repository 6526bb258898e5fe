package iscsi

import (
	"cmp"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// The status of a Login Response, class and detail (RFC 7143 section 11.13.5).
const (
	loginOK             = 0x0000
	loginInitiatorError = 0x0200
	loginAuthFailure    = 0x0201
	loginForbidden      = 0x0202
	loginNotFound       = 0x0203
	loginVersion        = 0x0205
	loginTooMany        = 0x0206 // connections in the session
	loginMissing        = 0x0207 // parameter
	loginNotInSession   = 0x0208
	loginSessionType    = 0x0209
	loginNoSession      = 0x020a
	loginInvalid        = 0x020b // PDU during login
	loginTargetError    = 0x0300
	loginUnavailable    = 0x0301
	loginNoResources    = 0x0302
)

// version is the only one that there is.
const version = 0

// A login ends with at most so many requests, and so many bytes of text in all: an initiator that dawdles has to come
// again. The longest seen takes 5 requests and 2 KiB.
const (
	maxLoginRequests = 32
	maxLoginBytes    = 64 << 10
)

// Errors of a login that have a status of their own.
var (
	errSessionType = errors.New("no such type of session")
	errVersion     = errors.New("no version in common")
	errMissing     = errors.New("missing key")
	errLogin       = errors.New("bad login request")
	errNoLogin     = errors.New("no login request")
)

// loginStatus is the status that an error becomes.
func loginStatus(err error) uint16 {
	for _, s := range []struct {
		err    error
		status uint16
	}{
		{errAuth, loginAuthFailure},
		{ErrForbidden, loginForbidden},
		{ErrNoTarget, loginNotFound},
		{ErrNotReady, loginUnavailable},
		{errVersion, loginVersion},
		{errMissing, loginMissing},
		{errSessionType, loginSessionType},
		{errNoLogin, loginInvalid},
		{errLogin, loginInitiatorError},
		{errText, loginInitiatorError},
	} {
		if errors.Is(err, s.err) {
			return s.status
		}
	}
	return loginTargetError
}

// loginConfig is what a login asks.
type loginConfig struct {
	directory Directory
	random    io.Reader // nil means the system's
}

// A login is the login phase of one connection (section 6.3): requests in, responses out. It goes through these stages,
// each of which the initiator may leave with a T bit, and not before this target sets it as well:
//
//	security (0)     who are you; may be passed over where nothing has to be proven
//	operational (1)  how do we talk; may be passed over
//	full feature (3) the login is done
type login struct {
	cfg loginConfig

	// What came of it, once step says that it is done.
	ok        bool
	err       error // why not
	params    params
	initiator string // its name
	alias     string
	isid      uint64
	tsih      uint16 // of the requests: 0 begins a session
	cid       uint16
	discovery bool
	target    *Target // nil in a discovery session

	stage    byte
	requests int
	bytes    int
	first    bhs    // of the first request
	in       []byte // a row whose end has not come
	out      []byte // what has not been sent of an answer
	keys     *negotiation
	auth     *authentication // nil until the initiator said who it is
	declared bool            // our MaxRecvDataSegmentLength
}

func newLogin(cfg loginConfig) *login {
	if cfg.random == nil {
		cfg.random = rand.Reader
	}
	return &login{cfg: cfg}
}

// step answers one Login Request. When it is done, the response is the last of the login: either l.ok says that the
// full feature phase begins, or l.err says why not, and the connection closes once the response is out. TSIH, StatSN and
// the window of commands are the caller's to fill in.
func (l *login) step(req *pdu) (resp *pdu, done bool) {
	resp = &pdu{}
	resp.bhs[0] = opLoginResp
	resp.bhs[2], resp.bhs[3] = version, version
	resp.setLUN(req.lun()) // ISID and TSIH
	resp.setITT(req.itt())
	err := l.advance(req, resp)
	if err == nil {
		return resp, l.ok
	}
	l.err = fmt.Errorf("login of %q: %w", cmp.Or(l.initiator, "a nameless initiator"), err)
	failLogin(resp, loginStatus(err))
	return resp, true
}

// failLogin turns a Login Response into a refusal.
func failLogin(resp *pdu, status uint16) {
	resp.bhs[1], resp.data = 0, nil
	resp.setLoginStatus(status)
}

func (l *login) advance(req, resp *pdu) error {
	if err := l.admit(req); err != nil {
		return err
	}
	resp.bhs[1] = l.stage << 2
	if len(l.out) > 0 {
		// The initiator asks for the rest of an answer, with nothing to say of its own.
		if len(req.data) > 0 || req.cont() {
			return fmt.Errorf("%w: text before the answer is over", errLogin)
		}
		return l.send(req, resp)
	}
	if l.in = append(l.in, req.data...); len(l.in) > maxText {
		return fmt.Errorf("%w: row of more than %d bytes", errLogin, maxText)
	}
	if req.cont() {
		return nil
	}
	pairs, err := parseText(l.in)
	if err != nil {
		return err
	}
	l.in = nil
	if err := l.take(pairs); err != nil {
		return err
	}
	if req.transit() && l.stage == stageSecurity && l.auth.state == authBegins && !l.auth.done() {
		return fmt.Errorf("%w: initiator offers nothing, wanted is %s", errAuth, methodCHAP)
	}
	return l.send(req, resp)
}

// admit checks the header.
func (l *login) admit(req *pdu) error {
	l.requests++
	l.bytes += len(req.data)
	if l.requests == 1 {
		l.first, l.stage = req.bhs, req.csg()
		l.isid, l.tsih, l.cid = req.isid(), req.tsih(), req.cid()
		l.keys = newNegotiation(l.tsih == 0)
	}
	first := &l.first
	switch {
	case req.opcode() != opLogin:
		return fmt.Errorf("%w: opcode %#02x", errNoLogin, req.opcode())
	case req.versionMin() > version:
		return fmt.Errorf("%w: initiator speaks %d to %d", errVersion, req.versionMin(), req.versionMax())
	case l.requests > maxLoginRequests || l.bytes > maxLoginBytes:
		return fmt.Errorf("%w: more than %d requests or %d bytes", errLogin, maxLoginRequests, maxLoginBytes)
	case len(req.data) > defaultSegment:
		return fmt.Errorf("%w: data segment of %d bytes, of %d at most", errLogin, len(req.data), defaultSegment)
	case req.lun() != first.lun() || req.cid() != first.cid():
		return fmt.Errorf("%w: ISID, TSIH or CID is not that of the first", errLogin)
	case req.csg() != l.stage || l.stage != stageSecurity && l.stage != stageOperational:
		return fmt.Errorf("%w: stage %d in stage %d", errLogin, req.csg(), l.stage)
	case req.transit() && req.cont():
		return fmt.Errorf("%w: T and C bits together", errLogin)
	case req.transit() && (req.nsg() <= l.stage || req.nsg() == 2):
		return fmt.Errorf("%w: from stage %d to %d", errLogin, l.stage, req.nsg())
	}
	return nil
}

// take answers the keys of a whole row.
func (l *login) take(pairs []pair) error {
	security := make(map[string]string)
	others := make([]pair, 0, len(pairs))
	for _, p := range pairs {
		if l.stage != stageSecurity || !isSecurityKey(p.key) {
			others = append(others, p)
			continue
		}
		security[p.key] = p.value
	}
	if err := l.keys.take(l.stage, others); err != nil {
		return err
	}
	if l.auth == nil {
		if err := l.open(); err != nil {
			return err
		}
	}
	if err := l.auth.take(security); err != nil {
		return err
	}
	l.out = append(l.out, l.keys.out...)
	l.out = append(l.out, l.auth.out...)
	l.keys.out, l.auth.out = nil, nil
	if l.stage == stageOperational && !l.declared {
		l.declared = true
		l.keys.params.maxRecv = ourMaxRecv
		l.out = appendText(l.out, "MaxRecvDataSegmentLength", strconv.Itoa(ourMaxRecv))
	}
	return nil
}

// ask asks the Directory what the initiator of a login may have, and what it has to prove for that.
func (l *login) ask() (*Target, *CHAP, error) {
	if l.discovery {
		need, _ := l.cfg.directory.Discover(l.initiator)
		return nil, need, nil
	}
	name := l.keys.names.target
	target, need, err := l.cfg.directory.Open(l.initiator, name)
	if err != nil {
		return nil, nil, fmt.Errorf("opening target %q: %w", name, err)
	}
	return target, need, nil
}

// confirm asks again: what held when the login began may not hold any more, as the initiator takes its time.
func (l *login) confirm() error {
	target, need, err := l.ask()
	if err != nil {
		return err
	}
	before := l.auth.need
	if target != l.target || (need == nil) != (before == nil) || need != nil && *need != *before {
		return fmt.Errorf("%w: it changed during the login", ErrNotReady)
	}
	return nil
}

// open finds, after the first row, what the initiator wants and what it has to prove.
func (l *login) open() error {
	n := &l.keys.names
	l.initiator, l.alias, l.discovery = n.initiator, n.alias, n.discovery
	if n.initiator == "" {
		return fmt.Errorf("%w: InitiatorName", errMissing)
	}
	if !n.discovery && n.target == "" {
		return fmt.Errorf("%w: TargetName", errMissing)
	}
	target, need, err := l.ask()
	if err != nil {
		return err
	}
	if l.target = target; !n.discovery {
		l.out = appendText(l.out, "TargetPortalGroupTag", strconv.Itoa(ourPortalGroup))
	}
	if need != nil {
		need = new(*need) // as it is now
	}
	l.auth = &authentication{need: need, random: l.cfg.random}
	if l.stage != stageSecurity && !l.auth.done() {
		return fmt.Errorf("%w: initiator passes over the security stage", errAuth)
	}
	return nil
}

// send puts as much of the answer into a response as the initiator takes, and moves on to the next stage where both
// want that and nothing is left to say.
func (l *login) send(req, resp *pdu) error {
	n := min(len(l.out), defaultSegment, l.keys.params.maxSend)
	resp.data, l.out = l.out[:n:n], l.out[n:]
	if len(l.out) > 0 {
		resp.bhs[1] |= flagContinue
		return nil
	}
	l.out = nil
	if !req.transit() || l.stage == stageSecurity && !l.auth.done() {
		return nil
	}
	resp.bhs[1] |= flagTransit | req.nsg()
	l.stage = req.nsg()
	if l.stage == stageFullFeature {
		l.params = l.keys.params
		l.alias = l.keys.names.alias
		l.ok = true
	}
	return nil
}
