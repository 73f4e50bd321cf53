package deploy

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	appsv1 "k8s.io/api/apps/v1"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

func (s *servers) as(who string) *client {
	s.t.Helper()
	return s.connect("oom-"+who, nats.UserInfo("oom-"+who, s.passwords[who]))
}

// owner is the owner of the streams, whose inbox is that of oom-tap.
func (s *servers) owner() *client {
	s.t.Helper()
	return s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
}

// command runs the nats command as install.md says.
func (s *servers) command(args ...string) error {
	s.t.Helper()
	cmd := exec.Command(oomtest.Program(s.t, "nats"), append(args, "--server", strings.Join(s.urls, ","), "--inbox-prefix", "_INBOX_oom-tap", "--no-progress")...)
	cmd.Env = []string{"HOME=" + s.t.TempDir(), "NATS_USER=oom-owner", "NATS_PASSWORD=" + s.passwords["owner"]}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("nats %q: %w: %s", args, err, out)
	}
	return nil
}

// streamNames are what there is to back up.
var streamNames = []string{"OOM", "OOM_NODES", "KV_OOM_ANNOTATOR"}

// TestOtherServers: from one server to three by the way of install.md: the record of before is there, in order, with a replica on each
// server; what comes after follows it.
func TestOtherServers(t *testing.T) {
	one := startServers(t, "--set", "nats.replicas=1,nats.tracers=shared")
	tracer := one.as("tracer")
	for i := range 3 {
		tracer.stores(fmt.Sprintf("oom.v1.kill.global.node-%d", i))
	}
	tracer.stores("oom.v1.node.status.node-1")
	operator := one.connect("oom-tap", nats.UserInfo("oom-operator", one.passwords["operator"]))
	if err := operator.nc.Publish("$KV.OOM_ANNOTATOR.state", []byte(`{"paused": true}`)); err != nil {
		t.Fatal(err)
	}
	if err := operator.nc.Flush(); err != nil {
		t.Fatal(err)
	}
	backup := t.TempDir()
	for _, name := range streamNames {
		if err := one.command("backup", "stream", name, filepath.Join(backup, name)); err != nil {
			t.Fatal(err)
		}
	}
	one.stop(0)

	three := newServers(t, nil, "--set", "nats.replicas=3,nats.tracers=shared")
	for _, name := range streamNames {
		eventually(t, "restore "+name, func() error {
			return three.command("backup", "restore", "stream", filepath.Join(backup, name), "--replicas", "3")
		})
	}
	three.setup()
	three.as("tracer").stores("oom.v1.kill.global.node-3")
	owner := three.owner()
	for name, want := range map[string]uint64{"OOM": 4, "OOM_NODES": 1, "KV_OOM_ANNOTATOR": 2} {
		eventually(t, name, func() error {
			stream, err := owner.js.Stream(t.Context(), name)
			if err != nil {
				return err
			}
			info := stream.CachedInfo()
			if info.State.Msgs != want || info.Config.Replicas != 3 || info.Cluster == nil || len(info.Cluster.Replicas) != 2 {
				return fmt.Errorf("%d messages, want %d; %d replicas, on %+v", info.State.Msgs, want, info.Config.Replicas, info.Cluster)
			}
			if name == "KV_OOM_ANNOTATOR" {
				if msg, err := stream.GetMsg(t.Context(), want); err != nil || string(msg.Data) != `{"paused": true}` {
					return fmt.Errorf("the state is %+v: %v", msg, err)
				}
			}
			for i := range want {
				if name != "OOM" {
					break
				}
				if msg, err := stream.GetMsg(t.Context(), i+1); err != nil || msg.Subject != fmt.Sprintf("oom.v1.kill.global.node-%d", i) {
					return fmt.Errorf("message %d: %+v: %v", i+1, msg, err)
				}
			}
			return nil
		})
	}
}

// TestNewPasswords: all passwords are replaced while kills come: the servers are rolled one after the other, as the StatefulSet's controller
// does, and the clients find the new password in their files, half-way. What a tracer has to publish is stored, once; the old password is
// worth nothing.
func TestNewPasswords(t *testing.T) {
	s := startServers(t, "--set", "nats.tracers=shared")
	var password atomic.Value
	old := s.passwords["tracer"]
	password.Store(old)
	nc, err := nats.Connect(strings.Join(s.urls, ","), nats.CustomInboxPrefix(bus.InboxPrefix("oom-tracer")), nats.MaxReconnects(-1), nats.ReconnectWait(200*time.Millisecond),
		// As bus does: the file is read at each login, and a refused one is tried again.
		nats.UserInfoHandler(func() (string, string) { return "oom-tracer", password.Load().(string) }), nats.IgnoreAuthErrorAbort())
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	done, published := make(chan struct{}), make(chan int)
	go func() {
		for n := 0; ; n++ {
			select {
			case <-done:
				published <- n
				return
			case <-time.After(20 * time.Millisecond):
			}
			for { // until it is acknowledged
				if _, err := js.Publish(t.Context(), "oom.v1.kill.global.node-1", []byte("{}"), jetstream.WithMsgID(fmt.Sprint(n))); err == nil || t.Context().Err() != nil {
					break
				}
				time.Sleep(100 * time.Millisecond)
			}
		}
	}()
	time.Sleep(time.Second)
	for _, name := range passwordNames {
		fresh := "p" + rand.Text()
		for i, e := range s.env {
			s.env[i] = strings.ReplaceAll(e, s.passwords[name], fresh)
		}
		s.passwords[name] = fresh
	}
	for i := 2; i >= 0; i-- {
		s.stop(i)
		s.start(i)
		// minReadySeconds.
		time.Sleep(10 * time.Second)
		if i == 1 {
			password.Store(s.passwords["tracer"])
		}
	}
	close(done)
	var n int
	select {
	case n = <-published:
	case <-time.After(time.Minute):
		t.Fatal("a kill is not stored within a minute")
	}
	owner := s.owner()
	eventually(t, "all servers have all", func() error {
		stream, err := owner.js.Stream(t.Context(), "OOM")
		if err != nil {
			return err
		}
		info := stream.CachedInfo()
		if info.State.Msgs != uint64(n) {
			t.Fatalf("%d kills stored, want %d", info.State.Msgs, n)
		}
		for _, r := range info.Cluster.Replicas {
			if !r.Current {
				return fmt.Errorf("%s is behind", r.Name)
			}
		}
		return nil
	})
	t.Logf("%d kills stored over the rotation", n)
	for _, url := range s.urls {
		if nc, err := nats.Connect(url, nats.UserInfo("oom-tracer", old)); err == nil {
			nc.Close()
			t.Errorf("%s takes the old password", url)
		}
	}
}

// authority signs the certificates of a test.
type authority struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{t: t}
	a.cert, a.key = a.sign(1, func(c *x509.Certificate) {
		c.Subject.CommonName = "CA" // for OpenSSL a certificate whose issuer has its own name is self-signed
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, x509.KeyUsageCertSign
	})
	return a
}

func (a *authority) sign(serial int64, change func(*x509.Certificate)) (*x509.Certificate, *ecdsa.PrivateKey) {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "oom-tracer-nats"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	change(template)
	parent, parentKey := template, key
	if a.cert != nil {
		parent, parentKey = a.cert, a.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, parentKey)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	return cert, key
}

// write writes a Secret of TLS for the servers of this machine into a directory.
func (a *authority) write(dir string, serial int64) {
	a.t.Helper()
	cert, key := a.sign(serial, func(c *x509.Certificate) {
		c.IPAddresses, c.DNSNames = []net.IP{net.IPv4(127, 0, 0, 1)}, []string{"localhost", "oom-tracer-nats." + namespace + ".svc"}
	})
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{
		"ca.crt": {Type: "CERTIFICATE", Bytes: a.cert.Raw}, "tls.crt": {Type: "CERTIFICATE", Bytes: cert.Raw}, "tls.key": {Type: "PRIVATE KEY", Bytes: der},
	} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
}

// route opens a route with TLS, with the certificate in FILE.crt and FILE.key, and returns the serial of the server's.
func (a *authority) route(address string, roots *x509.CertPool, file string) (int64, error) {
	a.t.Helper()
	cfg := &tls.Config{RootCAs: roots}
	if file != "" {
		cert, err := tls.LoadX509KeyPair(file+".crt", file+".key")
		if err != nil {
			a.t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{cert}
	}
	conn, err := tls.Dial("tcp", address, cfg)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
	if info, err := bufio.NewReader(conn).ReadString('\n'); err != nil || !strings.HasPrefix(info, "INFO ") {
		return 0, fmt.Errorf("no INFO, but %q: %w", info, err)
	}
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(), nil
}

// TestCertificates: clients and servers speak TLS, the servers among themselves too; renewed certificates are shown by running servers,
// and nobody is cut off.
func TestCertificates(t *testing.T) {
	a := newAuthority(t)
	clients, routes := t.TempDir(), t.TempDir()
	a.write(clients, 10)
	a.write(routes, 20)
	s := newServers(t, func(files map[string]string) {
		files["nats.conf"] = replaced(t, true, files["nats.conf"], "/etc/nats-tls/", clients+"/")
		files["nats.conf"] = replaced(t, true, files["nats.conf"], "/etc/nats-routes-tls/", routes+"/")
	}, "--set", "nats.tracers=shared,nats.tlsSecret=a,nats.routesTLSSecret=b")
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	option := func(o *nats.Options) error {
		for _, option := range []nats.Option{nats.UserInfo("oom-owner", s.passwords["owner"]), nats.Secure(&tls.Config{RootCAs: roots})} {
			if err := option(o); err != nil {
				return err
			}
		}
		return nil
	}
	eventually(t, "servers with TLS", func() error {
		nc, err := nats.Connect(strings.Join(s.urls, ","), option)
		if err == nil {
			nc.Close()
		}
		return err
	})
	owner := s.connect("oom-tap", option)
	eventually(t, "a stream on three servers", func() error {
		_, err := owner.js.CreateOrUpdateStream(t.Context(), jetstream.StreamConfig{Name: "OOM", Subjects: []string{"oom.v1.>"}, Replicas: 3})
		return err
	})
	for _, route := range s.routes {
		if serial, err := a.route(route, roots, filepath.Join(routes, "tls")); err != nil || serial != 20 {
			t.Errorf("route %s shows the certificate %d: %v", route, serial, err)
		}
		if _, err := a.route(route, roots, ""); err == nil {
			t.Errorf("route %s takes a server without a certificate", route)
		}
	}
	for i := range s.dirs {
		startLogged(t, exec.Command(oomtest.Program(t, "oom-auth"), "reload", filepath.Join(s.dirs[i], "nats.pid"), clients, routes))
	}
	time.Sleep(time.Second) // they have seen the old ones
	a.write(clients, 11)
	a.write(routes, 21)
	for _, url := range s.urls {
		eventually(t, "the new certificate", func() error {
			nc, err := nats.Connect(url, option)
			if err != nil {
				return err
			}
			defer nc.Close()
			state, err := nc.TLSConnectionState()
			if err != nil {
				return err
			}
			if got := state.PeerCertificates[0].SerialNumber.Int64(); got != 11 {
				return fmt.Errorf("%s shows the certificate %d", url, got)
			}
			return nil
		})
	}
	for _, route := range s.routes {
		if serial, err := a.route(route, roots, filepath.Join(routes, "tls")); err != nil || serial != 21 {
			t.Errorf("route %s shows the certificate %d: %v", route, serial, err)
		}
	}
	if n := owner.nc.Stats().Reconnects; n != 0 {
		t.Errorf("a client reconnected %d times", n)
	}
	if _, err := owner.js.Stream(t.Context(), "OOM"); err != nil {
		t.Errorf("after the reload: %v", err)
	}
}

// TestLameDuck: each server of three is stopped as the kubelet does, the preStop hook and then SIGTERM. It hands over before it exits by
// itself, within the grace period of the pod; what is published meanwhile is stored, each message once.
func TestLameDuck(t *testing.T) {
	s := startServers(t, "--set", "nats.replicas=3,nats.tracers=shared")
	pod := get[appsv1.StatefulSet](t, s.objects, "StatefulSet", "oom-tracer-nats").Spec.Template.Spec
	hook := pod.Containers[0].Lifecycle.PreStop.Exec.Command
	const name = "oom-tracer.node-1"
	tracer := s.connect(name, nats.UserInfo("oom-tracer", s.passwords["tracer"]))
	var sent atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	published := make(chan error, 1)
	go func() {
		for ; ctx.Err() == nil; time.Sleep(20 * time.Millisecond) {
			id := fmt.Sprint("m", sent.Load())
			for attempt := 0; ; attempt++ {
				bounded, done := context.WithTimeout(t.Context(), 3*time.Second)
				_, err := tracer.js.Publish(bounded, "oom.v1.kill.global.node-1", []byte(id), jetstream.WithMsgID(id))
				done()
				if err == nil {
					break
				}
				if attempt == 20 {
					published <- fmt.Errorf("message %s: %w", id, err)
					return
				}
			}
			sent.Add(1)
		}
		published <- nil
	}()
	for i, process := range s.processes {
		command := slices.Clone(hook)
		command[0] = oomtest.Program(t, command[0])
		command[len(command)-1] = strings.Replace(command[len(command)-1], "/run/nats", s.dirs[i], 1)
		// A server without a client stops at once: lameDuckMode of nats-server.
		guest, err := nats.Connect(s.urls[i], nats.UserInfo("oom-owner", s.passwords["owner"]), nats.IgnoreDiscoveredServers())
		if err != nil {
			t.Fatal(err)
		}
		defer guest.Close()
		begun := time.Now()
		if out, err := exec.Command(command[0], command[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v: %s", command, err, out)
		}
		time.Sleep(100 * time.Millisecond)
		s.stop(i)
		grace := time.Duration(*pod.TerminationGracePeriodSeconds) * time.Second
		if took := time.Since(begun); took < 4*time.Second || took > grace {
			t.Errorf("server %d stopped after %s; the pod has %s", i, took, grace)
		}
		if log := readFile(t, s.logs[i]); !strings.Contains(log, "Entering lame duck mode") || process.ProcessState.ExitCode() != 0 {
			t.Errorf("server %d: %s\n%s", i, process.ProcessState, log)
		}
		s.start(i)
		eventually(t, "the servers have caught up", func() error {
			stream, err := s.owner().js.Stream(t.Context(), "OOM")
			if err != nil {
				return err
			}
			for _, r := range stream.CachedInfo().Cluster.Replicas {
				if !r.Current || r.Offline {
					return fmt.Errorf("%s is behind", r.Name)
				}
			}
			return nil
		})
	}
	cancel()
	if err := <-published; err != nil {
		t.Error(err)
	}
	stream, err := s.owner().js.Stream(t.Context(), "OOM")
	if err != nil {
		t.Fatal(err)
	}
	if got := stream.CachedInfo().State.Msgs; got != uint64(sent.Load()) || got < 100 {
		t.Errorf("%d messages are stored, %d were published", got, sent.Load())
	}
}
