package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/troupe-dev/troupe/internal/pipelisten"
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
