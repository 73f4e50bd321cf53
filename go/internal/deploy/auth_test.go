package deploy

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// tokens are a cluster with a tracer's pod on each of two nodes, NATS, and oom-auth with the role that the manifests give it.
type tokens struct {
	*servers
	c        *kubetest.Cluster
	audience string // of the volume in the tracer's pod
}

var tracerNodes = []string{"node-1", "node-2.example.com"}

func startTokens(t *testing.T, args ...string) *tokens {
	t.Helper()
	c := kubetest.Start(t)
	c.Apply("deploy/manifests/00-namespace.yaml", "deploy/manifests/auth.yaml")
	for _, ns := range []string{namespace, "elsewhere"} {
		c.Namespace(ns)
		c.ServiceAccount(ns, "oom-tracer")
	}
	for _, node := range tracerNodes {
		c.Node(node)
		c.Pod(namespace, "oom-tracer-"+node, node, as("oom-tracer"))
	}
	s := &tokens{servers: startServers(t, args...), c: c}
	for _, volume := range templates(t, s.objects)["oom-tracer"].Spec.Volumes {
		if volume.Name == "token" && len(volume.Projected.Sources) == 1 {
			s.audience = volume.Projected.Sources[0].ServiceAccountToken.Audience
		}
	}
	s.token = func(node string) string {
		return s.issue(namespace, "oom-tracer", "oom-tracer-"+strings.ReplaceAll(node, "_", "."), s.audience)
	}
	return s
}

func as(account string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) { pod.Spec.ServiceAccountName = account }
}

// issue has the API server issue a token as it does for a kubelet: bound to a pod, if there is a name of one.
func (s *tokens) issue(namespace, account, pod, audience string) string {
	s.t.Helper()
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{audience}}}
	if pod != "" {
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod, UID: s.c.GetPod(namespace, pod).UID}
	}
	issued, err := s.c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(s.t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	return issued.Status.Token
}

// resign is a token with another time of its end, signed with a key; nil is the API server's.
func (s *tokens) resign(token string, key *rsa.PrivateKey, expires time.Time) string {
	s.t.Helper()
	if key == nil {
		block, _ := pem.Decode([]byte(readFile(s.t, filepath.Join(s.c.Dir, "sa.key"))))
		var err error
		if key, err = x509.ParsePKCS1PrivateKey(block.Bytes); err != nil {
			s.t.Fatal(err)
		}
	}
	parts := strings.Split(token, ".")
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		s.t.Fatal(err)
	}
	claims := map[string]json.RawMessage{}
	if err := json.Unmarshal(payload, &claims); err != nil {
		s.t.Fatal(err)
	}
	claims["exp"] = json.RawMessage(fmt.Sprint(expires.Unix()))
	if payload, err = json.Marshal(claims); err != nil {
		s.t.Fatal(err)
	}
	signed := parts[0] + "." + base64.RawURLEncoding.EncodeToString(payload)
	digest := sha256.Sum256([]byte(signed))
	signature, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, digest[:])
	if err != nil {
		s.t.Fatal(err)
	}
	return signed + "." + base64.RawURLEncoding.EncodeToString(signature)
}

// auth is a replica of oom-auth, which runs until the test ends.
type auth struct {
	*kubetest.Process
	listen string
}

func (s *tokens) auth() *auth {
	s.t.Helper()
	file := s.config("auth")
	a := &auth{
		&kubetest.Process{
			Path: oomtest.Program(s.t, "oom-auth"),
			Args: []string{"--config", file, "--kubeconfig", s.c.Kubeconfig(s.c.ServiceAccount(namespace, "oom-auth"))},
			Log:  filepath.Join(s.t.TempDir(), "oom-auth.log"),
		},
		regexp.MustCompile(`listen: (127\S+)`).FindStringSubmatch(readFile(s.t, file))[1],
	}
	s.t.Cleanup(func() { a.End(s.t) })
	a.start(s.t)
	return a
}

func (a *auth) start(t *testing.T) {
	t.Helper()
	a.Start(t)
	a.Wait(t, func(ctx context.Context) error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.listen+"/readyz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			return errors.New(resp.Status)
		}
		return nil
	})
}

func (a *auth) metrics(t *testing.T) exposed {
	t.Helper()
	resp, err := http.Get("http://" + a.listen + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	return parseMetrics(t, resp.Body)
}

// decided is how many decisions of a result it made.
func (a *auth) decided(t *testing.T, result string) float64 {
	t.Helper()
	for _, m := range a.metrics(t)["oom_tracer_auth_decisions_total"].GetMetric() {
		if m.GetLabel()[0].GetValue() == result {
			return m.GetCounter().GetValue()
		}
	}
	t.Fatalf("no metric for %s", result)
	return 0
}

// TestNodeTokens: with a token for the pod of each node, on three servers: a node publishes for itself, and nothing else. What
// is not the token of a tracer's pod is refused, for the right reason.
func TestNodeTokens(t *testing.T) {
	s := startTokens(t)
	if cfg := configs(t, s.objects)["tracer"]; cfg.NATS.TokenFile != "/etc/oom-tracer/token/token" || cfg.NATS.User != "" {
		t.Errorf("the tracer's config has %+v", cfg.NATS)
	}
	a := s.auth()
	for node, other := range map[string]string{"node-1": "node-2_example_com", "node-2_example_com": "node-1"} {
		c := s.connect("oom-tracer."+node, s.tracerLogin(node))
		for _, subject := range []string{"kill.global", "exiting.cgroup", "gap.restart", "node.status"} {
			c.stores("oom.v1." + subject + "." + node)
			c.mayNot("oom.v1." + subject + "." + other)
		}
		c.mayNot("oom.v1.outcome.annotated."+node, "oom.v1.eviction.x."+node, "oom.v1.kill.global."+node+".x", "oom.v2.kill.global."+node, "anything", "$SYS.REQ.USER.AUTH")
		c.mayNot(streamsOf...)
		c.mayNotHear("oom.v1.>", ">", "_INBOX_oom-tracer."+other+".>", "_INBOX_oom-tracer.>", "_INBOX_oom-annotator.>", "$JS.EVENT.>", "$SYS.>")
	}
	// A token opens nothing else.
	if _, err := s.pods(s.token("node-1")); !apierrors.IsUnauthorized(err) {
		t.Errorf("the API server with the token of a tracer: %v", err)
	}

	s.c.Pod(namespace, "gone", "node-1", as("oom-tracer"))
	gone := s.issue(namespace, "oom-tracer", "gone", s.audience)
	s.connect("oom-tracer.node-1", nats.Token(gone)).nc.Close()
	s.c.DeletePod(namespace, "gone")
	// The API server keeps what it knows of a token for ten seconds.
	eventually(t, "the token of a deleted pod is refused", func() error {
		nc, err := nats.Connect(s.urls[0], nats.Token(gone))
		if err == nil {
			nc.Close()
			return errors.New("accepted")
		}
		return nil
	})
	s.c.Pod(namespace, "other", "node-1", as("oom-auth"))
	s.c.Pod("elsewhere", "oom-tracer-node-1", "node-1", as("oom-tracer"))
	own, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	token := s.token("node-1")
	for name, test := range map[string]struct {
		login nats.Option
		why   string
	}{
		"another audience":            {nats.Token(s.issue(namespace, "oom-tracer", "oom-tracer-node-1", "https://kubernetes.default.svc")), "token for the audience"},
		"another namespace's account": {nats.Token(s.issue("elsewhere", "oom-tracer", "oom-tracer-node-1", s.audience)), `token of \"system:serviceaccount:elsewhere:oom-tracer\"`},
		"another account":             {nats.Token(s.issue(namespace, "oom-auth", "other", s.audience)), `token of \"system:serviceaccount:oom-tracer:oom-auth\"`},
		"a deleted pod":               {nats.Token(gone), "the API server does not accept the token"},
		"a forged signature":          {nats.Token(s.resign(token, own, time.Now().Add(time.Hour))), "the API server does not accept the token"},
		"an expired token":            {nats.Token(s.resign(token, nil, time.Now().Add(-time.Minute))), "token expired at"},
		"a token without a pod":       {nats.Token(s.issue(namespace, "oom-tracer", "", s.audience)), "the token names no node"},
		"no token":                    {nats.Token("x"), "not the token of a service account"},
		"nothing":                     {nats.Name("x"), "no token, and no user"},
		"a user of the past":          {nats.UserInfo("oom-tracer", s.passwords["tracer"]), "no token, and no user"},
	} {
		before, lines := a.decided(t, "refused"), len(readFile(t, a.Log))
		nc, err := nats.Connect(s.urls[0], test.login)
		if !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			nc.Close()
		}
		if log := readFile(t, a.Log)[lines:]; a.decided(t, "refused") == before || !strings.Contains(log, "login refused") || !strings.Contains(log, test.why) {
			t.Errorf("%s: want %q in the log:\n%s", name, test.why, log)
		}
	}
	// Who has a password is not asked about.
	before := a.decided(t, "refused")
	if _, err := nats.Connect(s.urls[0], nats.UserInfo("oom-annotator", "wrong")); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("a wrong password: %v", err)
	}
	if a.decided(t, "refused") != before {
		t.Error("oom-auth was asked about a user with a password")
	}
	if text := readFile(t, a.Log); strings.Contains(text, token) || strings.Contains(text, strings.Split(token, ".")[2]) {
		t.Error("a token is in the log")
	}

	// oom-auth itself answers, and does nothing else: not even of its own accord.
	service := s.connect("oom-auth", nats.UserInfo("oom-auth", s.passwords["auth"]))
	service.mayNot(streamsOf...)
	service.mayNot("oom.v1.kill.global.node-1", "oom.v1.outcome.annotated.node-1", "oom.v1.eviction.x.node-1", "$SYS.REQ.USER.AUTH", "$SYS._INBOX.x")
	service.mayNotHear("oom.v1.>", ">", "$SYS.>", "$SYS.REQ.USER.AUTH")
	service.nc.Close()
	client, err := kubernetes.NewForConfig(s.c.ServiceAccount(namespace, "oom-auth"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("oom-auth lists pods: %v", err)
	}

	// The whole power of a stolen node, with a stream's leader on another server than the client's.
	for _, u := range s.attackers() {
		if got := s.attack(u); len(got) > 0 {
			t.Errorf("%s stored what it may not:\n%s", u.user, strings.Join(got, "\n"))
		}
	}
}

// pods asks the API server for something with a token.
func (s *tokens) pods(token string) (*corev1.PodList, error) {
	cfg := *s.c.Admin
	cfg.BearerToken = token
	client, err := kubernetes.NewForConfig(&cfg)
	if err != nil {
		return nil, err
	}
	return client.CoreV1().Pods(namespace).List(s.t.Context(), metav1.ListOptions{})
}

// tracer publishes as oom-tracer does, with the token in a file.
type tracer struct {
	t         *testing.T
	file      string
	conn      *bus.Conn
	publisher *bus.Publisher
	log       string
}

func (s *tokens) tracer(token string) *tracer {
	s.t.Helper()
	dir := s.t.TempDir()
	r := &tracer{t: s.t, file: filepath.Join(dir, "token"), log: filepath.Join(dir, "log")}
	r.renew(token)
	out, err := os.Create(r.log)
	if err != nil {
		s.t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(out, nil))
	cfg := config.Default().NATS
	cfg.URL, cfg.TokenFile = strings.Join(s.urls, ","), r.file
	if r.conn, err = bus.Connect(s.t.Context(), cfg, bus.Options{Name: "oom-tracer.node-1", Background: true}, log); err != nil {
		s.t.Fatal(err)
	}
	if r.publisher, err = bus.NewPublisher(r.conn, 1000, bus.Hooks{}, log); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.publisher.Run(ctx)
	}()
	s.t.Cleanup(func() {
		cancel()
		<-done
		r.conn.Close()
		out.Close()
	})
	return r
}

// renew replaces the token as the kubelet does.
func (r *tracer) renew(token string) {
	r.t.Helper()
	if err := os.WriteFile(r.file+".new", []byte(token), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Rename(r.file+".new", r.file); err != nil {
		r.t.Fatal(err)
	}
}

// kill has a kill published, sooner or later.
func (r *tracer) kill(id string) {
	r.t.Helper()
	if err := r.publisher.Enqueue(bus.Msg{ID: id, Subject: "oom.v1.kill.global.node-1", Data: []byte(`"` + id + `"`)}); err != nil {
		r.t.Fatal(err)
	}
}

// within waits longer than eventually: for a server that waited for an answer, and the client's patience.
func within(t *testing.T, d time.Duration, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(d); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

// stored checks that the stream has these kills, each once.
func (s *tokens) stored(want ...string) {
	s.t.Helper()
	owner := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
	defer owner.nc.Close()
	stream, err := owner.js.Stream(s.t.Context(), event.StreamName)
	if err != nil {
		s.t.Fatal(err)
	}
	var got []string
	for seq := uint64(1); seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(s.t.Context(), seq)
		if err != nil {
			s.t.Fatal(err)
		}
		got = append(got, strings.Trim(string(m.Data), `"`))
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		s.t.Errorf("the stream has %v, want %v", got, want)
	}
}

// TestTokenFaults: while oom-auth or the API server is away, is rolled, or a token expires, tracers wait, and nothing is lost.
func TestTokenFaults(t *testing.T) {
	s := startTokens(t, "--values", root+"/deploy/examples/single-node.yaml")
	pending := func(r *tracer) func() bool { return func() bool { return r.publisher.Pending() == 0 } }

	// No oom-auth yet.
	r := s.tracer(s.token("node-1"))
	r.kill("before")
	within(t, 10*time.Second, "the log says who does not answer", func() bool { return strings.Contains(readFile(t, r.log), "is oom-auth running?") })
	if r.conn.Connected() || r.publisher.Pending() != 1 {
		t.Fatal("a tracer is connected, and nobody has looked at its token")
	}
	cfg := config.NATS{URL: s.urls[0], TokenFile: r.file} // as oom-tracer doctor asks
	if _, err := bus.Connect(t.Context(), cfg, bus.Options{Name: "oom-tracer.node-1"}, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "is oom-auth running?") {
		t.Errorf("without oom-auth: %v", err)
	}
	a, b := s.auth(), s.auth()
	within(t, 30*time.Second, "the kill from before is stored", pending(r))

	// The replicas are rolled one after the other, while tracers come.
	login := s.tracerLogin("node-1")
	for i, replica := range []*auth{a, b} {
		stop := make(chan struct{})
		failures := make(chan error, 1000)
		go func() {
			defer close(failures)
			for {
				select {
				case <-stop:
					return
				default:
				}
				nc, err := nats.Connect(s.urls[0], login)
				if err != nil {
					failures <- err
					continue
				}
				nc.Close()
			}
		}()
		time.Sleep(300 * time.Millisecond)
		replica.End(t)
		r.kill(fmt.Sprint("rolled-", i))
		time.Sleep(300 * time.Millisecond)
		replica.start(t)
		time.Sleep(300 * time.Millisecond)
		close(stop)
		for err := range failures {
			t.Errorf("roll %d: a login failed: %v", i, err)
		}
	}
	within(t, 10*time.Second, "kills during the roll are stored", pending(r))

	// No API server: who is connected stays, who comes waits.
	s.c.Stop()
	late := s.tracer(s.readToken(r))
	late.kill("api-late")
	within(t, 10*time.Second, "the outage is counted", func() bool { return a.decided(t, "failed")+b.decided(t, "failed") > 0 })
	r.kill("api")
	within(t, 10*time.Second, "the kill of who is connected is stored", pending(r))
	if late.conn.Connected() {
		t.Error("a token was accepted without an API server")
	}
	s.c.Start()
	within(t, 30*time.Second, "the kill of who came in the outage is stored", pending(late))

	// The token expires under a connection, and the kubelet has renewed it.
	short := s.tracer(s.resign(s.token("node-1"), nil, time.Now().Add(5*time.Second)))
	within(t, 3*time.Second, "connected", short.conn.Connected)
	short.renew(s.resign(s.token("node-1"), nil, time.Now().Add(10*time.Second)))
	within(t, 10*time.Second, "the connection ends with the token", func() bool { return strings.Contains(readFile(t, short.log), "disconnected from nats") })
	within(t, 5*time.Second, "connected with the new token", short.conn.Connected)
	short.kill("renewed")
	within(t, 3*time.Second, "its kill is stored", pending(short))
	// And now it has not.
	within(t, 20*time.Second, "it is refused", func() bool {
		return strings.Contains(readFile(t, a.Log)+readFile(t, b.Log), "token expired at")
	})
	short.kill("expired")
	time.Sleep(time.Second)
	if short.conn.Connected() || short.publisher.Pending() != 1 {
		t.Error("connected with an expired token")
	}
	short.renew(s.token("node-1"))
	within(t, 20*time.Second, "its kill is stored once the token is renewed", pending(short))

	s.stored("before", "rolled-0", "rolled-1", "api", "api-late", "renewed", "expired")
}

func (s *tokens) readToken(r *tracer) string { return readFile(s.t, r.file) }
