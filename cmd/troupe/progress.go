package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"golang.org/x/term"

	"github.com/troupe-dev/troupe/reconciler/api"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// progress tells a person who waits what happens: on a terminal in one line that changes, elsewhere in a line for each
// change.
type progress struct {
	w     io.Writer
	width int               // of the terminal; 0: it is none
	told  map[string]string // the last line about each thing
}

func newProgress(w io.Writer) *progress {
	p := &progress{w: w, told: map[string]string{}}
	if f, ok := w.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.width = 80
		if width, _, err := term.GetSize(int(f.Fd())); err == nil && width > 0 {
			p.width = width
		}
	}
	return p
}

// snapshot tells what is new in s.
func (p *progress) snapshot(s *api.Snapshot) {
	if p.width > 0 {
		p.redraw(s)
		return
	}
	if c := s.Status.Applied; c != nil {
		p.tell("commit", fmt.Sprintf("commit %s %s is in force", shortHash(c.Hash), plain(c.Subject)))
	}
	if line := sourceNews(s.Status); line != "" {
		p.tell("source", plain(line))
	}
	for _, i := range s.Images {
		if i.Declared && (i.Phase != state.BuildDone || p.told[i.Name] != "") {
			p.tell(i.Name, strings.TrimSpace(fmt.Sprintf("%s: build %s %s", plain(i.Name), i.Phase, plain(i.Step))))
		}
	}
	for _, h := range s.Hosts {
		if h.State != api.HostUnclaimed {
			p.tell(h.Key(), plain(h.Name+": "+stateText(h)))
		}
	}
}

// sourceNews is what keeps the newest commit from being in force; "" for nothing.
func sourceNews(st api.Status) string {
	switch c := st.Attempted; {
	case st.FetchError != "":
		return "the repo cannot be followed: " + st.FetchError
	case c != nil && len(st.Problems) > 0:
		return fmt.Sprintf("commit %s %s is refused: %s", shortHash(c.Hash), c.Subject, count(len(st.Problems), "problem"))
	case c != nil:
		return fmt.Sprintf("commit %s %s is being loaded", shortHash(c.Hash), c.Subject)
	}
	return ""
}

func (p *progress) tell(about, line string) {
	if p.told[about] != line {
		p.told[about] = line
		_, _ = fmt.Fprintln(p.w, line)
	}
}

// redraw writes how it stands over what it wrote before.
func (p *progress) redraw(s *api.Snapshot) {
	parts := []string{hostsLine(s.Status.Hosts)}
	if line := sourceNews(s.Status); line != "" {
		parts = append([]string{line}, parts...)
	}
	for _, i := range s.Images {
		if i.Phase == state.BuildRunning {
			parts = append(parts, strings.TrimSpace("building "+i.Name+" "+i.Step))
		}
	}
	for _, h := range s.Hosts {
		if !h.State.Fine() && h.State != api.HostUnclaimed {
			parts = append(parts, h.Name+" "+stateText(h))
		}
	}
	_, _ = fmt.Fprint(p.w, "\r\x1b[K"+cut(plain(strings.Join(parts, " · ")), p.width-1))
}

// end leaves the terminal's line free.
func (p *progress) end() {
	if p.width > 0 {
		_, _ = fmt.Fprint(p.w, "\r\x1b[K")
	}
}

// stateText is how a host is, with details.
func stateText(h api.Host) string {
	if h.Detail == "" {
		return string(h.State)
	}
	return fmt.Sprintf("%s (%s)", h.State, h.Detail)
}
