package iscsi

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Bounds of what a target may say in one exchange.
const (
	maxText   = 64 << 10 // bytes, of all PDUs that belong together
	maxKeys   = 64
	maxKey    = 63   // bytes of a key's name (RFC 7143 section 6.1)
	maxBinary = 1024 // bytes of a binary value, decoded
)

// A pair is one key with its value.
type pair struct{ key, value string }

// encodeText writes pairs as "key=value", each ended by a NUL.
func encodeText(pairs []pair) []byte {
	var b bytes.Buffer
	for _, p := range pairs {
		b.WriteString(p.key + "=" + p.value + "\x00")
	}
	return b.Bytes()
}

// parseText reads them. A key may stand there only once (RFC 7143 section 6.2).
func parseText(b []byte) (map[string]string, error) {
	keys := map[string]string{}
	for line := range bytes.SplitSeq(b, []byte{0}) {
		if len(line) == 0 {
			continue
		}
		key, value, ok := strings.Cut(string(line), "=")
		switch {
		case !ok || key == "" || len(key) > maxKey:
			return nil, fmt.Errorf("login text: %.80q is no key=value", line)
		case len(keys) == maxKeys:
			return nil, fmt.Errorf("login text: more than %d keys", maxKeys)
		}
		if _, twice := keys[key]; twice {
			return nil, fmt.Errorf("login text: key %q stands there twice", key)
		}
		keys[key] = value
	}
	return keys, nil
}

// binaryValue writes a binary value in hex (RFC 7143 section 6.1).
func binaryValue(b []byte) string { return "0x" + hex.EncodeToString(b) }

// parseBinary reads a binary value in hex or base64.
func parseBinary(s string) ([]byte, error) {
	if len(s) < 3 || s[0] != '0' {
		return nil, fmt.Errorf("binary value %.20q: neither hex nor base64", s)
	}
	digits := s[2:]
	if len(digits) > 2*maxBinary {
		return nil, fmt.Errorf("binary value of %d characters, at most %d are read", len(digits), 2*maxBinary)
	}
	switch s[1] {
	case 'x', 'X':
		if len(digits)%2 == 1 {
			digits = "0" + digits
		}
		return hex.DecodeString(digits)
	case 'b', 'B':
		return base64.StdEncoding.DecodeString(digits)
	}
	return nil, fmt.Errorf("binary value %.20q: neither hex nor base64", s)
}

// parseNumber reads a number in decimal or hex, within bounds.
func parseNumber(key, value string, least, most uint64) (uint64, error) {
	n, err := strconv.ParseUint(strings.ToLower(value), 0, 64)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("login text: %s=%.40s, want a number from %d to %d", key, value, least, most)
	}
	return n, nil
}

var errNotBool = errors.New("neither Yes nor No")

func parseBool(key, value string) (bool, error) {
	switch value {
	case "Yes":
		return true, nil
	case "No":
		return false, nil
	}
	return false, fmt.Errorf("login text: %s=%.40s: %w", key, value, errNotBool)
}
