package main

import (
	"fmt"
	"strconv"
	"strings"
)

// maxHostlist bounds how many names one hostlist stands for.
const maxHostlist = 100_000

// hostlist is the names that arguments stand for: each is a name, or has sets of numbers in brackets, as in n[1-5,9] and
// r[1-2]n[01-16]. Arguments and, outside of brackets, their parts are separated by commas.
func hostlist(args []string) ([]string, error) {
	var names []string
	for _, arg := range args {
		for _, part := range splitOutside(arg) {
			expanded, err := expand(part, maxHostlist-len(names))
			if err != nil {
				return nil, fmt.Errorf("host list %q: %w", arg, err)
			}
			names = append(names, expanded...)
		}
	}
	return names, nil
}

// splitOutside splits s at the commas that are in no brackets.
func splitOutside(s string) []string {
	depth := 0
	return strings.FieldsFunc(s, func(c rune) bool {
		switch c {
		case '[':
			depth++
		case ']':
			depth--
		}
		return c == ',' && depth <= 0
	})
}

func expand(s string, most int) ([]string, error) {
	before, rest, ok := strings.Cut(s, "[")
	if !ok {
		if strings.Contains(s, "]") {
			return nil, fmt.Errorf("%q has ] without [", s)
		}
		if most < 1 {
			return nil, fmt.Errorf("more than %d names", maxHostlist)
		}
		return []string{s}, nil
	}
	set, after, ok := strings.Cut(rest, "]")
	if !ok {
		return nil, fmt.Errorf("%q has [ without ]", s)
	}
	tails, err := expand(after, most)
	if err != nil {
		return nil, err
	}
	var names []string
	for r := range strings.SplitSeq(set, ",") {
		numbers, err := numbersOf(r, most/len(tails)-len(names)/len(tails))
		if err != nil {
			return nil, err
		}
		for _, n := range numbers {
			for _, tail := range tails {
				names = append(names, before+n+tail)
			}
		}
	}
	return names, nil
}

// numbersOf is a number, or those from the first to the last of a range, all as wide as the first.
func numbersOf(r string, most int) ([]string, error) {
	first, last, ok := strings.Cut(r, "-")
	if !ok {
		last = first
	}
	a, err := strconv.ParseUint(first, 10, 31)
	if err != nil {
		return nil, fmt.Errorf("%q is no number", first)
	}
	b, err := strconv.ParseUint(last, 10, 31)
	if err != nil {
		return nil, fmt.Errorf("%q is no number", last)
	}
	if b < a {
		return nil, fmt.Errorf("the range %q ends before it begins", r)
	}
	if most < 1 || b-a > uint64(most)-1 {
		return nil, fmt.Errorf("more than %d names", maxHostlist)
	}
	numbers := make([]string, 0, b-a+1)
	for n := a; n <= b; n++ {
		numbers = append(numbers, fmt.Sprintf("%0*d", len(first), n))
	}
	return numbers, nil
}
