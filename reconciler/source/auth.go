package source

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/go-git/go-git/v5/plumbing/transport"
	githttp "github.com/go-git/go-git/v5/plumbing/transport/http"
	gitssh "github.com/go-git/go-git/v5/plumbing/transport/ssh"
	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
)

// httpAuth gives the credentials of the URL, else those of the file; nil where there are none.
func httpAuth(cfg Config, ep *transport.Endpoint) (*githttp.BasicAuth, error) {
	if ep.Password != "" || ep.User != "" && cfg.Credentials == "" {
		return &githttp.BasicAuth{Username: ep.User, Password: ep.Password}, nil
	}
	if cfg.Credentials == "" {
		return nil, nil
	}
	f, err := os.Open(cfg.Credentials)
	if err != nil {
		return nil, fmt.Errorf("opening the file of credentials: %w", err)
	}
	defer f.Close()
	auth, err := findCredentials(io.LimitReader(f, 1<<20), ep)
	if err != nil {
		return nil, fmt.Errorf("reading credentials from %q: %w", cfg.Credentials, err)
	}
	return auth, nil
}

// findCredentials takes the first line that fits ep, as git-credential-store(1) does: same scheme, host and port; same
// user where ep has one, same path where the line has one. Lines that are no URL are skipped.
func findCredentials(r io.Reader, ep *transport.Endpoint) (*githttp.BasicAuth, error) {
	host := ep.Host
	if ep.Port != 0 {
		host += ":" + strconv.Itoa(ep.Port)
	}
	sc := bufio.NewScanner(r)
	for sc.Scan() {
		u, err := url.Parse(strings.TrimSpace(sc.Text()))
		if err != nil || u.Scheme != ep.Protocol || !strings.EqualFold(u.Host, host) {
			continue
		}
		if ep.User != "" && ep.User != u.User.Username() {
			continue
		}
		if p := strings.Trim(u.Path, "/"); p != "" && p != strings.Trim(ep.Path, "/") {
			continue
		}
		if pw, ok := u.User.Password(); ok {
			return &githttp.BasicAuth{Username: u.User.Username(), Password: pw}, nil
		}
	}
	return nil, sc.Err()
}

// httpTransport trusts the system's authorities and those of caFile.
func httpTransport(caFile string) (*http.Transport, error) {
	tr := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:   30 * time.Second,
		ResponseHeaderTimeout: 2 * time.Minute,
		ForceAttemptHTTP2:     true,
	}
	if caFile == "" {
		return tr, nil
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("reading certificate authorities: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("reading the system's certificate authorities: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("reading certificate authorities: %q has none", caFile)
	}
	tr.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	return tr, nil
}

// sshConfig gathers keys and known hosts afresh for each connection, so that a key that was replaced is used. The caller
// calls release when the handshake is over.
func sshConfig(ctx context.Context, cfg Config, ep *transport.Endpoint, addr string) (config *ssh.ClientConfig, release func(), err error) {
	var files []string
	if cfg.KnownHosts != "" {
		files = []string{cfg.KnownHosts}
	}
	db, err := gitssh.NewKnownHostsDb(files...)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: reading known hosts: %w", ErrAuth, err)
	}
	user := ep.User
	if user == "" {
		user = gitssh.DefaultUsername
	}
	config = &ssh.ClientConfig{
		User:              user,
		HostKeyAlgorithms: db.HostKeyAlgorithms(addr),
		HostKeyCallback: func(host string, remote net.Addr, key ssh.PublicKey) error {
			if err := db.HostKeyCallback()(host, remote, key); err != nil {
				return fmt.Errorf("%w: host key of %s, %s: %w", ErrAuth, host, ssh.FingerprintSHA256(key), err)
			}
			return nil
		},
	}
	if ep.Password != "" {
		config.Auth = append(config.Auth, ssh.Password(ep.Password))
	}
	keys, release, err := sshKeys(ctx, cfg.SSHKey)
	if err != nil {
		return nil, nil, err
	}
	if len(keys) > 0 {
		config.Auth = append(config.Auth, ssh.PublicKeys(keys...))
	}
	return config, release, nil
}

// sshKeys gives the key of the file, or else all that the agent and the default files have.
func sshKeys(ctx context.Context, file string) (keys []ssh.Signer, release func(), err error) {
	release = func() {}
	if file != "" {
		key, err := readKey(file)
		if err != nil {
			return nil, nil, fmt.Errorf("%w: reading SSH key %q: %w", ErrAuth, file, err)
		}
		return []ssh.Signer{key}, release, nil
	}
	if sock := os.Getenv("SSH_AUTH_SOCK"); sock != "" {
		// An agent that is gone is no error: there are the files.
		if conn, err := (&net.Dialer{}).DialContext(ctx, "unix", sock); err == nil {
			release = func() { _ = conn.Close() }
			if keys, err = agent.NewClient(conn).Signers(); err != nil {
				keys = nil
			}
		}
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return keys, release, nil //nolint:nilerr // a service may have no home: then there are no default files
	}
	for _, name := range []string{"id_ed25519", "id_ecdsa", "id_rsa"} {
		// A key that has a passphrase cannot be used without a person; the agent may have it.
		if key, err := readKey(filepath.Join(home, ".ssh", name)); err == nil {
			keys = append(keys, key)
		}
	}
	return keys, release, nil
}

func readKey(file string) (ssh.Signer, error) {
	b, err := readSmall(file)
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(b)
	var locked *ssh.PassphraseMissingError
	if errors.As(err, &locked) {
		return nil, errors.New("it has a passphrase: use an agent")
	}
	return key, err
}
