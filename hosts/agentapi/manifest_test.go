package agentapi_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/troupe-dev/troupe/hosts/agentapi"
	"github.com/troupe-dev/troupe/internal/digest"
	"github.com/troupe-dev/troupe/internal/signing"
)

func newKey(t *testing.T) (*signing.Key, signing.Keys) {
	t.Helper()
	k, err := signing.NewKey()
	if err != nil {
		t.Fatal(err)
	}
	keys, err := signing.ParseKeys(k.Public())
	if err != nil {
		t.Fatal(err)
	}
	return k, keys
}

func signed(t *testing.T, k *signing.Key) (agentapi.Release, agentapi.Assignment) {
	t.Helper()
	r := agentapi.Release{ID: digest.Of([]byte("release")), Base: agentapi.Image{Data: 4096, Root: strings.Repeat("0", 64)}, KernelArgs: []string{"quiet"}}
	a, err := agentapi.Sign(agentapi.Assignment{Version: "1", State: agentapi.Assigned, Host: "n1", Release: &r}, k)
	if err != nil {
		t.Fatal(err)
	}
	return r, a
}

func TestOpenTakesWhatWasSigned(t *testing.T) {
	k, keys := newKey(t)
	r, a := signed(t, k)
	// What comes over the wire beside the manifest is nobody's word.
	a.Release = &agentapi.Release{ID: digest.Of([]byte("forged"))}
	b, err := json.Marshal(a)
	if err != nil {
		t.Fatal(err)
	}
	var got agentapi.Assignment
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	if got, err = agentapi.Open(got, keys); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&r, got.Release); diff != "" {
		t.Errorf("release (-want +got):\n%s", diff)
	}
}

func TestOpenRefuses(t *testing.T) {
	k, keys := newKey(t)
	other, otherKeys := newKey(t)
	for name, change := range map[string]func(*agentapi.Assignment){
		"another key": func(a *agentapi.Assignment) { _, *a = signed(t, other) },
		"another payload": func(a *agentapi.Assignment) {
			a.Manifest.Payload = bytes.Replace(a.Manifest.Payload, []byte("quiet"), []byte("debug"), 1)
		},
		"no manifest":  func(a *agentapi.Assignment) { a.Manifest, a.Release = nil, &agentapi.Release{} },
		"no signature": func(a *agentapi.Assignment) { a.Manifest.Signature = nil },
		"no release": func(a *agentapi.Assignment) {
			*a.Manifest = agentapi.Manifest{Payload: []byte("x"), Signature: k.Sign([]byte("x"))}
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, a := signed(t, k)
			change(&a)
			got, err := agentapi.Open(a, keys)
			if !errors.Is(err, agentapi.ErrManifest) || got.Release != nil {
				t.Errorf("release %v, error %v", got.Release, err)
			}
		})
	}
	_, a := signed(t, other)
	if _, err := agentapi.Open(a, keys); err == nil || !strings.Contains(err.Error(), other.Fingerprint()) || !strings.Contains(err.Error(), k.Fingerprint()) {
		t.Errorf("error %v names not both keys", err)
	}
	// While a key takes the place of another one, both are trusted.
	if _, err := agentapi.Open(a, append(keys, otherKeys...)); err != nil {
		t.Errorf("with both keys: %v", err)
	}
}

func TestNothingToRunNeedsNoManifest(t *testing.T) {
	a := agentapi.Assignment{State: agentapi.Waiting, Release: &agentapi.Release{}}
	if got, err := agentapi.Open(a, nil); err != nil || got.Release != nil {
		t.Errorf("release %v, error %v", got.Release, err)
	}
}
