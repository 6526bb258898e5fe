package iscsi

import (
	"bytes"
	"crypto/md5"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha3"
	"crypto/subtle"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strconv"
)

// CHAP in a login (RFC 7143 section 12.1.3, RFC 1994). Each line is one PDU's keys; those in brackets are of a mutual
// exchange, in which the target proves itself as well:
//
//	initiator                                target
//	AuthMethod=CHAP,...                      AuthMethod=CHAP
//	CHAP_A=7,5                               CHAP_A=7 CHAP_I=i CHAP_C=challenge
//	CHAP_N=user CHAP_R=response              [CHAP_N=user CHAP_R=response]
//	[CHAP_I=i CHAP_C=challenge]
//
//	response = hash(i, 1 byte | secret | challenge)
const (
	keyAuthMethod    = "AuthMethod"
	keyCHAPAlgorithm = "CHAP_A"
	keyCHAPID        = "CHAP_I"
	keyCHAPChallenge = "CHAP_C"
	keyCHAPName      = "CHAP_N"
	keyCHAPResponse  = "CHAP_R"

	methodCHAP = "CHAP"

	// ourChallenge is the bytes of a challenge of ours: no less than any hash below gives.
	ourChallenge = 32
	// minChallenge is the least that an initiator may ask us to hash with our secret: a short challenge comes again
	// soon, and whoever collected our answers could then stand in for us. What is in use sends 16 or more.
	minChallenge = 16
)

// errAuth is in the chain of all that ends in login status 0201h, authentication failure.
var errAuth = errors.New("authentication failed")

// chapHash gives the hash of an algorithm by its number in IANA's registry of PPP authentication algorithms. MD5 and
// SHA-1 are no longer what they were, and MD5 is what all initiators speak; the others are taken where they are offered
// first.
func chapHash(algorithm uint64) func() hash.Hash {
	switch algorithm {
	case 5:
		return md5.New
	case 6:
		return sha1.New
	case 7:
		return sha256.New
	case 8:
		return func() hash.Hash { return sha3.New256() }
	}
	return nil
}

// isSecurityKey knows the keys of this file; they may only be said in the security stage.
func isSecurityKey(key string) bool {
	switch key {
	case keyAuthMethod, keyCHAPAlgorithm, keyCHAPID, keyCHAPChallenge, keyCHAPName, keyCHAPResponse:
		return true
	}
	return false
}

// An authentication is the security stage of one login. Its states are, in order: nothing chosen; the method chosen;
// challenged; proven. It goes through each once, so that an answer to a challenge is taken once.
type authentication struct {
	need   *CHAP // nil: nothing is asked for
	random io.Reader

	state     authState
	hash      func() hash.Hash
	id        byte
	challenge []byte
	next      bool // it was the next secrets that proved who it is
	out       []byte
}

type authState int

const (
	authBegins authState = iota
	authChosen
	authChallenged
	authProven
)

// done says that the initiator may leave the security stage.
func (a *authentication) done() bool { return a.need == nil || a.state == authProven }

// take answers the security keys that came together. Each state takes its own keys; what is left over is an error.
func (a *authentication) take(keys map[string]string) error {
	if v, ok := keys[keyAuthMethod]; ok {
		delete(keys, keyAuthMethod)
		if err := a.choose(v); err != nil {
			return err
		}
	}
	if v, ok := keys[keyCHAPAlgorithm]; ok {
		delete(keys, keyCHAPAlgorithm)
		if err := a.ask(v); err != nil {
			return err
		}
	} else if len(keys) > 0 {
		if err := a.prove(keys); err != nil {
			return err
		}
	}
	for key := range keys {
		return fmt.Errorf("%w: key %s out of turn", errText, key)
	}
	return nil
}

// choose takes the methods that the initiator offers.
func (a *authentication) choose(offer string) error {
	if a.state != authBegins {
		return fmt.Errorf("%w: key %s again", errText, keyAuthMethod)
	}
	methods, err := parseList(offer)
	if err != nil {
		return err
	}
	want := methodCHAP
	if a.need == nil {
		want = valueNone
	}
	if !slices.Contains(methods, want) {
		return fmt.Errorf("%w: initiator offers %.80q, wanted is %s", errAuth, offer, want)
	}
	a.state = authChosen
	a.out = appendText(a.out, keyAuthMethod, want)
	return nil
}

// ask chooses an algorithm and sends a challenge.
func (a *authentication) ask(offer string) error {
	if a.state != authChosen || a.need == nil {
		return fmt.Errorf("%w: key %s out of turn", errText, keyCHAPAlgorithm)
	}
	algorithms, err := parseList(offer)
	if err != nil {
		return err
	}
	for _, s := range algorithms {
		v, err := parseNumber(s)
		if err != nil {
			return err
		}
		if a.hash = chapHash(v); a.hash == nil {
			continue
		}
		random := make([]byte, 1+ourChallenge)
		if _, err := io.ReadFull(a.random, random); err != nil {
			return fmt.Errorf("making a challenge: %w", err)
		}
		a.id, a.challenge, a.state = random[0], random[1:], authChallenged
		a.out = appendText(a.out, keyCHAPAlgorithm, strconv.FormatUint(v, 10))
		a.out = appendText(a.out, keyCHAPID, strconv.Itoa(int(a.id)))
		a.out = appendText(a.out, keyCHAPChallenge, formatBinary(a.challenge))
		return nil
	}
	return fmt.Errorf("%w: no CHAP algorithm of %.80q", errAuth, offer)
}

// prove looks at the response to our challenge, and answers the initiator's challenge if there is one.
func (a *authentication) prove(keys map[string]string) error {
	name, named := keys[keyCHAPName]
	text, responded := keys[keyCHAPResponse]
	delete(keys, keyCHAPName)
	delete(keys, keyCHAPResponse)
	if a.state != authChallenged || !named || !responded {
		return fmt.Errorf("%w: keys of CHAP out of turn", errText)
	}
	response, err := parseBinary(text)
	if err != nil {
		return err
	}
	if err := a.check(name, response); err != nil {
		return err
	}
	if err := a.answer(keys); err != nil {
		return err
	}
	if a.next {
		a.need.Next.Proven()
		return fmt.Errorf("%w: initiator proves itself with the secrets that are the next ones", ErrNotReady)
	}
	a.state = authProven
	return nil
}

// check does the same work whether the name is wrong, the response, or both.
func (a *authentication) check(name string, response []byte) error {
	ok := a.fits(response, a.need.Secret, a.need.MutualSecret)
	if a.need.Next != nil {
		secret, mutual := a.need.Next.Secrets()
		a.next = a.fits(response, secret, mutual) == 1 && ok == 0
		ok |= a.fits(response, secret, mutual)
	}
	if ok&sameText(name, a.need.User) != 1 {
		return fmt.Errorf("%w: user %.80q", errAuth, name)
	}
	return nil
}

// fits is 1 for the response that a secret gives. One that our own secret gives is our own work thrown back, or both
// directions have one secret (section 9.2.1 and 12.1.3 forbid both).
func (a *authentication) fits(response []byte, secret, mutual string) int {
	if secret == "" {
		return 0
	}
	ok := subtle.ConstantTimeCompare(response, a.respond(a.id, secret, a.challenge))
	return ok & (1 - subtle.ConstantTimeCompare(response, a.respond(a.id, mutual, a.challenge)))
}

// answer takes the initiator's challenge.
func (a *authentication) answer(keys map[string]string) error {
	idText, hasID := keys[keyCHAPID]
	challengeText, hasChallenge := keys[keyCHAPChallenge]
	delete(keys, keyCHAPID)
	delete(keys, keyCHAPChallenge)
	if !hasID && !hasChallenge {
		return nil
	}
	id, err := parseNumber(idText)
	if err != nil || id > 255 {
		return fmt.Errorf("%w: %s=%.80s", errText, keyCHAPID, idText)
	}
	challenge, err := parseBinary(challengeText)
	if err != nil {
		return err
	}
	mutual := a.need.MutualSecret
	if a.next {
		_, mutual = a.need.Next.Secrets()
	}
	switch {
	case mutual == "":
		return fmt.Errorf("%w: initiator asks for a proof, and there is no secret for one", errAuth)
	case len(challenge) < minChallenge:
		return fmt.Errorf("%w: initiator's challenge has %d bytes, of %d at least", errAuth, len(challenge), minChallenge)
	case bytes.Equal(challenge, a.challenge):
		return fmt.Errorf("%w: initiator sends our challenge back", errAuth)
	}
	a.out = appendText(a.out, keyCHAPName, a.need.MutualUser)
	a.out = appendText(a.out, keyCHAPResponse, formatBinary(a.respond(byte(id), mutual, challenge)))
	return nil
}

func (a *authentication) respond(id byte, secret string, challenge []byte) []byte {
	h := a.hash()
	h.Write([]byte{id})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil)
}

// sameText compares in a time that tells nothing, not even the length.
func sameText(a, b string) int {
	x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
	return subtle.ConstantTimeCompare(x[:], y[:])
}
