package iscsi

import (
	"bufio"
	"crypto/md5"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
)

// A fakeTarget is the login of a target, and silence after it. It is written from the other side of RFC 7143 than the
// package is, and shares no code with it but the names of the constants.
type fakeTarget struct {
	t         *testing.T
	algorithm string // of CHAP; "" for the first that is offered
	secret    string // of the initiator; "" asks for no proof
	mutual    string // secret that the target proves itself with
	status    [2]byte
	address   string // where it sends its initiators; "" keeps them
	noDigests bool
	silent    bool // it takes requests and does not answer
	pieces    bool // it answers in PDUs of 7 bytes
	later     bool // it agrees to the next stage only when it is asked a second time

	listener net.Listener
	wg       sync.WaitGroup
	mu       sync.Mutex
	conns    []net.Conn
	logins   []header // first request of each login
	logouts  int
	ready    chan struct{} // gets one for each login that came to its end
}

// start listens on addr, "127.0.0.1:0" for any port.
func (f *fakeTarget) start(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	f.t = t
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	f.listener = l
	if f.ready == nil {
		f.ready = make(chan struct{}, 1000)
	}
	f.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			f.mu.Lock()
			f.conns = append(f.conns, c)
			f.mu.Unlock()
			f.wg.Go(func() { f.serve(c) })
		}
	})
	t.Cleanup(f.kill)
	return netip.MustParseAddrPort(l.Addr().String())
}

// kill ends the target with all of its connections.
func (f *fakeTarget) kill() {
	f.listener.Close()
	f.mu.Lock()
	for _, c := range f.conns {
		c.Close()
	}
	f.conns = nil
	f.mu.Unlock()
	f.wg.Wait()
}

// say sends an Asynchronous Message on each connection.
func (f *fakeTarget) say(event byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.conns {
		var h header
		h[0], h[1], h[36] = 0x32, 0x80, event
		copy(h[16:], "\xff\xff\xff\xff")
		_, _ = c.Write(h[:]) // one that has ended meanwhile
	}
}

func (f *fakeTarget) seen() []header {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.logins)
}

func readPDU(r io.Reader) (h header, data []byte, err error) {
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return h, nil, err
	}
	n := int(binary.BigEndian.Uint32(h[4:]) & 0xffffff)
	data = make([]byte, (n+3)&^3)
	_, err = io.ReadFull(r, data)
	return h, data[:n], err
}

func writePDU(w io.Writer, h header, data []byte) error {
	binary.BigEndian.PutUint32(h[4:], uint32(len(data)))
	b := append(append([]byte(nil), h[:]...), data...)
	_, err := w.Write(append(b, make([]byte, -len(b)&3)...))
	return err
}

// answerTo is the header of a login response.
func answerTo(req header, transit bool, statSN uint32) header {
	var h header
	h[0], h[1] = 0x23, req[1]&0x0c
	if transit {
		h[1] = req[1] &^ 0x40
	}
	copy(h[8:20], req[8:20])
	if transit && req[1]&3 == 3 {
		h[15] = 7 // TSIH
	}
	binary.BigEndian.PutUint32(h[24:], statSN)
	binary.BigEndian.PutUint32(h[28:], binary.BigEndian.Uint32(req[24:]))
	binary.BigEndian.PutUint32(h[32:], binary.BigEndian.Uint32(req[24:])+31)
	return h
}

// serve is one connection. A peer that is gone, or said what it may not, ends it.
func (f *fakeTarget) serve(c net.Conn) {
	defer c.Close()
	r := bufio.NewReader(c)
	var id, challenge string
	asked := false
	for turn := uint32(0); ; turn++ {
		req, data, err := readPDU(r)
		if err != nil {
			return
		}
		if req[0]&0x3f == 6 {
			f.mu.Lock()
			f.logouts++
			f.mu.Unlock()
			h := header{0: 0x26, 1: 0x80}
			copy(h[16:20], req[16:20])
			_ = writePDU(c, h, nil)
			return
		}
		if turn == 0 {
			f.mu.Lock()
			f.logins = append(f.logins, req)
			f.mu.Unlock()
		}
		if f.silent {
			continue
		}
		keys := map[string]string{}
		for kv := range strings.SplitSeq(string(data), "\x00") {
			if k, v, ok := strings.Cut(kv, "="); ok {
				keys[k] = v
			}
		}
		if f.address != "" || f.status != [2]byte{} {
			h := answerTo(req, false, turn)
			h[36], h[37] = f.status[0], f.status[1]
			_ = writePDU(c, h, []byte("TargetAddress="+f.address+"\x00"))
			return
		}
		out, transit := "", req[1]&0x80 != 0
		switch {
		case keys["AuthMethod"] != "":
			out = "TargetPortalGroupTag=1\x00AuthMethod=" + map[bool]string{true: "None", false: "CHAP"}[f.secret == ""] + "\x00"
		case keys["CHAP_A"] != "":
			if f.algorithm == "" {
				f.algorithm, _, _ = strings.Cut(keys["CHAP_A"], ",")
			}
			id, challenge = "200", "00112233445566778899aabbccddeeff"
			out = "CHAP_A=" + f.algorithm + "\x00CHAP_I=" + id + "\x00CHAP_C=0x" + challenge + "\x00"
		case keys["CHAP_R"] != "":
			if keys["CHAP_N"] != "n1" || keys["CHAP_R"] != "0x"+f.proof(200, f.secret, challenge) {
				h := answerTo(req, false, turn)
				h[36], h[37] = 2, 1
				_ = writePDU(c, h, nil)
				return
			}
			if keys["CHAP_C"] != "" {
				var n byte
				fmt.Sscan(keys["CHAP_I"], &n)
				out = "CHAP_N=troupe\x00CHAP_R=0x" + f.proof(n, f.mutual, keys["CHAP_C"][2:]) + "\x00"
			}
		case keys["MaxBurstLength"] != "":
			out = "HeaderDigest=CRC32C\x00DataDigest=CRC32C\x00MaxRecvDataSegmentLength=131072\x00InitialR2T=No\x00ImmediateData=Yes\x00" +
				"MaxBurstLength=524288\x00FirstBurstLength=65536\x00MaxOutstandingR2T=1\x00ErrorRecoveryLevel=0\x00TargetAlias=a\x00X-own=1\x00"
			if f.noDigests {
				out = strings.ReplaceAll(out, "CRC32C", "None")
			}
		}
		if f.later && transit && !asked {
			asked, transit = true, false
		}
		if !f.respond(c, r, req, transit, turn, out) {
			return
		}
		if transit {
			asked = false
		}
		if transit && req[1]&3 == 3 {
			f.ready <- struct{}{}
		}
	}
}

// respond sends out, in pieces where that is asked for.
func (f *fakeTarget) respond(c net.Conn, r io.Reader, req header, transit bool, turn uint32, out string) bool {
	for f.pieces && len(out) > 7 {
		h := answerTo(req, false, turn)
		h[1] |= 0x40
		if writePDU(c, h, []byte(out[:7])) != nil {
			return false
		}
		more, data, err := readPDU(r)
		if err != nil || len(data) > 0 || more[1]&0xc0 != 0 {
			return false
		}
		out = out[7:]
	}
	return writePDU(c, answerTo(req, transit, turn), []byte(out)) == nil
}

func (f *fakeTarget) proof(id byte, secret, challenge string) string {
	raw, err := hex.DecodeString(challenge)
	if err != nil {
		return ""
	}
	b := append(append([]byte{id}, secret...), raw...)
	if f.algorithm == "7" {
		sum := sha256.Sum256(b)
		return hex.EncodeToString(sum[:])
	}
	sum := md5.Sum(b)
	return hex.EncodeToString(sum[:])
}
