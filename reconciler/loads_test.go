package reconciler

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// TestAKernelThatBringsNoAgentIsLeft goes through boots, each of which is served a kernel, and loads it, or not.
func TestAKernelThatBringsNoAgentIsLeft(t *testing.T) {
	a, b := digest.Of([]byte("a")), digest.Of([]byte("b"))
	type boot struct {
		wanted   digest.Digest
		isLoaded bool             // all files were sent
		report   *agentapi.Report // of the agent that came up; nil: none did
	}
	running := &agentapi.Report{Running: &agentapi.Running{}, Good: a}
	early := &agentapi.Report{}
	isBad := &agentapi.Report{Running: &agentapi.Running{}, Good: a, Bad: []agentapi.BadRelease{{Release: b}}}
	for name, tt := range map[string]struct {
		boots []boot
		lost  bool // the release to go back to is not in the store
		want  string
	}{
		"all is well":           {boots: []boot{{a, true, running}, {b, true, running}, {b, true, running}}, want: "a b b "},
		"it panics":             {boots: []boot{{a, true, running}, {b, true, nil}, {b, true, nil}, {b, true, isBad}, {b, true, isBad}}, want: "a b b a! a "},
		"another is wanted":     {boots: []boot{{a, true, running}, {b, true, nil}, {b, true, isBad}, {digest.Of([]byte("c")), true, running}}, want: "a b b c "},
		"neither comes up":      {boots: []boot{{a, true, running}, {b, true, nil}, {b, true, nil}, {b, true, nil}, {b, true, nil}, {b, true, nil}, {b, true, nil}}, want: "a b b a! b b a! "},
		"it is not sent whole":  {boots: []boot{{a, true, running}, {b, false, nil}, {b, false, nil}, {b, false, nil}}, want: "a b b b "},
		"an agent came up":      {boots: []boot{{a, true, running}, {b, true, nil}, {b, true, early}, {b, true, nil}, {b, true, nil}}, want: "a b b b b "},
		"nothing to go back to": {boots: []boot{{b, true, nil}, {b, true, nil}, {b, true, nil}}, want: "b b b "},
		"what was good is gone": {lost: true, boots: []boot{{a, true, running}, {b, true, nil}, {b, true, nil}, {b, true, nil}}, want: "a b b b "},
		"the good one panics":   {boots: []boot{{a, true, running}, {a, true, nil}, {a, true, nil}, {a, true, nil}}, want: "a a a a "},
	} {
		t.Run(name, func(t *testing.T) {
			names := map[digest.Digest]string{a: "a", b: "b", digest.Of([]byte("c")): "c"}
			var l state.Loads
			got := ""
			for _, x := range tt.boots {
				var isDead bool
				l, isDead = nextLoad(l, x.wanted, func(digest.Digest) bool { return !tt.lost })
				got += names[l.Served]
				if isDead {
					got += "!"
				}
				got += " "
				if x.isLoaded {
					l.Loaded = l.Served
				}
				if x.report != nil {
					l = agentCame(l, *x.report)
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("kernels served; ! where the agent is told (-want +got):\n%s", diff)
			}
		})
	}
}
