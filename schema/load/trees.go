package load

import (
	"context"
	"io/fs"
	"sync"

	"github.com/troupe-dev/troupe/internal/treesum"
)

// maxTrees is how many names of directories are kept.
const maxTrees = 1000

// A hashed tree knows a name of its own for what lies at a path: one that is the same has the same content, as Git's object
// ids are.
type hashed interface {
	Hash(name string) (string, bool)
}

// trees keeps the names of directories, so that the same directory of the next commit need not be read again.
type trees struct {
	mu   sync.Mutex
	sums map[string]string // by the tree's own name
}

func (t *trees) sum(ctx context.Context, fsys fs.FS, dir string) (string, error) {
	own := ""
	if h, ok := fsys.(hashed); ok {
		if id, ok := h.Hash(dir); ok {
			own = id
			t.mu.Lock()
			sum := t.sums[own]
			t.mu.Unlock()
			if sum != "" {
				return sum, nil
			}
		}
	}
	sum, err := treesum.Sum(ctx, fsys, dir)
	if err != nil || own == "" {
		return sum.String(), err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.sums == nil || len(t.sums) >= maxTrees {
		t.sums = map[string]string{}
	}
	t.sums[own] = sum.String()
	return sum.String(), nil
}
