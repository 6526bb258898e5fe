package iscsi

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// A wire carries one login request to the target and its response back, data without padding.
type wire interface {
	exchange(ctx context.Context, h header, data []byte) (header, []byte, error)
}

// A RefusedError is a login response whose status is not success (RFC 7143 section 11.13.5).
type RefusedError struct{ Class, Detail byte }

func (e *RefusedError) Error() string {
	text := map[[2]byte]string{
		{2, 0}: "initiator error", {2, 1}: "authentication failed", {2, 2}: "not allowed to use this target",
		{2, 3}: "no such target", {2, 4}: "the target is gone for good", {2, 5}: "unsupported version",
		{2, 6}: "too many connections", {2, 7}: "missing parameter", {2, 8}: "cannot be included in the session",
		{2, 9}: "session type not supported", {2, 10}: "no such session", {2, 11}: "invalid during login",
		{3, 0}: "target error", {3, 1}: "service unavailable", {3, 2}: "out of resources",
	}[[2]byte{e.Class, e.Detail}]
	return strings.TrimSpace(fmt.Sprintf("the target refuses the login with status %02x%02xh %s", e.Class, e.Detail, text))
}

// isRefusal says whether an error needs somebody's help, and not only time.
func isRefusal(err error) bool {
	var r *RefusedError
	return errors.Is(err, ErrImpostor) || errors.Is(err, errDigests) || errors.As(err, &r) && r.Class == 2
}

// movedError is a redirection.
type movedError struct{ to netip.AddrPort }

func (e *movedError) Error() string { return "the target sends its initiators to " + e.to.String() }

// errDigests says that the target does not guard what it sends.
var errDigests = errors.New("the target has no CRC32C digests, by which damage on the way is noticed")

// What this machine offers (RFC 7143 section 13), in bytes.
const (
	maxRecvData = 256 << 10
	maxBurst    = 1 << 20
	firstBurst  = 256 << 10
)

// offers are the operational keys. Both digests are asked for without a second choice: a node trusts what its LUNs say,
// and the checksums of TCP let through one damaged segment in 65,536.
func offers() []pair {
	return []pair{
		{"HeaderDigest", "CRC32C"},
		{"DataDigest", "CRC32C"},
		{"MaxRecvDataSegmentLength", strconv.Itoa(maxRecvData)},
		{"InitialR2T", "No"},
		{"ImmediateData", "Yes"},
		{"MaxBurstLength", strconv.Itoa(maxBurst)},
		{"FirstBurstLength", strconv.Itoa(firstBurst)},
		{"MaxOutstandingR2T", "1"},
		{"MaxConnections", "1"},
		{"DataPDUInOrder", "Yes"},
		{"DataSequenceInOrder", "Yes"},
		{"ErrorRecoveryLevel", "0"},
		{"DefaultTime2Wait", "0"},
		{"DefaultTime2Retain", "0"},
	}
}

// agreed is the outcome of a login, beginning with the values that hold where nothing was said.
type agreed struct {
	maxXmit, maxBurst, firstBurst uint64 // bytes
	maxR2T                        uint64
	initialR2T, immediate         bool
	tpgt                          uint64
}

func defaults() agreed {
	return agreed{maxXmit: 8192, maxBurst: 256 << 10, firstBurst: 64 << 10, maxR2T: 1, initialR2T: true, immediate: true}
}

// A login is one login phase of a normal session with one connection.
type login struct {
	cfg  Config
	wire wire
	rand io.Reader
	keys map[string]string // all that the target said
}

// run goes through both stages. After an error the connection is of no use.
func (l *login) run(ctx context.Context) (agreed, error) {
	l.keys = map[string]string{}
	if err := l.security(ctx); err != nil {
		return agreed{}, err
	}
	if err := l.operational(ctx); err != nil {
		return agreed{}, err
	}
	return conclude(l.keys)
}

func (l *login) security(ctx context.Context) error {
	method := "None"
	if l.cfg.User != "" {
		method = "CHAP"
	}
	first := []pair{
		{"InitiatorName", l.cfg.Initiator}, {"TargetName", l.cfg.Target}, {"SessionType", "Normal"}, {"AuthMethod", method},
	}
	// Without CHAP nothing is left to say in this stage.
	keys, done, err := l.turn(ctx, stageSecurity, stageOperational, method == "None", first)
	if err != nil {
		return err
	}
	if got := keys["AuthMethod"]; got != method && (method == "CHAP" || got != "") {
		return fmt.Errorf("login: the target wants AuthMethod %.40q, %s was offered", got, method)
	}
	if method == "None" {
		return l.finish(ctx, stageSecurity, stageOperational, keys, done)
	}
	if done {
		return fmt.Errorf("%w: it asks for no proof either", ErrImpostor)
	}
	return l.chap(ctx)
}

func (l *login) chap(ctx context.Context) error {
	c := chap{cfg: l.cfg, rand: l.rand}
	keys, done, err := l.turn(ctx, stageSecurity, stageOperational, false, []pair{{"CHAP_A", chapOffer}})
	if err != nil {
		return err
	}
	if done {
		return fmt.Errorf("%w: it asks for no proof either", ErrImpostor)
	}
	answer, err := c.answer(keys)
	if err != nil {
		return err
	}
	if keys, done, err = l.turn(ctx, stageSecurity, stageOperational, true, answer); err != nil {
		return err
	}
	if err := c.verify(keys); err != nil {
		return err
	}
	return l.finish(ctx, stageSecurity, stageOperational, keys, done)
}

func (l *login) operational(ctx context.Context) error {
	keys, done, err := l.turn(ctx, stageOperational, stageFull, true, offers())
	if err != nil {
		return err
	}
	return l.finish(ctx, stageOperational, stageFull, keys, done)
}

// maxTurns is how often a target may put off the end of a stage.
const maxTurns = 16

// finish asks for the next stage until the target goes there. Keys that it brings up meanwhile are answered.
func (l *login) finish(ctx context.Context, now, next stage, keys map[string]string, done bool) error {
	open := unasked(keys)
	for range maxTurns {
		if done {
			return nil
		}
		keys, isDone, err := l.turn(ctx, now, next, true, open)
		if err != nil {
			return err
		}
		done, open = isDone, unasked(keys)
	}
	return fmt.Errorf("login: the target does not end a stage in %d turns", maxTurns)
}

// declared are keys that want no answer (RFC 7143 section 13).
var declared = []string{"TargetAlias", "TargetAddress", "TargetPortalGroupTag", "MaxRecvDataSegmentLength"}

// unasked answers the keys that are the target's own idea: this machine has none but those that it offers.
func unasked(keys map[string]string) []pair {
	var out []pair
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		isAnswer := key == "AuthMethod" || strings.HasPrefix(key, "CHAP_") ||
			slices.ContainsFunc(offers(), func(p pair) bool { return p.key == key })
		if !isAnswer && !slices.Contains(declared, key) {
			out = append(out, pair{key, "NotUnderstood"})
		}
	}
	return out
}

// turn says something and takes the whole answer to it; done says that the next stage has begun.
func (l *login) turn(ctx context.Context, now, next stage, transit bool, say []pair) (keys map[string]string, done bool, err error) {
	var flags byte
	if transit {
		flags = flagTransit
	}
	data := encodeText(say)
	if len(data) > maxLoginData {
		return nil, false, fmt.Errorf("login: %d bytes to say, at most %d fit", len(data), maxLoginData)
	}
	r, text, err := l.exchange(ctx, flags, now, next, data)
	if err != nil {
		return nil, false, err
	}
	for r.flags&flagContinue != 0 { // more of it comes for a request that says nothing (RFC 7143 section 6.2)
		var more []byte
		if r, more, err = l.exchange(ctx, 0, now, next, nil); err != nil {
			return nil, false, err
		}
		if text = append(text, more...); len(text) > maxText {
			return nil, false, fmt.Errorf("login: the target says more than %d bytes", maxText)
		}
	}
	if keys, err = parseText(text); err != nil {
		return nil, false, err
	}
	maps.Copy(l.keys, keys)
	done = r.flags&flagTransit != 0
	if done && (!transit || r.next != next) {
		return nil, false, fmt.Errorf("login: the target goes from stage %d to %d, which it was not asked for", r.now, r.next)
	}
	return keys, done, nil
}

// exchange is one request and its response.
func (l *login) exchange(ctx context.Context, flags byte, now, next stage, data []byte) (loginResponse, []byte, error) {
	id := isid(l.cfg.Initiator)
	h := loginRequest(id, flags, now, next, len(data))
	rh, text, err := l.wire.exchange(ctx, h, data)
	if err != nil {
		return loginResponse{}, nil, err
	}
	r, err := parseLoginResponse(rh)
	switch {
	case err != nil:
		return r, nil, err
	case r.class == 1:
		return r, nil, moved(text)
	case r.class != 0:
		return r, nil, &RefusedError{r.class, r.detail}
	case r.isid != id || r.now != now:
		return r, nil, fmt.Errorf("login: an answer for session %x in stage %d, want %x in %d", r.isid, r.now, id, now)
	case r.flags == flagTransit|flagContinue:
		return r, nil, errors.New("login: the target goes on and has more to say at once")
	}
	return r, text, nil
}

// moved reads where a target sends its initiators (RFC 7143 section 13.8). A name is not looked up: whoever keeps a root
// alive has no resolver.
func moved(text []byte) error {
	keys, err := parseText(text)
	if err != nil {
		return err
	}
	addr, _, _ := strings.Cut(keys["TargetAddress"], ",")
	to, err := netip.ParseAddrPort(addr)
	if err != nil {
		if ip, ipErr := netip.ParseAddr(strings.Trim(addr, "[]")); ipErr == nil {
			to, err = netip.AddrPortFrom(ip, 3260), nil
		}
	}
	if err != nil || to.Port() == 0 {
		return fmt.Errorf("login: the target sends its initiators to %.80q, which is no address", addr)
	}
	return &movedError{to}
}

// conclude reads what was agreed on.
func conclude(keys map[string]string) (agreed, error) {
	a := defaults()
	if keys["HeaderDigest"] != "CRC32C" || keys["DataDigest"] != "CRC32C" {
		return a, errDigests
	}
	numbers := []struct {
		key         string
		to          *uint64
		least, most uint64
	}{
		{"MaxRecvDataSegmentLength", &a.maxXmit, 512, 1<<24 - 1},
		{"MaxBurstLength", &a.maxBurst, 512, maxBurst},
		{"FirstBurstLength", &a.firstBurst, 512, firstBurst},
		{"MaxOutstandingR2T", &a.maxR2T, 1, 1},
		{"TargetPortalGroupTag", &a.tpgt, 0, 1<<16 - 1},
	}
	for _, n := range numbers {
		if v, ok := said(keys, n.key); ok {
			var err error
			if *n.to, err = parseNumber(n.key, v, n.least, n.most); err != nil {
				return a, err
			}
		}
	}
	a.firstBurst = min(a.firstBurst, a.maxBurst)
	for key, to := range map[string]*bool{"InitialR2T": &a.initialR2T, "ImmediateData": &a.immediate} {
		if v, ok := said(keys, key); ok {
			var err error
			if *to, err = parseBool(key, v); err != nil {
				return a, err
			}
		}
	}
	if v, ok := said(keys, "ErrorRecoveryLevel"); ok && v != "0" {
		return a, fmt.Errorf("login text: ErrorRecoveryLevel=%.40s, want 0", v)
	}
	return a, nil
}

// said is the value of a key, unless it is one of the words for none (RFC 7143 section 6.2).
func said(keys map[string]string, key string) (string, bool) {
	v, ok := keys[key]
	return v, ok && !slices.Contains([]string{"Irrelevant", "NotUnderstood", "Reject"}, v)
}
