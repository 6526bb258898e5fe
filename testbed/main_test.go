package testbed

import (
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if IsInside(os.Args) {
		os.Exit(RunInside(os.Args))
	}
	goleak.VerifyTestMain(m)
}
