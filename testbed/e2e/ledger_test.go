package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// A ledger is what the machines of testdata/diskless say of themselves.
type ledger struct {
	Color string // of the role
	Acked int    // the last record that the disk has, as the writer was told
	Born  string // changes with the disk
	Boot  string // changes with each boot
}

// askTime bounds one request to a machine whose disk may be away: then it answers late or not at all.
const askTime = 10 * time.Second

// awaitLedger asks a machine until it says what is wanted: nobody tells when it does.
func (f *fleet) awaitLedger(address, what string, done func(ledger) bool) ledger {
	f.t.Helper()
	var last ledger
	err := f.poll(func(ctx context.Context) error {
		said, err := f.ask(ctx, "http://"+address+"/cgi-bin/state")
		if err != nil {
			return err
		}
		if last, err = parseLedger(said); err != nil {
			return err
		}
		if !done(last) {
			return fmt.Errorf("it said %+v", last)
		}
		return nil
	})
	if err != nil {
		f.t.Fatalf("waited in vain for: %s of %s: %v", what, address, err)
	}
	f.t.Logf("%s: %s: %+v", address, what, last)
	return last
}

// writes waits until the machine's ledger has grown beyond a record.
func (f *fleet) writes(address string, beyond int) ledger {
	f.t.Helper()
	return f.awaitLedger(address, fmt.Sprintf("more than %d records", beyond), func(l ledger) bool { return l.Acked > beyond })
}

// wantWhole checks that the disk itself has every record up to that one.
func (f *fleet) wantWhole(address string, acked int) {
	f.t.Helper()
	whole := -1
	err := f.poll(func(ctx context.Context) error {
		said, err := f.ask(ctx, "http://"+address+"/cgi-bin/whole")
		if err != nil {
			return err
		}
		whole, err = strconv.Atoi(strings.TrimSpace(said))
		return err
	})
	if err != nil {
		f.t.Fatalf("%s does not say what its disk has: %v", address, err)
	}
	if whole < acked {
		f.t.Errorf("%s: the disk has %d whole records in a row, and %d were acknowledged", address, whole, acked)
	}
}

// poll tries twice a second until try is content or patience is at its end; then it returns try's last error.
func (f *fleet) poll(try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	defer cancel()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// ask is one request to a machine.
func (f *fleet) ask(ctx context.Context, url string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return "", err
	}
	resp, err := f.lab.HTTP().Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", url, resp.Status)
	}
	return string(b), err
}

func parseLedger(said string) (ledger, error) {
	fields := map[string]string{}
	for line := range strings.Lines(said) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		fields[key] = value
	}
	l := ledger{Color: fields["color"], Born: fields["born"], Boot: fields["boot"]}
	var err error
	if l.Acked, err = strconv.Atoi(fields["acked"]); err != nil || l.Color == "" || l.Born == "" || l.Boot == "" {
		return l, fmt.Errorf("the ledger is not open yet: it says %q", said)
	}
	return l, nil
}
