package load

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/troupe-dev/troupe/schema"
)

// Bounds of what is read from a fleet's tree.
const (
	maxFile    = 16 << 20  // bytes of one CUE file
	maxTotal   = 256 << 20 // bytes of all CUE files
	maxEntries = 200_000   // files and directories
	maxDepth   = 32        // directories in one another
)

// packageName is the package of the files that make a fleet.
const packageName = "fleet"

// A file is one file of package fleet.
type file struct {
	Name string `json:"name"` // slash-separated, from the fleet's root
	Text []byte `json:"text"`

	sum [sha256.Size]byte
}

// A sources is what collect found.
type sources struct {
	files    []file            // of package fleet, sorted by name
	problems []schema.Problem  // files that cannot be used
	others   map[string]string // CUE files that are not of the fleet, and why not

	entries, total int
}

// A plan is a shard before its evaluation.
type plan struct {
	dir   string
	files []int // in sources.files
	key   string
}

// collect finds the CUE files of package fleet. As the cue command does, it leaves out files and directories whose
// names begin with "_" or ".", cue.mod, and files that end in _test.cue or _tool.cue.
func collect(ctx context.Context, tree fs.FS) (*sources, error) {
	s := &sources{others: map[string]string{}}
	err := fs.WalkDir(tree, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("reading %q of the fleet: %w", name, err)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		return s.visit(tree, name, d)
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(s.files, func(a, b file) int { return comparePaths(a.Name, b.Name) })
	return s, nil
}

func (s *sources) visit(tree fs.FS, name string, d fs.DirEntry) error {
	if s.entries++; s.entries > maxEntries {
		return schema.Problems{{Message: fmt.Sprintf("the fleet has more than %d files and directories", maxEntries)}}
	}
	base := path.Base(name)
	hidden := name != "." && (base[0] == '.' || base[0] == '_')
	switch {
	case d.IsDir() && (hidden || base == "cue.mod"):
		return fs.SkipDir
	case d.IsDir() && strings.Count(name, "/") >= maxDepth:
		s.problem(name, "more than %d directories in one another", maxDepth)
		return fs.SkipDir
	case d.IsDir() || hidden || path.Ext(base) != ".cue":
		return nil
	case strings.HasSuffix(base, "_test.cue") || strings.HasSuffix(base, "_tool.cue"):
		return nil
	case !d.Type().IsRegular():
		s.problem(name, "is not a regular file: symbolic links are not followed")
		return nil
	}
	return s.add(tree, name)
}

// add reads one CUE file and keeps it if it is of the fleet.
func (s *sources) add(tree fs.FS, name string) error {
	text, err := readBounded(tree, name)
	if errors.Is(err, errTooBig) {
		s.problem(name, "is bigger than %d MiB", maxFile>>20)
		return nil
	}
	if err != nil {
		return fmt.Errorf("reading %q of the fleet: %w", name, err)
	}
	if s.total += len(text); s.total > maxTotal {
		return schema.Problems{{Message: fmt.Sprintf("the fleet has more than %d MiB of CUE", maxTotal>>20)}}
	}
	switch c, ok := packageClause(text); {
	case !ok, c.name == packageName: // where it is not ok, the evaluator says why
		s.files = append(s.files, file{Name: name, Text: text, sum: sha256.Sum256(text)})
	case c.name == "":
		s.others[name] = "has no package clause"
	case distance(strings.ToLower(c.name), packageName) <= maxTypo:
		s.problems = append(s.problems, schema.Problem{File: name, Line: c.line, Column: c.column, Message: notOfFleet(c.name)})
	default:
		s.others[name] = "is of package " + c.name
	}
	return nil
}

// maxTypo is how many letters the name of a package may differ from the fleet's for it to be a mistake: such a file
// would be left out without a word.
const maxTypo = 2

func notOfFleet(name string) string {
	return fmt.Sprintf("package %s is not part of the fleet (want package %s)", name, packageName)
}

func (s *sources) problem(name, format string, args ...any) {
	s.problems = append(s.problems, schema.Problem{File: name, Message: fmt.Sprintf(format, args...)})
}

var errTooBig = errors.New("file is too big")

func readBounded(tree fs.FS, name string) ([]byte, error) {
	f, err := tree.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.LimitReader(f, maxFile+1)); err != nil {
		return nil, err
	}
	if b.Len() > maxFile {
		return nil, errTooBig
	}
	return b.Bytes(), nil
}

// plan makes one shard of each directory with files of the fleet that has no such directory below it. Every file is
// then in one shard at least, and a shard has the files of its own directory and of those above it.
func (s *sources) plan() []*plan {
	byDir := map[string][]int{}
	leaf := map[string]bool{}
	for i, f := range s.files {
		dir := path.Dir(f.Name)
		byDir[dir] = append(byDir[dir], i)
		leaf[dir] = true
	}
	for dir := range byDir {
		for d := dir; d != "."; {
			d = path.Dir(d)
			delete(leaf, d)
		}
	}
	var plans []*plan
	for dir := range leaf {
		p := &plan{dir: dir}
		for d := dir; ; d = path.Dir(d) {
			p.files = append(p.files, byDir[d]...)
			if d == "." {
				break
			}
		}
		slices.Sort(p.files)
		p.key = s.key(p)
		plans = append(plans, p)
	}
	slices.SortFunc(plans, func(a, b *plan) int { return comparePaths(a.dir, b.dir) })
	return plans
}

// key is the hash of all that a shard's result depends on.
func (s *sources) key(p *plan) string {
	h := sha256.New()
	fmt.Fprintf(h, "troupe shard 1\n%d %s\n", len(schema.CUE), schema.CUE)
	fmt.Fprintf(h, "%q\n", p.dir)
	for _, i := range p.files {
		fmt.Fprintf(h, "%q %x\n", s.files[i].Name, s.files[i].sum)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// nothing is the error for a tree without a fleet.
func (s *sources) nothing() error {
	text := fmt.Sprintf("no fleet here: no CUE file says %q; write one that begins with it", "package "+packageName)
	ps := schema.Problems{{Message: text}}
	for name, why := range s.others {
		ps = append(ps, schema.Problem{File: name, Message: why + ", so it is not part of the fleet"})
	}
	return tidy(append(ps, s.problems...))
}

// comparePaths sorts files of a directory before its subdirectories.
func comparePaths(a, b string) int {
	return cmp.Or(
		strings.Compare(path.Dir(a), path.Dir(b)),
		strings.Compare(a, b),
	)
}

// arrange sorts problems by place, and drops those said twice.
func arrange(ps schema.Problems) schema.Problems {
	slices.SortFunc(ps, compareProblems)
	return slices.Compact(ps)
}

func compareProblems(a, b schema.Problem) int {
	return cmp.Or(strings.Compare(a.File, b.File), a.Line-b.Line, a.Column-b.Column, strings.Compare(a.Message, b.Message))
}

// maxProblems is how many problems are told; nobody reads more.
const maxProblems = 1000

// maxMessage is how many bytes the text of one problem may have: it may quote names and values that fill a file.
const maxMessage = 2 << 10

// cut makes of s one line of at most n bytes, where it ends with an ellipsis if there was more.
func cut(s string, n int) string {
	if len(s) > n {
		for n -= len("…"); n > 0 && !utf8.RuneStart(s[n]); {
			n--
		}
		s = s[:n] + "…"
	}
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}

// tidy arranges problems, and bounds their number and their length.
func tidy(ps schema.Problems) schema.Problems {
	for i := range ps {
		ps[i].Message = cut(ps[i].Message, maxMessage)
	}
	ps = arrange(ps)
	if more := len(ps) - maxProblems; more > 0 {
		ps = append(ps[:maxProblems:maxProblems], schema.Problem{Message: fmt.Sprintf("and %d more problems", more)})
	}
	return ps
}
