package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestMain makes this program the command "troupe" of the scripts, and of the processes that they start.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"troupe": main})
}

// TestScript runs the scripts in testdata/script, each in a directory of its own.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata/script", RequireExplicitExec: true, RequireUniqueNames: true})
}
