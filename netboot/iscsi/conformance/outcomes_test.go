package conformance

import (
	"bufio"
	"fmt"
	"os"
	"strings"
)

// outcomesFile lists what each test must come to. A line is a test, its outcome on a plain file with physical blocks of 512
// bytes, its outcome on a copy-on-write disk with physical blocks of 4096 bytes, and why, where one of them is not "pass".
const outcomesFile = "testdata/outcomes.txt"

// wanted is what one test must come to.
type wanted struct {
	on  [2]outcome // by the index of media
	why string
}

// readOutcomes reads the list.
func readOutcomes() (map[string]wanted, error) {
	f, err := os.Open(outcomesFile)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all := make(map[string]wanted)
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		name, w, err := parseWanted(line)
		if err == nil && all[name] != (wanted{}) {
			err = fmt.Errorf("%s stands in it twice", name)
		}
		if err != nil {
			return nil, fmt.Errorf("%s:%d: %w", outcomesFile, n, err)
		}
		all[name] = w
	}
	return all, lines.Err()
}

func parseWanted(line string) (string, wanted, error) {
	fields := strings.Fields(line)
	if len(fields) < 3 {
		return "", wanted{}, fmt.Errorf("%q is no test with two outcomes", line)
	}
	w := wanted{why: strings.Join(fields[3:], " ")}
	explained := true
	for i := range w.on {
		w.on[i] = outcome(fields[i+1])
		switch w.on[i] {
		case passed:
		case skipped, wrong:
			explained = explained && w.why != ""
		default:
			return "", wanted{}, fmt.Errorf("%q is no outcome that a list may have", w.on[i])
		}
	}
	if !explained {
		return "", wanted{}, fmt.Errorf("%s does not pass, and no reason is given", fields[0])
	}
	return fields[0], w, nil
}

// differs says in words how a run is not as the list wants it; "" where it is.
func (w wanted) differs(medium int, got outcome) string {
	want := w.on[medium]
	switch {
	case got == want, got == failed && want == wrong:
		return ""
	case want == "":
		return fmt.Sprintf("%s, and it does not stand in %s: add it", got, outcomesFile)
	case got == passed:
		return fmt.Sprintf("it passes now: %s says %q, so mend the list, that it is never lost again", outcomesFile, want)
	}
	return fmt.Sprintf("%s, and %s says %q", got, outcomesFile, want)
}
