package deploy

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"net/http"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// typedIn are the alerts that testdata/alerts-test.yaml alone shows to fire, and why.
var typedIn = map[string]string{
	"OOMTracerNodeWithoutTracer": "kube_node_info is a series of kube-state-metrics",
	"OOMTracerUnseenKills":       "the BPF program sees every kill of a kernel that calls it",
}

// ofTracer are the alerts that TestTracerAlertsFire shows to fire.
var ofTracer = []string{
	"OOMTracerNodeNotWatched", "OOMTracerGap", "OOMTracerNATSAway", "OOMTracerNotStored", "OOMTracerStateFile", "OOMTracerErrors", "OOMKillsOnNode", "OOMNodeOutOfMemory",
}

// scrape reads the metrics of a program of ours.
func scrape(address string) (exposed, error) {
	resp, err := http.Get("http://" + address + "/metrics")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return readMetrics(resp.Body)
}

// samples are the values of the counters and gauges of ours, by their series.
func (e exposed) samples(job string) map[string]float64 {
	all := map[string]float64{}
	for name, family := range e {
		for _, m := range family.Metric {
			if !strings.HasPrefix(name, "oom_tracer_") || m.Histogram != nil {
				continue
			}
			series := name + "{" + target(job)
			for _, l := range m.Label {
				series += fmt.Sprintf(",%s=%q", l.GetName(), l.GetValue())
			}
			all[series+"}"] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
		}
	}
	return all
}

// target are the labels that Prometheus adds to the series of a program.
func target(job string) string {
	labels := fmt.Sprintf("job=%q,instance=\"a\"", job)
	if job == "oom-tracer" {
		labels += `,node="node-1"`
	}
	return labels
}

// up is the series that Prometheus makes of the scrapes of a program.
func up(job string) string { return fmt.Sprintf("up{job=%q,node=\"node-1\",instance=\"a\"}", job) }

// ended ends a program. The scrape of it fails.
func ended(t *testing.T, cmd *exec.Cmd, address string) exposed {
	t.Helper()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	now, err := scrape(address)
	if err == nil {
		t.Errorf("%s still answers", cmd.Path)
	}
	return now
}

// until waits for series with at least these values, and returns all of that scrape.
func until(t *testing.T, what, address, job string, want map[string]float64) (now exposed) {
	t.Helper()
	within(t, 90*time.Second, what, func() bool {
		var err error
		if now, err = scrape(address); err != nil {
			return false
		}
		samples := now.samples(job)
		for series, value := range want {
			metric, labels, _ := strings.Cut(series, "{")
			if samples[metric+"{"+target(job)+","+labels] < value && samples[metric+"{"+target(job)+"}"] < value {
				return false
			}
		}
		return true
	})
	return now
}

// fires is an alert that fires.
type fires struct {
	alert, summary string
	labels         map[string]string
}

// inState is a test of promtool: what a program exposed before it was in a state, and in it.
type inState struct {
	name, job string
	scrapes   []exposed // each is what Prometheus sees for 10 minutes, the last one for 5 hours; nil: the scrape failed
	after     int       // minutes from the last scrape until the alerts are looked at
	want      []fires   // no other alert fires
	absent    string    // the job of a program that Prometheus has no target of. The others answer
}

// write is the test in promtool's format.
func (s *inState) write(alerts []string) map[string]any {
	series := map[string]bool{}
	var scrapes []map[string]float64
	for _, e := range s.scrapes {
		samples := e.samples(s.job)
		samples[up(s.job)] = 0
		if e != nil {
			samples[up(s.job)] = 1
		}
		scrapes = append(scrapes, samples)
		for name := range scrapes[len(scrapes)-1] {
			series[name] = true
		}
	}
	var input []map[string]string
	for _, name := range slices.Sorted(maps.Keys(series)) {
		values := ""
		for i, scrape := range scrapes {
			times := 9
			if i == len(scrapes)-1 {
				times = 300
			}
			if value, ok := scrape[name]; ok && !math.IsNaN(value) { // promtool cannot write NaN, which no alert is about
				values += fmt.Sprintf("%sx%d ", strconv.FormatFloat(value, 'f', -1, 64), times)
			} else {
				values += fmt.Sprintf("_x%d ", times+1)
			}
		}
		input = append(input, map[string]string{"series": name, "values": values})
	}
	for _, job := range []string{"oom-tracer", "oom-annotator", "oom-auth"} {
		if job != s.job && job != s.absent {
			input = append(input, map[string]string{"series": up(job), "values": "1x400"})
		}
	}
	var cases []map[string]any
	for _, alert := range alerts {
		expected := []map[string]any{}
		for _, f := range s.want {
			if f.alert == alert {
				expected = append(expected, map[string]any{"exp_labels": f.labels, "exp_annotations": map[string]string{
					"summary": f.summary, "runbook_url": "https://github.com/oom-tracer/oom-tracer/blob/main/deploy/docs/runbook.md#" + strings.ToLower(alert),
				}})
			}
		}
		cases = append(cases, map[string]any{"eval_time": fmt.Sprintf("%dm", 10*(len(s.scrapes)-1)+s.after), "alertname": alert, "exp_alerts": expected})
	}
	return map[string]any{"name": s.name, "interval": "1m", "input_series": input, "alert_rule_test": cases}
}

// TestAlertsFire: the real annotator, oom-auth and oom-notify are brought into each state that an alert is about. The alert fires from the metrics
// that they then expose, and no other one does.
func TestAlertsFire(t *testing.T) {
	s := startTokens(t, append(values(t, "config: {policy: {mark_lifetime: 1m, budgets: {node: 0, owner: 0, cooldown: 0s}}}"), "--values", root+"/deploy/examples/single-node.yaml")...)
	auth := s.auth()
	annotator, address := startAnnotator(t, s.servers, s.c)
	s.c.Namespace("shop")
	node := tracerNodes[0]
	tracer := s.connect("oom-tracer."+node, s.tracerLogin(node))
	seq := uint64(0)
	kill := func(pod *corev1.Pod, change func(*event.Event)) {
		t.Helper()
		seq++
		e := event.Event{
			Schema: event.Schema, ID: event.VictimID("boot", uint32(seq), 1), Seq: seq, Time: time.Now().UTC(), BoottimeNS: 1,
			Node:  event.Node{Name: pod.Spec.NodeName, BootID: "boot", Kernel: "6.1", Tier: "fentry"},
			Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled, Victim: event.Victim{PID: uint32(seq), TID: uint32(seq), Comm: "java"},
			Limit: &event.Limit{Level: event.LevelNode}, Container: &event.Container{PodUID: string(pod.UID), ContainerID: s.c.ContainerID(pod, "main"), QoS: "burstable"},
		}
		change(&e)
		data, err := json.Marshal(&e)
		if err != nil {
			t.Fatal(err)
		}
		subject, err := e.Subject()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tracer.js.Publish(t.Context(), subject, data, jetstream.WithMsgID(e.ID)); err != nil {
			t.Fatal(err)
		}
	}
	const job = "oom-annotator"
	pod := func(name string) *corev1.Pod {
		return s.c.Pod("shop", name, node, func(p *corev1.Pod) {
			p.Labels = map[string]string{"pod-template-hash": "abc"}
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: name + "-abc", UID: "x", Controller: new(true)}}
		})
	}
	var all []inState

	// Kills: of one workload again and again, of a node whose clock is ahead, one that nobody can read; and a mark that nobody acts on.
	ofPod := func(e *event.Event) { e.Limit.Level = event.LevelPod }
	cart := pod("cart")
	kill(cart, ofPod)
	before := until(t, "the first kill", address, job, map[string]float64{"oom_tracer_paused{": 0, `oom_tracer_marked_victims_total{reason="level",stage="skipped"}`: 1})
	all = append(all, inState{name: "as it should be", job: job, scrapes: []exposed{before, before}, after: 12})
	all = append(all, inState{name: "no tracer", job: job, scrapes: []exposed{before, before}, after: 20, want: []fires{
		{"OOMTracerAbsent", "Prometheus scrapes no OOM tracer", map[string]string{"job": "oom-tracer", "severity": "critical"}},
	}, absent: "oom-tracer"})
	for range 3 {
		kill(cart, ofPod)
	}
	kill(pod("clock"), func(e *event.Event) { e.Time, e.Limit.Level = e.Time.Add(time.Hour), event.LevelPod })
	kill(pod("old"), func(e *event.Event) { e.Time = e.Time.Add(-50 * time.Second) })
	if _, err := tracer.js.Publish(t.Context(), "oom.v1.kill.global."+node, []byte("{")); err != nil {
		t.Fatal(err)
	}
	after := until(t, "these kills", address, job, map[string]float64{
		`oom_tracer_events_total{reason="clock",stage="error"}`: 1, `oom_tracer_marked_victims_total{reason="lifetime",stage="expired"}`: 1,
		`oom_tracer_marked_victims_total{reason="malformed",stage="failed"}`: 1, `oom_tracer_marked_victims_total{reason="level",stage="skipped"}`: 5,
	})
	all = append(all, inState{name: "kills", job: job, scrapes: []exposed{before, after}, after: 12, want: []fires{
		{"OOMNodeClockAhead", "The clock of a node with OOM kills is ahead of the clock of NATS", map[string]string{"instance": "a", "job": job, "stage": "error", "reason": "clock", "severity": "warning"}},
		{"OOMAnnotatorFailing", "oom-annotator could not process OOM kills (malformed)", map[string]string{"reason": "malformed", "severity": "warning"}},
		{"OOMMarksStay", "Marked pods were not evicted in time (expired)", map[string]string{"stage": "expired", "severity": "warning"}},
		{"OOMKillsRepeat", "Deployment shop/cart is OOM-killed repeatedly", map[string]string{"namespace": "shop", "owner_kind": "Deployment", "owner": "cart", "severity": "warning"}},
	}})

	// An API server that does not answer: kills wait.
	waits := pod("waits")
	time.Sleep(time.Second) // for the watch
	thaw := s.c.Freeze()
	for range 150 {
		kill(waits, func(*event.Event) {})
	}
	behind := until(t, "150 kills wait", address, job, map[string]float64{"oom_tracer_kills_waiting{": 150})
	all = append(all, inState{name: "API server frozen", job: job, scrapes: []exposed{after, behind}, after: 12, want: []fires{
		{"OOMAnnotatorBehind", "150 OOM kills wait for oom-annotator", map[string]string{"instance": "a", "job": job, "severity": "warning"}},
	}})
	thaw()
	before = until(t, "they are decided", address, job, map[string]float64{`oom_tracer_marked_victims_total{reason="already",stage="skipped"}`: 149})

	tap := func(who string, args ...string) {
		t.Helper()
		if out, err := exec.Command(oomtest.Program(t, "oom-tap"), append(args, "--config", s.config(who))...).CombinedOutput(); err != nil {
			t.Fatalf("oom-tap %q: %v: %s", args, err, out)
		}
	}
	tap("operator", "pause", "--reason", "test")
	paused := until(t, "the pause", address, job, map[string]float64{"oom_tracer_paused{": 1})
	all = append(all, inState{name: "paused", job: job, scrapes: []exposed{before, paused}, after: 255, want: []fires{
		{"OOMAnnotatorPaused", "Marking has been paused for more than 4 hours", map[string]string{"severity": "info"}},
	}})
	tap("operator", "resume")

	kv, err := s.connect("oom-tap", nats.UserInfo("oom-operator", s.passwords["operator"])).js.KeyValue(t.Context(), bus.BucketName)
	if err == nil {
		err = kv.Delete(t.Context(), budget.Key)
	}
	if err != nil {
		t.Fatal(err)
	}
	refused := until(t, "the state is refused", address, job, map[string]float64{"oom_tracer_budget_state_refused{": 1})
	all = append(all, inState{name: "state deleted", job: job, scrapes: []exposed{before, refused}, after: 12, want: []fires{
		{"OOMAnnotatorStateRefused", "The state of budgets and pause is absent or not valid: no pod is marked", map[string]string{"severity": "warning"}},
	}})

	tap("owner", "restore")

	// Logins that oom-auth refuses, for as long as somebody tries: each scrape has more of them.
	logins := []exposed{auth.metrics(t)}
	for i := range 3 {
		s.tracer("not a token")
		logins = append(logins, until(t, "a refused login", auth.listen, "oom-auth", map[string]float64{`oom_tracer_auth_decisions_total{result="refused"}`: float64(i + 1)}))
	}
	all = append(all, inState{name: "wrong token", job: "oom-auth", scrapes: logins, after: 5, want: []fires{
		{"OOMAuthRefuses", "Logins to NATS with a token fail (refused)", map[string]string{"result": "refused", "severity": "warning"}},
	}})

	within(t, 30*time.Second, "the state is restored", func() bool {
		now, err := scrape(address)
		before = now
		refused, known := now.samples(job)["oom_tracer_budget_state_refused{"+target(job)+"}"]
		return err == nil && known && refused == 0
	})
	s.stop(0)
	within(t, 30*time.Second, "the annotator is not ready", func() bool {
		now, err := scrape(address)
		after = now
		return err == nil && now.samples(job)[`oom_tracer_ready{job="oom-annotator",instance="a",check="nats"}`] == 0
	})
	all = append(all, inState{name: "NATS away", job: job, scrapes: []exposed{before, after}, after: 12, want: []fires{
		{"OOMAnnotatorNotReady", "No oom-annotator is ready: check nats fails", map[string]string{"check": "nats", "severity": "warning"}},
	}})
	all = append(all, inState{name: "annotator ended", job: job, scrapes: []exposed{before, ended(t, annotator, address)}, after: 12, want: []fires{
		{"OOMAnnotatorDown", "No oom-annotator runs: pods are not marked", map[string]string{"severity": "warning"}},
	}})

	all = append(all, inState{name: "oom-notify without NATS", job: "oom-notify", scrapes: []exposed{scrapeNotify(t)}, after: 12, want: []fires{
		{"OOMNotifyNotSending", "oom-notify cannot send messages: check nats fails", map[string]string{"check": "nats", "severity": "warning"}},
	}})
	fireAll(t, all, func(alert string) bool { return typedIn[alert] == "" && !slices.Contains(ofTracer, alert) })
}

// fireAll has promtool look at the alerts in all states. Those that fire in one of them are those that want names.
func fireAll(t *testing.T, all []inState, want func(alert string) bool) {
	t.Helper()
	names, _, rules := alerts(t)
	var tests []map[string]any
	fired := map[string]bool{}
	for _, state := range all {
		tests = append(tests, state.write(names))
		for _, f := range state.want {
			fired[f.alert] = true
		}
	}
	for _, name := range names {
		if fired[name] != want(name) {
			t.Errorf("%s: fires in a state of the real programs: %v, want %v", name, fired[name], want(name))
		}
	}
	file, err := yaml.Marshal(map[string]any{"rule_files": []string{"alerts.yaml"}, "evaluation_interval": "1m", "tests": tests})
	if err != nil {
		t.Fatal(err)
	}
	promtool(t, map[string][]byte{"alerts.yaml": rules, "test.yaml": file}, "test", "rules", "test.yaml")
}
