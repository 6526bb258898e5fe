package state

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/troupe-dev/troupe/images"
	"github.com/troupe-dev/troupe/internal/backoff"
)

// ErrNotFound is in the chain of every error that says that a record does not exist.
var ErrNotFound = errors.New("no such record")

// ErrLocked is in the chain of Open's error where another process holds the directory.
var ErrLocked = errors.New("in use by another process")

// root is in front of every key. The number is the records' version: a change that old programs would misread gets a
// new one.
const root = "/troupe/1/"

// maxRecord bounds a record, in bytes: etcd refuses requests above 1.5 MiB, with an error that helps nobody.
const maxRecord = 1 << 20

// readyTimeout bounds how long Open waits for etcd. On 127 MB of data it was seen to take 1.1 s.
const readyTimeout = time.Minute

// quota bounds etcd's file, in bytes. Above it etcd raises an alarm and takes no more writes until it is told to.
const quota = 2 << 30

// repairTimeout bounds making room in a full store. Defragmenting copies what is left, at most quota.
const repairTimeout = 5 * time.Minute

// A Store keeps records. Every write that returned without an error is on disk.
type Store struct {
	client *clientv3.Client
	close  func() error

	etcd    *embed.Etcd
	closing atomic.Bool
	done    chan struct{}
	err     error // why etcd ended; written before done is closed
}

// Open starts the embedded etcd with its data in dir, and waits until it serves. One process at a time may have dir
// open. No TCP port is used: the client is in the process, and the peer listener, which a single member does not need
// but etcd insists on, is a unix socket.
func Open(ctx context.Context, dir string, log *slog.Logger) (*Store, error) {
	return openStore(ctx, dir, quota, log)
}

func openStore(ctx context.Context, dir string, quota int64, log *slog.Logger) (*Store, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("making the state directory: %w", err)
	}
	unlock, err := lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, fmt.Errorf("locking the state directory %s: %w", dir, err)
	}
	socket, release, err := peerSocket(dir, unlock)
	if err != nil {
		unlock()
		return nil, err
	}
	e, err := startEtcd(ctx, dir, socket, quota, log)
	if err != nil {
		release()
		return nil, fmt.Errorf("starting etcd in %s: %w", dir, err)
	}
	s := &Store{client: v3client.New(e.Server), etcd: e, done: make(chan struct{})}
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.await()
	}()
	s.close = func() error {
		s.closing.Store(true)
		err := s.client.Close()
		e.Close()
		<-watched
		release()
		if errors.Is(err, context.Canceled) { // what the in-process client says of a clean end
			return nil
		}
		return err
	}
	if err := s.makeRoom(ctx, log); err != nil {
		return nil, errors.Join(fmt.Errorf("making room in the records in %s: %w", dir, err), s.close())
	}
	return s, nil
}

// await closes done when etcd ends: by Close, or by itself, when it can no longer write.
func (s *Store) await() {
	defer close(s.done)
	select {
	case err := <-s.etcd.Err():
		s.err = fmt.Errorf("the embedded etcd failed: %w", err)
	case <-s.etcd.Server.StopNotify():
		s.err = errors.New("the embedded etcd stopped")
	}
	if s.closing.Load() {
		s.err = nil
	}
}

// Done is closed when the store works no more: its etcd failed, or Close was called. Nothing brings it back: the process
// should end, and another open the directory.
func (s *Store) Done() <-chan struct{} { return s.done }

// Err says why Done is closed; nil before that, and after Close.
func (s *Store) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// makeRoom takes up writing again where etcd refuses it because its file has reached the quota: it drops old versions of
// records, gives their room back, and takes the alarm off.
func (s *Store) makeRoom(ctx context.Context, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, repairTimeout)
	defer cancel()
	alarms, err := s.client.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("listing etcd's alarms: %w", err)
	}
	for _, a := range alarms.Alarms {
		if a.Alarm.String() != "NOSPACE" {
			continue
		}
		before, err := s.client.Status(ctx, "")
		if err != nil {
			return fmt.Errorf("asking for etcd's size: %w", err)
		}
		if _, err := s.client.Compact(ctx, before.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
			log.Warn("old versions of the records are not dropped", "error", err) // perhaps they were, and the process was killed
		}
		if err := s.etcd.Server.Defragment(); err != nil { // the in-process client's panics
			return fmt.Errorf("defragmenting: %w", err)
		}
		if _, err := s.client.AlarmDisarm(ctx, (*clientv3.AlarmMember)(a)); err != nil {
			return fmt.Errorf("taking off the alarm: %w", err)
		}
		after, err := s.client.Status(ctx, "")
		if err != nil {
			return fmt.Errorf("asking for etcd's size: %w", err)
		}
		log.Warn("the records had no room left; old versions of them were dropped", "bytes_before", before.DbSize, "bytes_after", after.DbSize)
	}
	return nil
}

// maxSocket is the longest path that fits into a unix socket's address (unix(7): 108 bytes with the final zero).
const maxSocket = 107

// peerSocket finds a place for etcd's socket: in dir, or, where that has too long a name, in a temporary directory.
// release undoes it, and unlocks.
func peerSocket(dir string, unlock func()) (name string, release func(), err error) {
	name = filepath.Join(dir, "peer")
	if len(name) <= maxSocket {
		_ = os.Remove(name) // left by a process that was killed: we hold the lock
		return name, unlock, nil
	}
	tmp, err := os.MkdirTemp("", "troupe-etcd-")
	if err != nil {
		return "", nil, fmt.Errorf("making a directory for etcd's socket: %w", err)
	}
	return filepath.Join(tmp, "peer"), func() {
		_ = os.RemoveAll(tmp)
		unlock()
	}, nil
}

func startEtcd(ctx context.Context, dir, socket string, quota int64, log *slog.Logger) (*embed.Etcd, error) {
	cfg := embed.NewConfig()
	cfg.Name = "troupe"
	cfg.Dir = filepath.Join(dir, "etcd")
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.New(slogCore{log}))
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = nil, nil
	// The advertised URL is a name only, the same at every start: a later join of other servers updates it.
	cfg.ListenPeerUrls = []url.URL{{Scheme: "unix", Host: socket}}
	cfg.AdvertisePeerUrls = []url.URL{{Scheme: "http", Host: "127.0.0.1:2380"}}
	cfg.InitialCluster = "troupe=http://127.0.0.1:2380"
	cfg.AutoCompactionMode, cfg.AutoCompactionRetention = "revision", "10000" // nodes report often
	cfg.QuotaBackendBytes = quota
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, err
	}
	timer := time.NewTimer(readyTimeout)
	defer timer.Stop()
	select {
	case <-e.Server.ReadyNotify():
		return e, nil
	case err = <-e.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-timer.C:
		err = fmt.Errorf("not ready within %s", readyTimeout)
	}
	e.Close()
	return nil, err
}

// lock takes the lock file for this process; the kernel drops it with the process, however that ends.
func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return func() { _ = f.Close() }, nil
	}
	_ = f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, ErrLocked
	}
	return nil, err
}

// Close ends the store. Nothing that was acknowledged needs it.
func (s *Store) Close() error { return s.close() }

// A Kind is one kind of record: T, by id.
type Kind[T any] struct{ prefix string }

// The kinds; package documentation says who writes them.
var (
	Sources     = Kind[Source]{"source/"} // one record: see SourceID
	Assignments = Kind[Assignment]{"assignments/"}
	Builds      = Kind[Build]{"builds/"}
	Bases       = Kind[images.Base]{"bases/"}
	Deltas      = Kind[images.Delta]{"deltas/"}
	Disks       = Kind[images.Disk]{"disks/"}
	Apps        = Kind[images.App]{"apps/"}
	Releases    = Kind[Release]{"releases/"}
	Machines    = Kind[Machine]{"machines/"}
	Nodes       = Kind[Node]{"nodes/"}
	LUNSets     = Kind[LUNs]{"luns/"}
	Orders      = Kind[Order]{"orders/"}
	Boots       = Kind[Boot]{"boots/"}
	Leases      = Kind[Lease]{"leases/"}
	Events      = Kind[Event]{"events/"}
)

// SourceID is the id of the only Source record.
const SourceID = "fleet"

// Prefix is the part of a kind's keys before the id, for Watch.
func (k Kind[T]) Prefix() string { return root + k.prefix }

// Get reads one record; an error that wraps ErrNotFound says that there is none.
func (k Kind[T]) Get(ctx context.Context, s *Store, id string) (T, error) {
	var v T
	r, err := s.client.Get(ctx, k.Prefix()+id)
	if err != nil {
		return v, fmt.Errorf("reading record %s%s: %w", k.prefix, id, err)
	}
	if len(r.Kvs) == 0 {
		return v, fmt.Errorf("reading record %s%s: %w", k.prefix, id, ErrNotFound)
	}
	if err := json.Unmarshal(r.Kvs[0].Value, &v); err != nil {
		return v, fmt.Errorf("reading record %s%s: %w", k.prefix, id, err)
	}
	return v, nil
}

// List reads all records of a kind, by id.
func (k Kind[T]) List(ctx context.Context, s *Store) (map[string]T, error) {
	return k.ListUnder(ctx, s, "")
}

// ListUnder reads the records whose id starts with prefix, by whole id.
func (k Kind[T]) ListUnder(ctx context.Context, s *Store, prefix string) (map[string]T, error) {
	r, err := s.client.Get(ctx, k.Prefix()+prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("listing records %s%s: %w", k.prefix, prefix, err)
	}
	all := make(map[string]T, len(r.Kvs))
	for _, kv := range r.Kvs {
		var v T
		if err := json.Unmarshal(kv.Value, &v); err != nil {
			return nil, fmt.Errorf("reading record %s: %w", kv.Key, err)
		}
		all[strings.TrimPrefix(string(kv.Key), k.Prefix())] = v
	}
	return all, nil
}

// Put writes one record whole. It is on disk when Put returns nil.
func (k Kind[T]) Put(ctx context.Context, s *Store, id string, v T) error {
	b, err := encode(v)
	if err != nil {
		return fmt.Errorf("writing record %s%s: %w", k.prefix, id, err)
	}
	if _, err := s.client.Put(ctx, k.Prefix()+id, string(b)); err != nil {
		return fmt.Errorf("writing record %s%s: %w", k.prefix, id, err)
	}
	return nil
}

// Delete removes one record; it is no error if there is none.
func (k Kind[T]) Delete(ctx context.Context, s *Store, id string) error {
	if _, err := s.client.Delete(ctx, k.Prefix()+id); err != nil {
		return fmt.Errorf("deleting record %s%s: %w", k.prefix, id, err)
	}
	return nil
}

func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // which makes six bytes of one
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	out := bytes.TrimSuffix(b.Bytes(), []byte{'\n'})
	if len(out) > maxRecord {
		return nil, fmt.Errorf("it has %d bytes, more than the %d that a record may have", len(out), maxRecord)
	}
	return out, nil
}

// Watch sends on the returned channel soon after any record changed whose key starts with one of prefixes, until ctx
// ends; then the channel is closed. A send says only that something changed: whoever gets it lists afresh. Changes that
// come while a send waits to be taken are one send. The first send comes as soon as
// changes are seen.
func (s *Store) Watch(ctx context.Context, prefixes ...string) <-chan struct{} {
	wake := make(chan struct{}, 1)
	go func() {
		defer close(wake)
		again := backoff.Backoff{First: watchAgain, Limit: time.Minute}
		for ctx.Err() == nil {
			if s.follow(ctx, prefixes, wake) {
				again.Reset()
			}
			if again.Wait(ctx) != nil {
				return
			}
		}
	}()
	return wake
}

// watchAgain is how long Watch waits before it watches again after a watch broke, at first: where etcd is gone, every
// watch breaks at once.
const watchAgain = 100 * time.Millisecond

// follow runs one etcd watch until it breaks, and says whether it ever stood. It notifies when the watch stands, not before: what changed until then is
// in the list that the woken one makes, what changes from then on is seen by the watch.
func (s *Store) follow(ctx context.Context, prefixes []string, wake chan<- struct{}) (stood bool) {
	ctx, cancel := context.WithCancel(ctx) // ends the watch in etcd, too
	defer cancel()
	for r := range s.client.Watch(ctx, root, clientv3.WithPrefix(), clientv3.WithCreatedNotify()) {
		if r.Created && r.Err() == nil {
			stood = true
			notify(wake)
		}
		if r.Err() != nil {
			return stood
		}
		for _, ev := range r.Events {
			if hasAnyPrefix(string(ev.Kv.Key), prefixes) {
				notify(wake)
				break
			}
		}
	}
	return stood
}

func hasAnyPrefix(key string, prefixes []string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(key, p) })
}

func notify(wake chan<- struct{}) {
	select {
	case wake <- struct{}{}:
	default:
	}
}
