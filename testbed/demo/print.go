package demo

import (
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/troupe-dev/troupe/reconciler/api"
)

// A printer writes one line for each thing that happened, with the time since the start. It says nothing twice.
type printer struct {
	w     io.Writer
	start time.Time
	said  map[string]bool
	hosts map[string]string // what is known of each host, in a form that can be compared
	// states are the last ones printed, by host or by image.
	states map[string]string
}

func newPrinter(w io.Writer) *printer {
	return &printer{w: w, start: time.Now(), said: map[string]bool{}, hosts: map[string]string{}, states: map[string]string{}}
}

// line prints what happened to a host, or with "" to the lab as a whole. What cannot be printed is lost: the demo goes on.
func (p *printer) line(host, format string, args ...any) {
	fmt.Fprintf(p.w, "%7.1fs  %-3s %s\n", time.Since(p.start).Seconds(), host, fmt.Sprintf(format, args...))
}

func (p *printer) heading(title string) { fmt.Fprintf(p.w, "\n== %s\n", title) }

func (p *printer) raw(text string) { fmt.Fprintln(p.w, text) }

// changed says whether a host is not as it was when changed was last called.
func (p *printer) changed(h api.Host) bool {
	now := fmt.Sprint(h.State, h.Detail, h.Stage, h.BootID, h.Role, h.RunningRole, h.Running, h.Staged, h.Target, h.Healthy, h.Error)
	if p.hosts[h.Name] == now {
		return false
	}
	p.hosts[h.Name] = now
	return true
}

// mark prints a stage of a boot.
func (p *printer) mark(host, boot string, m api.Mark) {
	key := fmt.Sprint(host, boot, m.Stage, m.Time.UnixNano())
	if p.said[key] {
		return
	}
	p.said[key] = true
	text := fmt.Sprintf("%-12s", m.Stage)
	if m.Bytes > 0 {
		text += " " + size(m.Bytes)
	}
	if m.Detail != "" {
		text += " " + m.Detail
	}
	if m.Error != "" {
		text += " ERROR: " + m.Error
	}
	p.line(host, "%s", text)
}

// state prints what a host waits for, or why it cannot go on: its boot's stages say the rest.
func (p *printer) state(h api.Host) {
	text := string(h.State)
	switch h.State {
	case api.HostWaiting, api.HostUnhealthy, api.HostFailed, api.HostLost, api.HostStaging:
		if h.Detail != "" {
			text += ": " + h.Detail
		}
	case api.HostRebooting:
	default:
		return
	}
	if p.states[h.Name] != text {
		p.states[h.Name] = text
		p.line(h.Name, "%s", text)
	}
}

// image prints how far a build is.
func (p *printer) image(i api.Image) {
	text := fmt.Sprintf("%s %s: %s", i.Kind, i.Name, i.Phase)
	switch {
	case i.Size > 0:
		text += fmt.Sprintf(", %s in %s", size(i.Size), seconds(i.Finished.Sub(i.Started)))
	case i.Step != "":
		text += ", " + i.Step
	}
	key := "image " + string(i.Recipe)
	if p.states[key] != text {
		p.states[key] = text
		p.line("", "%s", text)
	}
}

// table prints what all of it took.
func (p *printer) table(boots map[string]result, switches []result) {
	p.heading("what it took")
	var all []result
	for _, h := range hosts {
		all = append(all, boots[h.name])
	}
	fmt.Fprintf(p.w, "%9s  %12s\n", "time", "image bytes")
	for _, r := range slices.Concat(all, switches) {
		fmt.Fprintf(p.w, "%9s  %12d  %s\n", seconds(r.took), r.bytes, r.what)
	}
	fmt.Fprintln(p.w)
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

// size is a number of bytes for people.
func size(n int64) string {
	if n < 1e6 {
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%.1f MB", float64(n)/1e6)
}
