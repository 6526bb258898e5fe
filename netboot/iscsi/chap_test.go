package iscsi

import (
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"encoding/base64"
	"errors"
	"maps"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
)

// responseOf computes a response as RFC 1994 section 4.1 has it, each algorithm in its own way.
func responseOf(algorithm string, id byte, secret string, challenge []byte) []byte {
	in := append(append([]byte{id}, secret...), challenge...)
	switch algorithm {
	case "5":
		sum := md5.Sum(in)
		return sum[:]
	case "6":
		sum := sha1.Sum(in)
		return sum[:]
	case "7":
		sum := sha256.Sum256(in)
		return sum[:]
	case "8":
		sum := sha3.Sum256(in)
		return sum[:]
	}
	panic(algorithm)
}

var testCHAP = CHAP{User: "node1", Secret: "of-the-node-00000", MutualUser: "troupe", MutualSecret: "of-the-target-000"}

// A counter is a source of "random" bytes that differ, so that tests can tell what comes from where.
type counter byte

func (c *counter) Read(b []byte) (int, error) {
	for i := range b {
		*c++
		b[i] = byte(*c)
	}
	return len(b), nil
}

// answersOf are the answers of an authentication since the last time.
func answersOf(t *testing.T, a *authentication) map[string]string {
	t.Helper()
	pairs, err := parseText(a.out)
	if err != nil {
		t.Fatal(err)
	}
	a.out = nil
	m := make(map[string]string)
	for _, p := range pairs {
		m[p.key] = p.value
	}
	return m
}

// challenged brings an authentication to where it has sent its challenge.
func challenged(t *testing.T, need CHAP, algorithms string) (a *authentication, algorithm string, id byte, challenge []byte) {
	t.Helper()
	a = &authentication{need: &need, random: new(counter)}
	if err := a.take(map[string]string{"AuthMethod": "CHAP,None"}); err != nil {
		t.Fatal(err)
	}
	if got := answersOf(t, a); !maps.Equal(got, map[string]string{"AuthMethod": "CHAP"}) {
		t.Fatalf("answers %v", got)
	}
	if err := a.take(map[string]string{"CHAP_A": algorithms}); err != nil {
		t.Fatal(err)
	}
	got := answersOf(t, a)
	n, err := strconv.ParseUint(got["CHAP_I"], 10, 8)
	if err != nil {
		t.Fatal(err)
	}
	if challenge, err = parseBinary(got["CHAP_C"]); err != nil || len(challenge) < 16 || len(got) != 3 {
		t.Fatalf("answers %v, %v", got, err)
	}
	if a.done() {
		t.Fatal("done before anything was proven")
	}
	return a, got["CHAP_A"], byte(n), challenge
}

func TestCHAPAlgorithms(t *testing.T) {
	for _, test := range []struct{ offer, want string }{
		{"5", "5"},
		{"6", "6"},
		{"7", "7"},
		{"8", "8"},
		{"8,7,6,5", "8"},
		{"5,7", "5"},
		{"99,7,5", "7"},
		{"0x5", "5"},
		{"129,130,5", "5"},
	} {
		t.Run(test.offer, func(t *testing.T) {
			a, algorithm, id, challenge := challenged(t, testCHAP, test.offer)
			if algorithm != test.want {
				t.Fatalf("algorithm %s, want %s", algorithm, test.want)
			}
			theirs := bytes.Repeat([]byte{0xee}, 24)
			err := a.take(map[string]string{
				"CHAP_N": testCHAP.User,
				"CHAP_R": formatBinary(responseOf(algorithm, id, testCHAP.Secret, challenge)),
				"CHAP_I": "200",
				"CHAP_C": "0b" + base64.StdEncoding.EncodeToString(theirs),
			})
			if err != nil || !a.done() {
				t.Fatalf("done %v, %v", a.done(), err)
			}
			want := map[string]string{
				"CHAP_N": testCHAP.MutualUser,
				"CHAP_R": formatBinary(responseOf(algorithm, 200, testCHAP.MutualSecret, theirs)),
			}
			if got := answersOf(t, a); !maps.Equal(got, want) {
				t.Errorf("answers %v, want %v", got, want)
			}
		})
	}
}

func TestCHAPOneWay(t *testing.T) {
	need := CHAP{User: "node1", Secret: "s"}
	a, algorithm, id, challenge := challenged(t, need, "5")
	response := responseOf(algorithm, id, need.Secret, challenge)
	// Upper case, as libiscsi writes it.
	err := a.take(map[string]string{"CHAP_N": "node1", "CHAP_R": "0x" + strings.ToUpper(formatBinary(response)[2:])})
	if err != nil || !a.done() || len(a.out) != 0 {
		t.Fatalf("done %v, answers %q, %v", a.done(), a.out, err)
	}
}

// Each login has a challenge and an identifier of its own.
func TestCHAPChallengesDiffer(t *testing.T) {
	random := new(counter)
	seen := make(map[string]bool)
	for range 3 {
		a := &authentication{need: &testCHAP, random: random}
		if err := a.take(map[string]string{"AuthMethod": "CHAP", "CHAP_A": "5"}); err != nil {
			t.Fatal(err)
		}
		seen[strconv.Itoa(int(a.id))+formatBinary(a.challenge)] = true
	}
	if len(seen) != 3 {
		t.Errorf("%d challenges in 3 logins", len(seen))
	}
	a := &authentication{need: &testCHAP, random: iotest.ErrReader(errors.New("no randomness"))}
	err := a.take(map[string]string{"AuthMethod": "CHAP", "CHAP_A": "5"})
	if err == nil || loginStatus(err) != loginTargetError || a.done() {
		t.Errorf("without randomness: %v", err)
	}
}

// What must not get in, whatever it knows.
func TestCHAPRefusals(t *testing.T) {
	sameSecrets := testCHAP
	sameSecrets.MutualSecret = sameSecrets.Secret
	oneWay := CHAP{User: "node1", Secret: "of-the-node-00000"}
	long := bytes.Repeat([]byte{1}, 16)
	tests := []struct {
		name string
		need CHAP
		keys func(right, reflected, challenge []byte) map[string]string
	}{
		{"wrong secret", testCHAP, func(right, _, _ []byte) map[string]string {
			right[0] ^= 1
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right)}
		}},
		{"unknown user", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node2", "CHAP_R": formatBinary(right)}
		}},
		{"user in another case", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "NODE1", "CHAP_R": formatBinary(right)}
		}},
		{"response cut short", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right[:15])}
		}},
		{"response with more behind it", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(append(right, 0))}
		}},
		{"the target's own secret", testCHAP, func(_, reflected, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(reflected)}
		}},
		{"the target's own name and secret", testCHAP, func(_, reflected, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "troupe", "CHAP_R": formatBinary(reflected)}
		}},
		{"no secret known here", CHAP{User: "node1"}, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right)}
		}},
		{"one secret for both", sameSecrets, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right)}
		}},
		{"our challenge sent back", testCHAP, func(right, _, challenge []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right), "CHAP_I": "1", "CHAP_C": formatBinary(challenge)}
		}},
		{"short challenge", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right), "CHAP_I": "1", "CHAP_C": formatBinary(long[:15])}
		}},
		{"proof asked of a target without one", oneWay, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right), "CHAP_I": "1", "CHAP_C": formatBinary(long)}
		}},
		{"challenge without identifier", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right), "CHAP_C": formatBinary(long)}
		}},
		{"identifier without challenge", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right), "CHAP_I": "1"}
		}},
		{"identifier of two bytes", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right), "CHAP_I": "256", "CHAP_C": formatBinary(long)}
		}},
		{"challenge that is none", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": formatBinary(right), "CHAP_I": "1", "CHAP_C": "17"}
		}},
		{"no name", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_R": formatBinary(right)}
		}},
		{"no response", testCHAP, func(_, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1"}
		}},
		{"response that is none", testCHAP, func(_, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_N": "node1", "CHAP_R": "0x"}
		}},
		{"challenge first", testCHAP, func(_, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_I": "1", "CHAP_C": formatBinary(long)}
		}},
		{"algorithm again", testCHAP, func(_, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_A": "5"}
		}},
		{"method again", testCHAP, func(_, _, _ []byte) map[string]string {
			return map[string]string{"AuthMethod": "None"}
		}},
		{"algorithm and response together", testCHAP, func(right, _, _ []byte) map[string]string {
			return map[string]string{"CHAP_A": "5", "CHAP_N": "node1", "CHAP_R": formatBinary(right)}
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a, algorithm, id, challenge := challenged(t, test.need, "5")
			right := responseOf(algorithm, id, test.need.Secret, challenge)
			reflected := responseOf(algorithm, id, test.need.MutualSecret, challenge)
			keys := test.keys(right, reflected, challenge)
			err := a.take(keys)
			if !errors.Is(err, errAuth) && !errors.Is(err, errText) || a.done() {
				t.Fatalf("done %v, %v", a.done(), err)
			}
			if len(a.out) != 0 {
				t.Errorf("answers %q", a.out)
			}
		})
	}
}

// A right response of one login is worth nothing in another, nor a second time in its own.
func TestCHAPReplay(t *testing.T) {
	a, algorithm, id, challenge := challenged(t, testCHAP, "7")
	keys := map[string]string{
		"CHAP_N": testCHAP.User, "CHAP_R": formatBinary(responseOf(algorithm, id, testCHAP.Secret, challenge)),
	}
	if err := a.take(maps.Clone(keys)); err != nil {
		t.Fatal(err)
	}
	if err := a.take(maps.Clone(keys)); !errors.Is(err, errText) {
		t.Errorf("again in the same login: %v", err)
	}
	b := &authentication{need: &testCHAP, random: iotest.OneByteReader(bytes.NewReader(bytes.Repeat([]byte{9}, 64)))}
	if err := b.take(map[string]string{"AuthMethod": "CHAP", "CHAP_A": "7"}); err != nil {
		t.Fatal(err)
	}
	if err := b.take(maps.Clone(keys)); !errors.Is(err, errAuth) || b.done() {
		t.Errorf("in another login: done %v, %v", b.done(), err)
	}
}

func TestAuthMethod(t *testing.T) {
	tests := []struct {
		offer string
		need  *CHAP
		want  string // "" means refused
	}{
		{"None", nil, "None"},
		{"CHAP,None", nil, "None"},
		{"KRB5,None", nil, "None"},
		{"CHAP", nil, ""},
		{"CHAP", &testCHAP, "CHAP"},
		{"None,CHAP", &testCHAP, "CHAP"},
		{"KRB5,SRP,CHAP,None", &testCHAP, "CHAP"},
		{"None", &testCHAP, ""},
		{"KRB5,SRP", &testCHAP, ""},
		{"chap", &testCHAP, ""},
		{"", &testCHAP, ""},
	}
	for _, test := range tests {
		a := &authentication{need: test.need, random: new(counter)}
		err := a.take(map[string]string{"AuthMethod": test.offer})
		if test.want == "" {
			if err == nil || len(a.out) != 0 {
				t.Errorf("%s: answers %q, %v", test.offer, a.out, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", test.offer, err)
			continue
		}
		if got := answersOf(t, a); got["AuthMethod"] != test.want {
			t.Errorf("%s: answers %v, want %s", test.offer, got, test.want)
		}
	}
	for _, keys := range []map[string]string{
		{"CHAP_A": "5"},
		{"CHAP_N": "node1", "CHAP_R": "0x00"},
	} {
		for _, need := range []*CHAP{nil, &testCHAP} {
			a := &authentication{need: need, random: new(counter)}
			if err := a.take(maps.Clone(keys)); !errors.Is(err, errText) || len(a.out) != 0 {
				t.Errorf("%v before a method is chosen: %q, %v", keys, a.out, err)
			}
		}
	}
	a := &authentication{need: &testCHAP, random: new(counter)}
	if err := a.take(map[string]string{"AuthMethod": "CHAP", "CHAP_A": "5", "CHAP_I": "1"}); !errors.Is(err, errText) {
		t.Errorf("a challenge before ours: %v", err)
	}
	for offer, want := range map[string]error{"99": errAuth, "1,2,3,4": errAuth, "MD5": errText, "": errText, "5,,7": nil} {
		a := &authentication{need: &testCHAP, random: new(counter)}
		err := a.take(map[string]string{"AuthMethod": "CHAP", "CHAP_A": offer})
		if err == nil || want != nil && !errors.Is(err, want) {
			t.Errorf("algorithms %q: %v", offer, err)
		}
	}
}

// Nobody gets in who does not know the secret, whatever the keys.
func FuzzCHAP(f *testing.F) {
	f.Add("CHAP,None", "5", "node1", "0x00112233445566778899aabbccddeeff", "1", "0x000102030405060708090a0b0c0d0e0f")
	f.Add("CHAP", "8,7,6,5", "node1", "0b3q2+7w==", "", "")
	f.Add("None", "5", "", "", "255", "0b")
	f.Fuzz(func(t *testing.T, method, algorithms, name, response, id, challenge string) {
		a := &authentication{need: &testCHAP, random: new(counter)}
		rows := []map[string]string{
			{"AuthMethod": method},
			{"CHAP_A": algorithms},
			{"CHAP_N": name, "CHAP_R": response, "CHAP_I": id, "CHAP_C": challenge},
			{"CHAP_N": name, "CHAP_R": response},
		}
		for _, keys := range rows {
			err := a.take(keys)
			if a.done() {
				t.Fatalf("%q gets in with %q", name, response)
			}
			if err != nil && !errors.Is(err, errAuth) && !errors.Is(err, errText) {
				t.Fatal(err)
			}
			if _, err := parseText(a.out); err != nil {
				t.Fatal(err)
			}
		}
	})
}
