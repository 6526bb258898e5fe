package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/internal/pipelisten"
	"github.com/troupe-dev/troupe/reconciler/state"
)

// A server that can no longer keep records ends with an error, and so is started again; one that is told to end ends
// without.
func TestServerEndsWithItsRecords(t *testing.T) {
	broken, cancel := context.WithCancel(t.Context()) // has Done and Err, as the records have
	cancel()
	if err := watchRecords(t.Context(), broken); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want why the records ended", err)
	}
	if err := watchRecords(broken, context.Background()); err != nil {
		t.Errorf("told to end: %v", err)
	}
}

// That the default port of the target is taken ends a server whose hosts have disks there, by its records or by its files,
// and no other.
func TestTargetsPortIsTaken(t *testing.T) {
	const host = "127.3.26.0" // of this test
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", net.JoinHostPort(host, iscsiPort))
	if err == nil {
		defer l.Close()
	} else if !errors.Is(err, syscall.EADDRINUSE) { // taken by whoever else is as good
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		record bool
		file   string
		iscsi  string
		want   string // of the error; "": none
	}{
		"nobody has a disk": {},
		"what is no disk":   {file: "lost+found/notes"},
		"on record":         {record: true, want: "hosts are on record to have disks here"},
		"a disk":            {file: "n1/0123456789abcdef.disk", want: "there are disks of hosts in"},
		"a delta":           {file: "n1/0123456789abcdef.delta", want: "there are disks of hosts in"},
		"without them":      {record: true, iscsi: "off"},
		"a port that was asked for": {
			iscsi: net.JoinHostPort(host, iscsiPort), want: "address already in use",
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := serveOptions{data: t.TempDir(), listen: host + ":0", iscsi: tt.iscsi}
			records, err := state.Open(t.Context(), filepath.Join(o.data, "state"), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer records.Close()
			if tt.record {
				if err := state.LUNSets.Put(t.Context(), records, "n1", state.LUNs{Host: "n1"}); err != nil {
					t.Fatal(err)
				}
			}
			if tt.file != "" {
				file := filepath.Join(o.disksDir(), tt.file)
				if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, nil, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			l, err := o.listenISCSI(t.Context(), slog.New(slog.DiscardHandler), records)
			if l != nil {
				_ = l.Close()
				t.Error("it listens at a port that is taken")
			}
			if err == nil && tt.want != "" || err != nil && (tt.want == "" || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got error %v, want %q", err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), "--iscsi-listen") {
				t.Errorf("%v does not say what to do", err)
			}
		})
	}
}

// Whatever a handler does, a client that takes no answer or sends no body does not hold a connection for ever; one that is
// only idle for a while is served again.
func TestClientsAreBounded(t *testing.T) {
	big := strings.Repeat("x", 1<<20)
	for _, tt := range []struct {
		name, request string
		client        func(net.Conn, *bufio.Reader) error
		within        time.Duration
	}{
		{"takes nothing", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", func(net.Conn, *bufio.Reader) error { return nil }, slowAnswer},
		{"sends no body", "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n", func(_ net.Conn, in *bufio.Reader) error {
			_, err := io.Copy(io.Discard, in)
			return err
		}, slowBody},
		{"comes back", "GET / HTTP/1.1\r\nHost: x\r\n\r\n", func(c net.Conn, in *bufio.Reader) error {
			for range 3 {
				if err := readAnswer(in, len(big)); err != nil {
					return err
				}
				time.Sleep(slowAnswer + time.Second)
				if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
					return err
				}
			}
			return readAnswer(in, len(big))
		}, 10 * time.Minute},
	} {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			l, served := pipelisten.New(), make(chan error, 1)
			go func() {
				served <- serveHTTP(ctx, l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, big) }))
			}()
			ours, err := l.Dial(ctx)
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			if _, err := io.WriteString(ours, tt.request); err != nil {
				t.Fatal(err)
			}
			in := bufio.NewReader(ours)
			if err := tt.client(ours, in); err != nil {
				t.Errorf("%s: %v", tt.name, err)
			}
			time.Sleep(tt.within + time.Second - time.Since(start))
			if _, err := io.Copy(io.Discard, ours); err != nil {
				t.Errorf("%s: %v, want a closed connection", tt.name, err)
			}
			if took := time.Since(start); took > tt.within+time.Second {
				t.Errorf("%s: the connection was held for %s", tt.name, took)
			}
			cancel()
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

func readAnswer(in *bufio.Reader, want int) error {
	r, err := http.ReadResponse(in, nil)
	if err != nil {
		return err
	}
	defer r.Body.Close()
	n, err := io.Copy(io.Discard, r.Body)
	if err == nil && n != int64(want) {
		err = fmt.Errorf("got %d bytes, want %d", n, want)
	}
	return err
}
