// Package kubetest runs a real Kubernetes API server for tests: kube-apiserver and etcd of build/kube, as
// child processes on loopback. There is no kubelet, scheduler or controller: what they would do, the test
// does.
package kubetest

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

const (
	// Ready takes 3 to 7 s, and several times that beside a VM on two cores.
	startTimeout = 2 * time.Minute
	// With nothing to wait for, it takes 1 s. With watches open the server would wait a minute for them.
	stopTimeout = 2 * time.Second
)

// Cluster is an API server that goes with the test. Its methods fail the test by themselves, so they are
// for the test's own goroutine.
type Cluster struct {
	Admin  *rest.Config         // of the group system:masters, without a rate limit
	Client kubernetes.Interface // Admin's

	// Dir holds what the server was started with: sa.key (of service accounts) and certs/apiserver.crt among it.
	Dir string

	t        testing.TB
	api      *Process
	auditLog string
}

// Options change what Start starts.
type Options struct {
	// Tokens are further lines of the token file: token,user,uid,"group,group".
	Tokens []string
	// AuditPolicy is in the place of the one that Audit goes by.
	AuditPolicy string
	// Args of the API server are in the place of those of the same name, or further ones.
	Args map[string]string
}

// Start starts an API server and waits until it is ready.
func Start(t testing.TB) *Cluster {
	t.Helper()
	return StartWith(t, Options{AuditPolicy: auditPolicy})
}

// StartWith is Start with other options.
func StartWith(t testing.TB, opts Options) *Cluster {
	t.Helper()
	programs := oomtest.Program(t, "kube")
	if _, err := os.Stat(filepath.Join(programs, "kube-apiserver")); err != nil {
		t.Fatalf("no API server to test with, make build/kube builds it: %v", err)
	}
	dir := t.TempDir()
	client, peer, secure := oomtest.FreeAddr(t), oomtest.FreeAddr(t), oomtest.FreeAddr(t)

	etcd := &Process{
		Path: filepath.Join(programs, "etcd"),
		Log:  filepath.Join(dir, "etcd.log"),
		Args: []string{
			"--data-dir", filepath.Join(dir, "etcd"),
			"--listen-client-urls", "http://" + client, "--advertise-client-urls", "http://" + client,
			"--listen-peer-urls", "http://" + peer, "--initial-advertise-peer-urls", "http://" + peer,
			"--initial-cluster", "default=http://" + peer,
			"--unsafe-no-fsync",
		},
	}
	t.Cleanup(func() { etcd.End(t) })
	etcd.Start(t)
	etcd.Wait(t, func(ctx context.Context) error { return get(ctx, http.DefaultClient, "http://"+client+"/readyz") })

	// Nothing but the key of the service accounts is made here: the server writes its own certificate.
	token := rand.Text()
	saKey := filepath.Join(dir, "sa.key")
	saPub := filepath.Join(dir, "sa.pub")
	writeServiceAccountKey(t, saKey, saPub)
	tokens := filepath.Join(dir, "tokens.csv")
	lines := append([]string{token + ",admin,admin-uid,system:masters"}, opts.Tokens...)
	if err := os.WriteFile(tokens, []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	auditPolicyFile, auditLog := filepath.Join(dir, "audit-policy.yaml"), filepath.Join(dir, "audit.log")
	if err := os.WriteFile(auditPolicyFile, []byte(opts.AuditPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	_, port, err := net.SplitHostPort(secure)
	if err != nil {
		t.Fatal(err)
	}
	args := map[string]string{
		"etcd-servers": "http://" + client,
		"bind-address": "127.0.0.1", "advertise-address": "127.0.0.1", "secure-port": port,
		"cert-dir":        filepath.Join(dir, "certs"),
		"token-auth-file": tokens, "anonymous-auth": "false", "authorization-mode": "RBAC",
		"service-account-issuer":   "https://kubernetes.default.svc",
		"service-account-key-file": saPub, "service-account-signing-key-file": saKey,
		"service-cluster-ip-range": "10.0.0.0/24", "endpoint-reconciler-type": "none",
		"allow-privileged": "true", "profiling": "false",
		"audit-policy-file": auditPolicyFile, "audit-log-path": auditLog,
	}
	maps.Copy(args, opts.Args)
	api := &Process{Path: filepath.Join(programs, "kube-apiserver"), Log: filepath.Join(dir, "kube-apiserver.log")}
	for _, name := range slices.Sorted(maps.Keys(args)) {
		api.Args = append(api.Args, "--"+name+"="+args[name])
	}
	c := &Cluster{Dir: dir, t: t, api: api, auditLog: auditLog}
	t.Cleanup(func() { api.End(t) })
	api.Start(t)
	cert := filepath.Join(dir, "certs", "apiserver.crt")
	var ca []byte
	api.Wait(t, func(context.Context) error {
		if ca, err = os.ReadFile(cert); err == nil && !x509.NewCertPool().AppendCertsFromPEM(ca) {
			err = fmt.Errorf("%s is not written yet", cert)
		}
		return err
	})
	c.Admin = &rest.Config{
		Host:            "https://" + secure,
		BearerToken:     token,
		TLSClientConfig: rest.TLSClientConfig{CAData: ca},
		QPS:             -1,
	}
	if c.Client, err = kubernetes.NewForConfig(c.Admin); err != nil {
		t.Fatal(err)
	}
	c.waitReady()
	return c
}

// In is the same cluster for a subtest, which then fails by itself.
func (c *Cluster) In(t testing.TB) *Cluster {
	in := *c
	in.t = t
	return &in
}

// Stop ends the API server and leaves etcd: an outage.
func (c *Cluster) Stop() {
	c.t.Helper()
	c.api.End(c.t)
}

// Start starts the API server again after Stop, at the same address and with the same data, and waits until
// it is ready.
func (c *Cluster) Start() {
	c.t.Helper()
	c.api.Start(c.t)
	c.waitReady()
}

// Freeze stops the API server as it is, with all connections open, until thaw is called.
func (c *Cluster) Freeze() (thaw func()) {
	c.t.Helper()
	signal := func(s syscall.Signal) {
		if err := c.api.cmd.Process.Signal(s); err != nil {
			c.t.Error(err)
		}
	}
	signal(syscall.SIGSTOP)
	return func() { signal(syscall.SIGCONT) }
}

func (c *Cluster) waitReady() {
	c.t.Helper()
	client, err := rest.HTTPClientFor(c.Admin)
	if err != nil {
		c.t.Fatal(err)
	}
	c.api.Wait(c.t, func(ctx context.Context) error { return get(ctx, client, c.Admin.Host+"/readyz") })
}

// ServiceAccount makes a service account, if it is not there, and returns a client configuration with a new
// token of it, as a pod would get one.
func (c *Cluster) ServiceAccount(namespace, name string) *rest.Config {
	c.t.Helper()
	accounts := c.Client.CoreV1().ServiceAccounts(namespace)
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := accounts.Create(c.t.Context(), account, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		c.t.Fatal(err)
	}
	token, err := accounts.CreateToken(c.t.Context(), name, &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	cfg := rest.AnonymousClientConfig(c.Admin)
	cfg.QPS = 0 // the client's default
	cfg.BearerToken = token.Status.Token
	return cfg
}

// Kubeconfig writes a client configuration into a file, for a program's --kubeconfig.
func (c *Cluster) Kubeconfig(cfg *rest.Config) string {
	c.t.Helper()
	file := filepath.Join(c.t.TempDir(), "kubeconfig")
	if err := os.WriteFile(file, Kubeconfig(c.t, cfg), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return file
}

// Kubeconfig is a client configuration as the content of a file.
func Kubeconfig(t testing.TB, cfg *rest.Config) []byte {
	t.Helper()
	config := clientcmdapi.NewConfig()
	config.Clusters["test"] = &clientcmdapi.Cluster{Server: cfg.Host, CertificateAuthorityData: cfg.CAData}
	config.AuthInfos["test"] = &clientcmdapi.AuthInfo{Token: cfg.BearerToken, TokenFile: cfg.BearerTokenFile}
	config.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "test"}
	config.CurrentContext = "test"
	data, err := clientcmd.Write(*config)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Process is a child that can be ended and started again. Not for several goroutines.
type Process struct {
	Path string
	Args []string
	Log  string // the file that takes its output

	cmd    *exec.Cmd     // nil unless it was started
	exited chan struct{} // closed when it is gone
}

func (p *Process) name() string { return filepath.Base(p.Path) }

// Start starts it; it goes with this process, however that ends.
func (p *Process) Start(t testing.TB) {
	t.Helper()
	log, err := os.OpenFile(p.Log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(p.Path, p.Args...)
	cmd.Stdout, cmd.Stderr = log, log
	// A test binary that is killed, by its own timeout too, leaves nothing behind.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended is in its log
		close(exited)
	}()
	p.cmd, p.exited = cmd, exited
}

// PID is the process ID of a process that was started.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// End ends the process, if there is one, and waits until it is gone.
func (p *Process) End(t testing.TB) {
	t.Helper()
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may be gone
	select {
	case <-p.exited:
	case <-time.After(stopTimeout):
		_ = p.cmd.Process.Kill()
		<-p.exited
	}
	p.cmd = nil
}

// Wait waits until ready returns nil, or fails the test with the end of the process's log.
func (p *Process) Wait(t testing.TB, ready func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	for {
		err := ready(ctx)
		if err == nil {
			return
		}
		select {
		case <-p.exited:
			t.Fatalf("%s ended before it was ready:\n%s", p.name(), p.Tail())
		case <-ctx.Done():
			t.Fatalf("%s is not ready: %v\n%s", p.name(), err, p.Tail())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Tail is the end of its output.
func (p *Process) Tail() []byte {
	log, err := os.ReadFile(p.Log)
	if err != nil {
		return []byte(err.Error())
	}
	lines := bytes.SplitAfter(log, []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-20):], nil)
}

func get(ctx context.Context, client *http.Client, url string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return err
}

func writeServiceAccountKey(t testing.TB, private, public string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	pub, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{
		private: {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)},
		public:  {Type: "PUBLIC KEY", Bytes: pub},
	} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
