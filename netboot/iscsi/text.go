package iscsi

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// The data segment of Login and Text PDUs (RFC 7143 section 6.1) is a row of pairs, each closed by a zero byte:
//
//	key=value\0key=value\0
//
//	key        a letter, then letters, digits and .-+@_#, 63 bytes at most
//	value      one of these, by the key:
//	  text     letters, digits and .-+@_/[]:
//	  name     an iSCSI name, 223 bytes at most
//	  boolean  Yes or No
//	  number   decimal, or hexadecimal after 0x
//	  binary   hexadecimal after 0x, or base64 after 0b
//	  list     any of these with commas between them, in order of preference
//	  answer   None, Reject, Irrelevant, NotUnderstood: these have their meaning everywhere
//
// A row may be cut anywhere, also within a key: the C bit says that the next PDU of the same direction goes on. The
// RFC asks for 8192 bytes of a row at least.
const (
	maxKey      = 63
	maxBinary   = 1024            // bytes of a binary value (section 12.1.3)
	maxValue    = 2 + 2*maxBinary // the longest is a binary value in hexadecimal
	maxListItem = 255             // of a list's values, and of all where nothing else is said (section 6.1)
	maxName     = 223             // of an iSCSI name (section 4.2.7.1)
	maxText     = 16 << 10        // bytes of one row, its pieces put together
	maxPairs    = 128             // of one row
)

// The values that mean the same for every key (section 6.2), and the booleans.
const (
	valueYes           = "Yes"
	valueNo            = "No"
	valueNone          = "None"          // of the things listed, nothing
	valueReject        = "Reject"        // not that value: the key stays as it was
	valueIrrelevant    = "Irrelevant"    // the key says nothing here
	valueNotUnderstood = "NotUnderstood" // no such key
)

// errText is in the chain of the errors of this file: the initiator broke the form of section 6.1.
var errText = errors.New("bad text")

// A pair is one key and its value.
type pair struct{ key, value string }

// parseText takes a whole row apart. Two pairs of the same key are an error, and so is a row whose last pair is not
// closed. Zero bytes after the last pair are passed over: there are initiators that count the padding into the length.
func parseText(b []byte) ([]pair, error) {
	if len(b) > maxText {
		return nil, fmt.Errorf("%w: %d bytes, of %d at most", errText, len(b), maxText)
	}
	if len(b) > 0 && b[len(b)-1] != 0 {
		return nil, fmt.Errorf("%w: the last pair is not closed by a zero byte", errText)
	}
	var pairs []pair
	for b = bytes.TrimRight(b, "\x00"); len(b) > 0; {
		var one []byte
		one, b, _ = bytes.Cut(b, []byte{0})
		p, err := parsePair(one)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(pairs, func(q pair) bool { return q.key == p.key }) {
			return nil, fmt.Errorf("%w: key %s twice", errText, p.key)
		}
		if len(pairs) == maxPairs {
			return nil, fmt.Errorf("%w: more than %d keys", errText, maxPairs)
		}
		pairs = append(pairs, p)
	}
	return pairs, nil
}

func parsePair(b []byte) (pair, error) {
	key, value, ok := bytes.Cut(b, []byte("="))
	if !ok {
		return pair{}, fmt.Errorf("%w: no = in %.80q", errText, b)
	}
	if !isKey(key) {
		return pair{}, fmt.Errorf("%w: key %.80q", errText, key)
	}
	if len(value) > maxValue {
		return pair{}, fmt.Errorf("%w: %s has a value of %d bytes, of %d at most", errText, key, len(value), maxValue)
	}
	if !utf8.Valid(value) {
		return pair{}, fmt.Errorf("%w: %s has a value that is no UTF-8", errText, key)
	}
	return pair{string(key), string(value)}, nil
}

// isKey knows the names that keys may have. They begin with a capital letter, says section 6.1; section 13.24 then has
// iSCSIProtocolLevel. The # is of the public extension keys X#, Y# and Z#.
func isKey(b []byte) bool {
	if len(b) == 0 || len(b) > maxKey || !isLetter(b[0]) {
		return false
	}
	for _, c := range b {
		if !isLetter(c) && (c < '0' || c > '9') && strings.IndexByte(".-+@_#", c) < 0 {
			return false
		}
	}
	return true
}

func isLetter(c byte) bool { return 'A' <= c && c <= 'Z' || 'a' <= c && c <= 'z' }

// appendText writes one pair.
func appendText(b []byte, key, value string) []byte {
	b = append(b, key...)
	b = append(b, '=')
	b = append(b, value...)
	return append(b, 0)
}

// isAnswer says whether a value is one that only answers may have.
func isAnswer(value string) bool {
	return value == valueReject || value == valueIrrelevant || value == valueNotUnderstood
}

// parseNumber takes an unsigned decimal or hexadecimal number of 64 bits at most. A decimal one has no leading zeros.
func parseNumber(s string) (uint64, error) {
	digits, base := s, 10
	if len(s) > 2 && (s[:2] == "0x" || s[:2] == "0X") {
		digits, base = s[2:], 16
	}
	// ParseUint with an explicit base takes digits alone: no sign, no underscore.
	n, err := strconv.ParseUint(digits, base, 64)
	if err != nil || base == 10 && len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("%w: number %.80q", errText, s)
	}
	return n, nil
}

// parseBinary takes a binary value of more than 64 bits, so that it cannot be decimal. Hexadecimal digits come in
// pairs: what half a byte at either end would mean, the RFC does not say.
func parseBinary(s string) ([]byte, error) {
	var (
		b   []byte
		err error
	)
	switch prefix := s[:min(2, len(s))]; prefix {
	case "0x", "0X":
		b, err = hex.DecodeString(s[2:])
	case "0b", "0B":
		// Strict: two texts that mean the same bytes would be one more thing to think of.
		b, err = base64.StdEncoding.Strict().DecodeString(s[2:])
	default:
		return nil, fmt.Errorf("%w: binary value without 0x or 0b", errText)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: binary value: %w", errText, err)
	}
	if len(b) == 0 || len(b) > maxBinary {
		return nil, fmt.Errorf("%w: binary value of %d bytes, of 1 to %d", errText, len(b), maxBinary)
	}
	return b, nil
}

// formatBinary is hexadecimal in lower case, which all initiators read; not all read base64.
func formatBinary(b []byte) string { return "0x" + hex.EncodeToString(b) }

// parseList takes a list of values.
func parseList(s string) ([]string, error) {
	list := strings.Split(s, ",")
	for _, v := range list {
		if v == "" || len(v) > maxListItem {
			return nil, fmt.Errorf("%w: list with a value of %d bytes, of 1 to %d", errText, len(v), maxListItem)
		}
	}
	return list, nil
}

// checkName takes an iSCSI name (section 4.2.7): one of the three types, and nothing that does not show.
func checkName(s string) error {
	typed := strings.HasPrefix(s, "iqn.") || strings.HasPrefix(s, "eui.") || strings.HasPrefix(s, "naa.")
	if !typed || len(s) > maxName {
		return fmt.Errorf("%w: name %.240q", errText, s)
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r == 0x7f || r == ',' || r == '=' }) {
		return fmt.Errorf("%w: name %.240q", errText, s)
	}
	return nil
}
