// Package kmsg logs to the kernel's ring buffer (/dev/kmsg, see Documentation/ABI/testing/dev-kmsg of Linux), so that
// a machine without a disk and without a network still shows on every console what it does.
package kmsg

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
)

// maxLine is the longest record that the kernel takes in one write (LOG_LINE_MAX is 1024 with its prefix).
const maxLine = 900

// A Handler is a slog.Handler that writes one record a line, with a syslog priority in front of it.
type Handler struct {
	out   *output
	level slog.Level
	tag   string
	attrs string // already formatted, with a leading space
	group string // prefix of the keys that follow
}

type output struct {
	mu sync.Mutex
	w  io.Writer
}

// NewHandler writes "<PRIORITY>tag: message key=value …" to w, for records of at least level.
func NewHandler(w io.Writer, tag string, level slog.Level) *Handler {
	return &Handler{out: &output{w: w}, level: level, tag: tag}
}

// Enabled says whether records of a level are written.
func (h *Handler) Enabled(_ context.Context, l slog.Level) bool { return l >= h.level }

// Handle writes a record. The time is left to the kernel, which has a better one at this point of a boot.
func (h *Handler) Handle(_ context.Context, r slog.Record) error {
	var b strings.Builder
	fmt.Fprintf(&b, "<%d>%s: %s%s", priority(r.Level), h.tag, r.Message, h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		appendAttr(&b, h.group, a)
		return true
	})
	line := strings.ReplaceAll(b.String(), "\n", "; ")
	if len(line) > maxLine {
		line = line[:maxLine] + "…"
	}
	h.out.mu.Lock()
	defer h.out.mu.Unlock()
	_, err := io.WriteString(h.out.w, line+"\n")
	return err
}

// WithAttrs is a Handler that adds attrs to each record.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	var b strings.Builder
	b.WriteString(h.attrs)
	for _, a := range attrs {
		appendAttr(&b, h.group, a)
	}
	n := *h
	n.attrs = b.String()
	return &n
}

// WithGroup is a Handler that puts name and a dot before the keys that follow.
func (h *Handler) WithGroup(name string) slog.Handler {
	n := *h
	if name != "" {
		n.group += name + "."
	}
	return &n
}

func appendAttr(b *strings.Builder, group string, a slog.Attr) {
	v := a.Value.Resolve()
	if a.Equal(slog.Attr{}) {
		return
	}
	if v.Kind() == slog.KindGroup {
		if a.Key != "" {
			group += a.Key + "."
		}
		for _, ga := range v.Group() {
			appendAttr(b, group, ga)
		}
		return
	}
	s := v.String()
	if s == "" || strings.ContainsAny(s, " \t\n\"=") {
		s = fmt.Sprintf("%q", s)
	}
	fmt.Fprintf(b, " %s%s=%s", group, a.Key, s)
}

// priority is a level in syslog's words: facility user (1), so that nobody takes it for the kernel's own.
func priority(l slog.Level) int {
	const user = 1 << 3
	switch {
	case l >= slog.LevelError:
		return user | 3
	case l >= slog.LevelWarn:
		return user | 4
	case l >= slog.LevelInfo:
		return user | 5 // notice: shown on the console unless the machine was told to be quiet
	}
	return user | 6 // whoever asks for them wants to see them on the console, too
}
