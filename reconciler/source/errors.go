package source

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/go-git/go-git/v5/plumbing/transport"
)

// What Fetch and Revision can fail with; each is wrapped.
var (
	ErrNoBranch    = errors.New("no such branch")
	ErrUnreachable = errors.New("repository unreachable")
	ErrAuth        = errors.New("not authorized")
	ErrNoPath      = errors.New("no such directory in the commit")
	ErrNoRevision  = errors.New("no such commit")
	ErrTree        = errors.New("not a usable file tree")
)

// errMirror is in the chain of errors that are about the mirror, not about the remote.
var errMirror = errors.New("damaged mirror")

// kinds are the ways in which a remote can answer.
const (
	kindOK = iota + 1
	kindUnreachable
	kindAuth
	kindMirror
)

func kindOf(err error) int {
	switch {
	case err == nil:
		return kindOK
	case errors.Is(err, ErrAuth):
		return kindAuth
	case errors.Is(err, errMirror):
		return kindMirror
	}
	return kindUnreachable
}

// classify gives an error of a transport its sentinel.
func classify(err error) error {
	if errors.Is(err, ErrAuth) || errors.Is(err, ErrUnreachable) || errors.Is(err, errMirror) {
		return err
	}
	// The ssh package has no value for this one; go-git's are values.
	if errors.Is(err, transport.ErrAuthenticationRequired) || errors.Is(err, transport.ErrAuthorizationFailed) ||
		strings.Contains(err.Error(), "ssh: unable to authenticate") {
		return fmt.Errorf("%w: %w", ErrAuth, err)
	}
	return fmt.Errorf("%w: %w", ErrUnreachable, err)
}

// noBranch says what is there instead.
func noBranch(branch string, got refs) error {
	names := got.branches()
	for i, name := range names[:min(len(names), 5)] {
		names[i] = bounded(name, 100)
	}
	switch {
	case len(names) == 0:
		return fmt.Errorf("%w: %q: the repository has no branches yet", ErrNoBranch, branch)
	case len(names) > 5:
		return fmt.Errorf("%w: %q: there are %s and %d more", ErrNoBranch, branch, strings.Join(names[:5], ", "), len(names)-5)
	}
	return fmt.Errorf("%w: %q: there is %s", ErrNoBranch, branch, strings.Join(names, ", "))
}

// Redact takes the credentials out of a repository's URL: everything before the host and after the path of http and
// https, the password of others. Paths and host:path stay as they are.
func Redact(repo string) string {
	scheme, rest, ok := strings.Cut(repo, "://")
	if !ok {
		return repo
	}
	u, err := url.Parse(repo)
	if err != nil || u.Host == "" && u.Scheme != "file" {
		// Not a URL, yet it may hold a secret: keep what surely is none.
		if i := strings.LastIndexByte(rest, '@'); i >= 0 {
			rest = rest[i+1:]
		}
		rest, _, _ = strings.Cut(rest, "?")
		return scheme + "://" + rest
	}
	if u.Scheme == "ssh" && u.User != nil {
		u.User = url.User(u.User.Username())
	} else {
		u.User = nil
	}
	u.RawQuery, u.Fragment, u.RawFragment, u.ForceQuery = "", "", "", false
	return u.String()
}

// A scrubber takes one repository's secrets out of texts. Libraries quote URLs in their errors, some with the password.
type scrubber struct{ secrets []string }

func newScrubber(repo string) scrubber {
	var s scrubber
	if clean := Redact(repo); clean != repo {
		s.add(repo)
	}
	u, err := url.Parse(repo)
	if err != nil {
		return s
	}
	if pw, ok := u.User.Password(); ok {
		s.add(pw)
	}
	if u.Scheme == "http" || u.Scheme == "https" {
		s.add(u.User.Username()) // a token may stand there
		s.add(u.RawQuery)
		s.add(u.Fragment)
	}
	return s
}

// add makes text a secret, in the spellings that it has in URLs.
func (s *scrubber) add(text string) {
	for _, v := range []string{text, url.PathEscape(text), url.QueryEscape(text), url.UserPassword("", text).String()[1:]} {
		if v != "" && !slices.Contains(s.secrets, v) {
			s.secrets = append(s.secrets, v)
		}
	}
	// The longest first: a short secret may be part of a long one.
	slices.SortFunc(s.secrets, func(a, b string) int { return len(b) - len(a) })
}

func (s *scrubber) text(t string) string {
	for _, secret := range s.secrets {
		t = strings.ReplaceAll(t, secret, "xxxxx")
	}
	return t
}

// maxText is how many bytes of an error are told: a remote says what it likes.
const maxText = 2 << 10

// wrap gives err the prefix what, a sentinel and a text without secrets. What err wraps beyond the sentinels is cut off:
// it could be printed.
func (s *scrubber) wrap(what string, err error) error {
	text := bounded(s.text(err.Error()), maxText)
	for _, sentinel := range []error{ErrAuth, ErrUnreachable, ErrNoBranch, errMirror} {
		if errors.Is(err, sentinel) {
			text = strings.TrimPrefix(text, sentinel.Error()+": ")
			return fmt.Errorf("%s: %w: %s", what, sentinel, text)
		}
	}
	return fmt.Errorf("%s: %s", what, text)
}
