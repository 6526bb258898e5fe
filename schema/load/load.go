package load

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/troupe-dev/troupe/schema"
)

// What a zero field of Loader stands for.
const (
	DefaultDeadline = 30 * time.Second
	DefaultMemory   = 2 << 30
)

// ErrLimit is in the chain of an error of Load whose fleet took too long or too much memory to evaluate.
var ErrLimit = errors.New("evaluation limit reached")

// A Loader loads fleets. The zero value works. It keeps what it evaluated for the next loads, by the hash of the files,
// so use one Loader for commits that follow one another. Its methods may be called from several goroutines.
type Loader struct {
	// Command is the program, with its arguments, that calls Evaluate with its standard input and output. Nil is
	// this very program with the argument "eval".
	Command []string

	// Deadline is how long an evaluation may take; 0 is DefaultDeadline.
	Deadline time.Duration

	// Memory is how many bytes the evaluating process may add to what it has when it starts; 0 is DefaultMemory.
	Memory int64

	// Workers is how many shards are evaluated at once; 0 is one for each processor.
	Workers int

	cache cache
	trees trees
}

// Load evaluates the fleet whose root is tree. What is wrong with the fleet comes back as schema.Problems (use
// errors.As), sorted by place; a fleet that takes more than the Loader's limits also has ErrLimit in its chain. Any
// other error says that the fleet could not be read or evaluated.
func (l *Loader) Load(ctx context.Context, tree fs.FS) (*schema.Fleet, error) {
	src, err := collect(ctx, tree)
	if err != nil {
		return nil, err
	}
	plans := src.plan()
	if len(plans) == 0 {
		return nil, src.nothing()
	}
	shards, missing := l.cache.lookup(plans)
	fresh, runErr := l.evaluate(ctx, src, missing)
	l.cache.add(fresh)
	shards = append(shards, fresh...)
	slices.SortFunc(shards, func(a, b *shard) int { return comparePaths(a.Dir, b.Dir) })

	m := merge(shards)
	m.problems = append(m.problems, src.problems...)
	var limit *limitError
	switch {
	case errors.As(runErr, &limit):
		limit.Problems = tidy(append(m.problems, limit.Problems...))
		return nil, limit
	case runErr != nil:
		return nil, runErr
	}
	m.check()
	m.resolveMachines()
	if err := l.readDirs(ctx, m, tree); err != nil {
		return nil, err
	}
	if len(m.problems) > 0 {
		return nil, tidy(m.problems)
	}
	return m.fleet, nil
}

func (l *Loader) limits() limits {
	v := limits{deadline: l.Deadline, memory: l.Memory, workers: l.Workers}
	if v.deadline <= 0 {
		v.deadline = DefaultDeadline
	}
	if v.memory <= 0 {
		v.memory = DefaultMemory
	}
	if v.workers <= 0 {
		v.workers = runtime.GOMAXPROCS(0)
	}
	return v
}

// limits are the fields of a Loader with their defaults filled in.
type limits struct {
	deadline time.Duration
	memory   int64
	workers  int
}

func (l limits) String() string {
	return fmt.Sprintf("the limits are %v and %d MiB", l.deadline, l.memory>>20)
}

// A limitError is a fleet that was refused because of what its evaluation took.
type limitError struct{ schema.Problems }

func (e *limitError) Unwrap() []error { return []error{e.Problems, ErrLimit} }

// keepLoads is for how many loads a cached shard stays that none of them used: enough for a few branches and working
// trees that are loaded in turn.
const keepLoads = 8

// A cache has the results of evaluated shards by the hash of all that they were made from.
type cache struct {
	mu      sync.Mutex
	loads   int
	entries map[string]*cached
}

type cached struct {
	shard *shard
	used  int // the load that last used it
}

// lookup divides plans into those with a result and those without.
func (c *cache) lookup(plans []*plan) (known []*shard, missing []*plan) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.loads++
	for _, p := range plans {
		if e := c.entries[p.key]; e != nil {
			e.used = c.loads
			known = append(known, e.shard)
			continue
		}
		missing = append(missing, p)
	}
	for key, e := range c.entries {
		if c.loads-e.used > keepLoads {
			delete(c.entries, key)
		}
	}
	return known, missing
}

func (c *cache) add(shards []*shard) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.entries == nil {
		c.entries = map[string]*cached{}
	}
	for _, s := range shards {
		c.entries[s.key] = &cached{shard: s, used: c.loads}
	}
}
