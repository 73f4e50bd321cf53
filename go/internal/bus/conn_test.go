package bus_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base32"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

func refused(ctx context.Context, t *testing.T, cfg config.NATS) error {
	t.Helper()
	c, err := bus.Connect(ctx, cfg, bus.Options{Name: "test"}, quiet())
	if err == nil {
		c.Close()
		t.Fatal("connected")
	}
	return err
}

// A connection that cannot be made says why and where to look, and names no secret.
func TestConnectFails(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, `authorization { user: tracer, password: right-secret }`)
	dir := t.TempDir()
	embeddedAt := func(listen string) config.NATS {
		return config.NATS{Embedded: config.Embedded{Listen: listen, Dir: dir}}
	}
	password := func(text string, mode os.FileMode) {
		path := bus.PasswordFile(dir)
		os.Remove(path)
		check(t, os.WriteFile(path, []byte(text), mode))
		check(t, os.Chmod(path, mode))
	}
	const good = "abcdefghijklmnopqrstuvwxyzABCDEF0123456789_-"

	err := refused(ctx, t, config.NATS{URL: d.url(), User: "tracer", PasswordFile: secret(t, "wrong-secret")})
	wantError(t, err, d.listen, "Authorization Violation", `user "tracer"`, "nats.password_file")
	if strings.Contains(err.Error(), "secret") && !strings.Contains(err.Error(), "/secret") {
		t.Errorf("the error %q tells the password", err)
	}
	wantError(t, refused(ctx, t, d.owner()), "Authorization Violation", "nats.creds_file")
	wantError(t, refused(ctx, t, config.NATS{URL: d.url(), User: "tracer", PasswordFile: secret(t, "\n")}), "nats.password_file", "is empty")
	err = refused(ctx, t, config.NATS{URL: d.url(), User: "tracer", PasswordFile: "/nowhere/password"})
	wantError(t, err, "nats.password_file", "/nowhere/password")
	wantError(t, refused(ctx, t, config.NATS{URL: d.url(), TokenFile: secret(t, "\n")}), "nats.token_file", "is empty")
	wantError(t, refused(ctx, t, config.NATS{URL: d.url(), TokenFile: "/nowhere/token"}), "nats.token_file", "/nowhere/token")
	token := secret(t, "hidden-token")
	err = refused(ctx, t, config.NATS{URL: d.url(), TokenFile: token})
	wantError(t, err, "Authorization Violation", "token in "+token, "oom-auth")
	if strings.Contains(err.Error(), "hidden") {
		t.Errorf("the error %q tells the token", err)
	}
	wantError(t, refused(ctx, t, config.NATS{URL: d.url(), CredsFile: "/nowhere/creds"}), "nats.creds_file", "/nowhere/creds")
	wantError(t, refused(ctx, t, config.NATS{URL: d.url(), NKeyFile: secret(t, "no seed")}), "nats.nkey_file")
	wantError(t, refused(ctx, t, config.NATS{URL: d.url(), TLS: config.TLS{CAFile: secret(t, "no certificate")}}), "parse root certificate")
	addr := freePort(t)
	wantError(t, refused(ctx, t, config.NATS{URL: "nats://" + addr}), addr, "nobody listens")

	// The embedded server of another process.
	err = refused(ctx, t, embeddedAt(addr))
	wantError(t, err, bus.PasswordFile(dir), "is oom-tracer running")
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v does not wrap ErrNotExist", err)
	}
	password(good, 0o600)
	wantError(t, refused(ctx, t, embeddedAt(addr)), addr, "is oom-tracer running")
	wantError(t, refused(ctx, t, embeddedAt("127.0.0.1:0")), bus.AddressFile(dir))
	wantError(t, refused(ctx, t, embeddedAt(d.listen)), "Authorization Violation", bus.PasswordFile(dir))
	for _, mode := range []os.FileMode{0o644, 0o640, 0o604, 0o666} {
		password(good, mode)
		wantError(t, refused(ctx, t, embeddedAt(addr)), bus.PasswordFile(dir), fmt.Sprintf("mode %04o", mode))
	}
	for text, word := range map[string]string{"": "is empty", "\n": "is empty", "short": "generated", good + "\x00": "generated", good + "\n\n": "generated", strings.Repeat("x", 5000): "4096"} {
		password(text, 0o600)
		wantError(t, refused(ctx, t, embeddedAt(addr)), bus.PasswordFile(dir), word)
	}
	check(t, os.Remove(bus.PasswordFile(dir)))
	check(t, os.Symlink(secret(t, good), bus.PasswordFile(dir)))
	wantError(t, refused(ctx, t, embeddedAt(addr)), bus.PasswordFile(dir), "regular file")

	// A server that takes connections and says nothing.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	defer l.Close()
	short, cancel := context.WithTimeout(ctx, 100*time.Millisecond)
	defer cancel()
	err = refused(short, t, config.NATS{URL: "nats://" + l.Addr().String()})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v is not the context's", err)
	}
	l.Close()
}

// Secrets are read again at each connection, in both modes.
func TestConnectSecretsChange(t *testing.T) {
	oomtest.Slow(t)
	ctx := begin(t)
	d := startNatsd(t, `authorization { user: tracer, password: first }`)
	log, logged := newLog(t)
	cfg := config.NATS{URL: d.url(), User: "tracer", PasswordFile: secret(t, "first")}
	c := connect(ctx, t, cfg, bus.Options{Background: true}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	rec := newRecorder()
	p, _ := publisher(t, c, 10, rec.hooks(), log)

	d.kill()
	d.conf = strings.Replace(d.conf, "first", "second", 1)
	d.start()
	enqueue(t, p, 0, 5)
	refusals := func(c *bus.Conn, logged *oomtest.Output) {
		t.Helper()
		// nats.go gives up after the second one, unless told otherwise. Neither it nor the log announces them.
		for c.NATS().Stats().Reconnects < 3 || !strings.Contains(logged.String(), "Authorization Violation") {
			if ctx.Err() != nil {
				t.Fatal("the refusals did not come or were not logged")
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	refusals(c, logged)
	check(t, os.WriteFile(cfg.PasswordFile, []byte("second"), 0o600))
	rec.waitAcks(ctx, t, 5)
	if n := strings.Count(logged.String(), "disconnected from nats"); n != 1 {
		t.Errorf("the end of the connection was logged %d times", n)
	}
	if n := strings.Count(logged.String(), "level=INFO msg=\"connected to nats\""); n != 2 {
		t.Errorf("two connections were logged %d times", n)
	}
	wantOnce(t, stored(ctx, t, cfg), 5)

	// The wrong password from the start, in the background: said, and mended later.
	late := cfg
	late.PasswordFile = secret(t, "wrong")
	log2, logged2 := newLog(t)
	c2 := connect(ctx, t, late, bus.Options{Name: "late", Background: true}, log2)
	refusals(c2, logged2)
	check(t, os.WriteFile(late.PasswordFile, []byte("second\n"), 0o600))
	check(t, bus.EnsureStreams(ctx, c2, streamConfig))
	if n := strings.Count(logged2.String(), "level=WARN"); n > 2 {
		t.Errorf("%d warnings", n)
	}
}

// nkeyPair makes a seed file and the public key that belongs to it (github.com/nats-io/nkeys, strkey.go).
func nkeyPair(t *testing.T) (file, public string) {
	t.Helper()
	pub, priv, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	encode := func(raw []byte) string {
		crc := uint16(0)
		for _, b := range raw {
			crc ^= uint16(b) << 8
			for range 8 {
				if crc&0x8000 != 0 {
					crc = crc<<1 ^ 0x1021
				} else {
					crc <<= 1
				}
			}
		}
		return base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(append(raw, byte(crc), byte(crc>>8)))
	}
	const seed, user = 18 << 3, 20 << 3
	return secret(t, encode(append([]byte{seed | user>>5, user & 31 << 3}, priv.Seed()...))), encode(append([]byte{user}, pub...))
}

func TestConnectNKey(t *testing.T) {
	ctx := begin(t)
	file, public := nkeyPair(t)
	other, _ := nkeyPair(t)
	d := startNatsd(t, fmt.Sprintf(`authorization { users: [ { nkey: %s } ] }`, public))
	c := connect(ctx, t, config.NATS{URL: d.url(), NKeyFile: file}, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	wantError(t, refused(ctx, t, config.NATS{URL: d.url(), NKeyFile: other}), "Authorization Violation")
}

// authority is a throw-away CA.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	file string
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.cert, a.key, a.file, _ = a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return a
}

func (a *authority) issue(template *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey, string, string) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	check(a.t, err)
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	check(a.t, err)
	cert, err := x509.ParseCertificate(der)
	check(a.t, err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	check(a.t, err)
	dir := a.t.TempDir()
	certFile, keyFile := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	check(a.t, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600))
	check(a.t, os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
	return cert, key, certFile, keyFile
}

func (a *authority) leaf(usage x509.ExtKeyUsage) (cert, key string) {
	a.t.Helper()
	_, _, cert, key = a.issue(&x509.Certificate{
		Subject: pkix.Name{CommonName: "leaf"}, ExtKeyUsage: []x509.ExtKeyUsage{usage}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
	return cert, key
}

func TestConnectTLS(t *testing.T) {
	ctx := begin(t)
	ca, stranger := newAuthority(t), newAuthority(t)
	cert, key := ca.leaf(x509.ExtKeyUsageServerAuth)
	d := startNatsd(t, fmt.Sprintf(`tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }`, cert, key, ca.file))
	clientCert, clientKey := ca.leaf(x509.ExtKeyUsageClientAuth)
	url := "tls://" + d.listen

	good := config.NATS{URL: url, TLS: config.TLS{CAFile: ca.file, CertFile: clientCert, KeyFile: clientKey}}
	c := connect(ctx, t, good, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	state, err := c.NATS().TLSConnectionState()
	check(t, err)
	if state.Version < tls.VersionTLS12 || !state.HandshakeComplete {
		t.Errorf("TLS version %x, complete: %t", state.Version, state.HandshakeComplete)
	}

	wrongCA := good
	wrongCA.TLS.CAFile = stranger.file
	err = refused(ctx, t, wrongCA)
	wantError(t, err, d.listen, "certificate signed by unknown authority", "check nats.tls")
	if !errors.Is(err, nats.ErrTLS) {
		t.Errorf("%v is no TLS error", err)
	}
	noCert := good
	noCert.TLS.CertFile, noCert.TLS.KeyFile = "", ""
	wantError(t, refused(ctx, t, noCert), d.listen, "certificate")
	halfCert := good
	halfCert.TLS.KeyFile = "/nowhere/key"
	wantError(t, refused(ctx, t, halfCert), "/nowhere/key")

	plain := startNatsd(t, "")
	wantError(t, refused(ctx, t, config.NATS{URL: plain.url(), TLS: config.TLS{CAFile: ca.file}}), "does not offer it")

	// In the background the wrong CA is named too.
	log, logged := newLog(t)
	connect(ctx, t, wrongCA, bus.Options{Name: "background", Background: true}, log)
	for !strings.Contains(logged.String(), "unknown authority") {
		if ctx.Err() != nil {
			t.Fatal("the refusal was not logged")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Closing is quick in every state, and silent.
func TestClose(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, logged := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	away := connect(ctx, t, config.NATS{URL: "nats://" + freePort(t)}, bus.Options{Background: true}, quiet())
	start := time.Now()
	for range 2 {
		c.Close()
		away.Close()
	}
	if took := time.Since(start); took >= timeout {
		t.Errorf("closing took %s", took)
	}
	select {
	case <-c.Closed():
	default:
		t.Error("not closed")
	}
	if c.Connected() {
		t.Error("still connected")
	}
	if strings.Contains(logged.String(), "WARN") || strings.Contains(logged.String(), "ERROR") {
		t.Errorf("closing is not silent: %s", logged)
	}
	if err := bus.EnsureStreams(ctx, c, streamConfig); !errors.Is(err, bus.ErrClosed) {
		t.Errorf("ensure stream: %v", err)
	}
	if err := bus.Tail(ctx, away, bus.TailOptions{Follow: true}, nil); !errors.Is(err, bus.ErrClosed) {
		t.Errorf("tail: %v", err)
	}
}

func TestInboxPrefix(t *testing.T) {
	for name, want := range map[string]string{
		"oom-tracer-node-1":       "_INBOX_oom-tracer-node-1",
		"oom-tracer.a_b_internal": "_INBOX_oom-tracer.a_b_internal",
		"x >*é":                   "_INBOX_x____",
	} {
		if got := bus.InboxPrefix(name); got != want {
			t.Errorf("InboxPrefix(%q) is %s, want %s", name, got, want)
		}
	}
}
