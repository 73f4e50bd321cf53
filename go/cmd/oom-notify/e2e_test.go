package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/notify"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// process is a program that goes with the test.
type process struct {
	cmd  *exec.Cmd
	out  *oomtest.Output
	done chan struct{}
}

func start(t *testing.T, program string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(oomtest.Program(t, program), args...), out: &oomtest.Output{}, done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.SysProcAttr = p.out, p.out, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait()
	}()
	t.Cleanup(func() {
		p.end(syscall.SIGKILL)
		if t.Failed() {
			t.Logf("%s:\n%s", program, p.out)
		}
	})
	return p
}

// end ends the process, and waits until it has ended.
func (p *process) end(signal syscall.Signal) {
	_ = p.cmd.Process.Signal(signal)
	<-p.done
}

func within(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); !cond(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", limit, what)
		}
	}
}

// rig is a NATS server with the streams, and an oom-notify.
type rig struct {
	t          *testing.T
	config     string // file
	metrics    string // address
	natsServer func() *process
	nats       *process
	conn       *bus.Conn
	notify     *process
	pid        uint32 // of the last kill
}

// newRig starts NATS. The section notify of the config has the receivers.
func newRig(t *testing.T, receivers string) *rig {
	t.Helper()
	addr, dir := oomtest.FreeAddr(t), t.TempDir()
	host, port, _ := net.SplitHostPort(addr)
	r := &rig{t: t, config: filepath.Join(dir, "config.yaml"), metrics: oomtest.FreeAddr(t)}
	text := fmt.Sprintf("nats: {url: 'nats://%s'}\nlog: {level: debug}\nnotify: {listen: %q, min_interval: 0s, %s}\n", addr, r.metrics, receivers)
	if err := os.WriteFile(r.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r.natsServer = func() *process {
		return start(t, "nats-server", "-a", host, "-p", port, "-js", "-sd", filepath.Join(dir, "store"))
	}
	r.nats = r.natsServer()
	var err error
	r.conn, err = bus.Connect(t.Context(), config.NATS{URL: "nats://" + addr}, bus.Options{Name: "owner", Background: true}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.conn.Close)
	if err := bus.EnsureStreams(t.Context(), r.conn, config.Default().NATS.Stream); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) start() { r.notify = start(r.t, "oom-notify", "--config", r.config) }

func (r *rig) publish(subject, id string, message any) {
	r.t.Helper()
	data, err := json.Marshal(message)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.conn.JetStream().PublishAsync(subject, data, jetstream.WithMsgID(id)); err != nil {
		r.t.Fatal(err)
	}
}

// kill publishes a kill and, unless owner is empty, its outcome, in a pod of that owner.
func (r *rig) kill(owner string) (id string) {
	r.t.Helper()
	r.pid++
	limit := uint64(512 << 20)
	e := event.Event{
		Schema: event.Schema, Seq: uint64(r.pid), Time: time.Now(), BoottimeNS: 1, Node: event.Node{Name: "node-1", BootID: "boot"},
		Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled, Victim: event.Victim{PID: r.pid, TID: r.pid, Comm: "java", StartBoottimeNS: 1},
		Limit: &event.Limit{Level: event.LevelPod, Max: &limit},
	}
	e.ID = event.VictimID("boot", r.pid, 1)
	r.publish("oom.v1.kill.cgroup.node-1", e.ID, e)
	if owner != "" {
		o := event.Outcome{
			Schema: event.Schema, ID: event.OutcomeID(e.ID, event.StageAnnotate), Kill: e.ID, Stage: event.StageAnnotate, Time: time.Now(),
			Result: event.ResultSkipped, Reason: event.ReasonLevel, Node: "node-1", Container: "app",
			Pod: &event.PodRef{Namespace: "shop", Name: "cart-1", UID: "uid", Owner: owner},
		}
		subject, err := o.Subject()
		if err != nil {
			r.t.Fatal(err)
		}
		r.publish(subject, o.ID, o)
	}
	return e.ID
}

func (r *rig) gap(cause event.GapCause) {
	r.t.Helper()
	g := event.Gap{Schema: event.Schema, ID: "gap-" + string(cause), Time: time.Now(), Node: event.Node{Name: "node-1", BootID: "boot"}, Cause: cause}
	r.publish("oom.v1.gap."+string(cause)+".node-1", g.ID, g)
}

// stored waits until the stream has everything that was published.
func (r *rig) stored() {
	r.t.Helper()
	select {
	case <-r.conn.JetStream().PublishAsyncComplete():
	case <-time.After(time.Minute):
		r.t.Fatal("the stream does not take messages")
	}
}

// left is how many messages are not delivered, and how many have no ack.
func (r *rig) left() (pending uint64, unacked int, err error) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 10*time.Second)
	defer cancel()
	consumer, err := r.conn.JetStream().Consumer(ctx, event.StreamName, notify.Name)
	if err != nil {
		return 0, 0, err
	}
	return consumer.CachedInfo().NumPending, consumer.CachedInfo().NumAckPending, nil
}

func (r *rig) settled() {
	r.t.Helper()
	within(r.t, 20*time.Second, "every message has its ack", func() bool {
		pending, unacked, err := r.left()
		return err == nil && pending == 0 && unacked == 0
	})
}

// metric reads a line of /metrics.
func (r *rig) metric(series string) string {
	response, err := http.Get("http://" + r.metrics + "/metrics")
	if err != nil {
		return err.Error()
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	return "absent"
}

// hook is a webhook, which takes messages while it is up.
type hook struct {
	addr string

	mu       sync.Mutex
	messages []notify.Notification
	before   func(n *notify.Notification) // called before a message is answered
	status   int
	server   *http.Server
}

func newHook(t *testing.T) *hook {
	h := &hook{addr: oomtest.FreeAddr(t), status: http.StatusOK}
	h.up(t)
	t.Cleanup(h.down)
	return h
}

func (h *hook) up(t *testing.T) {
	t.Helper()
	l, err := net.Listen("tcp", h.addr)
	if err != nil {
		t.Fatal(err)
	}
	h.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, request *http.Request) {
		var n notify.Notification
		if err := json.NewDecoder(request.Body).Decode(&n); err != nil {
			t.Errorf("the message: %v", err)
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.before != nil {
			h.before(&n)
		}
		if h.status == http.StatusOK {
			h.messages = append(h.messages, n)
		}
		w.WriteHeader(h.status)
	})}
	go func(s *http.Server) { _ = s.Serve(l) }(h.server)
}

func (h *hook) down() { h.server.Close() }

func (h *hook) got() []notify.Notification {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.messages)
}

// kills is how many kills, or gaps, the messages of a group are about.
func (h *hook) kills(group string) (count int) {
	for _, n := range h.got() {
		if n.Group == group {
			count += n.Count
		}
	}
	return count
}

// TestKilled: oom-notify is killed when the receiver has the message and before the stream has the ack. The next one sends it once more.
func TestKilled(t *testing.T) {
	oomtest.Slow(t) // takes as long as the server waits for an acknowledgement: 30 s
	h := newHook(t)
	r := newRig(t, fmt.Sprintf("webhook: {url: 'http://%s'}, group_wait: 100ms", h.addr))
	h.before = func(*notify.Notification) {
		h.before = nil
		_ = r.notify.cmd.Process.Kill()
	}
	r.start()
	id := r.kill("Deployment/cart")
	<-r.notify.done
	r.start()
	within(t, time.Minute, "the second message", func() bool { return len(h.got()) == 2 })
	r.settled()
	time.Sleep(time.Second)
	if got := h.got(); len(got) != 2 || got[0].Items[0].ID != id || got[1].Items[0].ID != id || got[1].Title != "OOM: Deployment shop/cart: 1 kill" {
		t.Errorf("%+v", got)
	}
}

// TestStorm: 2,000 kills of one Deployment are few messages, with each kill once; a restart in between loses none.
func TestStorm(t *testing.T) {
	h := newHook(t)
	r := newRig(t, fmt.Sprintf("webhook: {url: 'http://%s'}, group_wait: 1s, group_interval: 5s", h.addr))
	r.start()
	for n := range 2000 {
		r.kill("Deployment/cart")
		if n == 1000 {
			r.stored()
			r.notify.end(syscall.SIGTERM)
			r.start()
		}
	}
	within(t, 2*time.Minute, "all kills", func() bool { return h.kills("shop/Deployment/cart") >= 2000 })
	r.settled()
	if got := h.got(); len(got) > 10 || h.kills("shop/Deployment/cart") != 2000 {
		t.Errorf("%d messages about %d kills", len(got), h.kills("shop/Deployment/cart"))
	}
}

// TestAway: while receiver, oom-notify or NATS are away, everything waits; what is no message of ours holds up nothing; kills without an
// outcome and gaps are sent too.
func TestAway(t *testing.T) {
	h := newHook(t)
	h.down()
	r := newRig(t, fmt.Sprintf("webhook: {url: 'http://%s'}, group_wait: 100ms, group_interval: 1s, wait_for_outcome: 1s", h.addr))
	r.start()
	r.publish("oom.v1.kill.cgroup.node-1", "bad", "no kill")
	r.publish("oom.v1.kill.cgroup.node-2", "forged", map[string]string{"schema": event.Schema})
	r.kill("Deployment/cart")
	r.kill("")
	r.gap(event.GapReboot)
	within(t, 20*time.Second, "the receiver fails", func() bool {
		return r.metric(`oom_tracer_ready{check="webhook"}`) == "0" && r.metric("oom_tracer_notify_waiting") == "3"
	})
	if _, unacked, err := r.left(); err != nil || unacked != 3 || r.metric("oom_tracer_notify_malformed_total") != "2" {
		t.Errorf("%d without ack, %v, malformed: %s", unacked, err, r.metric("oom_tracer_notify_malformed_total"))
	}
	r.notify.end(syscall.SIGTERM)
	if !strings.Contains(r.notify.out.String(), "kills and gaps returned to the stream\" count=3") {
		t.Errorf("the end of oom-notify")
	}
	r.kill("Deployment/mail")
	r.stored()
	r.nats.end(syscall.SIGKILL)
	r.start()
	r.nats = r.natsServer()
	h.up(t)
	for _, group := range []string{"shop/Deployment/cart", "shop/Deployment/mail", "node/node-1", "gap/reboot"} {
		within(t, time.Minute, group, func() bool { return h.kills(group) == 1 })
	}
	r.settled()
	within(t, 5*time.Second, "ready", func() bool { return r.metric(`oom_tracer_ready{check="webhook"}`) == "1" })
	for _, n := range h.got() {
		if n.Group == "gap/reboot" && n.Title != "OOM gap: node node-1: kills may be missing (reboot)" {
			t.Errorf("%+v", n)
		}
	}
}

// TestAlertmanager: a real Alertmanager has the alerts, one for each owner and one for gaps; a receiver beside it that refuses everything
// changes nothing.
func TestAlertmanager(t *testing.T) {
	addr, dir := oomtest.FreeAddr(t), t.TempDir()
	file := filepath.Join(dir, "alertmanager.yml")
	if err := os.WriteFile(file, []byte("route: {receiver: none}\nreceivers: [{name: none}]\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, "alertmanager", "--config.file", file, "--storage.path", dir, "--web.listen-address", addr, "--cluster.listen-address=")
	h := newHook(t)
	h.status = http.StatusBadRequest
	r := newRig(t, fmt.Sprintf("alertmanager: {url: 'http://%s'}, webhook: {url: 'http://%s'}, link: 'https://example.com/d', group_wait: 100ms, group_interval: 1s", addr, h.addr))
	r.start()
	r.kill("Deployment/cart")
	r.kill("StatefulSet/db")
	r.gap(event.GapWrapped)
	type alert struct {
		Labels, Annotations map[string]string
		StartsAt, EndsAt    time.Time
		GeneratorURL        string
		Status              struct{ State string }
	}
	alerts := func() (found map[string]alert) {
		response, err := http.Get("http://" + addr + "/api/v2/alerts")
		if err != nil {
			return nil // it starts
		}
		defer response.Body.Close()
		var all []alert
		if err := json.NewDecoder(response.Body).Decode(&all); err != nil {
			return nil
		}
		found = map[string]alert{}
		for _, a := range all {
			found[a.Labels["owner"]+a.Labels["cause"]] = a
		}
		return found
	}
	within(t, time.Minute, "three alerts", func() bool { return len(alerts()) == 3 })
	first := alerts()
	cart := first["cart"]
	if cart.Labels["alertname"] != "OOMKill" || cart.Labels["namespace"] != "shop" || cart.Labels["owner_kind"] != "Deployment" || cart.Labels["severity"] != "warning" ||
		cart.Annotations["summary"] != "OOM: Deployment shop/cart: 1 kill" || !strings.Contains(cart.Annotations["description"], "OOM killer killed java[1]") ||
		cart.GeneratorURL != "https://example.com/d" || cart.Status.State != "active" || time.Until(cart.EndsAt) < 10*time.Minute || time.Since(cart.StartsAt) > time.Minute {
		t.Errorf("%+v", cart)
	}
	if gap := first["wrapped"]; gap.Labels["alertname"] != "OOMKillsNotRecorded" || gap.Status.State != "active" {
		t.Errorf("%+v", gap)
	}
	r.kill("Deployment/cart")
	within(t, time.Minute, "the alert goes on", func() bool {
		return strings.Contains(alerts()["cart"].Annotations["description"], "java[3]")
	})
	if now := alerts()["cart"]; len(alerts()) != 3 || !now.StartsAt.Equal(cart.StartsAt) || !now.EndsAt.After(cart.EndsAt) {
		t.Errorf("%+v", now)
	}
	r.settled()
	if given := r.metric(`oom_tracer_notify_given_up_total{reason="refused",receiver="webhook"}`); given != "4" {
		t.Errorf("given up: %s", given)
	}
}
