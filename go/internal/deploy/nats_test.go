package deploy

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// servers are nats-servers with the configuration that the chart renders.
type servers struct {
	t         *testing.T
	objects   []*unstructured.Unstructured
	urls      []string
	passwords map[string]string
	seeds     string                   // the directory with the nodes' keys, with nats.tracers nkeys
	token     func(node string) string // of the pod of a node's tracer, with nats.tracers tokens
	logs      []string                 // files
	dirs      []string                 // of the servers: configuration and store
	routes    []string                 // addresses
	env       []string                 // of the servers
	processes []*exec.Cmd
}

// passwordNames are the keys of the Secret with the passwords.
var passwordNames = []string{"tracer", "annotator", "owner", "operator", "tap", "route", "auth", "issuer", "notify"}

// startServers starts the servers, and makes the streams as the owner's Job does.
func startServers(t *testing.T, args ...string) *servers {
	t.Helper()
	s := newServers(t, nil, args...)
	s.setup()
	return s
}

// setup runs the owner's Job, as rendered but for the addresses.
func (s *servers) setup() {
	s.t.Helper()
	eventually(s.t, "oom-tap setup", func() error {
		out, err := exec.Command(oomtest.Program(s.t, "oom-tap"), "setup", "--config", s.config("owner")).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
}

// newServers starts as many servers as the chart would, on loopback. The rest of their configuration, and of
// their environment, is as rendered, unless edit changes the files.
func newServers(t *testing.T, edit func(files map[string]string), args ...string) *servers {
	t.Helper()
	s := &servers{t: t, objects: render(t, args...), passwords: map[string]string{}}
	for _, name := range passwordNames {
		s.passwords[name] = "p" + rand.Text()
	}
	set := get[appsv1.StatefulSet](t, s.objects, "StatefulSet", "oom-tracer-nats")
	files := get[corev1.ConfigMap](t, s.objects, "ConfigMap", "oom-tracer-nats").Data
	if edit != nil {
		edit(files)
	}
	var env []string
	for _, e := range set.Spec.Template.Spec.Containers[0].Env {
		if e.ValueFrom != nil && e.ValueFrom.SecretKeyRef != nil {
			env = append(env, e.Name+"="+s.passwords[e.ValueFrom.SecretKeyRef.Key])
		} else if e.Value != "" {
			// As the kubelet does.
			env = append(env, e.Name+"="+strings.ReplaceAll(e.Value, "$(OOM_ROUTE_PASSWORD)", s.passwords["route"]))
		}
	}
	routes := map[int]string{}
	for i := range int(*set.Spec.Replicas) {
		routes[i] = freeAddr(t)
		s.routes = append(s.routes, routes[i])
		for j, e := range env {
			env[j] = strings.ReplaceAll(e, fmt.Sprintf("oom-tracer-nats-%d.oom-tracer-nats-peers.oom-tracer.svc:6222", i), routes[i])
		}
	}
	for i := range int(*set.Spec.Replicas) {
		dir, addr := t.TempDir(), freeAddr(t)
		s.dirs = append(s.dirs, dir)
		for name, text := range files {
			text = replaced(t, name == "nats.conf", text, `"0.0.0.0:4222"`, fmt.Sprintf("%q", addr))
			text = replaced(t, name == "nats.conf", text, `http: "0.0.0.0:8222"`, "")
			text = replaced(t, name == "nats.conf", text, "store_dir: /data", fmt.Sprintf("store_dir: %q", dir))
			text = replaced(t, name == "nats.conf" && len(routes) > 1, text, `"0.0.0.0:6222"`, fmt.Sprintf("%q", routes[i]))
			text = strings.ReplaceAll(text, "../nats-issuer/issuer.conf", "issuer.conf")
			text = strings.ReplaceAll(text, "/run/nats/", dir+"/")
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if files["auth.conf"] != "" { // as the init container does
			out, err := exec.Command(oomtest.Program(t, "oom-auth"), "issuer", s.secret("issuer"), filepath.Join(dir, "issuer.conf")).CombinedOutput()
			if err != nil {
				t.Fatalf("oom-auth issuer: %v: %s", err, out)
			}
		}
		s.urls = append(s.urls, "nats://"+addr)
	}
	s.env, s.processes, s.logs = env, make([]*exec.Cmd, len(s.dirs)), make([]string, len(s.dirs))
	for i := range s.dirs {
		s.start(i)
	}
	return s
}

// start starts a server, with the environment of now.
func (s *servers) start(i int) {
	s.t.Helper()
	cmd := exec.Command(oomtest.Program(s.t, "nats-server"), "--config", filepath.Join(s.dirs[i], "nats.conf"))
	cmd.Env = append([]string{fmt.Sprintf("POD_NAME=oom-tracer-nats-%d", i)}, s.env...)
	s.logs[i], s.processes[i] = startLogged(s.t, cmd), cmd
}

// stop ends a server as the kubelet does, and waits for it.
func (s *servers) stop(i int) {
	s.t.Helper()
	if err := s.processes[i].Process.Signal(syscall.SIGTERM); err != nil {
		s.t.Fatal(err)
	}
	_ = s.processes[i].Wait()
}

// startLogged starts a program, and returns the file that it logs to.
func startLogged(t *testing.T, cmd *exec.Cmd) string {
	t.Helper()
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%q logged:\n%s", cmd.Args, readFile(t, log.Name()))
		}
	})
	return log.Name()
}

func readFile(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func replaced(t *testing.T, needed bool, text, old, with string) string {
	t.Helper()
	if needed && !strings.Contains(text, old) {
		t.Fatalf("no %s in:\n%s", old, text)
	}
	return strings.ReplaceAll(text, old, with)
}

// freeAddr is an address that is free now, below the ephemeral ports.
func freeAddr(t *testing.T) string {
	t.Helper()
	for port := 31000 + os.Getpid()%700; port < 32700; port++ {
		addr := fmt.Sprintf("127.0.0.1:%d", port)
		if taken[port] {
			continue
		}
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			taken[port] = true
			return addr
		}
	}
	t.Fatal("no address is free")
	return ""
}

// taken are the ports that were handed out: a server may not have them yet.
var taken = map[int]bool{}

func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// secret is a file with a password of the Secret.
func (s *servers) secret(name string) string {
	s.t.Helper()
	file := filepath.Join(s.t.TempDir(), name)
	if err := os.WriteFile(file, []byte(s.passwords[name]), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return file
}

// config writes the rendered config of a program, with the addresses and the password of this test.
func (s *servers) config(who string) string {
	s.t.Helper()
	base := "owner"
	if who == "annotator" || who == "notify" { // they have a port of their own
		base = who
	}
	text := get[corev1.ConfigMap](s.t, s.objects, "ConfigMap", "oom-tracer").Data[base+".yaml"]
	text = replaced(s.t, true, text, "nats://oom-tracer-nats.oom-tracer.svc:4222", strings.Join(s.urls, ","))
	text = replaced(s.t, true, text, "/etc/oom-tracer/secret/"+base, s.secret(who))
	text = replaced(s.t, true, text, "user: oom-"+base, "user: oom-"+who)
	text = replaced(s.t, true, text, "/etc/oom-tracer/issuer/issuer", s.secret("issuer"))
	text = replaced(s.t, true, text, "listen: :9107", "listen: "+freeAddr(s.t))
	text = replaced(s.t, who == "notify", text, "listen: :9108", "listen: "+freeAddr(s.t))
	file := filepath.Join(s.t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	return file
}

// client is a connection with the permissions that are tried.
type client struct {
	t      *testing.T
	nc     *nats.Conn
	js     jetstream.JetStream
	denied chan error
}

func (s *servers) connect(name string, how nats.Option) *client {
	s.t.Helper()
	c := &client{t: s.t, denied: make(chan error, 100)}
	var err error
	c.nc, err = nats.Connect(strings.Join(s.urls, ","), how, nats.Name(name), nats.CustomInboxPrefix(bus.InboxPrefix(name)),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { c.denied <- err }))
	if err != nil {
		s.t.Fatalf("connect as %s: %v", name, err)
	}
	s.t.Cleanup(c.nc.Close)
	if c.js, err = jetstream.New(c.nc); err != nil {
		s.t.Fatal(err)
	}
	return c
}

// stores checks that a message is stored, and that the word of it arrives.
func (c *client) stores(subject string) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(c.t.Context(), 10*time.Second)
	defer cancel()
	ack, err := c.js.Publish(ctx, subject, []byte("{}"))
	if err != nil {
		c.t.Errorf("publish %s: %v", subject, err)
	} else if want := map[bool]string{true: event.NodesStreamName, false: event.StreamName}[strings.HasPrefix(subject, "oom.v1.node.")]; ack.Stream != want {
		c.t.Errorf("%s is stored in %s", subject, ack.Stream)
	}
}

// mayNot checks that the server denies to publish each subject.
func (c *client) mayNot(subjects ...string) {
	c.t.Helper()
	for _, subject := range subjects {
		c.isDenied("Publish to", subject, c.nc.Publish(subject, []byte("{}")))
	}
}

// mayNotHear checks that the server denies each subscription.
func (c *client) mayNotHear(subjects ...string) {
	c.t.Helper()
	for _, subject := range subjects {
		_, err := c.nc.SubscribeSync(subject)
		c.isDenied("Subscription to", subject, err)
	}
}

func (c *client) isDenied(act, subject string, err error) {
	c.t.Helper()
	if err = errors.Join(err, c.nc.FlushTimeout(10*time.Second)); err != nil {
		c.t.Errorf("%s %s: %v", act, subject, err)
	}
	select {
	case err := <-c.denied:
		if text := err.Error(); !errors.Is(err, nats.ErrPermissionViolation) || !strings.Contains(text, fmt.Sprintf("%s %q", act, subject)) {
			c.t.Errorf("%s %s: %v", act, subject, err)
		}
	case <-time.After(2 * time.Second):
		c.t.Errorf("%s %s is permitted", act, subject)
	}
}

// streamsOf are subjects that read, change or remove what is stored, or take it from the annotator.
var streamsOf = []string{
	"$JS.API.INFO", "$JS.API.STREAM.INFO.OOM", "$JS.API.STREAM.CREATE.X", "$JS.API.STREAM.UPDATE.OOM", "$JS.API.STREAM.DELETE.OOM",
	"$JS.API.STREAM.PURGE.OOM", "$JS.API.STREAM.MSG.GET.OOM", "$JS.API.STREAM.MSG.DELETE.OOM", "$JS.API.DIRECT.GET.OOM", "$JS.API.STREAM.NAMES",
	"$JS.API.CONSUMER.CREATE.OOM", "$JS.API.CONSUMER.CREATE.OOM.x", "$JS.API.CONSUMER.MSG.NEXT.OOM.oom-annotator", "$JS.API.CONSUMER.DELETE.OOM.oom-annotator",
	"$JS.ACK.OOM.oom-annotator.1.1.1.1.1", "$KV.OOM_ANNOTATOR.state", "$JS.API.DIRECT.GET.KV_OOM_ANNOTATOR.$KV.OOM_ANNOTATOR.state",
}

// TestNodeKeys: with a key for each node, made by oom-tap keys, on three servers: a node publishes for itself,
// and nothing else.
func TestNodeKeys(t *testing.T) {
	seeds := filepath.Join(t.TempDir(), "seeds")
	printed, err := exec.Command(oomtest.Program(t, "oom-tap"), "keys", seeds, "node-1", "node-2.example.com").Output()
	if err != nil {
		t.Fatal(err)
	}
	again, err := exec.Command(oomtest.Program(t, "oom-tap"), "keys", seeds, "node-1", "node-2.example.com").Output()
	if err != nil || !bytes.Equal(printed, again) {
		t.Fatalf("keys that are there are not kept: %v\n%s\n%s", err, printed, again)
	}
	for _, seed := range []string{"node-1.nk", "node-2.example.com.nk"} {
		if info, err := os.Stat(filepath.Join(seeds, seed)); err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("seed %s: %v %v", seed, info, err)
		}
	}
	s := startServers(t, values(t, string(printed))...)
	s.seeds = seeds
	if cfg := configs(t, s.objects)["tracer"]; cfg.NATS.NKeyFile != "/etc/oom-tracer/node/nats.nk" || cfg.NATS.User != "" {
		t.Errorf("the tracer's config has %+v", cfg.NATS)
	}

	for node, other := range map[string]string{"node-1": "node-2_example_com", "node-2_example_com": "node-1"} {
		c := s.connect("oom-tracer."+node, s.tracerLogin(strings.ReplaceAll(node, "_", ".")))
		for _, subject := range []string{"kill.global", "exiting.cgroup", "gap.restart", "node.status"} {
			c.stores("oom.v1." + subject + "." + node)
			c.mayNot("oom.v1." + subject + "." + other)
		}
		c.mayNot("oom.v1.outcome.annotated."+node, "oom.v1.eviction.x."+node, "oom.v1.kill.global."+node+".x", "oom.v2.kill.global."+node, "anything")
		c.mayNot(streamsOf...)
		c.mayNotHear("oom.v1.>", ">", "_INBOX_oom-tracer."+other+".>", "_INBOX_oom-tracer.>", "_INBOX_oom-annotator.>", "$JS.EVENT.>", "$SYS.>")
	}
	if _, err := nats.Connect(s.urls[0], nats.UserInfo("oom-tracer", s.passwords["tracer"])); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("a tracer without a key: %v", err)
	}

	owner := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
	for _, name := range []string{event.StreamName, event.NodesStreamName, "KV_" + bus.BucketName} {
		stream, err := owner.js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		info := stream.CachedInfo()
		if info.Config.Replicas != 3 || info.Config.Storage != jetstream.FileStorage {
			t.Errorf("stream %s: %+v", name, info.Config)
		}
	}
	// With a stream's leader on another server than the client's.
	for _, u := range s.attackers() {
		if got := s.attack(u); len(got) > 0 {
			t.Errorf("%s stored what it may not:\n%s", u.user, strings.Join(got, "\n"))
		}
	}
}

// TestFirstInstall: the annotator is there before the streams, in the smallest volume that the chart takes. It waits for
// them, asks for nothing that is not its own, and nobody logs a warning.
func TestFirstInstall(t *testing.T) {
	c := kubetest.Start(t)
	s := newServers(t, nil, "--values", root+"/deploy/examples/single-node.yaml", "--set", "nats.storage.size=1299Mi")
	eventually(t, "the server listens", func() error {
		conn, err := net.Dial("tcp", strings.TrimPrefix(s.urls[0], "nats://"))
		if err == nil {
			conn.Close()
		}
		return err
	})
	file := s.config("annotator")
	text := replaced(t, true, readFile(t, file), "listen: :9106", "listen: "+freeAddr(t))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	annotator := startLogged(t, exec.Command(oomtest.Program(t, "oom-annotator"), "--config", file, "--kubeconfig", c.Kubeconfig(c.Annotator())))
	for _, line := range []string{"waiting for the stream", "waiting for the bucket"} {
		eventually(t, line, func() error {
			if !strings.Contains(readFile(t, annotator), line) {
				return errors.New("not logged")
			}
			return nil
		})
	}
	s.setup()
	owner := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
	eventually(t, "the annotator consumes", func() error {
		_, err := owner.js.Consumer(t.Context(), event.StreamName, "oom-annotator")
		return err
	})
	for _, log := range append(s.logs, annotator) {
		for line := range strings.Lines(readFile(t, log)) {
			// The passwords come from a Secret, and are in no file.
			if !strings.Contains(line, "Plaintext passwords detected") && strings.Contains(line, "[WRN]") || strings.Contains(line, "[ERR]") || strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
				t.Errorf("logged: %s", line)
			}
		}
	}
}

// TestSharedTracer: with one user for all tracers, on one server: it publishes for every node, and reads and
// changes nothing. And what those may who are no tracers.
func TestSharedTracer(t *testing.T) {
	s := startServers(t, "--values", root+"/deploy/examples/single-node.yaml", "--set", "nats.tracers=shared")
	for _, node := range []string{"node-1", "node-2"} {
		c := s.connect("oom-tracer."+node, nats.UserInfo("oom-tracer", s.passwords["tracer"]))
		for _, subject := range []string{"kill.global.node-1", "exiting.cgroup.node-2", "gap.restart.node-1", "node.status.node-1"} {
			c.stores("oom.v1." + subject)
		}
		c.mayNot("oom.v1.outcome.annotated."+node, "oom.v1.eviction.x."+node, "oom.v1.kill.global.a.b", "anything")
		c.mayNot(streamsOf...)
		c.mayNotHear("oom.v1.>", ">", "_INBOX_oom-annotator.>", "_INBOX_oom-tap.>", "$JS.EVENT.>", "$SYS.>")
	}

	// Who only reads, with the real program.
	status, err := json.Marshal(event.NodeStatus{})
	if err != nil {
		t.Fatal(err)
	}
	tracer := s.connect("oom-tracer.node-1", nats.UserInfo("oom-tracer", s.passwords["tracer"]))
	full, err := os.ReadFile("../../event/testdata/full.json")
	if err != nil {
		t.Fatal(err)
	}
	e, err := event.Parse(full)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := e.Subject()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tracer.js.Publish(t.Context(), subject, full); err != nil {
		t.Fatal(err)
	}
	if _, err := tracer.js.Publish(t.Context(), "oom.v1.node.status.node-1", status); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--since", "1h", "--no-follow", "--output", "json"}, {"--count", "1", "--since", "1h", "--output", "json"},
		{"nodes"},
	} {
		for _, who := range []string{"tap", "owner"} {
			cmd := exec.CommandContext(t.Context(), oomtest.Program(t, "oom-tap"), append(args, "--config", s.config(who))...)
			out, err := cmd.CombinedOutput()
			if err != nil || strings.Contains(strings.ToLower(string(out)), "violation") || args[0] != "nodes" && !strings.Contains(string(out), e.ID) {
				t.Errorf("oom-tap %v as %s: %v\n%s", args, who, err, out)
			}
		}
	}
	// The user of helm test.
	cmd := exec.CommandContext(t.Context(), oomtest.Program(t, "oom-tap"), "await", "--timeout", "20s", "--pod-uid", e.Container.PodUID, "--config", s.config("tap"))
	if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "ok: pod "+e.Container.PodUID+" was killed") {
		t.Errorf("oom-tap await: %v\n%s", err, out)
	}
	tap := s.connect("oom-tap", nats.UserInfo("oom-tap", s.passwords["tap"]))
	tap.mayNot("oom.v1.kill.global.node-1", "oom.v1.outcome.annotated.node-1", "oom.v1.eviction.x.node-1", "$JS.API.STREAM.DELETE.OOM", "$JS.API.STREAM.PURGE.OOM", "$JS.API.STREAM.UPDATE.OOM",
		"$JS.API.STREAM.MSG.DELETE.OOM", "$JS.API.CONSUMER.DELETE.OOM.oom-annotator", "$JS.API.CONSUMER.CREATE.OOM.oom-annotator",
		"$JS.API.CONSUMER.CREATE.OOM.oom-annotator.oom.v1.kill.>", "$JS.API.CONSUMER.MSG.NEXT.OOM.oom-annotator", "$JS.ACK.OOM.oom-annotator.1.1.1.1.1", "$KV.OOM_ANNOTATOR.state")
	owner := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
	owner.mayNot("oom.v1.kill.global.node-1", "oom.v1.outcome.annotated.node-1", "oom.v1.eviction.x.node-1")
	operator := s.connect("oom-tap", nats.UserInfo("oom-operator", s.passwords["operator"]))
	operator.mayNot("oom.v1.kill.global.node-1", "$JS.API.STREAM.DELETE.OOM", "$JS.API.STREAM.INFO.OOM", "$JS.API.CONSUMER.CREATE.OOM.x", "$KV.OOM_ANNOTATOR.other")
	for _, try := range []struct {
		who  string
		args []string
		ok   bool
		out  string
	}{
		{"tap", []string{"pause", "--reason", "test"}, false, "oom-operator"},
		{"tap", []string{"status"}, true, "marking"},
		{"operator", []string{"pause", "--reason", "test"}, true, "paused by"},
		{"tap", []string{"status"}, true, "paused by"},
		{"operator", []string{"status"}, true, "paused by"},
		{"tap", []string{"resume"}, false, "oom-operator"},
		{"operator", []string{"resume"}, true, "marking resumed"},
	} {
		out, err := exec.CommandContext(t.Context(), oomtest.Program(t, "oom-tap"), append(try.args, "--config", s.config(try.who))...).CombinedOutput()
		if (err == nil) != try.ok || !strings.Contains(string(out), try.out) {
			t.Errorf("oom-tap %v as %s: %v\n%s", try.args, try.who, err, out)
		}
	}
	annotator := s.connect("oom-annotator", nats.UserInfo("oom-annotator", s.passwords["annotator"]))
	annotator.mayNot("oom.v1.kill.global.node-1", "oom.v1.gap.restart.node-1", "$JS.API.STREAM.DELETE.OOM", "$JS.API.STREAM.UPDATE.OOM")
	if _, err := nats.Connect(s.urls[0]); !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("without a user: %v", err)
	}
}
