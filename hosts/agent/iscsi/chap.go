package iscsi

import (
	"crypto/md5"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"hash"
	"io"
	"strconv"
)

// ErrImpostor says that the target does not know the secret that it should prove itself with.
var ErrImpostor = errors.New("the target does not prove who it is")

// Numbers of CHAP algorithms (IANA, "PPP Authentication Algorithms").
const (
	chapMD5    = 5
	chapSHA256 = 7
)

// chapOffer is CHAP_A, best first.
const chapOffer = "7,5"

// challengeSize is how much is asked of the target, in bytes: tgt has room for 20.
const challengeSize = 16

// A chap is this machine's side of one CHAP (RFC 1994; RFC 7143 section 12.1.3).
//
//	request                        response
//	CHAP_A=7,5                     CHAP_A=5 CHAP_I=… CHAP_C=…
//	CHAP_N=… CHAP_R=…              -
//	  and, for mutual: CHAP_I CHAP_C   CHAP_N=… CHAP_R=…
type chap struct {
	cfg       Config
	rand      io.Reader
	algorithm int
	id        byte // of our challenge
	challenge []byte
}

func (c *chap) hash() hash.Hash {
	if c.algorithm == chapSHA256 {
		return sha256.New()
	}
	return md5.New() // the one algorithm that every target has
}

// proof is the value of CHAP_R: a hash of identifier, secret and challenge.
func (c *chap) proof(id byte, secret string, challenge []byte) []byte {
	h := c.hash()
	h.Write([]byte{id})
	h.Write([]byte(secret))
	h.Write(challenge)
	return h.Sum(nil)
}

// answer is what the second row of the table needs of the first one.
func (c *chap) answer(keys map[string]string) ([]pair, error) {
	n, err := parseNumber("CHAP_A", keys["CHAP_A"], 0, 255)
	if err != nil || n != chapMD5 && n != chapSHA256 {
		return nil, fmt.Errorf("CHAP: the target takes algorithm %.20q, %s were offered", keys["CHAP_A"], chapOffer)
	}
	c.algorithm = int(n)
	id, err := parseNumber("CHAP_I", keys["CHAP_I"], 0, 255)
	if err != nil {
		return nil, err
	}
	asked, err := parseBinary(keys["CHAP_C"])
	if err != nil || len(asked) == 0 {
		return nil, fmt.Errorf("CHAP: the target's challenge cannot be read: %w", err)
	}
	out := []pair{{"CHAP_N", c.cfg.User}, {"CHAP_R", binaryValue(c.proof(byte(id), c.cfg.Secret, asked))}} //nolint:gosec // at most 255
	if c.cfg.MutualUser == "" {
		return out, nil
	}
	own := make([]byte, 1+challengeSize)
	if _, err := io.ReadFull(c.rand, own); err != nil {
		return nil, fmt.Errorf("CHAP: making a challenge: %w", err)
	}
	c.id, c.challenge = own[0], own[1:]
	return append(out, pair{"CHAP_I", strconv.Itoa(int(c.id))}, pair{"CHAP_C", binaryValue(c.challenge)}), nil
}

// verify holds what the target answered against what only the right one can.
func (c *chap) verify(keys map[string]string) error {
	if c.cfg.MutualUser == "" {
		return nil
	}
	got, err := parseBinary(keys["CHAP_R"])
	if err != nil {
		return fmt.Errorf("%w: its answer cannot be read: %w", ErrImpostor, err)
	}
	want := c.proof(c.id, c.cfg.MutualSecret, c.challenge)
	if keys["CHAP_N"] != c.cfg.MutualUser || subtle.ConstantTimeCompare(got, want) != 1 {
		return ErrImpostor
	}
	return nil
}
