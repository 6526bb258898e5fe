package source

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/cgi"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"
)

const (
	testUser     = "deploy"
	testPassword = "s3cret/with@signs"
)

// backend serves the repositories below root as Git's own server does.
func backend(root string) http.Handler {
	return &cgi.Handler{
		Path:   "/usr/lib/git-core/git-http-backend",
		Stderr: io.Discard, // what it says there, the client hears as well
		Env:    []string{"GIT_PROJECT_ROOT=" + root, "GIT_HTTP_EXPORT_ALL=1", "GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*"},
	}
}

// private lets in who knows the password.
func private(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if u, p, _ := r.BasicAuth(); u != testUser || p != testPassword {
			w.Header().Set("WWW-Authenticate", `Basic realm="git"`)
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// follows checks that a change of the repository arrives, and an unchanged one costs nothing.
func follows(t *testing.T, work *gitRepo, cfg Config) *Repo {
	t.Helper()
	r := open(t, cfg)
	want(t, fetch(t, r), work.git("rev-parse", "origin/main"), "fleet.cue", "one")
	packs := func() int {
		all, _ := filepath.Glob(filepath.Join(r.mirror.dir, "objects", "pack", "*.pack"))
		return len(all)
	}
	if n := packs(); n != 1 {
		t.Errorf("%d packs after the first fetch", n)
	}
	fetch(t, r)
	next := work.commit("fleet.cue", "two")
	work.git("push", "-q")
	want(t, fetch(t, r), next, "fleet.cue", "two")
	if n := packs(); n != 2 {
		t.Errorf("%d packs after the second commit", n)
	}
	work.git("commit", "-q", "--amend", "-m", "forced")
	work.git("push", "-q", "-f")
	if !fetch(t, r).Rewritten {
		t.Error("a force-push is not seen")
	}
	work.git("push", "-q", "origin", ":main")
	if _, err := r.Fetch(t.Context()); !errors.Is(err, ErrNoBranch) {
		t.Errorf("got %v, want ErrNoBranch", err)
	}
	work.git("push", "-q", "origin", "main")
	if fetch(t, r).Rewritten {
		t.Error("a branch that came back is rewritten")
	}
	return r
}

// served is a repository with one commit in a bare repository called fleet.git, and the directory that this lies in.
func served(t *testing.T) (*gitRepo, string) {
	t.Helper()
	work := newGitRepo(t)
	work.commit("fleet.cue", "one")
	bare := work.bare()
	runGit(t, bare, "config", "receive.denyDeleteCurrent", "ignore")
	return work, filepath.Dir(bare)
}

func TestHTTP(t *testing.T) {
	work, root := served(t)
	srv := httptest.NewServer(backend(root))
	defer srv.Close()
	follows(t, work, Config{Repo: srv.URL + "/fleet.git"})
	if _, err := open(t, Config{Repo: srv.URL + "/other.git"}).Fetch(t.Context()); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v, want ErrUnreachable", err)
	}
}

func TestHTTPSWithCredentials(t *testing.T) {
	work, root := served(t)
	srv := httptest.NewTLSServer(private(backend(root)))
	defer srv.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(srv.URL + "/fleet.git")
	if err != nil {
		t.Fatal(err)
	}
	plain := u.String()
	u.User = url.UserPassword(testUser, testPassword)
	r := follows(t, work, Config{Repo: u.String(), CAFile: ca})
	if r.Repo() != plain {
		t.Errorf("got %q, want %q", r.Repo(), plain)
	}
	noSecretOnDisk(t, r.mirror.dir)

	u.Path = ""
	store := filepath.Join(t.TempDir(), "credentials")
	if err := os.WriteFile(store, []byte("https://x:y@example.com\n# no URL\n"+u.String()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	fetch(t, open(t, Config{Repo: plain, CAFile: ca, Credentials: store}))

	u.Path, u.User = "/fleet.git", url.UserPassword(testUser, "wr0ng-s3cret")
	for name, cfg := range map[string]Config{
		"wrong password": {Repo: u.String(), CAFile: ca},
		"no password":    {Repo: plain, CAFile: ca},
	} {
		_, err := open(t, cfg).Fetch(t.Context())
		if !errors.Is(err, ErrAuth) || strings.Contains(err.Error(), "s3cret") {
			t.Errorf("%s: got %v, want ErrAuth without secrets", name, err)
		}
	}
	if _, err := open(t, Config{Repo: u.String()}).Fetch(t.Context()); !errors.Is(err, ErrUnreachable) || strings.Contains(err.Error(), "s3cret") {
		t.Errorf("unknown authority: got %v", err)
	}
}

func noSecretOnDisk(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(p string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		b, err := os.ReadFile(p)
		if strings.Contains(string(b), "s3cret") {
			t.Errorf("%s holds the password", p)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// An sshServer runs git-upload-pack for who has its client key.
type sshServer struct {
	addr   string
	config *ssh.ServerConfig
	wait   sync.WaitGroup
	l      net.Listener
}

func newKey(t *testing.T) (ssh.Signer, []byte) {
	t.Helper()
	_, priv, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewSignerFromKey(priv)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(priv, "")
	if err != nil {
		t.Fatal(err)
	}
	return key, pem.EncodeToMemory(block)
}

// startSSH returns the server, and the files of a key that it knows and of known hosts that it is in.
func startSSH(t *testing.T) (srv *sshServer, keyFile, hostsFile string) {
	t.Helper()
	hostKey, _ := newKey(t)
	clientKey, clientPEM := newKey(t)
	srv = &sshServer{config: &ssh.ServerConfig{
		PublicKeyCallback: func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if string(key.Marshal()) != string(clientKey.PublicKey().Marshal()) {
				return nil, errors.New("not you")
			}
			return nil, nil
		},
	}}
	srv.config.AddHostKey(hostKey)
	var err error
	if srv.l, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	srv.addr = srv.l.Addr().String()
	srv.wait.Go(srv.accept)
	t.Cleanup(func() {
		_ = srv.l.Close()
		srv.wait.Wait()
	})
	dir := t.TempDir()
	keyFile, hostsFile = filepath.Join(dir, "key"), filepath.Join(dir, "known_hosts")
	line := knownhosts.Line([]string{knownhosts.Normalize(srv.addr)}, hostKey.PublicKey()) + "\n"
	if err := errors.Join(os.WriteFile(keyFile, clientPEM, 0o600), os.WriteFile(hostsFile, []byte(line), 0o600)); err != nil {
		t.Fatal(err)
	}
	return srv, keyFile, hostsFile
}

func (s *sshServer) accept() {
	for {
		c, err := s.l.Accept()
		if err != nil {
			return
		}
		s.wait.Go(func() { s.serve(c) })
	}
}

func (s *sshServer) serve(c net.Conn) {
	defer c.Close()
	conn, chans, reqs, err := ssh.NewServerConn(c, s.config)
	if err != nil {
		return
	}
	defer conn.Close()
	s.wait.Go(func() { ssh.DiscardRequests(reqs) })
	for nc := range chans {
		ch, reqs, err := nc.Accept()
		if err != nil {
			return
		}
		for req := range reqs {
			if req.Type != "exec" {
				continue
			}
			_ = req.Reply(true, nil)
			cmd := exec.Command("sh", "-c", string(req.Payload[4:]))
			cmd.Env = append(os.Environ(), "GIT_CONFIG_COUNT=1", "GIT_CONFIG_KEY_0=safe.directory", "GIT_CONFIG_VALUE_0=*")
			in, err := cmd.StdinPipe()
			if err != nil {
				return
			}
			cmd.Stdout, cmd.Stderr = ch, ch.Stderr()
			s.wait.Go(func() { _, _ = io.Copy(in, ch); _ = in.Close() })
			status := struct{ Status uint32 }{}
			if cmd.Run() != nil {
				status.Status = 1
			}
			_, _ = ch.SendRequest("exit-status", false, ssh.Marshal(status))
			_ = ch.Close()
		}
	}
}

func TestSSH(t *testing.T) {
	t.Setenv("HOME", t.TempDir()) // no keys, no known hosts
	work, root := served(t)
	srv, key, hosts := startSSH(t)
	repo := "ssh://git@" + srv.addr + root + "/fleet.git"
	follows(t, work, Config{Repo: repo, SSHKey: key, KnownHosts: hosts})

	_, err := open(t, Config{Repo: "ssh://" + srv.addr + root + "/it's not there", SSHKey: key, KnownHosts: hosts}).Fetch(t.Context())
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), "does not appear to be a git repository") {
		t.Errorf("no repository: got %v", err)
	}
	_, other := newKey(t)
	strange := filepath.Join(t.TempDir(), "key")
	empty := filepath.Join(t.TempDir(), "known_hosts")
	if err := errors.Join(os.WriteFile(strange, other, 0o600), os.WriteFile(empty, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, cfg := range map[string]Config{
		"wrong key":           {Repo: repo, SSHKey: strange, KnownHosts: hosts},
		"no key":              {Repo: repo, KnownHosts: hosts},
		"unknown host":        {Repo: repo, SSHKey: key, KnownHosts: empty},
		"no known hosts file": {Repo: repo, SSHKey: key},
	} {
		if _, err := open(t, cfg).Fetch(t.Context()); !errors.Is(err, ErrAuth) {
			t.Errorf("%s: got %v, want ErrAuth", name, err)
		}
	}
}

// The keys of who runs the server are found where ssh(1) finds them.
func TestSSHDefaultFiles(t *testing.T) {
	home := t.TempDir()
	t.Setenv("HOME", home)
	_, root := served(t)
	srv, key, hosts := startSSH(t)
	if err := os.Mkdir(filepath.Join(home, ".ssh"), 0o700); err != nil {
		t.Fatal(err)
	}
	err := errors.Join(os.Rename(key, filepath.Join(home, ".ssh", "id_ed25519")), os.Rename(hosts, filepath.Join(home, ".ssh", "known_hosts")))
	if err != nil {
		t.Fatal(err)
	}
	fetch(t, open(t, Config{Repo: "ssh://git@" + srv.addr + root + "/fleet.git"}))
}

// A host that accepts and says nothing is let go when the context ends.
func TestSilentRemote(t *testing.T) {
	_, key, hosts := startSSH(t)
	for _, scheme := range []string{"ssh", "http"} {
		t.Run(scheme, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			ctx, cancel := context.WithCancel(t.Context())
			var wait sync.WaitGroup
			defer wait.Wait()
			wait.Go(func() {
				c, err := l.Accept()
				if err != nil {
					return
				}
				cancel() // the client has connected, and waits
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			})
			r := open(t, Config{Repo: scheme + "://" + l.Addr().String() + "/fleet.git", SSHKey: key, KnownHosts: hosts})
			if _, err := r.Fetch(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v, want context.Canceled", err)
			}
			_ = l.Close()
		})
	}
}

// What a remote says is hostile: names that would break out of the mirror's list, and packs that break off.
func TestHostileRemote(t *testing.T) {
	work, root := served(t)
	good := backend(root)
	cut := make(chan int, 100)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasSuffix(r.URL.Path, "git-upload-pack") {
			good.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		good.ServeHTTP(rec, r)
		b := rec.Body.Bytes()
		select {
		case n := <-cut:
			b = b[:min(n, len(b))]
		default:
		}
		w.Header().Set("Content-Type", "application/x-git-upload-pack-result")
		_, _ = w.Write(b)
	}))
	defer srv.Close()
	r := open(t, Config{Repo: srv.URL + "/fleet.git"})
	for _, n := range []int{0, 8, 30, 60, 100, 150} {
		for range wireTries {
			cut <- n
		}
		if _, err := r.Fetch(t.Context()); !errors.Is(err, ErrUnreachable) {
			t.Fatalf("cut at %d: got %v, want ErrUnreachable", n, err)
		}
		if left, _ := filepath.Glob(filepath.Join(r.mirror.dir, "objects", "pack", "*")); len(left) != 0 {
			t.Fatalf("cut at %d: left %q", n, left)
		}
	}
	cut <- 100 // the second try brings it
	want(t, fetch(t, r), work.git("rev-parse", "HEAD"), "fleet.cue", "one")
}
