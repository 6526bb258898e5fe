package source

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// watch runs Watch and returns its wake-ups, and a function that ends it.
func watch(t *testing.T, r *Repo) <-chan struct{} {
	t.Helper()
	woken := make(chan struct{}, 1)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- r.Watch(ctx, func() {
			select {
			case woken <- struct{}{}:
			default:
			}
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Watch returned %v", err)
		}
	})
	return woken
}

// until fetches at each wake-up until the head, or the error, is the one wanted.
func until(t *testing.T, r *Repo, woken <-chan struct{}, head string, want error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		select {
		case <-woken:
			rev, err := r.Fetch(t.Context())
			if want != nil && errors.Is(err, want) || want == nil && err == nil && rev.Commit.Hash == head {
				return
			}
		case <-deadline:
			t.Fatalf("no wake-up brought %s, %v", head, want)
		}
	}
}

// The interval is an hour: only the file system can have told.
func TestWatchLocal(t *testing.T) {
	work := newGitRepo(t)
	head := work.commit("a", "1")
	linked := filepath.Join(t.TempDir(), "linked")
	work.git("worktree", "add", "-q", linked)
	bare := work.bare()
	for name, repo := range map[string]string{"working tree": work.dir, "linked worktree": linked} {
		t.Run(name, func(t *testing.T) {
			r := open(t, Config{Repo: repo, Interval: time.Hour})
			woken := watch(t, r)
			until(t, r, woken, work.git("rev-parse", "HEAD"), nil)
			until(t, r, wokenBy(t, woken, func() { head = work.commit("a", name) }), head, nil)
			work.git("pack-refs", "--all")
			until(t, r, wokenBy(t, woken, func() { head = work.commit("a", name+" again") }), head, nil)
			until(t, r, wokenBy(t, woken, func() { work.git("branch", "-q", "-m", "main", "elsewhere") }), "", ErrNoBranch)
			until(t, r, wokenBy(t, woken, func() { work.git("branch", "-q", "-m", "elsewhere", "main") }), head, nil)
		})
	}
	t.Run("bare, pushed to", func(t *testing.T) {
		r := open(t, Config{Repo: bare, Interval: time.Hour})
		woken := watch(t, r)
		until(t, r, woken, runGit(t, bare, "rev-parse", "main"), nil)
		until(t, r, wokenBy(t, woken, func() { head = work.commit("a", "pushed"); work.git("push", "-q") }), head, nil)
	})
	t.Run("branch in a directory of its own", func(t *testing.T) {
		r := open(t, Config{Repo: bare, Branch: "team/fleet", Interval: time.Hour})
		woken := watch(t, r)
		until(t, r, woken, "", ErrNoBranch)
		until(t, r, wokenBy(t, woken, func() { work.git("push", "-q", "origin", "main:team/fleet") }), work.git("rev-parse", "main"), nil)
		until(t, r, wokenBy(t, woken, func() { head = work.commit("a", "team"); work.git("push", "-q", "origin", "main:team/fleet") }), head, nil)
	})
	t.Run("gone and back", func(t *testing.T) {
		r := open(t, Config{Repo: bare, Interval: time.Hour})
		work.git("push", "-q")
		woken := watch(t, r)
		until(t, r, woken, work.git("rev-parse", "main"), nil)
		away := filepath.Join(t.TempDir(), "away")
		until(t, r, wokenBy(t, woken, func() { rename(t, bare, away) }), "", ErrUnreachable)
		until(t, r, wokenBy(t, woken, func() { rename(t, away, bare) }), work.git("rev-parse", "main"), nil)
	})
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

func wokenBy(t *testing.T, woken <-chan struct{}, f func()) <-chan struct{} {
	t.Helper()
	f()
	return woken
}

func TestWatchRemote(t *testing.T) {
	work, root := served(t)
	var down atomic.Bool
	good := backend(root)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if down.Load() {
			http.Error(w, "down for maintenance", http.StatusServiceUnavailable)
			return
		}
		good.ServeHTTP(w, r)
	}))
	defer srv.Close()
	r := open(t, Config{Repo: srv.URL + "/fleet.git", Interval: 10 * time.Millisecond})
	woken := watch(t, r)
	until(t, r, woken, work.git("rev-parse", "HEAD"), nil)
	if r.Answered().IsZero() {
		t.Error("nothing was answered")
	}
	head := work.commit("a", "2")
	work.git("push", "-q")
	until(t, r, woken, head, nil)
	down.Store(true)
	until(t, r, woken, "", ErrUnreachable)
	down.Store(false)
	until(t, r, woken, head, nil)
}

func TestPause(t *testing.T) {
	for misses, want := range map[int]time.Duration{0: 30 * time.Second, 1: 30 * time.Second, 2: time.Minute, 3: 2 * time.Minute, 50: 2 * time.Minute} {
		for range 100 {
			if got := pause(30*time.Second, misses); got < want-want/10 || got > want+want/10 {
				t.Fatalf("%d misses: got %v, want about %v", misses, got, want)
			}
		}
	}
	if got := pause(time.Hour, 10); got < 50*time.Minute {
		t.Errorf("a long interval became %v", got)
	}
}
