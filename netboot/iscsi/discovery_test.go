package iscsi

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var testPortals = []string{"192.0.2.1:3260", "[2001:db8::1]:3260"}

// textAfter is the text phase after a login to a target, or to discover.
func textAfter(t *testing.T, d testDirectory, initiator string, discovery bool) *textPhase {
	t.Helper()
	l := newLogin(loginConfig{directory: d})
	keys := []string{"InitiatorName=" + initiator, "TargetName=" + testTarget}
	if discovery {
		keys = []string{"InitiatorName=" + initiator, "SessionType=Discovery"}
	}
	if _, done := l.step(loginRequest(1, 3, keys...)); !done || !l.ok {
		t.Fatal(l.err)
	}
	return newTextPhase(l, testPortals)
}

func textRequest(flags byte, ttt uint32, pairs ...string) *pdu {
	p := &pdu{data: text(pairs...)}
	p.bhs[0] = opText
	p.bhs[1] = flags
	p.setITT(9)
	p.setTTT(ttt)
	return p
}

// record is what appendix C has of one target.
func record(name string) []string {
	return []string{"TargetName=" + name, "TargetAddress=192.0.2.1:3260,1", "TargetAddress=[2001:db8::1]:3260,1"}
}

func TestSendTargets(t *testing.T) {
	two := []string{testTarget, testTarget + ":second"}
	tests := []struct {
		name      string
		discovery bool
		initiator string
		names     []string
		value     string
		want      []string
	}{
		{"all", true, testInitiator, two, "All", append(record(two[0]), record(two[1])...)},
		{"one", true, testInitiator, two, two[1], record(two[1])},
		{"one of others", true, testInitiator, two, otherTarget, nil},
		{"nothing said, in a discovery session", true, testInitiator, two, "", []string{"SendTargets=Reject"}},
		{"no name", true, testInitiator, two, "all", []string{"SendTargets=Reject"}},
		{"a stranger", true, "iqn.2026-11.x", nil, "All", nil},
		{"a stranger that knows a name", true, "iqn.2026-11.x", nil, testTarget, nil},
		{"nothing said, in a normal session", false, testInitiator, two, "", record(testTarget)},
		{"its own, in a normal session", false, testInitiator, two, testTarget, record(testTarget)},
		{"another, in a normal session", false, testInitiator, two, two[1], []string{"SendTargets=Reject"}},
		{"all, in a normal session", false, testInitiator, two, "All", []string{"SendTargets=Reject"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			text := textAfter(t, testDirectory{target: &Target{}, names: test.names}, test.initiator, test.discovery)
			for range 2 { // each time anew
				resp, rejected := text.step(textRequest(flagFinal, noTag, "SendTargets="+test.value))
				if rejected || resp.opcode() != opTextResp || resp.bhs[1] != flagFinal || resp.ttt() != noTag || resp.itt() != 9 {
					t.Fatalf("rejected %v, %+v", rejected, resp)
				}
				if diff := cmp.Diff(test.want, untext(resp.data)); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			}
		})
	}
}

// An answer of more than fits goes out in pieces as large as the initiator declared; it asks for each by the tag of the
// last.
func TestSendTargetsInPieces(t *testing.T) {
	var names, want []string
	for i := range 40 {
		names = append(names, fmt.Sprintf("iqn.2026-11.dev.troupe:disk%02d", i))
		want = append(want, record(names[i])...)
	}
	text := textAfter(t, testDirectory{names: names}, testInitiator, true)
	req := textRequest(flagFinal, noTag, "MaxRecvDataSegmentLength=700", "SendTargets=All")
	var whole []byte
	tags := make(map[uint32]bool)
	for {
		resp, rejected := text.step(req)
		if rejected || len(resp.data) > 700 || text.maxSend != 700 {
			t.Fatalf("rejected %v, %d bytes, at most %d", rejected, len(resp.data), text.maxSend)
		}
		whole = append(whole, resp.data...)
		if resp.final() {
			if resp.ttt() != noTag || resp.cont() {
				t.Errorf("last piece with tag %x, flags %02x", resp.ttt(), resp.bhs[1])
			}
			break
		}
		if !resp.cont() || tags[resp.ttt()] || resp.ttt() == noTag || len(resp.data) != 700 {
			t.Fatalf("flags %02x, tag %x", resp.bhs[1], resp.ttt())
		}
		tags[resp.ttt()] = true
		req = textRequest(flagFinal, resp.ttt())
	}
	if diff := cmp.Diff(want, untext(whole)); diff != "" || len(tags) < 4 {
		t.Errorf("%d pieces (-want +got):\n%s", len(tags)+1, diff)
	}
}

// A row of the initiator in pieces, and one of several requests, none of which but the last is final.
func TestTextRequestsInPieces(t *testing.T) {
	text := textAfter(t, testDirectory{}, testInitiator, true)
	row := "SendTargets=All\x00X-com.example.a=b\x00"
	ttt := uint32(noTag)
	for i := range len(row) - 1 {
		req := textRequest(flagContinue, ttt)
		req.data = []byte(row[i : i+1])
		resp, rejected := text.step(req)
		if rejected || resp.bhs[1] != 0 || len(resp.data) != 0 || resp.ttt() == noTag {
			t.Fatalf("piece %d: rejected %v, %+v", i, rejected, resp)
		}
		ttt = resp.ttt()
	}
	req := textRequest(0, ttt)
	req.data = []byte(row[len(row)-1:])
	resp, rejected := text.step(req)
	if rejected || resp.bhs[1] != 0 || resp.ttt() == noTag {
		t.Fatalf("rejected %v, %+v", rejected, resp)
	}
	want := append([]string{"X-com.example.a=NotUnderstood"}, record(testTarget)...)
	if diff := cmp.Diff(want, untext(resp.data)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	resp, rejected = text.step(textRequest(flagFinal, resp.ttt(), "InitiatorAlias=a"))
	if rejected || resp.bhs[1] != flagFinal || resp.ttt() != noTag || len(resp.data) != 0 {
		t.Fatalf("rejected %v, %+v", rejected, resp)
	}
}

func TestTextRejects(t *testing.T) {
	many := make([]string, 60)
	for i := range many {
		many[i] = fmt.Sprintf("iqn.2026-11.dev.troupe:%s%02d", strings.Repeat("x", 180), i)
	}
	goOn := func(text *textPhase) uint32 {
		resp, _ := text.step(textRequest(0, noTag))
		return resp.ttt()
	}
	answering := func(text *textPhase) uint32 {
		resp, _ := text.step(textRequest(flagFinal, noTag, "SendTargets=All"))
		return resp.ttt()
	}
	tests := []struct {
		name string
		req  func(text *textPhase) *pdu
	}{
		{"F and C", func(*textPhase) *pdu { return textRequest(flagFinal|flagContinue, noTag) }},
		{"unknown tag", func(*textPhase) *pdu { return textRequest(flagFinal, 1) }},
		{"tag of a moment ago", func(text *textPhase) *pdu {
			old := goOn(text)
			text.step(textRequest(0, old))
			return textRequest(flagFinal, old)
		}},
		{"tag of a row that is over", func(text *textPhase) *pdu {
			old := goOn(text)
			text.step(textRequest(flagFinal, old))
			return textRequest(flagFinal, old)
		}},
		{"another task's tag", func(text *textPhase) *pdu {
			req := textRequest(flagFinal, goOn(text))
			req.setITT(10)
			return req
		}},
		{"not text", func(*textPhase) *pdu { return textRequest(flagFinal, noTag, "SendTargets") }},
		{"key of the login", func(*textPhase) *pdu { return textRequest(flagFinal, noTag, "HeaderDigest=None") }},
		{"key of security", func(*textPhase) *pdu { return textRequest(flagFinal, noTag, "AuthMethod=None") }},
		{"same key in two rows", func(text *textPhase) *pdu {
			resp, _ := text.step(textRequest(0, noTag, "SendTargets=All"))
			for resp.cont() {
				resp, _ = text.step(textRequest(0, resp.ttt()))
			}
			return textRequest(flagFinal, resp.ttt(), "SendTargets=All")
		}},
		{"segment too small", func(*textPhase) *pdu { return textRequest(flagFinal, noTag, "MaxRecvDataSegmentLength=1") }},
		{"text before the answer is over", func(text *textPhase) *pdu {
			return textRequest(flagFinal, answering(text), "InitiatorAlias=a")
		}},
		{"row without an end", func(text *textPhase) *pdu {
			req := textRequest(flagContinue, noTag)
			for {
				req.data = make([]byte, 8192)
				resp, rejected := text.step(req)
				if rejected {
					return textRequest(flagFinal|flagContinue, noTag)
				}
				req = textRequest(flagContinue, resp.ttt())
			}
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			text := textAfter(t, testDirectory{names: many}, testInitiator, true)
			before := text.maxSend
			if resp, rejected := text.step(test.req(text)); !rejected || resp != nil {
				t.Fatalf("rejected %v, %.80q", rejected, resp.data)
			}
			if text.maxSend != before {
				t.Errorf("at most %d bytes, %d before", text.maxSend, before)
			}
			// A new row is a new beginning.
			if resp, rejected := text.step(textRequest(flagFinal, noTag, "SendTargets="+many[7])); rejected || !resp.final() {
				t.Errorf("afterwards: rejected %v, %+v", rejected, resp)
			}
		})
	}
}

// The tag that means none is passed over.
func TestTextTagsWrapAround(t *testing.T) {
	text := textAfter(t, testDirectory{}, testInitiator, true)
	text.tag = noTag - 1
	resp, rejected := text.step(textRequest(0, noTag))
	if rejected || resp.ttt() != 0 {
		t.Fatalf("rejected %v, %+v", rejected, resp)
	}
	if resp, rejected := text.step(textRequest(flagFinal, 0)); rejected || !resp.final() {
		t.Errorf("rejected %v, %+v", rejected, resp)
	}
}

// A row that is begun before another is over takes its place.
func TestTextBeginsAnew(t *testing.T) {
	text := textAfter(t, testDirectory{}, testInitiator, true)
	req := textRequest(flagContinue, noTag)
	req.data = []byte("InitiatorAl")
	text.step(req)
	resp, rejected := text.step(textRequest(flagFinal, noTag, "SendTargets=All"))
	if rejected || !slices.Equal(untext(resp.data), record(testTarget)) {
		t.Errorf("rejected %v, %+v", rejected, resp)
	}
}

// Requests of any form are answered or rejected; nothing of another initiator is told.
func FuzzTextPhase(f *testing.F) {
	f.Add(true, []byte{0x80, 1, 16, 'S', 'e', 'n', 'd', 'T', 'a', 'r', 'g', 'e', 't', 's', '=', 'A', 'l', 'l', 0})
	f.Add(false, []byte{0x40, 1, 2, 'A', '=', 0x80, 0, 1, 0})
	f.Fuzz(func(t *testing.T, discovery bool, in []byte) {
		text := textAfter(t, testDirectory{}, testInitiator, discovery)
		tag := uint32(noTag)
		for len(in) > 2 {
			req := textRequest(in[0], tag)
			if in[1]&1 != 0 {
				req.setTTT(noTag)
			}
			n := min(int(in[2]), len(in)-3)
			req.data, in = in[3:3+n], in[3+n:]
			resp, rejected := text.step(req)
			if rejected {
				tag = noTag
				continue
			}
			tag = resp.ttt()
			if resp.final() != (tag == noTag) || resp.final() && resp.cont() || resp.final() && !req.final() {
				t.Fatalf("flags %02x, tag %x in answer to %02x", resp.bhs[1], tag, req.bhs[1])
			}
			if len(resp.data) > text.maxSend || strings.Contains(string(resp.data), otherTarget) {
				t.Fatalf("answer %q", resp.data)
			}
		}
	})
}
