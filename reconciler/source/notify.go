package source

import (
	"context"
	"io/fs"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// A notifier hears of changes in a local repository (inotify(7)). For others, and where the system gives no watches, it
// only waits.
type notifier struct {
	local *local            // nil for others
	w     *fsnotify.Watcher // nil where there is none
	log   *slog.Logger
}

func newNotifier(r remote, log *slog.Logger) *notifier {
	n := &notifier{log: log}
	l, ok := r.(*local)
	if !ok {
		return n
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		log.Warn("the repository cannot be watched and is polled only", "err", err)
		return n
	}
	n.local, n.w = l, w
	return n
}

func (n *notifier) close() {
	if n.w != nil {
		_ = n.w.Close()
	}
}

// refresh watches the directories that exist now. A watch that is there already is no second one.
func (n *notifier) refresh() {
	if n.w == nil {
		return
	}
	dir, err := gitDir(n.local.path)
	if err != nil {
		// The repository is not there yet, or no more: its parent tells when it comes.
		_ = n.w.Add(filepath.Dir(n.local.path))
		_ = n.w.Add(n.local.path)
		return
	}
	n.add(dir)
	n.add(filepath.Join(dir, "refs"))
	for _, top := range []string{"heads", "tags"} {
		_ = filepath.WalkDir(filepath.Join(dir, "refs", top), func(p string, d fs.DirEntry, err error) error {
			if err == nil && d.IsDir() {
				n.add(p)
			}
			return nil // a directory that has just gone is none of ours
		})
	}
}

func (n *notifier) add(dir string) {
	if err := n.w.Add(dir); err != nil {
		n.log.Debug("watching", "dir", dir, "err", err)
	}
}

// wait returns nil when d is over or the repository changed, and ctx's error when ctx ends.
func (n *notifier) wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	var events <-chan fsnotify.Event
	var errs <-chan error
	if n.w != nil {
		events, errs = n.w.Events, n.w.Errors
	}
	var end time.Time // of the longest wait for quiet; zero before the first change
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
			return nil
		case err := <-errs:
			// Events were lost: look.
			n.log.Debug("watching", "err", err)
			return nil
		case e := <-events:
			if !interesting(e) {
				continue
			}
			now := time.Now()
			if end.IsZero() {
				end = now.Add(maxDebounce)
			}
			timer.Reset(min(debounce, end.Sub(now)))
		}
	}
}

// interesting says whether e may mean another head. Objects come in below directories that are not watched; in those
// that are, Git makes a file NAME.lock and renames it.
func interesting(e fsnotify.Event) bool {
	name := filepath.Base(e.Name)
	switch {
	case e.Has(fsnotify.Chmod) && !e.Has(fsnotify.Create|fsnotify.Write|fsnotify.Rename|fsnotify.Remove):
		return false
	case strings.HasSuffix(name, ".lock"), name == "index", name == "FETCH_HEAD", name == "COMMIT_EDITMSG", name == "gc.pid":
		return false
	}
	return true
}
