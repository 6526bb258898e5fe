package iscsi

import (
	"errors"
	"testing"
)

// testNext are next secrets that count how often somebody had them.
type testNext struct{ proven int }

func (*testNext) Secrets() (secret, mutual string) { return "thesecretofthenext", "itsothersecret" }
func (n *testNext) Proven()                        { n.proven++ }

// The next secrets are heard of, and let nobody in; those of the moment go on to.
func TestCHAPNextSecrets(t *testing.T) {
	for _, tt := range []struct {
		name, user, secret string
		want               error
		proven             int
	}{
		{"of the moment", testCHAP.User, testCHAP.Secret, nil, 0},
		{"next", testCHAP.User, "thesecretofthenext", ErrNotReady, 1},
		{"next of another user", "node2", "thesecretofthenext", errAuth, 0},
		{"thrown back", testCHAP.User, "itsothersecret", errAuth, 0},
		{"others", testCHAP.User, "thesecretofnobody", errAuth, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			next := &testNext{}
			need := testCHAP
			need.Next = next
			a, algorithm, id, challenge := challenged(t, need, "7")
			err := a.take(map[string]string{"CHAP_N": tt.user, "CHAP_R": formatBinary(responseOf(algorithm, id, tt.secret, challenge))})
			if !errors.Is(err, tt.want) || a.done() != (tt.want == nil) || next.proven != tt.proven {
				t.Errorf("got %v, done %v, heard of %d times", err, a.done(), next.proven)
			}
		})
	}
}
