package conformance

import (
	"context"
	"errors"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// An outcome is what became of one test of iscsi-test-cu.
type outcome string

const (
	passed  outcome = "pass"
	skipped outcome = "skip" // the tool found that the unit has not what the test is about
	failed  outcome = "fail"
	hung    outcome = "hung"  // not at its end after cuLimit
	wrong   outcome = "wrong" // in the list only: it fails, and the test is what is wrong
)

// cuLimit is how long one test may take. The slowest wait 3 s for an answer that must not come; -race makes others slow.
const cuLimit = 30 * time.Second

// A cuResult is one run of one test.
type cuResult struct {
	outcome outcome
	output  string // all that the tool said
}

// cuTally is the line of the tool's summary that counts tests: total, ran, passed, failed, inactive.
var cuTally = regexp.MustCompile(`(?m)^ +tests +(\d+) +(\d+) +(\d+) +(\d+) +(\d+)$`)

// cuTests lists the tests of iscsi-test-cu, each by its name ALL.SUITE.TEST.
func cuTests(t testing.TB) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "iscsi-test-cu", "--list").Output()
	if err != nil {
		t.Fatalf("listing the tests of iscsi-test-cu: %v", err)
	}
	var tests []string
	for line := range strings.Lines(string(out)) {
		name := strings.TrimSpace(line)
		// The families SCSI, iSCSI and LINUX are other groupings of the same tests.
		if strings.HasPrefix(name, "ALL.") && strings.Count(name, ".") == 2 {
			tests = append(tests, name)
		}
	}
	return tests
}

// runCU runs one test against the unit at a URL, in a process of its own. A second URL is a second path to the unit.
func runCU(ctx context.Context, test string, urls ...string) cuResult {
	ctx, cancel := context.WithTimeout(ctx, cuLimit)
	defer cancel()
	args := append([]string{"--dataloss", "--Verbose-scsi", "--test=" + test}, urls...)
	out, err := exec.CommandContext(ctx, "iscsi-test-cu", args...).CombinedOutput()
	if ctx.Err() != nil {
		return cuResult{hung, string(out)}
	}
	return cuResult{cuOutcome(string(out), err), string(out)}
}

// cuOutcome tells how a test ended. The tool's own count knows no skipped tests: they pass, and say "[SKIPPED]". A test that
// it does not know, and a unit that it cannot log in to, are no failure to it either: then it counts nothing.
func cuOutcome(out string, err error) outcome {
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return failed
	}
	tally := cuTally.FindStringSubmatch(out)
	switch {
	case err != nil, tally == nil, strings.Join(tally[1:], " ") != "1 1 1 0 0":
		return failed
	case strings.Contains(out, "[SKIPPED]"):
		return skipped
	}
	return passed
}

func TestOutcomeIsReadFromTheTool(t *testing.T) {
	const (
		pass = "  Test: Simple ...passed\n\nRun Summary:    Type  Total    Ran Passed Failed Inactive\n" +
			"              suites      1      1    n/a      0        0\n               tests      1      1      1      0        0\n"
		skip = "  Test: Simple ...    [SKIPPED] EXTENDEDCOPY is not implemented.\n" + pass
		fail = "  Test: Range ...    [FAILED] PRIN/SA=0x3 failed\nFAILED\n               tests      1      1      0      1        0\n"
		none = "               tests      0      0      0      0        0\n"
	)
	exit := exec.CommandContext(t.Context(), "false").Run()
	for _, tc := range []struct {
		out  string
		err  error
		want outcome
	}{
		{pass, nil, passed},
		{skip, nil, skipped},
		{fail, exit, failed},
		{fail, nil, failed},
		{pass, exit, failed}, // it crashed while it cleaned up
		{none, nil, failed},  // no such test
		{"Failed to connect to SCSI device 0\n", exit, failed},
		{"", exec.ErrNotFound, failed},
	} {
		if got := cuOutcome(tc.out, tc.err); got != tc.want {
			t.Errorf("outcome of %q, %v: %s, want %s", tc.out, tc.err, got, tc.want)
		}
	}
}
