package iscsi

import (
	"errors"
	"slices"
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
			name: "open-iscsi, no authentication",
			exchanges: []exchange{
				{from: 0, to: 1, next: 1,
					say: []string{
						"InitiatorName=" + testInitiator, "InitiatorAlias=node1", "TargetName=" + testTarget,
						"SessionType=Normal", "AuthMethod=None",
					},
					hear: []string{"AuthMethod=None", "TargetPortalGroupTag=1"}},
				{from: 1, to: 3, next: 3,
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
					}},
			},
			want: func(p *params) {
				p.maxRecv, p.maxSend = 262144, 262144
				p.maxBurst, p.firstBurst = 1<<20, 262144
				p.initialR2T = false
				p.time2Wait, p.time2Retain = 2, 0
			},
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
