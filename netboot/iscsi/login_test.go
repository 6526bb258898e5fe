package iscsi

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const (
	testInitiator = "iqn.2026-11.dev.troupe:node1:initiator"
	testTarget    = "iqn.2026-11.dev.troupe:node1"
	otherTarget   = "iqn.2026-11.dev.troupe:node2"
)

// A testDirectory has two targets, one of which is for others, one that is not ready, and one that is broken.
type testDirectory struct {
	chap   *CHAP
	target *Target
	names  []string // what Discover tells; nil means testTarget
}

func (d testDirectory) Discover(initiator string) (*CHAP, []string) {
	switch {
	case initiator != testInitiator:
		return d.chap, nil
	case d.names != nil:
		return d.chap, d.names
	}
	return d.chap, []string{testTarget}
}

func (d testDirectory) Open(initiator, target string) (*Target, *CHAP, error) {
	switch {
	case target == otherTarget || target == testTarget && initiator != testInitiator:
		return nil, nil, ErrForbidden
	case target == testTarget:
		return d.target, d.chap, nil
	case strings.HasSuffix(target, ":late"):
		return nil, nil, ErrNotReady
	case strings.HasSuffix(target, ":broken"):
		return nil, nil, errors.New("disk on fire")
	}
	return nil, nil, ErrNoTarget
}

// text makes a row of "key=value" strings.
func text(pairs ...string) []byte {
	if len(pairs) == 0 {
		return nil
	}
	return []byte(strings.Join(pairs, "\x00") + "\x00")
}

// untext takes a row apart again.
func untext(b []byte) []string {
	if len(b) == 0 {
		return nil
	}
	return strings.Split(strings.TrimSuffix(string(b), "\x00"), "\x00")
}

// sorted is untext where the order of the answers says nothing.
func sorted(b []byte) []string { return slices.Sorted(slices.Values(untext(b))) }

// loginRequest makes one. from and to are stages; to is -1 for no T bit.
func loginRequest(from, to int, pairs ...string) *pdu {
	p := &pdu{data: text(pairs...)}
	p.bhs[0] = opLogin | opImmediate
	p.bhs[1] = byte(from) << 2
	if to >= 0 {
		p.bhs[1] |= flagTransit | byte(to)
	}
	p.setISID(0x00023d000001)
	p.setITT(7)
	p.setDataLength(len(p.data))
	return p
}

// An exchange is one request and what is to come back.
type exchange struct {
	from, to int // stages of the request
	say      []string
	next     int      // the stage that the response goes on to; -1 for no T bit
	hear     []string // in any order
	status   uint16
}

// run says all of them, one after the other, and fails the test at the first that does not fit.
func run(t *testing.T, l *login, exchanges []exchange) {
	t.Helper()
	for i, e := range exchanges {
		resp, done := l.step(loginRequest(e.from, e.to, e.say...))
		if resp.loginStatus() != e.status {
			t.Fatalf("exchange %d: status %04x, want %04x: %v", i, resp.loginStatus(), e.status, l.err)
		}
		if wantDone := e.status != 0 || e.next == stageFullFeature; done != wantDone || l.ok != (e.next == stageFullFeature) {
			t.Fatalf("exchange %d: done %v, ok %v", i, done, l.ok)
		}
		if e.status != 0 {
			if l.err == nil || resp.bhs[1] != 0 || len(resp.data) != 0 {
				t.Fatalf("exchange %d: refused with flags %02x, %q, %v", i, resp.bhs[1], resp.data, l.err)
			}
			return
		}
		next := -1
		if resp.transit() {
			next = int(resp.nsg())
		}
		if next != e.next || int(resp.csg()) != e.from || resp.cont() {
			t.Fatalf("exchange %d: flags %02x, want stage %d to %d", i, resp.bhs[1], e.from, e.next)
		}
		want := slices.Sorted(slices.Values(e.hear))
		if diff := cmp.Diff(want, sorted(resp.data)); diff != "" {
			t.Fatalf("exchange %d (-want +got):\n%s", i, diff)
		}
	}
}

var aNormalLogin = []string{"InitiatorName=" + testInitiator, "TargetName=" + testTarget, "SessionType=Normal"}

// The key sets of initiators in the field: what they say, in their order, and what they must hear.
func TestLoginOfInitiators(t *testing.T) {
	tests := []struct {
		name      string
		exchanges []exchange
		want      func(*params)
	}{
		{
			name: "open-iscsi, with a user that nobody asks for",
			exchanges: []exchange{
				{
					from: 0, to: 1, next: 1,
					say: []string{
						"InitiatorName=" + testInitiator, "InitiatorAlias=node1", "TargetName=" + testTarget,
						"SessionType=Normal", "AuthMethod=CHAP,None",
					},
					hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1"},
				},
				{
					from: 1, to: 3, next: 3,
					say: []string{
						"HeaderDigest=None", "DataDigest=None", "DefaultTime2Wait=2", "DefaultTime2Retain=0",
						"IFMarker=No", "OFMarker=No", "ErrorRecoveryLevel=0", "InitialR2T=No", "ImmediateData=Yes",
						"MaxBurstLength=16776192", "FirstBurstLength=262144", "MaxOutstandingR2T=1",
						"MaxConnections=1", "DataPDUInOrder=Yes", "DataSequenceInOrder=Yes",
						"MaxRecvDataSegmentLength=262144",
					},
					hear: []string{
						"HeaderDigest=None", "DataDigest=None", "DefaultTime2Wait=2", "DefaultTime2Retain=0",
						"IFMarker=Reject", "OFMarker=Reject", "ErrorRecoveryLevel=0", "InitialR2T=No",
						"ImmediateData=Yes", "MaxBurstLength=1048576", "FirstBurstLength=262144",
						"MaxOutstandingR2T=1", "MaxConnections=1", "DataPDUInOrder=Yes",
						"DataSequenceInOrder=Yes", "MaxRecvDataSegmentLength=262144",
					},
				},
			},
			want: func(p *params) {
				p.maxRecv, p.maxSend = 262144, 262144
				p.maxBurst, p.firstBurst = 1<<20, 262144
				p.initialR2T = false
				p.time2Wait, p.time2Retain = 2, 0
			},
		},
		{
			name: "libiscsi, without a user: straight to the operational stage",
			exchanges: []exchange{
				{
					from: 1, to: 3, next: 3,
					say: []string{
						"InitiatorName=" + testInitiator, "InitiatorAlias=node1", "TargetName=" + testTarget,
						"SessionType=Normal", "HeaderDigest=None", "DataDigest=None", "InitialR2T=No",
						"ImmediateData=Yes", "MaxBurstLength=262144", "FirstBurstLength=262144",
						"DefaultTime2Wait=2", "DefaultTime2Retain=0", "MaxOutstandingR2T=1",
						"ErrorRecoveryLevel=0", "IFMarker=No", "OFMarker=No", "MaxConnections=1",
						"MaxRecvDataSegmentLength=262144", "DataPDUInOrder=Yes", "DataSequenceInOrder=Yes",
					},
					hear: []string{
						"TargetPortalGroupTag=1", "HeaderDigest=None", "DataDigest=None", "InitialR2T=No",
						"ImmediateData=Yes", "MaxBurstLength=262144", "FirstBurstLength=262144",
						"DefaultTime2Wait=2", "DefaultTime2Retain=0", "MaxOutstandingR2T=1",
						"ErrorRecoveryLevel=0", "IFMarker=Reject", "OFMarker=Reject", "MaxConnections=1",
						"MaxRecvDataSegmentLength=262144", "DataPDUInOrder=Yes", "DataSequenceInOrder=Yes",
					},
				},
			},
			want: func(p *params) {
				p.maxRecv, p.maxSend = 262144, 262144
				p.firstBurst, p.initialR2T = 262144, false
				p.time2Retain = 0
			},
		},
		{
			name: "libiscsi, with a user that nobody asks for: says who it is twice",
			exchanges: []exchange{
				{
					from: 0, to: 1, next: 1,
					say:  append(slices.Clone(aNormalLogin), "AuthMethod=CHAP,None"),
					hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1"},
				},
				{
					from: 1, to: 3, next: 3,
					say:  append(slices.Clone(aNormalLogin), "HeaderDigest=CRC32C,None", "DataDigest=CRC32C,None"),
					hear: []string{"HeaderDigest=CRC32C", "DataDigest=CRC32C", "MaxRecvDataSegmentLength=262144"},
				},
			},
			want: func(p *params) { p.maxRecv, p.headerDigest, p.dataDigest = 262144, true, true },
		},
		{
			name: "iPXE",
			exchanges: []exchange{
				{
					from: 0, to: 1, next: 1,
					say: []string{
						"InitiatorName=" + testInitiator, "TargetName=" + testTarget, "SessionType=Normal", "AuthMethod=None",
					},
					hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1"},
				},
				{
					from: 1, to: 3, next: 3,
					say: []string{
						"HeaderDigest=None", "DataDigest=None", "MaxConnections=1", "InitialR2T=Yes", "ImmediateData=No",
						"MaxRecvDataSegmentLength=8192", "MaxBurstLength=262144", "FirstBurstLength=65536",
						"DefaultTime2Wait=0", "DefaultTime2Retain=0", "MaxOutstandingR2T=1", "DataPDUInOrder=Yes",
						"DataSequenceInOrder=Yes", "ErrorRecoveryLevel=0",
					},
					hear: []string{
						"HeaderDigest=None", "DataDigest=None", "MaxConnections=1", "InitialR2T=Yes", "ImmediateData=No",
						"MaxRecvDataSegmentLength=262144", "MaxBurstLength=262144", "FirstBurstLength=Irrelevant",
						"DefaultTime2Wait=0", "DefaultTime2Retain=0", "MaxOutstandingR2T=1", "DataPDUInOrder=Yes",
						"DataSequenceInOrder=Yes", "ErrorRecoveryLevel=0",
					},
				},
			},
			want: func(p *params) {
				p.maxRecv, p.immediateData = 262144, false
				p.time2Wait, p.time2Retain = 0, 0
			},
		},
		{
			name: "Windows",
			exchanges: []exchange{
				{
					from: 0, to: 1, next: 1,
					say: []string{
						"InitiatorName=" + testInitiator, "SessionType=Normal", "TargetName=" + testTarget, "AuthMethod=None,CHAP",
					},
					hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1"},
				},
				{
					from: 1, to: 3, next: 3,
					say: []string{
						"HeaderDigest=None,CRC32C", "DataDigest=None,CRC32C", "ErrorRecoveryLevel=2", "InitialR2T=No",
						"ImmediateData=Yes", "MaxRecvDataSegmentLength=65536", "MaxBurstLength=262144",
						"FirstBurstLength=65536", "MaxConnections=32", "DataPDUInOrder=Yes",
						"DataSequenceInOrder=Yes", "DefaultTime2Wait=0", "DefaultTime2Retain=60", "MaxOutstandingR2T=16",
					},
					hear: []string{
						"HeaderDigest=None", "DataDigest=None", "ErrorRecoveryLevel=0", "InitialR2T=No",
						"ImmediateData=Yes", "MaxRecvDataSegmentLength=262144", "MaxBurstLength=262144",
						"FirstBurstLength=65536", "MaxConnections=1", "DataPDUInOrder=Yes",
						"DataSequenceInOrder=Yes", "DefaultTime2Wait=0", "DefaultTime2Retain=0", "MaxOutstandingR2T=8",
					},
				},
			},
			want: func(p *params) {
				p.maxRecv, p.maxSend, p.initialR2T = 262144, 65536, false
				p.time2Wait, p.time2Retain, p.maxOutstandingR2T = 0, 0, 8
			},
		},
		{
			// RFC 7143 appendix B: the security stage leads straight to the full feature phase.
			name: "nothing to negotiate",
			exchanges: []exchange{{
				from: 0, to: 3, next: 3,
				say:  append(slices.Clone(aNormalLogin), "AuthMethod=None"),
				hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1"},
			}},
			want: func(*params) {},
		},
		{
			// The same, with stages that take several requests, and a T bit that comes when all is said.
			name: "one thing after the other",
			exchanges: []exchange{
				{from: 0, to: -1, next: -1, say: aNormalLogin, hear: []string{"TargetPortalGroupTag=1"}},
				{from: 0, to: -1, next: -1, say: []string{"AuthMethod=SRP,None"}, hear: []string{"AuthMethod=None"}},
				{from: 0, to: 1, next: 1},
				{from: 1, to: -1, next: -1, hear: []string{"MaxRecvDataSegmentLength=262144"}},
				{from: 1, to: -1, next: -1, say: []string{"InitialR2T=No"}, hear: []string{"InitialR2T=No"}},
				{from: 1, to: -1, next: -1, say: []string{"MaxRecvDataSegmentLength=4096"}},
				{from: 1, to: 3, next: 3, say: []string{"InitiatorAlias=node1"}},
			},
			want: func(p *params) { p.maxRecv, p.maxSend, p.initialR2T = 262144, 4096, false },
		},
		{
			name: "keys that nobody knows",
			exchanges: []exchange{
				{
					from: 0, to: 1, next: 1,
					say:  append(slices.Clone(aNormalLogin), "AuthMethod=None", "X-com.example.shoe=44"),
					hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1", "X-com.example.shoe=NotUnderstood"},
				},
				{
					from: 1, to: 3, next: 3,
					say:  []string{"X-com.example.hat=7", "Y-com.example.glove=9"},
					hear: []string{"MaxRecvDataSegmentLength=262144", "X-com.example.hat=NotUnderstood", "Y-com.example.glove=NotUnderstood"},
				},
			},
			want: func(p *params) { p.maxRecv = 262144 },
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			target := &Target{}
			l := newLogin(loginConfig{directory: testDirectory{target: target}})
			run(t, l, test.exchanges)
			want := defaultParams()
			test.want(&want)
			if diff := cmp.Diff(want, l.params, cmp.AllowUnexported(params{})); diff != "" {
				t.Errorf("params (-want +got):\n%s", diff)
			}
			if l.initiator != testInitiator || l.target != target || l.isid != 0x00023d000001 || l.tsih != 0 {
				t.Errorf("initiator %q, target %p, ISID %x, TSIH %d", l.initiator, l.target, l.isid, l.tsih)
			}
		})
	}
}

// Discovery sessions: straight to the operational stage (open-iscsi), with both stages (Windows), and with none but
// security, so that all defaults hold.
func TestLoginToDiscover(t *testing.T) {
	l := newLogin(loginConfig{directory: testDirectory{}})
	run(t, l, []exchange{{
		from: 0, to: 3, next: 3,
		say:  []string{"InitiatorName=" + testInitiator, "InitiatorAlias=node1", "SessionType=Discovery", "AuthMethod=None"},
		hear: []string{"AuthMethod=None"},
	}})
	if !l.discovery || l.target != nil || l.alias != "node1" || l.params != defaultParams() {
		t.Errorf("discovery %v, target %v, alias %q, params %+v", l.discovery, l.target, l.alias, l.params)
	}
	l = newLogin(loginConfig{directory: testDirectory{}})
	run(t, l, []exchange{{
		from: 1, to: 3, next: 3,
		say: []string{
			"InitiatorName=" + testInitiator, "InitiatorAlias=node1", "SessionType=Discovery", "HeaderDigest=None",
			"DataDigest=None", "DefaultTime2Wait=2", "DefaultTime2Retain=0", "IFMarker=No", "OFMarker=No",
			"ErrorRecoveryLevel=0", "MaxRecvDataSegmentLength=32768",
		},
		hear: []string{
			"HeaderDigest=None", "DataDigest=None", "DefaultTime2Wait=2", "DefaultTime2Retain=0", "IFMarker=Reject",
			"OFMarker=Reject", "ErrorRecoveryLevel=0", "MaxRecvDataSegmentLength=262144",
		},
	}})
	l = newLogin(loginConfig{directory: testDirectory{}})
	run(t, l, []exchange{
		{
			from: 0, to: 1, next: 1,
			say:  []string{"InitiatorName=" + testInitiator, "SessionType=Discovery", "AuthMethod=None"},
			hear: []string{"AuthMethod=None"},
		},
		{
			from: 1, to: 3, next: 3,
			say: []string{
				"HeaderDigest=None", "DataDigest=None", "ErrorRecoveryLevel=2", "MaxRecvDataSegmentLength=65536",
				"DefaultTime2Wait=0", "DefaultTime2Retain=60", "InitialR2T=No",
			},
			hear: []string{
				"HeaderDigest=None", "DataDigest=None", "ErrorRecoveryLevel=0", "MaxRecvDataSegmentLength=262144",
				"DefaultTime2Wait=0", "DefaultTime2Retain=0", "InitialR2T=Irrelevant",
			},
		},
	})
}

// heard is what a login answers to one request, by key.
func heard(t *testing.T, l *login, req *pdu) map[string]string {
	t.Helper()
	resp, _ := l.step(req)
	if l.err != nil {
		t.Fatal(l.err)
	}
	pairs, err := parseText(resp.data)
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]string)
	for _, p := range pairs {
		m[p.key] = p.value
	}
	return m
}

// CHAP as RFC 7143 appendix B has it: method, algorithm, proof, each in a request of its own; then the rest. The T bit
// of libiscsi comes too soon and is passed over.
func TestLoginWithCHAP(t *testing.T) {
	for _, mutual := range []bool{false, true} {
		for _, early := range []int{-1, stageOperational} {
			t.Run(fmt.Sprintf("mutual %v, to stage %d", mutual, early), func(t *testing.T) {
				l := newLogin(loginConfig{directory: testDirectory{chap: &testCHAP, target: &Target{}}})
				run(t, l, []exchange{{
					from: 0, to: early, next: -1,
					say:  append(slices.Clone(aNormalLogin), "AuthMethod=KRB5,CHAP,None"),
					hear: []string{"AuthMethod=CHAP", "TargetPortalGroupTag=1"},
				}})
				got := heard(t, l, loginRequest(0, early, "CHAP_A=7,5"))
				id, err := strconv.ParseUint(got["CHAP_I"], 10, 8)
				challenge, err2 := parseBinary(got["CHAP_C"])
				if err := errors.Join(err, err2); err != nil || got["CHAP_A"] != "7" || l.stage != stageSecurity {
					t.Fatalf("%v, stage %d, %v", got, l.stage, err)
				}
				e := exchange{from: 0, to: 1, next: 1, say: []string{
					"CHAP_N=node1", "CHAP_R=" + formatBinary(responseOf("7", byte(id), testCHAP.Secret, challenge)),
				}}
				if mutual {
					theirs := []byte("0123456789abcdef")
					e.say = append(e.say, "CHAP_I=3", "CHAP_C="+formatBinary(theirs))
					e.hear = []string{
						"CHAP_N=troupe", "CHAP_R=" + formatBinary(responseOf("7", 3, testCHAP.MutualSecret, theirs)),
					}
				}
				run(t, l, []exchange{e, {
					from: 1, to: 3, next: 3,
					say:  []string{"ImmediateData=No"},
					hear: []string{"ImmediateData=No", "MaxRecvDataSegmentLength=262144"},
				}})
			})
		}
	}
}

// Each refusal has its status, and ends the login.
func TestLoginRefusals(t *testing.T) {
	const initiator = "InitiatorName=" + testInitiator
	normal := append(slices.Clone(aNormalLogin), "AuthMethod=None")
	toSecurity := exchange{from: 0, to: -1, next: -1, say: normal, hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1"}}
	tests := []struct {
		name      string
		chap      *CHAP
		exchanges []exchange // the last is refused with its status
	}{
		{name: "no name", exchanges: []exchange{{from: 0, to: 1, say: []string{"TargetName=" + testTarget}, status: 0x0207}}},
		{name: "nothing at all", exchanges: []exchange{{from: 0, to: 1, status: 0x0207}}},
		{name: "no target", exchanges: []exchange{{from: 0, to: 1, say: []string{initiator}, status: 0x0207}}},
		{name: "unknown target", exchanges: []exchange{{from: 0, to: 1, say: []string{initiator, "TargetName=iqn.2026-11.x"}, status: 0x0203}}},
		{name: "target of others", exchanges: []exchange{{from: 0, to: 1, say: []string{initiator, "TargetName=" + otherTarget}, status: 0x0202}}},
		{name: "initiator of others", exchanges: []exchange{{from: 0, to: 1, say: []string{"InitiatorName=iqn.2026-11.x", "TargetName=" + testTarget}, status: 0x0202}}},
		{name: "target not ready", exchanges: []exchange{{from: 0, to: 1, say: []string{initiator, "TargetName=iqn.2026-11.x:late"}, status: 0x0301}}},
		{name: "broken target", exchanges: []exchange{{from: 0, to: 1, say: []string{initiator, "TargetName=iqn.2026-11.x:broken"}, status: 0x0300}}},
		{name: "unknown type of session", exchanges: []exchange{{from: 0, to: 1, say: []string{initiator, "SessionType=Boot"}, status: 0x0209}}},
		{name: "no authentication", chap: &testCHAP, exchanges: []exchange{{from: 0, to: 1, say: normal, status: 0x0201}}},
		{name: "authentication not offered", chap: &testCHAP, exchanges: []exchange{{from: 0, to: 1, say: aNormalLogin, status: 0x0201}}},
		{name: "security passed over", chap: &testCHAP, exchanges: []exchange{{from: 1, to: 3, say: aNormalLogin, status: 0x0201}}},
		{name: "discovery without authentication", chap: &testCHAP, exchanges: []exchange{{from: 0, to: 3, say: []string{initiator, "SessionType=Discovery"}, status: 0x0201}}},
		{name: "wrong secret", chap: &testCHAP, exchanges: []exchange{
			{from: 0, to: -1, next: -1, say: append(slices.Clone(aNormalLogin), "AuthMethod=CHAP"), hear: []string{"AuthMethod=CHAP", "TargetPortalGroupTag=1"}},
			{from: 0, to: -1, say: []string{"CHAP_A=99"}, status: 0x0201},
		}},
		{name: "authentication in the operational stage", exchanges: []exchange{{from: 1, to: 3, say: normal, status: 0x0200}}},
		{name: "no such method", exchanges: []exchange{{from: 0, to: 1, say: append(slices.Clone(aNormalLogin), "AuthMethod=KRB5"), status: 0x0201}}},
		{name: "method twice", exchanges: []exchange{toSecurity, {from: 0, to: 1, say: []string{"AuthMethod=None"}, status: 0x0200}}},
		{name: "not text", exchanges: []exchange{{from: 0, to: 1, say: []string{"\xff"}, status: 0x0200}}},
		{name: "back a stage", exchanges: []exchange{
			{from: 1, to: -1, next: -1, say: aNormalLogin, hear: []string{"MaxRecvDataSegmentLength=262144", "TargetPortalGroupTag=1"}},
			{from: 0, to: -1, status: 0x0200},
		}},
		{name: "forward without asking", exchanges: []exchange{toSecurity, {from: 1, to: -1, status: 0x0200}}},
		{name: "to the same stage", exchanges: []exchange{{from: 0, to: 0, say: normal, status: 0x0200}}},
		{name: "to stage 2", exchanges: []exchange{{from: 0, to: 2, say: normal, status: 0x0200}}},
		{name: "from stage 2", exchanges: []exchange{{from: 2, to: 3, say: normal, status: 0x0200}}},
		{name: "from the full feature phase", exchanges: []exchange{{from: 3, to: -1, say: normal, status: 0x0200}}},
		{name: "another name", exchanges: []exchange{toSecurity, {from: 0, to: 1, say: []string{"InitiatorName=iqn.2026-11.x"}, status: 0x0200}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := newLogin(loginConfig{directory: testDirectory{chap: test.chap}})
			run(t, l, test.exchanges)
			if l.ok || l.err == nil {
				t.Errorf("ok %v, %v", l.ok, l.err)
			}
		})
	}
}

// A login that joins a session may say what kind it is, and how its connection talks; the rest is settled.
func TestLoginIntoSession(t *testing.T) {
	join := func(keys ...string) (*login, *pdu) {
		l := newLogin(loginConfig{directory: testDirectory{target: &Target{}}})
		req := loginRequest(1, 3, append(slices.Clone(aNormalLogin), keys...)...)
		req.setTSIH(3)
		req.setCID(5)
		resp, _ := l.step(req)
		return l, resp
	}
	l, resp := join("HeaderDigest=CRC32C", "MaxRecvDataSegmentLength=4096")
	if !l.ok || l.tsih != 3 || l.cid != 5 || resp.tsih() != 3 || !l.params.headerDigest || l.params.maxSend != 4096 {
		t.Errorf("%+v, %v", l.params, l.err)
	}
	if l, resp := join("MaxBurstLength=8192"); l.ok || resp.loginStatus() != 0x0200 {
		t.Errorf("ok %v, status %04x", l.ok, resp.loginStatus())
	}
}

// Headers that do not fit the first one, or no login at all.
func TestLoginHeaders(t *testing.T) {
	tests := []struct {
		name   string
		spoil  func(p *pdu)
		status uint16
	}{
		{"ISID", func(p *pdu) { p.setISID(p.isid() + 1) }, 0x0200},
		{"TSIH", func(p *pdu) { p.setTSIH(1) }, 0x0200},
		{"CID", func(p *pdu) { p.setCID(1) }, 0x0200},
		{"T and C", func(p *pdu) { p.bhs[1] |= flagTransit | flagContinue | stageFullFeature }, 0x0200},
		{"opcode", func(p *pdu) { p.bhs[0] = opText }, 0x020b},
		{"version", func(p *pdu) { p.bhs[2], p.bhs[3] = 9, 1 }, 0x0205},
		{"data segment", func(p *pdu) { p.data = make([]byte, defaultSegment+1) }, 0x0200},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := newLogin(loginConfig{directory: testDirectory{}})
			first := loginRequest(1, -1, aNormalLogin...)
			first.bhs[2] = 3 // the initiator speaks newer ones as well
			if resp, done := l.step(first); done || resp.versionMax() != 0 || resp.versionMin() != 0 || resp.itt() != 7 {
				t.Fatalf("done %v, %x, %v", done, resp.bhs, l.err)
			}
			req := loginRequest(1, -1)
			test.spoil(req)
			if resp, done := l.step(req); !done || l.ok || resp.loginStatus() != test.status {
				t.Errorf("done %v, status %04x, want %04x", done, resp.loginStatus(), test.status)
			}
		})
	}
}

// A row in pieces, cut in the middle of a key, a value and a delimiter.
func TestLoginInPieces(t *testing.T) {
	row := string(text(append(slices.Clone(aNormalLogin), "HeaderDigest=CRC32C", "InitialR2T=No")...))
	for size := 1; size < len(row); size += 7 {
		l := newLogin(loginConfig{directory: testDirectory{target: &Target{}}})
		rest := row
		for ; len(rest) > size && l.requests < maxLoginRequests-1; rest = rest[size:] {
			req := loginRequest(1, -1)
			req.bhs[1] |= flagContinue
			req.data = []byte(rest[:size])
			resp, done := l.step(req)
			if done || len(resp.data) != 0 || resp.bhs[1] != stageOperational<<2 {
				t.Fatalf("pieces of %d: done %v, flags %02x, %q, %v", size, done, resp.bhs[1], resp.data, l.err)
			}
		}
		if len(rest) > size {
			continue // more pieces than anybody gets
		}
		req := loginRequest(1, 3)
		req.data = []byte(rest)
		resp, done := l.step(req)
		if !done || !l.ok || !l.params.headerDigest || l.params.initialR2T {
			t.Fatalf("pieces of %d: done %v, %+v, %v", size, done, l.params, l.err)
		}
		want := []string{"HeaderDigest=CRC32C", "InitialR2T=No", "MaxRecvDataSegmentLength=262144", "TargetPortalGroupTag=1"}
		if diff := cmp.Diff(want, sorted(resp.data)); diff != "" {
			t.Fatalf("pieces of %d (-want +got):\n%s", size, diff)
		}
	}
}

// An answer that the initiator takes 512 bytes of at a time: it asks for each piece, and the stage ends with the last.
func TestLoginAnswersInPieces(t *testing.T) {
	say := append(slices.Clone(aNormalLogin), "MaxRecvDataSegmentLength=512")
	want := []string{"MaxRecvDataSegmentLength=262144", "TargetPortalGroupTag=1"}
	for i := range 60 {
		key := fmt.Sprintf("X-com.example.%02d", i)
		say = append(say, key+"=1")
		want = append(want, key+"="+valueNotUnderstood)
	}
	slices.Sort(want)
	l := newLogin(loginConfig{directory: testDirectory{target: &Target{}}})
	var whole []byte
	req := loginRequest(1, 3, say...)
	for pieces := 1; ; pieces++ {
		resp, done := l.step(req)
		whole = append(whole, resp.data...)
		if len(resp.data) > 512 || l.err != nil {
			t.Fatalf("%d bytes, %v", len(resp.data), l.err)
		}
		if done {
			if pieces < 4 || resp.cont() || !resp.transit() || resp.nsg() != 3 {
				t.Fatalf("done after %d pieces, flags %02x", pieces, resp.bhs[1])
			}
			break
		}
		if !resp.cont() || resp.transit() {
			t.Fatalf("flags %02x, and more to come", resp.bhs[1])
		}
		req = loginRequest(1, 3)
	}
	if diff := cmp.Diff(want, sorted(whole)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	l = newLogin(loginConfig{directory: testDirectory{}})
	if resp, done := l.step(loginRequest(1, 3, say...)); done || !resp.cont() {
		t.Fatalf("done %v, flags %02x, %v", done, resp.bhs[1], l.err)
	}
	if resp, done := l.step(loginRequest(1, 3, "InitialR2T=No")); !done || resp.loginStatus() != 0x0200 {
		t.Errorf("text before the answer is over: done %v, status %04x", done, resp.loginStatus())
	}
}

// Nobody keeps a login going for ever, nor fills the memory with it.
func TestLoginBounds(t *testing.T) {
	piece := func(n int) *pdu {
		req := loginRequest(0, -1)
		req.bhs[1] |= flagContinue
		req.data = make([]byte, n)
		return req
	}
	idle := func(int) *pdu { return loginRequest(0, -1) }
	tests := []struct {
		name  string
		first *pdu
		next  func(i int) *pdu
		most  int // requests that are answered
	}{
		{"empty requests", loginRequest(0, -1, aNormalLogin...), idle, maxLoginRequests},
		{"empty pieces", piece(0), func(int) *pdu { return piece(0) }, maxLoginRequests},
		{"full pieces", piece(8192), func(int) *pdu { return piece(8192) }, maxText / 8192},
		{"full rows", loginRequest(0, -1, aNormalLogin...), func(i int) *pdu {
			req := loginRequest(0, -1)
			for j := range 60 {
				req.data = appendText(req.data, fmt.Sprintf("X-com.example.%d.%d", i, j), strings.Repeat("v", 110))
			}
			return req
		}, maxLoginRequests},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := newLogin(loginConfig{directory: testDirectory{}})
			answered, taken, req := 0, 0, test.first
			for {
				resp, done := l.step(req)
				if done {
					if l.ok || resp.loginStatus() != 0x0200 {
						t.Fatalf("ok %v, status %04x", l.ok, resp.loginStatus())
					}
					break
				}
				answered++
				taken += len(req.data)
				req = test.next(answered)
			}
			if answered > test.most || taken > maxLoginBytes {
				t.Errorf("%d requests of %d bytes", answered, taken)
			}
		})
	}
}

// A fuzzed login is a row of requests, each made of bytes: flags; what of the header is spoilt; how many keys, each an
// index into fuzzKeys; 255 in place of that takes the rest as text.
var fuzzKeys = []string{
	"InitiatorName=" + testInitiator, "TargetName=" + testTarget, "TargetName=" + otherTarget, "SessionType=Normal",
	"SessionType=Discovery", "InitiatorAlias=a", "AuthMethod=CHAP,None", "AuthMethod=None", "CHAP_A=5", "CHAP_A=7,99",
	"CHAP_N=node1", "CHAP_N=troupe", "CHAP_R=0x00112233445566778899aabbccddeeff", "CHAP_R=0b", "CHAP_I=1",
	"CHAP_C=0x0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f20", "CHAP_C=0x00", "HeaderDigest=CRC32C,None",
	"DataDigest=CRC32C", "MaxConnections=4", "InitialR2T=No", "ImmediateData=No", "MaxRecvDataSegmentLength=512",
	"MaxRecvDataSegmentLength=16777215", "MaxBurstLength=512", "MaxBurstLength=16777215", "FirstBurstLength=16777215",
	"FirstBurstLength=512", "DefaultTime2Wait=3600", "DefaultTime2Retain=0", "MaxOutstandingR2T=65535",
	"DataPDUInOrder=No", "DataSequenceInOrder=No", "ErrorRecoveryLevel=2", "TaskReporting=FastAbort", "IFMarker=Yes",
	"OFMarkInt=1~2", "iSCSIProtocolLevel=31", "X-com.example.a=b", "X#NodeArchitecture=x", "SendTargets=All",
	"TargetAlias=Reject", "TargetAddress=10.0.0.1", "MaxBurstLength=Irrelevant",
}

func fuzzRequest(in []byte) (*pdu, []byte) {
	take := func() (b byte) {
		if len(in) > 0 {
			b, in = in[0], in[1:]
		}
		return b
	}
	req := loginRequest(0, -1)
	req.bhs[1] = take()
	if i := take(); i != 0 && int(i) < bhsLength {
		req.bhs[i] = take()
	}
	n := take()
	if n == 255 {
		n, in := min(len(in), 64), in
		req.data = slices.Clone(in[:n])
		return req, in[n:]
	}
	for range n % 24 {
		req.data = append(req.data, text(fuzzKeys[int(take())%len(fuzzKeys)])...)
	}
	return req, in
}

func FuzzLogin(f *testing.F) {
	f.Add(false, []byte{0x81, 0, 4, 0, 1, 3, 7, 0x87, 0, 5, 17, 18, 20, 22, 24})
	f.Add(false, []byte{0x87, 0, 8, 0, 1, 3, 20, 21, 25, 26, 38})
	f.Add(false, []byte{0x83, 0, 3, 0, 4, 7})
	f.Add(true, []byte{0x81, 0, 4, 0, 1, 3, 6, 0x00, 0, 1, 8, 0x81, 0, 4, 10, 12, 14, 15, 0x87, 0, 0})
	f.Add(true, []byte{0x40, 0, 2, 0, 1, 0x00, 0, 2, 3, 6, 0x00, 0, 255, 'C', 'H', 'A', 'P', '_', 'A', '=', '5', 0})
	f.Fuzz(func(t *testing.T, needed bool, in []byte) {
		cfg := loginConfig{directory: testDirectory{target: &Target{}}, random: new(counter)}
		if needed {
			cfg.directory = testDirectory{target: &Target{}, chap: &testCHAP}
		}
		l := newLogin(cfg)
		for requests := 1; len(in) > 0; requests++ {
			var req *pdu
			req, in = fuzzRequest(in)
			stage := l.stage
			resp, done := l.step(req)
			checkResponse(t, l, req, resp, done)
			switch {
			case l.ok && needed:
				t.Fatal("got in without the secret")
			case requests > maxLoginRequests && !done:
				t.Fatalf("%d requests", requests)
			case done:
				return
			case requests > 1 && l.stage < stage:
				t.Fatalf("back from stage %d to %d", stage, l.stage)
			}
		}
	})
}

// checkResponse holds a response to what section 11.13 says of all of them.
func checkResponse(t *testing.T, l *login, req, resp *pdu, done bool) {
	t.Helper()
	switch status := resp.loginStatus(); {
	case resp.opcode() != opLoginResp || resp.itt() != req.itt() || resp.lun() != req.lun():
		t.Fatalf("header %x", resp.bhs)
	case len(resp.data) > defaultSegment:
		t.Fatalf("%d bytes of data", len(resp.data))
	case status != 0 && (!done || l.ok || l.err == nil || resp.bhs[1] != 0 || len(resp.data) != 0):
		t.Fatalf("status %04x, done %v, ok %v, flags %02x", status, done, l.ok, resp.bhs[1])
	case status == 0 && done != l.ok:
		t.Fatalf("done %v, ok %v", done, l.ok)
	case status == 0 && resp.csg() != req.csg():
		t.Fatalf("stage %d in answer to %d", resp.csg(), req.csg())
	case resp.transit() && (!req.transit() || resp.cont() || resp.nsg() != req.nsg() || resp.nsg() != l.stage):
		t.Fatalf("flags %02x in answer to %02x", resp.bhs[1], req.bhs[1])
	case req.cont() && len(resp.data) != 0:
		t.Fatalf("%q in answer to a piece", resp.data)
	case l.ok && (l.initiator == "" || l.target == nil && !l.discovery || l.params.firstBurst > l.params.maxBurst):
		t.Fatalf("%+v", l)
	}
}
