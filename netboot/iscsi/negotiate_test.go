package iscsi

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Each key by its rule: what is offered, what is answered, and what holds from then on.
func TestNegotiateKeys(t *testing.T) {
	tests := []struct {
		say, hear string // hear "" means that nothing is answered
		holds     func(*params)
	}{
		{"HeaderDigest=None", "HeaderDigest=None", nil},
		{"HeaderDigest=CRC32C", "HeaderDigest=CRC32C", func(p *params) { p.headerDigest = true }},
		{"HeaderDigest=None,CRC32C", "HeaderDigest=None", nil},
		{"HeaderDigest=CRC32C,None", "HeaderDigest=CRC32C", func(p *params) { p.headerDigest = true }},
		{"HeaderDigest=X-md5,CRC32C", "HeaderDigest=CRC32C", func(p *params) { p.headerDigest = true }},
		{"HeaderDigest=X-md5", "HeaderDigest=Reject", nil},
		{"HeaderDigest=CRC32C,", "HeaderDigest=Reject", nil},
		{"DataDigest=CRC32C,None", "DataDigest=CRC32C", func(p *params) { p.dataDigest = true }},
		{"DataDigest=None", "DataDigest=None", nil},

		{"MaxConnections=8", "MaxConnections=1", nil},
		{"MaxConnections=0", "MaxConnections=Reject", nil},
		{"MaxConnections=65536", "MaxConnections=Reject", nil},

		{"InitialR2T=Yes", "InitialR2T=Yes", nil},
		{"InitialR2T=No", "InitialR2T=No", func(p *params) { p.initialR2T = false }},
		{"InitialR2T=no", "InitialR2T=Reject", nil},
		{"ImmediateData=Yes", "ImmediateData=Yes", nil},
		{"ImmediateData=No", "ImmediateData=No", func(p *params) { p.immediateData = false }},
		{"DataPDUInOrder=Yes", "DataPDUInOrder=Yes", nil},
		{"DataPDUInOrder=No", "DataPDUInOrder=Yes", nil},
		{"DataSequenceInOrder=No", "DataSequenceInOrder=Yes", nil},

		{"MaxRecvDataSegmentLength=512", "", func(p *params) { p.maxSend = 512 }},
		{"MaxRecvDataSegmentLength=0x40000", "", func(p *params) { p.maxSend = 262144 }},
		{"MaxRecvDataSegmentLength=16777215", "", func(p *params) { p.maxSend = 1<<24 - 1 }},

		{"MaxBurstLength=512", "MaxBurstLength=512", func(p *params) { p.maxBurst, p.firstBurst = 512, 512 }},
		{"MaxBurstLength=262144", "MaxBurstLength=262144", nil},
		{"MaxBurstLength=0x40000", "MaxBurstLength=262144", nil},
		{"MaxBurstLength=16776192", "MaxBurstLength=1048576", func(p *params) { p.maxBurst = 1 << 20 }},
		{"MaxBurstLength=511", "MaxBurstLength=Reject", nil},
		{"MaxBurstLength=16777216", "MaxBurstLength=Reject", nil},
		{"MaxBurstLength=-1", "MaxBurstLength=Reject", nil},
		{"MaxBurstLength=512~1024", "MaxBurstLength=Reject", nil},
		{"MaxBurstLength=", "MaxBurstLength=Reject", nil},
		{"FirstBurstLength=65536", "FirstBurstLength=65536", nil},
		{"FirstBurstLength=16777215", "FirstBurstLength=262144", func(p *params) { p.firstBurst = 262144 }},
		{"FirstBurstLength=1", "FirstBurstLength=Reject", nil},

		{"DefaultTime2Wait=0", "DefaultTime2Wait=0", func(p *params) { p.time2Wait = 0 }},
		{"DefaultTime2Wait=3600", "DefaultTime2Wait=3600", func(p *params) { p.time2Wait = 3600 }},
		{"DefaultTime2Wait=3601", "DefaultTime2Wait=Reject", nil},
		{"DefaultTime2Retain=20", "DefaultTime2Retain=0", func(p *params) { p.time2Retain = 0 }},
		{"MaxOutstandingR2T=1", "MaxOutstandingR2T=1", nil},
		{"MaxOutstandingR2T=16", "MaxOutstandingR2T=8", func(p *params) { p.maxOutstandingR2T = 8 }},
		{"MaxOutstandingR2T=0", "MaxOutstandingR2T=Reject", nil},
		{"ErrorRecoveryLevel=0", "ErrorRecoveryLevel=0", nil},
		{"ErrorRecoveryLevel=2", "ErrorRecoveryLevel=0", nil},
		{"ErrorRecoveryLevel=3", "ErrorRecoveryLevel=Reject", nil},

		{"TaskReporting=RFC3720", "TaskReporting=RFC3720", nil},
		{"TaskReporting=FastAbort,ResponseFence,RFC3720", "TaskReporting=RFC3720", nil},
		{"TaskReporting=FastAbort", "TaskReporting=Reject", nil},
		{"iSCSIProtocolLevel=2", "iSCSIProtocolLevel=1", nil},
		{"iSCSIProtocolLevel=0", "iSCSIProtocolLevel=0", func(p *params) { p.protocolLevel = 0 }},
		{"iSCSIProtocolLevel=32", "iSCSIProtocolLevel=Reject", nil},

		{"IFMarker=No", "IFMarker=Reject", nil},
		{"OFMarker=Yes", "OFMarker=Reject", nil},
		{"IFMarkInt=2048~8192", "IFMarkInt=Reject", nil},
		{"OFMarkInt=2048", "OFMarkInt=Reject", nil},

		{"X#NodeArchitecture=os.linux,cpu.x86", "", nil},
		{"InitiatorAlias=", "", nil},
		{"X-com.example.speed=11", "X-com.example.speed=NotUnderstood", nil},
		{"RDMAExtensions=Yes", "RDMAExtensions=NotUnderstood", nil},
		{"TargetAlias=NotUnderstood", "", nil},
		{"TargetPortalGroupTag=Reject", "", nil},
		{"MaxRecvDataSegmentLength=Reject", "", nil},
	}
	for _, test := range tests {
		t.Run(test.say, func(t *testing.T) {
			n := newNegotiation(true)
			pairs, err := parseText(text(test.say))
			if err == nil {
				err = n.take(stageOperational, pairs)
			}
			if err != nil {
				t.Fatal(err)
			}
			want := defaultParams()
			if test.holds != nil {
				test.holds(&want)
			}
			var hear []string
			if test.hear != "" {
				hear = []string{test.hear}
			}
			if diff := cmp.Diff(hear, untext(n.out)); diff != "" {
				t.Errorf("answer (-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(want, n.params, cmp.AllowUnexported(params{})); diff != "" {
				t.Errorf("params (-want +got):\n%s", diff)
			}
		})
	}
}

// mustParse is a row that is known to be good.
func mustParse(t *testing.T, pairs ...string) []pair {
	t.Helper()
	p, err := parseText(text(pairs...))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// FirstBurstLength follows what was said before it, beside it and after it, in whatever order.
func TestNegotiateFirstBurst(t *testing.T) {
	tests := []struct {
		name string
		say  [][]string
		hear []string
		want int
		bad  bool
	}{
		{
			name: "before MaxBurstLength", say: [][]string{{"FirstBurstLength=65536", "MaxBurstLength=8192"}},
			hear: []string{"FirstBurstLength=8192", "MaxBurstLength=8192"}, want: 8192,
		},
		{
			name: "in a row of its own", say: [][]string{{"MaxBurstLength=8192"}, {"FirstBurstLength=65536"}},
			hear: []string{"FirstBurstLength=8192", "MaxBurstLength=8192"}, want: 8192,
		},
		{name: "MaxBurstLength lower afterwards", say: [][]string{{"FirstBurstLength=65536"}, {"MaxBurstLength=8192"}}, bad: true},
		{name: "not named", say: [][]string{{"MaxBurstLength=8192"}}, hear: []string{"MaxBurstLength=8192"}, want: 8192},
		{
			name: "no unsolicited data", say: [][]string{{"FirstBurstLength=8192", "ImmediateData=No", "InitialR2T=Yes"}},
			hear: []string{"FirstBurstLength=Irrelevant", "ImmediateData=No", "InitialR2T=Yes"}, want: 65536,
		},
		{
			name: "no unsolicited data, and short bursts",
			say:  [][]string{{"FirstBurstLength=8192", "ImmediateData=No", "InitialR2T=Yes", "MaxBurstLength=16384"}},
			hear: []string{"FirstBurstLength=Irrelevant", "ImmediateData=No", "InitialR2T=Yes", "MaxBurstLength=16384"}, want: 16384,
		},
		{
			name: "rejected, and short bursts", say: [][]string{{"FirstBurstLength=1", "MaxBurstLength=16384"}},
			hear: []string{"FirstBurstLength=Reject", "MaxBurstLength=16384"}, want: 16384,
		},
		{
			name: "immediate data alone", say: [][]string{{"FirstBurstLength=8192", "InitialR2T=Yes"}},
			hear: []string{"FirstBurstLength=8192", "InitialR2T=Yes"}, want: 8192,
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			n := newNegotiation(true)
			var err error
			for _, row := range test.say {
				if err == nil {
					err = n.take(stageOperational, mustParse(t, row...))
				}
			}
			if test.bad {
				if !errors.Is(err, errText) {
					t.Fatal(err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(test.hear, sorted(n.out)); diff != "" || n.params.firstBurst != test.want {
				t.Errorf("%d, want %d; answers (-want +got):\n%s", n.params.firstBurst, test.want, diff)
			}
		})
	}
}

// What ends a negotiation.
func TestNegotiateRefusals(t *testing.T) {
	tests := []struct {
		name    string
		stage   byte
		joining bool // a login into a session
		rows    [][]string
	}{
		{name: "operational key in the security stage", stage: stageSecurity, rows: [][]string{{"HeaderDigest=None"}}},
		{name: "MaxRecvDataSegmentLength in the security stage", stage: stageSecurity, rows: [][]string{{"MaxRecvDataSegmentLength=8192"}}},
		{name: "SendTargets in a login", stage: stageOperational, rows: [][]string{{"SendTargets=All"}}},
		{name: "login key in the full feature phase", stage: stageFullFeature, rows: [][]string{{"MaxBurstLength=8192"}}},
		{name: "name in the full feature phase", stage: stageFullFeature, rows: [][]string{{"InitiatorName=" + testInitiator}}},
		{name: "operational key twice", stage: stageOperational, rows: [][]string{{"InitialR2T=No"}, {"InitialR2T=No"}}},
		{name: "declaration twice", stage: stageOperational, rows: [][]string{{"MaxRecvDataSegmentLength=8192"}, {"MaxRecvDataSegmentLength=8192"}}},
		{name: "unknown key twice", stage: stageOperational, rows: [][]string{{"X-a=1"}, {"X-a=1"}}},
		{name: "rejected key again", stage: stageOperational, rows: [][]string{{"MaxBurstLength=1"}, {"MaxBurstLength=512"}}},
		{name: "another name", stage: stageOperational, rows: [][]string{{"InitiatorName=iqn.2026-11.a"}, {"InitiatorName=iqn.2026-11.b"}}},
		{name: "late name", stage: stageOperational, rows: [][]string{{}, {"InitiatorName=iqn.2026-11.a"}}},
		{name: "late type of session", stage: stageOperational, rows: [][]string{{}, {"SessionType=Discovery"}}},
		{name: "late target", stage: stageOperational, rows: [][]string{{}, {"TargetName=iqn.2026-11.a"}}},
		{name: "no name", stage: stageOperational, rows: [][]string{{"InitiatorName=node1"}}},
		{name: "key of the target", stage: stageOperational, rows: [][]string{{"TargetPortalGroupTag=1"}}},
		{name: "redirection by the initiator", stage: stageOperational, rows: [][]string{{"TargetAddress=10.0.0.1"}}},
		{name: "answer to nothing", stage: stageOperational, rows: [][]string{{"MaxBurstLength=Irrelevant"}}},
		{name: "answer of an unknown key", stage: stageOperational, rows: [][]string{{"X-a=NotUnderstood"}}},
		{name: "segment too small", stage: stageOperational, rows: [][]string{{"MaxRecvDataSegmentLength=511"}}},
		{name: "segment too large", stage: stageOperational, rows: [][]string{{"MaxRecvDataSegmentLength=16777216"}}},
		{name: "segment no number", stage: stageOperational, rows: [][]string{{"MaxRecvDataSegmentLength=many"}}},
		{name: "alias too long", stage: stageOperational, rows: [][]string{{"InitiatorAlias=" + strings.Repeat("a", maxListItem+1)}}},
		{name: "session's key in a login that joins one", joining: true, stage: stageOperational, rows: [][]string{{"MaxBurstLength=8192"}}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			n := newNegotiation(!test.joining)
			for i, row := range test.rows {
				err := n.take(test.stage, mustParse(t, row...))
				if last := i == len(test.rows)-1; last != errors.Is(err, errText) || !last && err != nil {
					t.Fatalf("row %d: %v", i, err)
				}
			}
		})
	}
}

// In a discovery session, what is about data says nothing; in which order it comes does not matter.
func TestNegotiateDiscovery(t *testing.T) {
	n := newNegotiation(true)
	row := []string{
		"InitialR2T=No", "MaxBurstLength=8192", "FirstBurstLength=8192", "ImmediateData=No", "MaxConnections=1",
		"MaxOutstandingR2T=1", "DataPDUInOrder=Yes", "DataSequenceInOrder=Yes", "TaskReporting=FastAbort",
		"iSCSIProtocolLevel=2", "HeaderDigest=None", "DefaultTime2Wait=2", "DefaultTime2Retain=0",
		"ErrorRecoveryLevel=0", "MaxRecvDataSegmentLength=32768", "IFMarker=No", "SessionType=Discovery",
	}
	if err := n.take(stageOperational, mustParse(t, row...)); err != nil {
		t.Fatal(err)
	}
	hear := []string{
		"DataPDUInOrder=Irrelevant", "DataSequenceInOrder=Irrelevant", "DefaultTime2Retain=0", "DefaultTime2Wait=2",
		"ErrorRecoveryLevel=0", "FirstBurstLength=Irrelevant", "HeaderDigest=None", "IFMarker=Reject",
		"ImmediateData=Irrelevant", "InitialR2T=Irrelevant", "MaxBurstLength=Irrelevant", "MaxConnections=Irrelevant",
		"MaxOutstandingR2T=Irrelevant", "TaskReporting=Irrelevant", "iSCSIProtocolLevel=Irrelevant",
	}
	if diff := cmp.Diff(hear, sorted(n.out)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	want := defaultParams()
	want.maxSend, want.time2Retain = 32768, 0
	if diff := cmp.Diff(want, n.params, cmp.AllowUnexported(params{})); diff != "" {
		t.Errorf("params (-want +got):\n%s", diff)
	}
}

// The table itself.
func TestKeyRulesAreWhole(t *testing.T) {
	for key, r := range keyRules {
		if !isKey([]byte(key)) || r.rule == nil || isSecurityKey(key) {
			t.Errorf("rule of %s", key)
		}
		if r.turn == turnNames && r.stages&inFullFeature != 0 && key != "InitiatorAlias" {
			t.Errorf("%s may come again", key)
		}
		if r.turn < turnNames || r.turn > turnLast {
			t.Errorf("turn of %s", key)
		}
		if r.first && r.turn != turnNames {
			t.Errorf("%s is for the first row, and may come again", key)
		}
	}
}
