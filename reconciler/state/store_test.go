package state

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func open(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestRecordsSurviveReopening(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	want := Lease{MAC: "52:54:00:00:00:01", Hostname: "n1"}
	if err := Leases.Put(t.Context(), s, want.MAC, want); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir)
	defer s.Close()
	got, err := Leases.Get(t.Context(), s, want.MAC)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got, cmp.Comparer(func(a, b Lease) bool { return a == b })); d != "" {
		t.Errorf("lease after reopening (-want +got):\n%s", d)
	}
	if err := Leases.Delete(t.Context(), s, want.MAC); err != nil {
		t.Fatal(err)
	}
	if _, err := Leases.Get(t.Context(), s, want.MAC); !errors.Is(err, ErrNotFound) {
		t.Errorf("Get of a deleted lease: %v, want ErrNotFound", err)
	}
}

func TestKindsDoNotSeeEachOther(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	if err := Nodes.Put(t.Context(), s, "a", Node{MAC: "a"}); err != nil {
		t.Fatal(err)
	}
	for id, b := range map[string]Boot{"a/1": {ID: "1"}, "a/2": {ID: "2"}, "ab/1": {ID: "3"}} {
		if err := Boots.Put(t.Context(), s, id, b); err != nil {
			t.Fatal(err)
		}
	}
	got, err := Boots.ListUnder(t.Context(), s, "a/")
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || got["a/1"].ID != "1" || got["a/2"].ID != "2" {
		t.Errorf("boots under a/: got %v", got)
	}
	machines, err := Machines.List(t.Context(), s)
	if err != nil || len(machines) != 0 {
		t.Errorf("machines: got %v, %v; want none", machines, err)
	}
}

func TestTooLargeRecordIsRefusedWithItsSize(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	err := Events.Put(t.Context(), s, "x", Event{Message: strings.Repeat("x", maxRecord)})
	if err == nil || !strings.Contains(err.Error(), "more than the 1048576") {
		t.Errorf("got %v, want an error that states the limit", err)
	}
}

func TestWatchWakesForItsPrefixes(t *testing.T) {
	s := open(t, t.TempDir())
	defer s.Close()
	wake := s.Watch(t.Context(), Nodes.Prefix())
	<-wake // the watch stands
	// A record of another kind must not wake; a node must. Both are written, in this order: one wake can only be the node's.
	if err := Leases.Put(t.Context(), s, "l", Lease{}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-wake:
		t.Fatal("woken by a record of another kind, or twice at the start")
	default:
	}
	if err := Nodes.Put(t.Context(), s, "n", Node{}); err != nil {
		t.Fatal(err)
	}
	<-wake
}

func TestSecondOpenIsRefused(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	defer s.Close()
	if _, err := Open(t.Context(), dir, nil); !errors.Is(err, ErrLocked) {
		t.Errorf("second Open: %v, want ErrLocked", err)
	}
}

// A store that was filled to its quota takes records again after it was opened again: old versions make room.
func TestFullStoreMakesRoomWhenOpened(t *testing.T) {
	const small = 2 << 20
	dir := t.TempDir()
	s, err := openStore(t.Context(), dir, small, nil)
	if err != nil {
		t.Fatal(err)
	}
	big := Event{Message: strings.Repeat("x", 100<<10)}
	for n := 0; err == nil; n++ {
		if n > 100 {
			t.Fatal("the store takes more than its quota")
		}
		err = Events.Put(t.Context(), s, "x", big)
	}
	if !strings.Contains(err.Error(), "space exceeded") {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var logged bytes.Buffer
	if s, err = openStore(t.Context(), dir, small, slog.New(slog.NewTextHandler(&logged, nil))); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if err := Events.Put(t.Context(), s, "y", big); err != nil {
		t.Errorf("after it was opened again: %v", err)
	}
	if got, err := Events.Get(t.Context(), s, "x"); err != nil || got.Message != big.Message {
		t.Errorf("a record from before: %d bytes, %v", len(got.Message), err)
	}
	if !strings.Contains(logged.String(), "no room left") {
		t.Errorf("nobody was told: %s", logged.String())
	}
}

// When etcd ends by itself the store says so, and a watch neither spins nor ends.
func TestDeathOfEtcdIsNoticed(t *testing.T) {
	s := open(t, t.TempDir())
	ctx, cancel := context.WithCancel(t.Context())
	wake := s.Watch(ctx, Nodes.Prefix())
	<-wake
	if err := s.Err(); err != nil {
		t.Errorf("a store that works says %v", err)
	}
	s.etcd.Server.Stop()
	<-s.Done()
	if err := s.Err(); err == nil || !strings.Contains(err.Error(), "etcd") {
		t.Errorf("Err: %v, want why", err)
	}
	cancel()
	for range wake { // until it is closed
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestClosedStoreIsDoneWithoutError(t *testing.T) {
	s := open(t, t.TempDir())
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	<-s.Done()
	if err := s.Err(); err != nil {
		t.Errorf("Err after Close: %v", err)
	}
}

// Fleets hold markup: a record must not take six bytes for each bracket of it.
func TestMarkupTakesNoMoreRoom(t *testing.T) {
	b, err := encode(Event{Message: "<&>"})
	if err != nil || !strings.Contains(string(b), `"<&>"`) {
		t.Errorf("got %s, %v", b, err)
	}
}

// TestAcknowledgedRecordsSurviveKill writes in a child that is killed after it acknowledged some records: each of them must be there.
func TestAcknowledgedRecordsSurviveKill(t *testing.T) {
	if dir := os.Getenv("STATE_TEST_CHILD"); dir != "" {
		writeUntilKilled(t, dir)
		return
	}
	dir := t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestAcknowledgedRecordsSurviveKill$")
	cmd.Env = append(os.Environ(), "STATE_TEST_CHILD="+dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	acked := make([]byte, 50) // one byte for each acknowledged record
	for n := 0; n < len(acked); {
		m, err := out.Read(acked[n:])
		if err != nil {
			t.Fatal(err)
		}
		n += m
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	s := open(t, dir)
	defer s.Close()
	all, err := Leases.List(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < len(acked) {
		t.Errorf("%d records were acknowledged, %d are there", len(acked), len(all))
	}
}

func writeUntilKilled(t *testing.T, dir string) {
	t.Helper()
	s := open(t, dir)
	for i := range 100000 {
		if err := Leases.Put(t.Context(), s, string(rune('a'+i%26))+strings.Repeat("x", i/26), Lease{}); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stdout.Write([]byte(".")); err != nil {
			t.Fatal(err)
		}
	}
}
