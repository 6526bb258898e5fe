package testbed

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/troupe-dev/troupe/internal/backoff"
	"github.com/troupe-dev/troupe/testbed/qmp"
)

// What a Direct machine starts lies in its directory.
const (
	directFile   = "direct.json"
	directKernel = "direct.kernel"
	directInitrd = "direct.initrd"
)

const (
	askAgain = 500 * time.Millisecond // while the server does not answer, or has nothing to boot
	// giveUp is how often the server may not answer before the machine starts what it was told the last time.
	giveUp = 6
	// maxScript bounds a boot script, in bytes.
	maxScript = 1 << 20
)

// A loader is what a Direct machine has in place of firmware: it asks the server what to start, and asks again when the machine
// was reset.
type loader struct {
	stop context.CancelFunc
	done chan struct{} // closed when it has ended
}

// startLoader is called by who holds button.
func (m *machine) startLoader() {
	ctx, stop := context.WithCancel(context.Background())
	l := &loader{stop: stop, done: make(chan struct{})}
	m.mu.Lock()
	m.loader = l
	m.mu.Unlock()
	go func() {
		defer close(l.done)
		err := m.load(ctx)
		m.mu.Lock()
		defer m.mu.Unlock()
		m.loader, m.since = nil, time.Now()
		if err != nil && ctx.Err() == nil {
			m.err = err.Error()
			m.log.Error("the machine goes off", "err", err)
		}
	}()
}

// stopLoader has no other run begin, and leaves the one that there is. The caller holds button.
func (m *machine) stopLoader() {
	m.mu.Lock()
	l := m.loader
	m.mu.Unlock()
	if l == nil {
		return
	}
	l.stop()
	<-l.done
}

// load boots the machine, again and again, until it is off for another reason than a reset, or ctx ends.
func (m *machine) load(ctx context.Context) error {
	for {
		b, err := m.askBoot(ctx)
		if err != nil {
			return err
		}
		args := append(qemuArgs(m.spec, m.tap, m.accel), "-kernel", directKernel, "-initrd", directInitrd, "-append", b.args())
		r, err := m.start(ctx, args)
		if err != nil {
			return err
		}
		select {
		case <-r.ended:
		case <-ctx.Done():
			return ctx.Err()
		}
		m.mu.Lock()
		again := r.again
		m.mu.Unlock()
		if !again {
			return nil
		}
	}
}

// A directBoot is what a boot script says.
type directBoot struct {
	Kernel  string   `json:"kernel"`  // URL
	Initrds []string `json:"initrds"` // URLs
	Args    []string `json:"args"`
}

func (b directBoot) args() string { return strings.Join(b.Args, " ") }

// askBoot asks the server until it says what to boot, and has that in the machine's directory.
func (m *machine) askBoot(ctx context.Context) (directBoot, error) {
	silent := 0
	for {
		b, err := m.ask(ctx)
		if err == nil && b.Kernel != "" {
			if err = m.fetch(ctx, b); err == nil {
				return b, nil
			}
		}
		if err == nil {
			silent = 0 // it answers, and has nothing to boot yet
		} else if silent++; silent >= giveUp {
			if b, err := m.lastBoot(); err == nil {
				m.log.Info("the server does not answer: starting what was started before")
				return b, nil
			}
		}
		if err := backoff.Sleep(ctx, askAgain); err != nil {
			return directBoot{}, err
		}
	}
}

var errUnplugged = errors.New("the cable is not plugged in")

// ask is one request for the boot script.
func (m *machine) ask(ctx context.Context) (directBoot, error) {
	m.mu.Lock()
	link := m.link
	m.mu.Unlock()
	if !link {
		return directBoot{}, errUnplugged
	}
	q := url.Values{"mac": {m.spec.MAC}, "uuid": {m.spec.UUID}, "serial": {m.spec.Serial}, "arch": {"0"}}
	body, err := m.get(ctx, m.server+"/boot/ipxe?"+q.Encode())
	if err != nil {
		return directBoot{}, err
	}
	defer body.Close()
	return parseScript(io.LimitReader(body, maxScript))
}

// parseScript reads what package ipxe writes: a line "kernel", and lines "initrd".
func parseScript(r io.Reader) (directBoot, error) {
	var b directBoot
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if end := slices.Index(words, "||"); end >= 0 {
			words = words[:end]
		}
		if len(words) < 4 || words[1] != "--name" {
			continue
		}
		switch words[0] {
		case "kernel":
			b.Kernel = words[3]
			b.Args = slices.DeleteFunc(words[4:], func(w string) bool { return strings.HasPrefix(w, "initrd=") })
		case "initrd":
			b.Initrds = append(b.Initrds, words[3])
		}
	}
	if err := lines.Err(); err != nil {
		return b, fmt.Errorf("reading the boot script: %w", err)
	}
	return b, nil
}

func (m *machine) get(ctx context.Context, url string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return nil, err
	}
	t := &http.Transport{DisableKeepAlives: true, ResponseHeaderTimeout: quitGrace}
	resp, err := (&http.Client{Transport: t}).Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("%s: %s", url, resp.Status)
	}
	return resp.Body, nil
}

// fetch brings kernel and initramfs into the machine's directory, and last what they are started with.
func (m *machine) fetch(ctx context.Context, b directBoot) error {
	if err := m.fetchFiles(ctx, directKernel, b.Kernel); err != nil {
		return err
	}
	if err := m.fetchFiles(ctx, directInitrd, b.Initrds...); err != nil {
		return err
	}
	text, err := json.Marshal(b)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(m.dir, directFile), text, 0o644)
}

// fetchFiles puts what urls have, one after the other, into one file, which is replaced when it is whole.
func (m *machine) fetchFiles(ctx context.Context, name string, urls ...string) (err error) {
	path := filepath.Join(m.dir, name)
	out, err := os.Create(path + ".new")
	if err != nil {
		return err
	}
	defer func() {
		if err = errors.Join(err, out.Close()); err == nil {
			err = os.Rename(out.Name(), path)
		}
	}()
	for _, u := range urls {
		body, err := m.get(ctx, u)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, body)
		if err := errors.Join(err, body.Close()); err != nil {
			return fmt.Errorf("fetching %s: %w", u, err)
		}
	}
	return nil
}

// lastBoot is what the machine was started with before. Nobody gave that boot a name.
func (m *machine) lastBoot() (directBoot, error) {
	text, err := os.ReadFile(filepath.Join(m.dir, directFile))
	if err != nil {
		return directBoot{}, err
	}
	var b directBoot
	if err := json.Unmarshal(text, &b); err != nil {
		return b, err
	}
	b.Args = slices.DeleteFunc(b.Args, func(a string) bool { return strings.HasPrefix(a, "troupe.boot=") })
	return b, nil
}

// shutdown takes QEMU's word for why it ends. It is called by the monitor's reader.
func (m *machine) shutdown(e qmp.Event) {
	var data struct{ Reason string }
	if err := json.Unmarshal(e.Data, &data); err != nil {
		m.log.Warn("event SHUTDOWN", "err", err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.run == nil || data.Reason != "guest-reset" && data.Reason != "host-qmp-system-reset" {
		return
	}
	m.run.again = true
	m.resets++
	m.reset = e.Time
	m.log.Info("reset", "why", data.Reason)
}
