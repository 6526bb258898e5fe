package main

import (
	"context"
	"errors"
	"testing"
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
