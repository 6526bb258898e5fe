package iscsi

import (
	"fmt"
	"slices"
	"strconv"
)

// What this target offers, and asks for. An initiator's wish is granted up to these.
const (
	ourMaxRecv           = 256 << 10
	ourMaxBurst          = 1 << 20
	ourFirstBurst        = 256 << 10
	ourMaxOutstandingR2T = 8
	ourPortalGroup       = 1

	maxSegment     = 1<<24 - 1 // the most that the 24 bits of DataSegmentLength say
	minSegment     = 512
	defaultSegment = 8192 // MaxRecvDataSegmentLength of either side until it declares another, so in all of a login
)

// params is what a session and its connection agreed on (RFC 7143 section 13).
type params struct {
	headerDigest, dataDigest bool // CRC32C; from the first PDU of the full feature phase on
	maxRecv                  int  // of ours: the most that the initiator may send in one data segment
	maxSend                  int  // the initiator's MaxRecvDataSegmentLength
	maxBurst, firstBurst     int
	initialR2T               bool
	immediateData            bool
	maxOutstandingR2T        int
	time2Wait, time2Retain   int // seconds
	maxConnections           int
	errorRecoveryLevel       int
	protocolLevel            int
	dataPDUInOrder           bool
	dataSequenceInOrder      bool
}

// defaultParams are the values of keys that nobody speaks of.
func defaultParams() params {
	return params{
		maxRecv: defaultSegment, maxSend: defaultSegment,
		maxBurst: 262144, firstBurst: 65536,
		initialR2T: true, immediateData: true,
		maxOutstandingR2T: 1,
		time2Wait:         2, time2Retain: 20,
		maxConnections: 1, errorRecoveryLevel: 0, protocolLevel: 1,
		dataPDUInOrder: true, dataSequenceInOrder: true,
	}
}

// names is what an initiator says of itself and of whom it wants to talk to.
type names struct {
	initiator string
	alias     string
	target    string
	discovery bool
}

// The stages that a key may be said in, as bits; the RFC's words are IO (login), FFPO (full feature phase only), ALL.
const (
	inSecurity    = 1 << stageSecurity
	inOperational = 1 << stageOperational
	inFullFeature = 1 << stageFullFeature
	inLogin       = inSecurity | inOperational
)

// A keyRule is what section 13 says of a key, from the side of a target.
type keyRule struct {
	stages  int
	first   bool // only in the first row of a login
	leading bool // LO: only in the login that begins a session
	normal  bool // says nothing in a discovery session
	// turn is when the key is looked at, among those that came together: what a rule needs to know comes before it.
	turn int
	// rule answers an offer; "" answers nothing, as declarations want it. What it cannot grant it rejects; an error
	// ends the login.
	rule func(n *negotiation, value string) (answer string, err error)
}

// turns of a keyRule.
const (
	turnNames = iota // who speaks to whom, and in what kind of session
	turnMost
	turnLast // FirstBurstLength, which four others have a say in
	turns
)

// keyRules is section 13, but for the keys of security, which login.go hands to chap.go.
//
//	key                       stages       rule
//	HeaderDigest, DataDigest  operational  list
//	MaxConnections            operational  min      leading, normal
//	SendTargets               full feature          discovery.go
//	TargetName                login        declared
//	InitiatorName             login        declared
//	TargetAlias               the target's own
//	InitiatorAlias            all          declared
//	TargetAddress             the target's own
//	TargetPortalGroupTag      the target's own
//	InitialR2T                operational  or       leading, normal
//	ImmediateData             operational  and      leading, normal
//	MaxRecvDataSegmentLength  all          declared
//	MaxBurstLength            operational  min      leading, normal
//	FirstBurstLength          operational  min      leading, normal; and not with InitialR2T=Yes and ImmediateData=No
//	DefaultTime2Wait          operational  max      leading
//	DefaultTime2Retain        operational  min      leading
//	MaxOutstandingR2T         operational  min      leading, normal
//	DataPDUInOrder            operational  or       leading, normal
//	DataSequenceInOrder       operational  or       leading, normal
//	ErrorRecoveryLevel        operational  min      leading
//	SessionType               login        declared leading; but initiators say it in each login
//	TaskReporting             operational  list     leading, normal
//	iSCSIProtocolLevel        operational  min      leading, normal
//	X#NodeArchitecture        all          declared
//	IFMarker, OFMarker        operational  Reject: obsolete (section 13.25)
//	IFMarkInt, OFMarkInt      operational  Reject: obsolete
var keyRules = map[string]keyRule{
	"InitiatorName":  {stages: inLogin, first: true, rule: declareName(func(n *names) *string { return &n.initiator })},
	"TargetName":     {stages: inLogin, first: true, rule: declareName(func(n *names) *string { return &n.target })},
	"SessionType":    {stages: inLogin, first: true, rule: declareSessionType},
	"InitiatorAlias": {stages: inLogin | inFullFeature, rule: declareAlias},

	"SendTargets":          {stages: inFullFeature, turn: turnMost, rule: declareAnything}, // textPhase answers it
	"TargetAlias":          {rule: notYours},
	"TargetAddress":        {rule: notYours},
	"TargetPortalGroupTag": {rule: notYours},

	"MaxRecvDataSegmentLength": {stages: inOperational | inFullFeature, turn: turnMost, rule: declareMaxRecv},
	"X#NodeArchitecture":       {stages: inLogin | inFullFeature, turn: turnMost, rule: declareAnything},

	"HeaderDigest": operational(list(func(p *params, v string) bool { return digest(&p.headerDigest, v) })),
	"DataDigest":   operational(list(func(p *params, v string) bool { return digest(&p.dataDigest, v) })),

	"DefaultTime2Wait":   leadingOnly(number(0, 3600, 0, highest, func(p *params) *int { return &p.time2Wait })),
	"DefaultTime2Retain": leadingOnly(number(0, 3600, 0, lowest, func(p *params) *int { return &p.time2Retain })),
	"ErrorRecoveryLevel": leadingOnly(number(0, 2, 0, lowest, func(p *params) *int { return &p.errorRecoveryLevel })),

	"MaxConnections":      normalOnly(number(1, 65535, 1, lowest, func(p *params) *int { return &p.maxConnections })),
	"MaxBurstLength":      normalOnly(number(minSegment, maxSegment, ourMaxBurst, lowest, func(p *params) *int { return &p.maxBurst })),
	"MaxOutstandingR2T":   normalOnly(number(1, 65535, ourMaxOutstandingR2T, lowest, func(p *params) *int { return &p.maxOutstandingR2T })),
	"iSCSIProtocolLevel":  normalOnly(number(0, 31, 1, lowest, func(p *params) *int { return &p.protocolLevel })),
	"InitialR2T":          normalOnly(boolean(false, either, func(p *params) *bool { return &p.initialR2T })),
	"ImmediateData":       normalOnly(boolean(true, both, func(p *params) *bool { return &p.immediateData })),
	"DataPDUInOrder":      normalOnly(boolean(true, either, func(p *params) *bool { return &p.dataPDUInOrder })),
	"DataSequenceInOrder": normalOnly(boolean(true, either, func(p *params) *bool { return &p.dataSequenceInOrder })),
	"TaskReporting":       normalOnly(list(func(_ *params, v string) bool { return v == "RFC3720" })),
	"FirstBurstLength":    {stages: inOperational, leading: true, normal: true, turn: turnLast, rule: firstBurst},

	"IFMarker":  operational(obsolete),
	"OFMarker":  operational(obsolete),
	"IFMarkInt": operational(obsolete),
	"OFMarkInt": operational(obsolete),
}

type rule = func(n *negotiation, value string) (string, error)

func operational(r rule) keyRule {
	return keyRule{stages: inOperational, turn: turnMost, rule: r}
}

func leadingOnly(r rule) keyRule {
	return keyRule{stages: inOperational, leading: true, turn: turnMost, rule: r}
}

func normalOnly(r rule) keyRule {
	return keyRule{stages: inOperational, leading: true, normal: true, turn: turnMost, rule: r}
}

// A negotiation is the keys of one login, or of one row of a Text Request. The initiator offers and declares; this
// target answers, and declares, but offers nothing that needs an answer: what it does not like it brings down when the
// initiator offers, and the defaults it can live with.
type negotiation struct {
	params  params
	names   names
	leading bool
	rows    int               // taken so far
	first   bool              // FirstBurstLength was granted
	said    map[string]string // the keys that the initiator said so far; of those of turnNames what it said
	out     []byte            // the answers
}

func newNegotiation(leading bool) *negotiation {
	return &negotiation{params: defaultParams(), leading: leading, said: make(map[string]string)}
}

// take answers all pairs that came together.
func (n *negotiation) take(stage byte, pairs []pair) error {
	for _, p := range pairs {
		if err := n.admit(stage, p); err != nil {
			return err
		}
	}
	for turn := range turns {
		for _, p := range pairs {
			r, ok := keyRules[p.key]
			if ok && r.turn != turn || !ok && turn != turnMost {
				continue
			}
			answer, err := n.answer(r, p.value)
			if err != nil {
				return fmt.Errorf("%s=%.80s: %w", p.key, p.value, err)
			}
			if answer != "" {
				n.out = appendText(n.out, p.key, answer)
			}
		}
	}
	n.rows++
	return n.check()
}

// admit says whether a pair may be said at all, here and now, and remembers it. A key comes once; but libiscsi says who
// it is again when it goes on to the operational stage, and where it is the same that does no harm.
func (n *negotiation) admit(stage byte, p pair) error {
	r, known := keyRules[p.key]
	before, twice := n.said[p.key]
	switch {
	case twice && (!known || r.turn != turnNames || before != p.value):
		return fmt.Errorf("%w: key %s again", errText, p.key)
	case isSecurityKey(p.key):
		return fmt.Errorf("%w: key %s in stage %d", errText, p.key, stage)
	case known && r.stages == 0:
		// The target's own keys: an initiator can only refuse them, which changes nothing.
		if !isAnswer(p.value) {
			return fmt.Errorf("%w: key %s is the target's", errText, p.key)
		}
	case isAnswer(p.value) && p.key != "MaxRecvDataSegmentLength":
		return fmt.Errorf("%w: %s=%s answers nothing that was offered", errText, p.key, p.value)
	case known && r.stages&(1<<stage) == 0:
		return fmt.Errorf("%w: key %s in stage %d", errText, p.key, stage)
	case r.first && n.rows > 0 && !twice:
		return fmt.Errorf("%w: key %s after the first row", errText, p.key)
	case known && r.leading && !n.leading:
		return fmt.Errorf("%w: key %s in a login that begins no session", errText, p.key)
	}
	n.said[p.key] = ""
	if known && r.turn == turnNames {
		n.said[p.key] = p.value
	}
	return nil
}

func (n *negotiation) answer(r keyRule, value string) (string, error) {
	switch {
	case r.rule == nil:
		return valueNotUnderstood, nil
	case r.normal && n.names.discovery:
		return valueIrrelevant, nil
	}
	return r.rule(n, value)
}

// check holds the two bursts to each other (section 13.14): where the initiator only lowered the one, the default of the
// other follows. If both were granted, firstBurst saw to it, unless MaxBurstLength came later.
func (n *negotiation) check() error {
	p := &n.params
	if p.firstBurst <= p.maxBurst {
		return nil
	}
	if n.first {
		return fmt.Errorf("%w: MaxBurstLength %d below FirstBurstLength %d", errText, p.maxBurst, p.firstBurst)
	}
	p.firstBurst = p.maxBurst
	return nil
}

// number grants a wish from least to most, of what it and ours make together; anything else is rejected.
func number(least, most uint64, ours int, together func(a, b int) int, field func(*params) *int) rule {
	return func(n *negotiation, value string) (string, error) {
		v, err := parseNumber(value)
		if err != nil || v < least || v > most {
			return valueReject, nil //nolint:nilerr // the initiator is told, and the key stays as it was
		}
		p := field(&n.params)
		*p = together(int(v), ours) //nolint:gosec // at most 24 bits
		return strconv.Itoa(*p), nil
	}
}

func lowest(a, b int) int  { return min(a, b) }
func highest(a, b int) int { return max(a, b) }

// boolean grants what the wish and ours make together.
func boolean(ours bool, together func(a, b bool) bool, field func(*params) *bool) rule {
	return func(n *negotiation, value string) (string, error) {
		if value != valueYes && value != valueNo {
			return valueReject, nil
		}
		p := field(&n.params)
		if *p = together(value == valueYes, ours); *p {
			return valueYes, nil
		}
		return valueNo, nil
	}
}

func either(a, b bool) bool { return a || b }
func both(a, b bool) bool   { return a && b }

// list grants the first value that use takes.
func list(use func(p *params, value string) bool) rule {
	return func(n *negotiation, value string) (string, error) {
		values, err := parseList(value)
		if err != nil {
			return valueReject, nil //nolint:nilerr // as in number
		}
		i := slices.IndexFunc(values, func(v string) bool { return use(&n.params, v) })
		if i < 0 {
			return valueReject, nil
		}
		return values[i], nil
	}
}

func digest(on *bool, value string) bool {
	*on = value == "CRC32C"
	return *on || value == valueNone
}

// firstBurst is FirstBurstLength, of no meaning where no data comes unasked.
func firstBurst(n *negotiation, value string) (string, error) {
	p := &n.params
	if p.initialR2T && !p.immediateData {
		return valueIrrelevant, nil
	}
	ours := min(ourFirstBurst, p.maxBurst)
	answer, err := number(minSegment, maxSegment, ours, lowest, func(p *params) *int { return &p.firstBurst })(n, value)
	n.first = answer != valueReject
	return answer, err
}

func obsolete(*negotiation, string) (string, error) { return valueReject, nil }

// notYours is for the target's own keys, which admit lets through only as refusals of what we declared.
func notYours(*negotiation, string) (string, error) { return "", nil }

func declareAnything(*negotiation, string) (string, error) { return "", nil }

func declareName(field func(*names) *string) rule {
	return func(n *negotiation, value string) (string, error) {
		if err := checkName(value); err != nil {
			return "", err
		}
		*field(&n.names) = value
		return "", nil
	}
}

func declareAlias(n *negotiation, value string) (string, error) {
	if len(value) > maxListItem {
		return "", fmt.Errorf("%w: alias of %d bytes, of %d at most", errText, len(value), maxListItem)
	}
	n.names.alias = value
	return "", nil
}

func declareSessionType(n *negotiation, value string) (string, error) {
	switch value {
	case "Normal":
		n.names.discovery = false
	case "Discovery":
		n.names.discovery = true
	default:
		return "", errSessionType
	}
	return "", nil
}

// declareMaxRecv is what the initiator takes at once. Its refusal of ours is none of our trouble: it will send less.
func declareMaxRecv(n *negotiation, value string) (string, error) {
	if isAnswer(value) {
		return "", nil
	}
	v, err := parseNumber(value)
	if err != nil {
		return "", err
	}
	if v < minSegment || v > maxSegment {
		return "", fmt.Errorf("%w: not from %d to %d", errText, minSegment, maxSegment)
	}
	n.params.maxSend = int(v)
	return "", nil
}
