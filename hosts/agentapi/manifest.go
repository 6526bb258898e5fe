package agentapi

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/troupe-dev/troupe/internal/signing"
)

// A Manifest is a Release that the server signed.
type Manifest struct {
	Payload   []byte `json:"payload"` // the JSON of the Release
	Signature []byte `json:"signature"`
	// Key is the fingerprint of the key that is said to have signed it: for people, and not to be believed.
	Key string `json:"key,omitempty"`
}

// ErrManifest is in the chain of the error about an assignment whose release nobody vouches for.
var ErrManifest = errors.New("the release manifest is refused")

// maxFingerprint bounds what is repeated of a Manifest's Key.
const maxFingerprint = 32

// Sign is a with a manifest of its release in the place of the release; a itself where it has none.
func Sign(a Assignment, key *signing.Key) (Assignment, error) {
	if a.Release == nil {
		return a, nil
	}
	payload, err := json.Marshal(a.Release)
	if err != nil {
		return a, fmt.Errorf("signing a release: %w", err)
	}
	a.Manifest = &Manifest{Payload: payload, Signature: key.Sign(payload), Key: key.Fingerprint()}
	a.Release = nil
	return a, nil
}

// Open is a with the release of its manifest, where one of the keys signed that. Whatever a has for a release beside that
// is left out.
func Open(a Assignment, keys signing.Keys) (Assignment, error) {
	a.Release = nil
	if a.State != Assigned {
		return a, nil
	}
	m := a.Manifest
	if m == nil {
		return a, fmt.Errorf("%w: there is none; this machine trusts %s", ErrManifest, keys.Fingerprints())
	}
	if !keys.Verify(m.Payload, m.Signature) {
		by := m.Key
		if by == "" || len(by) > maxFingerprint {
			by = "unknown"
		}
		return a, fmt.Errorf("%w: its signature (key %s) is not right; this machine trusts %s. A machine takes up the server's key when it boots from it", ErrManifest, by, keys.Fingerprints())
	}
	var r Release
	if err := json.Unmarshal(m.Payload, &r); err != nil {
		return a, fmt.Errorf("%w: reading what was signed: %w", ErrManifest, err)
	}
	a.Release = &r
	return a, nil
}
