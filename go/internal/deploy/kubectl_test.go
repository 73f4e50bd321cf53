package deploy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// kubelet forwards ports as a kubelet does: by the protocol portforward.k8s.io, of two streams for each connection. The API server
// finds it by the address of its Node.
type kubelet struct {
	t      *testing.T
	server *httptest.Server
	ports  map[string]string // by "POD:PORT" the address that listens there; without one the connection is refused

	mu    sync.Mutex
	conns []httpstream.Connection
	asked []string // Upgrade of the requests
}

func startKubelet(t *testing.T, ports map[string]string) *kubelet {
	k := &kubelet{t: t, ports: ports}
	k.server = httptest.NewTLSServer(k)
	t.Cleanup(func() {
		k.cut()
		k.server.Close()
	})
	return k
}

// node is where the API server finds it.
func (k *kubelet) node(node *corev1.Node) {
	address := k.server.Listener.Addr().(*net.TCPAddr)
	node.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: address.IP.String()}}
	node.Status.DaemonEndpoints.KubeletEndpoint.Port = int32(address.Port)
}

// cut cuts all that is forwarded, as a kubelet that restarts.
func (k *kubelet) cut() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for _, conn := range k.conns {
		_ = conn.Close()
	}
	k.conns = nil
}

// ServeHTTP is /portForward/NAMESPACE/POD.
func (k *kubelet) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	path := strings.Split(r.URL.Path, "/")
	if len(path) != 4 || path[1] != "portForward" || path[2] != namespace {
		http.NotFound(w, r)
		return
	}
	if _, err := httpstream.Handshake(r, w, []string{"portforward.k8s.io"}); err != nil {
		return
	}
	streams := make(chan httpstream.Stream, 10)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, _ <-chan struct{}) error {
		streams <- s
		return nil
	})
	if conn == nil {
		return
	}
	k.mu.Lock()
	k.conns, k.asked = append(k.conns, conn), append(k.asked, r.Header.Get("Upgrade"))
	k.mu.Unlock()
	pair := map[string]httpstream.Stream{}
	for {
		select {
		case s := <-streams:
			pair[s.Headers().Get(corev1.StreamType)] = s
		case <-conn.CloseChan():
			return
		}
		failure, data := pair[corev1.StreamTypeError], pair[corev1.StreamTypeData]
		if failure == nil || data == nil {
			continue
		}
		go func() {
			defer failure.Close()
			defer data.Close()
			to := path[3] + ":" + data.Headers().Get(corev1.PortHeader)
			k.mu.Lock()
			address := k.ports[to]
			k.mu.Unlock()
			server, err := net.Dial("tcp", address)
			if err != nil {
				fmt.Fprintf(failure, "failed to connect to %s inside the pod: connection refused", to)
				return
			}
			defer server.Close()
			go func() {
				_, _ = io.Copy(server, data)
				_ = server.Close()
			}()
			_, _ = io.Copy(data, server)
		}()
		clear(pair)
	}
}

// laptop runs kubectl-oom with nothing but a kubeconfig.
type laptop struct {
	t          *testing.T
	kubeconfig string
}

func (l *laptop) command(args ...string) *exec.Cmd {
	cmd := exec.CommandContext(l.t.Context(), oomtest.Program(l.t, "kubectl-oom"), args...)
	cmd.Env = []string{"HOME=" + l.t.TempDir(), "KUBECONFIG=" + l.kubeconfig}
	return cmd
}

// runs returns what a command prints. It succeeds, and complains of nothing.
func (l *laptop) runs(args ...string) string {
	l.t.Helper()
	var stderr bytes.Buffer
	cmd := l.command(args...)
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		l.t.Errorf("kubectl oom %q: %v\n%s%s", args, err, out, &stderr)
	}
	return string(out)
}

// fails expects status 1, and one line with all of these.
func (l *laptop) fails(args []string, want ...string) {
	l.t.Helper()
	var stderr bytes.Buffer
	cmd := l.command(args...)
	cmd.Stderr = &stderr
	err := cmd.Run()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || exit.ExitCode() != 1 || strings.Count(stderr.String(), "\n") != 1 {
		l.t.Errorf("kubectl oom %q: %v\n%s", args, err, &stderr)
	}
	for _, part := range want {
		if !strings.Contains(stderr.String(), part) {
			l.t.Errorf("kubectl oom %q does not say %q, but\n%s", args, part, &stderr)
		}
	}
}

// contexts writes a kubeconfig with a context for each namespace, named as it; the first is the current one. "none" has no namespace.
func contexts(t *testing.T, c *kubetest.Cluster, cfg *rest.Config, namespaces ...string) string {
	t.Helper()
	file := c.Kubeconfig(cfg)
	raw, err := clientcmd.LoadFromFile(file)
	if err != nil {
		t.Fatal(err)
	}
	test := raw.Contexts["test"]
	delete(raw.Contexts, "test")
	for _, name := range namespaces {
		context := test.DeepCopy()
		if name != "none" {
			context.Namespace = name
		}
		raw.Contexts[name] = context
	}
	raw.CurrentContext = namespaces[0]
	if err := clientcmd.WriteToFile(*raw, file); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestKubectl: a kubeconfig is all that kubectl oom needs, with TLS. The release is helm's, on a real API server, which proxies to the
// kubelet of this test; the servers are real.
func TestKubectl(t *testing.T) {
	a := newAuthority(t)
	certificates := t.TempDir()
	a.write(certificates, 10)
	s := newServers(t, func(files map[string]string) {
		files["nats.conf"] = replaced(t, true, files["nats.conf"], "/etc/nats-tls/", certificates+"/")
	}, "--set", "nats.tracers=shared,nats.tlsSecret=tls,nats.replicas=1")
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	as := func(who, password string) nats.Option {
		return func(o *nats.Options) error {
			return errors.Join(nats.UserInfo(who, password)(o), nats.Secure(&tls.Config{RootCAs: roots})(o))
		}
	}
	file := filepath.Join(t.TempDir(), "owner.yaml")
	text := fmt.Sprintf("nats: {url: %q, user: oom-owner, password_file: %q, tls: {ca_file: %q}}\n",
		strings.Replace(s.urls[0], "nats:", "tls:", 1), s.secret("owner"), filepath.Join(certificates, "ca.crt"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "oom-tap setup", func() error {
		if out, err := exec.Command(oomtest.Program(t, "oom-tap"), "setup", "--config", file).CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	tracer := s.connect("oom-tracer.node-1", as("oom-tracer", s.passwords["tracer"]))
	annotator := s.connect("oom-annotator", as("oom-annotator", s.passwords["annotator"]))
	kill := func(id, owner string) {
		t.Helper()
		for _, by := range []*client{tracer, annotator} {
			subject, data := "oom.v1.kill.cgroup.node-1", fmt.Sprintf(`{"schema":"oom-tracer/v1","id":%[1]q,"seq":1,"time":"2026-11-23T02:03:04Z","boottime_ns":2000000000,"node":{"name":"node-1","boot_id":"b","kernel":"k","tier":"fentry"},`+
				`"scope":"cgroup","outcome":"killed","victim":{"pid":7,"tid":7,"ns_pid":1,"comm":"java","start_boottime_ns":1000000000},`+
				`"limit":{"level":"container","max":1073741824,"usage":1073741824,"inferred":false},"container":{"pod_uid":%[1]q,"container_id":"c","qos":"burstable"}}`, id)
			if by == annotator {
				subject = "oom.v1.outcome." + id + "_annotate.node-1"
				data = fmt.Sprintf(`{"schema":"oom-tracer/v1","id":"%[1]s/annotate","kill":%[1]q,"stage":"annotate","time":"2026-11-23T02:03:05Z","result":"skipped","reason":"level","node":"node-1",`+
					`"pod":{"namespace":%[2]q,"name":"x","uid":%[1]q,"owner":"Deployment/cart"},"container":"main"}`, id, owner)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if _, err := by.js.Publish(ctx, subject, []byte(data)); err != nil {
				t.Fatal(err)
			}
		}
	}
	kill("k-1", "shop")
	kill("k-2", "bank")

	// jane is a reader, and joe nobody.
	c := kubetest.StartWith(t, kubetest.Options{
		AuditPolicy: "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: None}]\n",
		Tokens:      []string{"jane-token,jane,jane,readers", "joe-token,joe,joe,nobodies"},
	})
	k := startKubelet(t, map[string]string{"oom-tracer-nats-0:4222": strings.TrimPrefix(s.urls[0], "nats://")})
	c.Node("node-1", k.node)
	for _, name := range []string{namespace, "shop", "bank"} {
		c.Namespace(name)
	}
	c.Pod("shop", "cart-0", "node-1")
	user := func(token string) *rest.Config {
		cfg := rest.AnonymousClientConfig(c.Admin)
		cfg.BearerToken = token
		return cfg
	}
	admin := &laptop{t, contexts(t, c, c.Admin, "none", "shop", "bank")}
	jane := &laptop{t, contexts(t, c, user("jane-token"), "none")}
	joe := &laptop{t, contexts(t, c, user("joe-token"), "none")}

	admin.fails([]string{"top"}, "find the release: no OOM Tracer in this cluster")
	jane.fails([]string{"top"}, `cannot list resource "configmaps"`, "--release", "the chart's value readers")
	for _, secret := range []*corev1.Secret{
		{
			// The passwords that the servers have. Helm takes them for those of a release before.
			ObjectMeta: metav1.ObjectMeta{Name: "oom-tracer-nats", Labels: map[string]string{"app.kubernetes.io/managed-by": "Helm"},
				Annotations: map[string]string{"meta.helm.sh/release-name": "oom-tracer", "meta.helm.sh/release-namespace": namespace}},
			StringData: s.passwords,
		},
		{
			ObjectMeta: metav1.ObjectMeta{Name: "tls"},
			StringData: map[string]string{"ca.crt": readFile(t, certificates+"/ca.crt"), "tls.crt": readFile(t, certificates+"/tls.crt"), "tls.key": readFile(t, certificates+"/tls.key")},
		},
	} {
		if _, err := c.Client.CoreV1().Secrets(namespace).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	helm := func(args ...string) {
		t.Helper()
		args = append(args, "--namespace", namespace, "--kubeconfig", c.Kubeconfig(c.Admin), "--set", "nats.tracers=shared,nats.tlsSecret=tls,nats.replicas=1")
		if _, err := kubetest.Helm(t, args...); err != nil {
			t.Fatal(err)
		}
	}
	helm("install", "oom-tracer", chart)
	admin.fails([]string{"top"}, "no pod of NATS in namespace oom-tracer")
	server := c.Pod(namespace, "oom-tracer-nats-0", "node-1", func(pod *corev1.Pod) {
		template := get[appsv1.StatefulSet](t, s.objects, "StatefulSet", "oom-tracer-nats").Spec.Template
		pod.Labels, pod.Spec.Containers = template.Labels, template.Spec.Containers[:1]
		pod.Spec.Containers[0].VolumeMounts = nil
	})
	admin.fails([]string{"top"}, "no pod of NATS is ready in namespace oom-tracer (oom-tracer-nats-0 is not ready)", "describe pods")
	server.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	c.SetStatus(server)

	t.Run("Commands", func(t *testing.T) {
		admin := &laptop{t, admin.kubeconfig}
		all := admin.runs("top")
		if !strings.Contains(all, "shop/Deployment/cart") || !strings.Contains(all, "bank/Deployment/cart") {
			t.Errorf("top:\n%s", all)
		}
		if out := admin.runs("top", "-n", "shop"); !strings.Contains(out, "shop/Deployment/cart") || strings.Contains(out, "bank") {
			t.Errorf("top -n shop:\n%s", out)
		}
		if out := admin.runs("top", "-A", "--context", "bank"); !strings.Contains(out, "shop/Deployment/cart") {
			t.Errorf("top -A:\n%s", out)
		}
		if out := admin.runs("advise", "--context", "bank"); !strings.Contains(out, "bank") || strings.Contains(out, "shop") {
			t.Errorf("advise in bank:\n%s", out)
		}
		if out, err := admin.command("pod", "x", "--context", "shop").Output(); err != nil || !strings.Contains(string(out), "shop/x: 1 kills;") {
			t.Errorf("pod: %v\n%s", err, out)
		}
		cmd := admin.command("top", "--context", "shop")
		if out, err := cmd.CombinedOutput(); err != nil || strings.Contains(string(out), "bank") || !strings.Contains(string(out), "kubectl oom: only namespace shop, that of the kubeconfig's context (-A: all)") {
			t.Errorf("top in shop: %v\n%s", err, out)
		}
		// With the passwords of those who may do it, and the config of the release.
		if out := admin.runs("pause", "--reason", "a test"); !strings.Contains(out, "paused by") {
			t.Errorf("pause: %s", out)
		}
		if out := admin.runs("status"); !strings.Contains(out, "a test") {
			t.Errorf("status: %s", out)
		}
		admin.runs("resume")
		if out := admin.runs("restore"); !strings.Contains(out, "the state is valid") {
			t.Errorf("restore: %s", out)
		}
		if help := admin.runs("--help"); strings.Contains(help, "setup") || strings.Contains(help, "victim") || strings.Contains(help, "--insecure") || !strings.Contains(help, "--context context") {
			t.Errorf("help:\n%s", help)
		}
		if !slices.Equal(k.asked, slices.Repeat([]string{"SPDY/3.1"}, len(k.asked))) {
			t.Errorf("the API server asked for %q", k.asked)
		}
	})

	t.Run("Rights", func(t *testing.T) {
		admin, jane, joe := &laptop{t, admin.kubeconfig}, &laptop{t, jane.kubeconfig}, &laptop{t, joe.kubeconfig}
		helm("upgrade", "oom-tracer", chart, "--set", "readers.subjects[0].kind=Group,readers.subjects[0].name=readers")
		secret, err := c.Client.CoreV1().Secrets(namespace).Get(t.Context(), "oom-tracer-readers", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(secret.Data) != 2 || string(secret.Data["tap"]) != s.passwords["tap"] || string(secret.Data["ca.crt"]) != readFile(t, certificates+"/ca.crt") {
			t.Errorf("readers have %q", secret.Data)
		}
		c.In(t).Eventually("jane is a reader", func() error {
			if out, err := jane.command("top").CombinedOutput(); err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		if out := jane.runs("top"); !strings.Contains(out, "shop/Deployment/cart") {
			t.Errorf("top: %s", out)
		}
		admin.runs("top", "--as", "jane", "--as-group", "readers")
		jane.fails([]string{"pause", "--reason", "x"}, `read the password of the user oom-operator: secrets "oom-tracer-nats" is forbidden`)
		joe.fails([]string{"top"}, `configmaps "oom-tracer" is forbidden: User "joe" cannot list`)
		joe.fails([]string{"top", "--release", namespace}, `configmaps "oom-tracer" is forbidden: User "joe"`, "the chart's value readers")

		// One right after the other is taken away.
		role, err := c.Client.RbacV1().Roles(namespace).Get(t.Context(), "oom-tracer-readers", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		for _, want := range []string{`forward port 4222 of pod oom-tracer-nats-0 in namespace oom-tracer: unable to upgrade connection: pods "oom-tracer-nats-0" is forbidden`,
			"find the servers of NATS: pods is forbidden", `read the Secret for kubectl oom: secrets "oom-tracer-readers" is forbidden`} {
			role.Rules = role.Rules[:len(role.Rules)-1]
			if role, err = c.Client.RbacV1().Roles(namespace).Update(t.Context(), role, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			c.In(t).Eventually("the server obeys", func() error {
				if jane.command("top").Run() == nil {
					return errors.New("not yet")
				}
				return nil
			})
			jane.fails([]string{"top"}, want, "the chart's value readers")
		}
	})

	t.Run("Completion", func(t *testing.T) {
		admin, joe := &laptop{t, admin.kubeconfig}, &laptop{t, joe.kubeconfig}
		for args, want := range map[string]string{
			"pod -n shop ":        "cart-0\n:4\n",
			"pod --context shop ": "cart-0\n:4\n",
			"pod ":                ":4\n",
			"--node ":             "node-1\n:4\n",
			"pod -n shop x ":      ":4\n",
			"--release ":          "bank\ndefault\nkube-node-lease\nkube-public\nkube-system\noom-tracer\nshop\n:4\n",
			"--context ":          "bank\nnone\nshop\n:4\n",
		} {
			if out, err := admin.command(append([]string{"__complete"}, strings.Split(args, " ")...)...).Output(); err != nil || string(out) != want {
				t.Errorf("%s: %v, %q", args, err, out)
			}
		}
		if out, err := joe.command("__complete", "pod", "").Output(); err != nil || string(out) != ":4\n" {
			t.Errorf("joe: %v, %q", err, out)
		}
	})

	// A command that follows makes the forward again, and shows what came meanwhile.
	t.Run("Cut", func(t *testing.T) {
		admin := &laptop{t, admin.kubeconfig}
		out, err := os.Create(filepath.Join(t.TempDir(), "out"))
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		cmd := admin.command("--since", "1h", "-o", "json", "--kills")
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		shown := func(id string) {
			t.Helper()
			eventually(t, id, func() error {
				if text := readFile(t, out.Name()); !strings.Contains(text, fmt.Sprintf("%q", id)) {
					return errors.New(text)
				}
				return nil
			})
		}
		shown("k-1")
		for i := range 2 {
			k.cut()
			id := fmt.Sprint("cut-", i)
			kill(id, "shop")
			shown(id)
		}
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v\n%s", err, readFile(t, out.Name()))
		}
		if text := readFile(t, out.Name()); strings.Count(text, "disconnected from nats, reconnecting") != 2 {
			t.Errorf("said:\n%s", text)
		}
	})

	// Where there are no WebSockets, it is SPDY all the way.
	t.Run("SPDY", func(t *testing.T) {
		target, err := url.Parse(c.Admin.Host)
		if err != nil {
			t.Fatal(err)
		}
		cfg := rest.AnonymousClientConfig(c.Admin)
		cfg.NextProtos = []string{"http/1.1"} // the other one has no upgrades
		transport, err := rest.TransportFor(cfg)
		if err != nil {
			t.Fatal(err)
		}
		upgrades := map[string]int{}
		api := &httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }, Transport: transport}
		proxy := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			upgrades[r.Header.Get("Upgrade")]++ // one after the other
			if r.Header.Get("Upgrade") == "websocket" {
				http.Error(w, "no WebSockets", http.StatusBadRequest)
				return
			}
			api.ServeHTTP(w, r)
		}))
		defer proxy.Close()
		cfg = rest.CopyConfig(c.Admin)
		cfg.Host, cfg.CAData = proxy.URL, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: proxy.Certificate().Raw})
		through := &laptop{t, contexts(t, c.In(t), cfg, "none")}
		if out := through.runs("top"); !strings.Contains(out, "shop/Deployment/cart") {
			t.Errorf("top: %s", out)
		}
		if upgrades["websocket"] != 1 || upgrades["SPDY/3.1"] != 1 {
			t.Errorf("upgrades %v", upgrades)
		}
	})

	t.Run("Trouble", func(t *testing.T) {
		admin := &laptop{t, admin.kubeconfig}
		admin.fails([]string{"top", "--context", "nowhere"}, `read the kubeconfig: it has no context "nowhere", but bank, none, shop`)
		admin.fails([]string{"top", "--release", "shop"}, "no OOM Tracer in namespace shop", "--release names another namespace")
		(&laptop{t, "/nonexistent"}).fails([]string{"top"}, "read the kubeconfig: ", "--config")
		other := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: "oom-tracer", Labels: map[string]string{"app.kubernetes.io/part-of": "oom-tracer"}},
			Data: map[string]string{"tap.yaml": `nats: {url: "nats://nats.example.com:4222"}`}}
		maps := c.Client.CoreV1().ConfigMaps("bank")
		other, err := maps.Create(t.Context(), other, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		admin.fails([]string{"top"}, "several in this cluster, in the namespaces bank, oom-tracer: choose one with --release NAMESPACE")
		admin.runs("top", "--release", namespace)
		admin.fails([]string{"top", "--release", "bank"}, "the release in namespace bank has your own NATS, at nats://nats.example.com:4222: --config FILE")
		for text, want := range map[string]string{
			"": "nats.mode: embedded",
			// Keys of another version are no fault, and a chart of before has no annotations.
			`{nats: {url: "nats://oom-tracer-nats.bank.svc:4222", new: 1}, newer: {}}`: "of a chart that does not know kubectl oom yet",
		} {
			if other.Data = map[string]string{"tap.yaml": text}; text == "" {
				other.Data = nil
			}
			if other, err = maps.Update(t.Context(), other, metav1.UpdateOptions{}); err != nil {
				t.Fatal(err)
			}
			admin.fails([]string{"top", "--release", "bank"}, want)
		}
		if err := maps.Delete(t.Context(), "oom-tracer", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}

		k.mu.Lock()
		k.ports = nil
		k.mu.Unlock()
		admin.fails([]string{"top"}, "the forwarded port was closed: failed to connect to oom-tracer-nats-0:4222 inside the pod: connection refused")
		k.server.Close()
		admin.fails([]string{"top"}, "forward port 4222 of pod oom-tracer-nats-0 in namespace oom-tracer: ", "connection refused")
	})
}
