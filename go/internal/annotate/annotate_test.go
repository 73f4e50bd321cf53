package annotate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/mark"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// These tests are about what no API server does on demand. What one does is in go/cmd/oom-annotator.

const key = "oom-tracer.alpha.kubernetes.io/evict-me"

// acting is the shipped policy with the annotation set.
func acting() config.Policy {
	p := config.Default().Policy
	p.Annotation = key + "=true"
	return p
}

// kill is an event for which the pod is marked.
func kill() *event.Event {
	return &event.Event{
		Schema: event.Schema, ID: "boot-1-2", Seq: 1, Time: time.Unix(1000, 0).UTC(), Node: event.Node{Name: "node-1"},
		Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled, Victim: event.Victim{PID: 1, TID: 1, Comm: "java"},
		Limit:     &event.Limit{Level: event.LevelNode},
		Container: &event.Container{PodUID: "uid-1", ContainerID: "c"},
	}
}

var resource = schema.GroupResource{Resource: "pods"}

// world is everything around an Annotator.
type world struct {
	*Annotator
	now      time.Time
	registry *prometheus.Registry

	mu      sync.Mutex
	pod     *corev1.Pod // on the API server; nil: none
	watched string      // the resourceVersion that the watch has delivered; empty: the pod must be read
	gets    int
	getErr  []error // what the next ones answer; nil: as it should
	patches []string
	patched []error // likewise
	status  []error // likewise
	find    error
	stale   error
	full    error // of the publisher
	verdict budget.Verdict
	claim   error
	claims  []string
	// contested: other pods of the owner on the node are marked. granted: the kill has the right.
	contested, granted bool
	released           error
	stored             map[string]string // outcomes that the stream holds, by subject
	lastErr            error
	asked              []string // the subjects that were looked at
	events             []string // in Kubernetes
	out                []bus.Msg
	acks               []string
}

func newWorld() *world {
	w := &world{now: time.Unix(1001, 0), stored: map[string]string{}, registry: prometheus.NewPedanticRegistry()}
	w.pod = &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "cart", UID: "uid-1", ResourceVersion: "7"}, Spec: corev1.PodSpec{NodeName: "node-1"}}
	cfg := config.Default()
	cfg.Policy = acting()
	metrics, log, now := NewMetrics(w.registry, 0), slog.New(slog.DiscardHandler), func() time.Time { return w.now }
	w.Annotator = &Annotator{
		Policy: cfg.Policy, Wait: 30 * time.Second, Finder: w, Stale: func() error { return w.stale }, Events: w, InFlight: NewInFlight(0), Metrics: metrics, Log: log, Now: now,
		Marker:   &mark.Marker{Policy: cfg.Policy, Terms: decide.Terms(&cfg), API: w, Ledger: w, Now: now},
		Outcomes: &Outcomes{Publisher: w, Last: w.last, Metrics: metrics, Log: log},
	}
	return w
}

func (w *world) Claim(_ context.Context, r budget.Request) (budget.Verdict, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.claims = append(w.claims, fmt.Sprintf("%s %s %s %d", r.Kill, r.Node, r.Owner, r.Killed.Unix()))
	v := w.verdict
	if v.Contested = w.contested && !r.Read; v.Granted() && w.claim == nil {
		v.New = !w.granted
		w.granted = true
	}
	return v, w.claim
}

func (w *world) Release(_ context.Context, kill string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.claims = append(w.claims, "release "+kill)
	return w.released
}

func (w *world) last(_ context.Context, subject string) ([]byte, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.asked = append(w.asked, subject)
	data, ok := w.stored[subject]
	if w.lastErr == nil && !ok {
		return nil, fmt.Errorf("read: %w", bus.ErrNoMessage)
	}
	return []byte(data), w.lastErr
}

func (w *world) Record(e *event.Event, o *event.Outcome, seq uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if seq == 0 {
		w.events = append(w.events, "without a sequence")
	}
	w.events = append(w.events, e.ID+" "+string(o.Result))
}

func (w *world) Find(node, uid, containerID string) (pods.Found, error) {
	if w.find != nil {
		return pods.Found{}, w.find
	}
	if uid == "" {
		uid = "uid-1"
	}
	return pods.Found{Pod: &pods.Pod{Namespace: "shop", Name: "cart", UID: uid, ResourceVersion: w.watched, Node: "node-1", Selected: true}}, nil
}

func next(errs *[]error) error {
	if len(*errs) == 0 {
		return nil
	}
	err := (*errs)[0]
	*errs = (*errs)[1:]
	return err
}

func (w *world) Get(context.Context, string, string) (*corev1.Pod, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.gets++
	if err := next(&w.getErr); err != nil {
		return nil, err
	}
	if w.pod == nil {
		return nil, fmt.Errorf("get pods: %w", apierrors.NewNotFound(resource, "cart"))
	}
	return w.pod.DeepCopy(), nil
}

func (w *world) Patch(_ context.Context, namespace, name string, patch []byte) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.patches = append(w.patches, string(patch))
	if err := next(&w.patched); err != nil {
		return "", err
	}
	var p struct{ Metadata metav1.ObjectMeta }
	if err := json.Unmarshal(patch, &p); err != nil {
		return "", err
	}
	switch {
	case w.pod == nil:
		return "", apierrors.NewNotFound(resource, "cart")
	case w.pod.UID != p.Metadata.UID:
		return "", apierrors.NewInvalid(schema.GroupKind{Kind: "Pod"}, "cart", nil)
	case w.pod.ResourceVersion != p.Metadata.ResourceVersion:
		return "", apierrors.NewConflict(resource, "cart", errors.New("changed"))
	}
	w.pod = w.pod.DeepCopy()
	w.pod.Annotations = p.Metadata.Annotations
	w.pod.ResourceVersion += "1"
	return w.pod.ResourceVersion, nil
}

func (w *world) PatchStatus(_ context.Context, namespace, name string, patch []byte) (string, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.patches = append(w.patches, "status "+string(patch))
	return w.pod.ResourceVersion, next(&w.status)
}

func (w *world) Enqueue(m bus.Msg) error {
	if w.full != nil {
		return w.full
	}
	w.mu.Lock()
	w.out = append(w.out, m)
	_, before := w.stored[m.Subject]
	w.mu.Unlock()
	w.Outcomes.Hooks().OnAck(m, before)
	return nil
}

func (w *world) Ack()               { w.acks = append(w.acks, "ack") }
func (w *world) Term(reason string) { w.acks = append(w.acks, "term "+reason) }
func (w *world) Nak(time.Duration)  { w.acks = append(w.acks, "nak") }

// handle works on an event, and returns its outcome, if there is one.
func (w *world) handle(t *testing.T, e *event.Event) *event.Outcome {
	t.Helper()
	data, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := e.Subject()
	if err != nil {
		t.Fatal(err)
	}
	return w.raw(t, subject, data)
}

func (w *world) raw(t *testing.T, subject string, data []byte) *event.Outcome {
	t.Helper()
	before := len(w.out)
	w.Handle(t.Context(), Message{Stored: bus.Stored{ID: "x", Subject: subject, Data: data, Seq: 9, Time: time.Unix(1000, 0)}, Attempt: 1, Acker: w})
	if len(w.acks) == 0 {
		t.Fatal("the message is not acknowledged")
	}
	if len(w.out) == before {
		return nil
	}
	m := w.out[len(w.out)-1]
	o, err := event.ParseOutcome(m.Data)
	if err != nil {
		t.Fatal(err)
	}
	subjectWant, err := o.Subject()
	if err != nil || m.Subject != subjectWant || m.ID != o.ID {
		t.Errorf("outcome %s on %s, %v", m.ID, m.Subject, err)
	}
	return &o
}

// want checks an outcome's result and reason, and how the message was acknowledged last.
func (w *world) want(t *testing.T, o *event.Outcome, want, ack string) {
	t.Helper()
	got := "none"
	if o != nil {
		got = string(o.Result) + "/" + string(o.Reason)
	}
	if last := w.acks[len(w.acks)-1]; got != want || last != ack {
		t.Errorf("outcome %s (%s), want %s (%s)", got, last, want, ack)
	}
}

// A mark by the key of another configuration goes with the new one: the summary names it no longer.
func TestHandleReplaces(t *testing.T) {
	w := newWorld()
	w.pod.Annotations = map[string]string{"example.com/old": "x", "other": "y", w.Marker.Terms.Summary: `{"event":"boot-1-1","annotation":"example.com/old"}`}
	w.want(t, w.handle(t, kill()), "annotated/marked", "ack")
	if len(w.patches) != 1 || !strings.Contains(w.patches[0], `"example.com/old":null`) || strings.Contains(w.patches[0], `"other"`) {
		t.Errorf("patches %q", w.patches)
	}
}

func TestHandleMarks(t *testing.T) {
	w := newWorld()
	e := kill()
	e.Container.ContainerID = strings.Repeat("1", 64)
	e.Limit.Max, e.Limit.Usage = new(uint64(100)), new(uint64(99))
	w.pod.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "main", Image: "example.com/main:1", RestartCount: 7, ContainerID: "containerd://" + e.Container.ContainerID}}
	o := w.handle(t, e)
	w.want(t, o, "annotated/marked", "ack")
	want := event.Outcome{
		Schema: event.Schema, ID: "boot-1-2/annotate", Kill: "boot-1-2", Stage: "annotate", Time: w.now.UTC(), Result: "annotated", Reason: "marked",
		Node: "node-1", Pod: &event.PodRef{Namespace: "shop", Name: "cart", UID: "uid-1"}, Container: "main", Image: "example.com/main:1", Restarts: new(uint32(7)), Annotation: key + "=true",
	}
	if diff := cmp.Diff(want, *o); diff != "" {
		t.Errorf("outcome (-want +got):\n%s", diff)
	}
	wantPatch := `{"metadata":{"annotations":{"oom-tracer.alpha.kubernetes.io/evict-me":"true","oom-tracer.alpha.kubernetes.io/last-kill":` +
		`"{\"event\":\"boot-1-2\",\"annotation\":\"oom-tracer.alpha.kubernetes.io/evict-me\",\"time\":\"1970-01-01T00:16:40Z\",\"scope\":\"global\",\"level\":\"node\",\"container\":\"main\",\"victim\":\"java\",\"pid\":1,\"usage\":99,\"limit\":100,\"node\":\"node-1\"}"` +
		`},"resourceVersion":"7","uid":"uid-1"}}`
	if diff := cmp.Diff([]string{wantPatch}, w.patches); diff != "" {
		t.Errorf("patches (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"boot-1-2 node-1 shop/Pod/cart 1000"}, w.claims); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"boot-1-2 annotated"}, w.events); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
}

// With a condition a mark is two patches. Whatever comes between them, it is the same mark, of the same right.
func TestHandleCondition(t *testing.T) {
	const (
		condition = `status {"metadata":{"resourceVersion":"%s","uid":"uid-1"},"status":{"conditions":[{"lastTransitionTime":"1970-01-01T00:16:41Z",` +
			`"message":"boot-1-2","reason":"OOMKilled","status":"True","type":"example.com/evict"}]}}`
	)
	conflict := apierrors.NewConflict(resource, "cart", errors.New("changed"))
	forbidden := fmt.Errorf("patch pods/status: %w", apierrors.NewForbidden(resource, "cart", errors.New("no")))
	for _, tt := range []struct {
		name        string
		change      func(w *world)
		want, ack   string
		versions    string // of the pod, at each patch of its status
		annotations int    // how often it is annotated
		claims      int
	}{
		{"all goes well", func(w *world) {}, "annotated/marked", "ack", "71", 1, 1},
		{"another condition changes", func(w *world) { w.status = []error{conflict} }, "annotated/marked", "ack", "71 71", 1, 1},
		{"left at once", func(w *world) { w.status = []error{apierrors.NewNotFound(resource, "cart")} }, "annotated/marked", "ack", "71", 1, 1},
		{"no right", func(w *world) { w.status = []error{forbidden} }, "none", "nak", "71", 1, 1},
		{"no right for long", func(w *world) {
			w.status, w.now = []error{forbidden}, time.Unix(1031, 0)
			w.firstForbidden, w.lastForbidden = time.Unix(1001, 0), time.Unix(1020, 0)
		}, "failed/forbidden", "ack", "71", 1, 1},
		{"a replica before got no further than the annotation", func(w *world) {
			w.pod.Annotations = map[string]string{key: "true", w.Marker.Terms.Summary: `{"event":"boot-1-2"}`}
		}, "annotated/marked", "ack", "7", 0, 0},
		{"and it was taken back since", func(w *world) {
			w.pod.Annotations = map[string]string{w.Marker.Terms.Summary: `{"event":"boot-1-2"}`}
		}, "annotated/marked", "ack", "", 0, 0},
		{"and it leaves", func(w *world) {
			w.pod.Annotations = map[string]string{key: "true", w.Marker.Terms.Summary: `{"event":"boot-1-2"}`}
			w.pod.DeletionTimestamp = &metav1.Time{Time: w.now}
		}, "annotated/marked", "ack", "", 0, 0},
		{"done before", func(w *world) {
			w.pod.Annotations = map[string]string{key: "true", w.Marker.Terms.Summary: `{"event":"boot-1-2"}`}
			w.pod.Status.Conditions = []corev1.PodCondition{{Type: "example.com/evict", Status: corev1.ConditionTrue, Message: "boot-1-2"}}
		}, "annotated/marked", "ack", "", 0, 0},
		{"one of a kill before is there", func(w *world) {
			w.pod.Status.Conditions = []corev1.PodCondition{{Type: "example.com/evict", Status: corev1.ConditionTrue, Message: "boot-1-1"}}
		}, "annotated/marked", "ack", "71", 1, 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			w.Marker.Policy.Condition, w.Marker.Terms.Condition = "example.com/evict", "example.com/evict"
			w.Policy.Condition = w.Marker.Policy.Condition
			tt.change(w)
			w.want(t, w.handle(t, kill()), tt.want, tt.ack)
			annotations := 0
			var got, want []string
			for _, p := range w.patches {
				if strings.HasPrefix(p, "status ") {
					got = append(got, p)
				} else {
					annotations++
				}
			}
			for _, version := range strings.Fields(tt.versions) {
				want = append(want, strings.ReplaceAll(fmt.Sprintf(condition, version), "1970-01-01T00:16:41Z", w.now.UTC().Format(time.RFC3339)))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("patches of the status (-want +got):\n%s", diff)
			}
			if annotations != tt.annotations || len(w.claims) != tt.claims {
				t.Errorf("annotated %d times, %d claims; want %d, %d", annotations, len(w.claims), tt.annotations, tt.claims)
			}
		})
	}
}

// Nothing is marked without a right to it.
func TestHandleClaims(t *testing.T) {
	w := newWorld()
	w.verdict.Refusal = "cluster: 10 of 10"
	o := w.handle(t, kill())
	w.want(t, o, "skipped/budget", "ack")
	if o.Detail != "cluster: 10 of 10" {
		t.Errorf("detail %q", o.Detail)
	}
	w.verdict = budget.Verdict{Paused: &budget.Pause{Reason: "roll-out", By: "ann@host"}}
	o = w.handle(t, kill())
	w.want(t, o, "observed/paused", "ack")
	if o.Detail != "by ann@host: roll-out" {
		t.Errorf("detail %q", o.Detail)
	}
	w.verdict, w.claim = budget.Verdict{}, errors.New("nats is away")
	w.want(t, w.handle(t, kill()), "none", "nak")
	w.now = time.Unix(1600, 0)
	w.want(t, w.handle(t, kill()), "failed/unavailable", "ack")
	if len(w.patches) > 0 {
		t.Errorf("patches without a right: %q", w.patches)
	}

	// Once for each attempt, however often the pod changes, and of whom it is.
	w = newWorld()
	conflict := apierrors.NewConflict(resource, "cart", errors.New("changed"))
	w.patched = []error{conflict, conflict}
	w.pod.Labels = map[string]string{"pod-template-hash": "abc"}
	w.pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "cart-abc", Controller: new(true)}}
	e := kill()
	e.Time = time.Unix(5000, 0) // a clock that is ahead
	w.want(t, w.handle(t, e), "annotated/marked", "ack")
	if diff := cmp.Diff([]string{"boot-1-2 node-1 shop/Deployment/cart 1000"}, w.claims); diff != "" {
		t.Errorf("claims (-want +got):\n%s", diff)
	}
	// Who only observes claims nothing.
	w = newWorld()
	w.Policy.Annotation = ""
	w.want(t, w.handle(t, kill()), "observed/observe_only", "ack")
	if len(w.claims) > 0 {
		t.Errorf("claims %q", w.claims)
	}
}

// A kill that has an outcome is not marked, whatever would be decided now; and what the server refuses is not counted again.
func TestHandleDecided(t *testing.T) {
	w, e := newWorld(), kill()
	const subject = "oom.v1.outcome.boot-1-2_annotate.node-1"
	w.stored[subject] = `{"schema":"oom-tracer/v1","id":"boot-1-2/annotate","kill":"boot-1-2","time":"2026-01-01T00:00:00Z","result":"observed","reason":"paused","node":"node-1"}`
	w.want(t, w.handle(t, e), "none", "ack")
	w.lastErr = errors.New("nats is away")
	w.want(t, w.handle(t, e), "none", "nak")
	if diff := cmp.Diff([]string{subject, subject}, w.asked); diff != "" {
		t.Errorf("asked (-want +got):\n%s", diff)
	}
	if len(w.patches)+len(w.claims)+len(w.events)+len(w.out) > 0 {
		t.Errorf("patches %q, claims %q, events %q, outcomes %v", w.patches, w.claims, w.events, w.out)
	}
	// What is no outcome of it keeps no pod from being marked.
	for _, data := range []string{`{"stream":"OOM","seq":7}`, strings.ReplaceAll(w.stored[subject], "boot-1-2", "boot-1-3")} {
		w := newWorld()
		w.stored[subject] = data
		w.want(t, w.handle(t, e), "annotated/marked", "ack")
	}
	// Who marks nothing need not look.
	e.Limit = nil
	w.want(t, w.handle(t, e), "skipped/no_limit", "ack")
	if len(w.asked) > 2 || len(w.out) != 1 || !w.out[0].Once {
		t.Errorf("asked %q, outcomes %v", w.asked, w.out)
	}
	repeated, skipped := w.Metrics.events.WithLabelValues("skipped", "repeated"), w.Metrics.victims.WithLabelValues("skipped", "no_limit")
	if r, s := testutil.ToFloat64(repeated), testutil.ToFloat64(skipped); r != 2 || s != 0 {
		t.Errorf("%g repeated, %g skipped", r, s)
	}
	// An attempt before this one may have been stored without word of it: that was ours.
	w.Outcomes.Hooks().OnRetry(w.out[0], errors.New("no answer"))
	w.Outcomes.Hooks().OnAck(w.out[0], true)
	if r, s := testutil.ToFloat64(repeated), testutil.ToFloat64(skipped); r != 2 || s != 1 {
		t.Errorf("after another attempt: %g repeated, %g skipped", r, s)
	}
}

// What is true now counts, and not what the store knew.
func TestHandleChanged(t *testing.T) {
	conflict := apierrors.NewConflict(resource, "cart", errors.New("changed"))
	invalid := apierrors.NewInvalid(schema.GroupKind{Kind: "Pod"}, "cart", nil)
	notFound := apierrors.NewNotFound(resource, "cart")
	for _, tt := range []struct {
		name      string
		change    func(w *world)
		want, ack string
		patches   int
	}{
		{"reborn", func(w *world) { w.pod.UID = "uid-2" }, "skipped/reborn", "ack", 0},
		{"gone", func(w *world) { w.pod = nil }, "skipped/gone", "ack", 0},
		{"gone at the last moment", func(w *world) { w.patched = []error{notFound} }, "skipped/gone", "ack", 1},
		{"moved", func(w *world) { w.pod.Spec.NodeName = "node-2" }, "skipped/other_node", "ack", 0},
		{"opted out", func(w *world) {
			w.pod.Annotations = map[string]string{"oom-tracer.alpha.kubernetes.io/opt-out": ""}
		}, "skipped/opt_out", "ack", 0},
		{"marked by another replica", func(w *world) {
			w.pod.Annotations = map[string]string{key: "true", w.Marker.Terms.Summary: `{"event":"boot-1-2"}`}
		}, "annotated/marked", "ack", 0},
		{"marked for another kill", func(w *world) { w.pod.Annotations = map[string]string{key: "true"} }, "skipped/already", "ack", 0},
		{"changes twice", func(w *world) { w.patched = []error{conflict, conflict} }, "annotated/marked", "ack", 3},
		{"changes without an end", func(w *world) { w.patched = []error{conflict, conflict, conflict, conflict, conflict} }, "none", "nak", 5},
		{"refused once", func(w *world) { w.patched = []error{invalid} }, "annotated/marked", "ack", 2},
		{"refused for good", func(w *world) { w.patched = []error{invalid, invalid, invalid} }, "failed/rejected", "ack", 2},
		{"refused for good, and NATS is away", func(w *world) {
			w.patched, w.released = []error{invalid, invalid, invalid}, errors.New("nats is away")
		}, "none", "nak", 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			tt.change(w)
			w.want(t, w.handle(t, kill()), tt.want, tt.ack)
			if len(w.patches) != tt.patches {
				t.Errorf("%d patches, want %d", len(w.patches), tt.patches)
			}
			// Only a mark that was refused for good, and is nowhere, gives its right back.
			if got, want := slices.Contains(w.claims, "release boot-1-2"), strings.HasPrefix(tt.name, "refused for good") || tt.name == "gone at the last moment"; got != want {
				t.Errorf("released: %v, want %v", got, want)
			}
		})
	}
}

// The state that the watch has delivered serves for the first patch. What has changed since is read, and decided again.
func TestHandleWatched(t *testing.T) {
	for _, tt := range []struct {
		name          string
		change        func(w *world)
		want          string
		gets, patches int
		claims        string
	}{
		{"as watched", func(*world) {}, "annotated/marked", 0, 1, "claim"},
		{"changed since", func(w *world) { w.pod.ResourceVersion = "8" }, "annotated/marked", 1, 2, "claim"},
		{"opted out since", func(w *world) {
			w.pod.ResourceVersion, w.pod.Annotations = "8", map[string]string{"oom-tracer.alpha.kubernetes.io/opt-out": ""}
		}, "skipped/opt_out", 1, 1, "claim release"},
		{"marked since", func(w *world) {
			w.pod.ResourceVersion, w.pod.Annotations = "8", map[string]string{key: "true"}
		}, "skipped/already", 1, 1, "claim release"},
		{"marked since for this kill", func(w *world) {
			w.pod.ResourceVersion, w.pod.Annotations = "8", map[string]string{key: "true", w.Marker.Terms.Summary: `{"event":"boot-1-2"}`}
		}, "annotated/marked", 1, 1, "claim"},
		{"reborn since", func(w *world) { w.pod.UID = "uid-2" }, "skipped/reborn", 1, 1, "claim release"},
		{"gone since", func(w *world) { w.pod = nil }, "skipped/gone", 0, 1, "claim release"},
		{"gone since, and an earlier attempt had the claim", func(w *world) { w.pod, w.granted = nil, true }, "skipped/gone", 0, 1, "claim"},
		{"others of the owner were marked", func(w *world) { w.contested = true }, "annotated/marked", 1, 1, "claim claim"},
		{"others of the owner were marked, and so was this one", func(w *world) {
			w.contested, w.pod.ResourceVersion, w.pod.Annotations = true, "8", map[string]string{key: "true"}
		}, "skipped/already", 1, 0, "claim"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			w.watched = "7"
			var after *pods.Pod
			w.Marker.Patched = func(_, p *pods.Pod) { after = p }
			tt.change(w)
			w.want(t, w.handle(t, kill()), tt.want, "ack")
			var claims []string
			for _, claim := range w.claims {
				if act, _, ok := strings.Cut(claim, " boot-1-2"); ok {
					claims = append(claims, act)
				} else {
					claims = append(claims, "claim")
				}
			}
			if got := strings.Join(claims, " "); w.gets != tt.gets || len(w.patches) != tt.patches || got != tt.claims {
				t.Errorf("%d reads, %d patches, %q; want %d, %d, %q", w.gets, len(w.patches), got, tt.gets, tt.patches, tt.claims)
			}
			// What is noted of a patch is what the watch will deliver.
			if wrote := tt.want == "annotated/marked" && tt.name != "marked since for this kill"; wrote != (after != nil) {
				t.Fatalf("noted %+v", after)
			} else if wrote {
				want := w.Marker.Terms.Read(w.pod)
				if diff := cmp.Diff(want, after, cmpopts.IgnoreUnexported(pods.Pod{})); diff != "" {
					t.Errorf("noted after the patch (-watched +noted):\n%s", diff)
				}
			}
		})
	}
}

// The first kill of a pod does not wait behind further kills in others: while the API server answers none of the marks of one pod,
// those of other pods are made, in their order, however many kills in the first one come before them.
func TestHandleFirstKills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		w.InFlight = NewInFlight(2)
		api := &slowFirst{world: w, answer: make(chan struct{})}
		w.Marker.API = api
		store := pods.NewStore(time.Minute)
		w.Finder, w.Marker.Patched = store, store.Patched
		for _, name := range []string{"first", "second", "third", "fourth"} {
			store.Set(&pods.Pod{Namespace: "shop", Name: name, UID: "uid-" + name, ResourceVersion: "7", Node: "node-1", Selected: true})
		}
		var handled sync.WaitGroup
		kills := 0
		begin := func(pod string, to *worker) {
			e := kill()
			kills++
			e.ID, e.Container.PodUID = fmt.Sprint("boot-1-", kills), "uid-"+pod
			data, _ := json.Marshal(e)
			subject, _ := e.Subject()
			handled.Go(func() {
				w.Handle(t.Context(), Message{Stored: bus.Stored{ID: "x", Subject: subject, Data: data, Seq: 9, Time: time.Unix(1000, 0)}, Attempt: 1, Acker: to})
			})
			synctest.Wait() // no time passes
		}
		var first, others worker
		const repeats = 100
		for range repeats {
			begin("first", &first)
		}
		for _, pod := range []string{"second", "third", "fourth"} {
			begin(pod, &others)
		}
		if want := []string{"first", "second", "third", "fourth"}; !slices.Equal(api.patched, want) || others.count("ack") != 3 || first.count("") != 0 {
			t.Errorf("patched %q, want %q; %q of the others, %q of the first pod's kills", api.patched, want, others.all, first.all)
		}
		// The further kills are decided as soon as the first one is, without another request.
		close(api.answer)
		handled.Wait()
		if first.count("ack") != repeats || len(api.patched) != 4 || w.gets != 0 {
			t.Errorf("%d acks and %d patches, %d reads", first.count("ack"), len(api.patched), w.gets)
		}
		outcomes := map[event.Reason]int{}
		for _, m := range w.out {
			o, err := event.ParseOutcome(m.Data)
			if err != nil {
				t.Error(err)
			}
			outcomes[o.Reason]++
		}
		if outcomes[event.ReasonMarked] != 4 || outcomes[event.ReasonAlready] != repeats-1 {
			t.Errorf("outcomes %v", outcomes)
		}
	})
}

// slowFirst answers the patch of the pod "first" when answer is closed, and those of other pods at once.
type slowFirst struct {
	*world
	answer  chan struct{}
	patched []string
}

func (s *slowFirst) Patch(_ context.Context, _, name string, _ []byte) (string, error) {
	s.mu.Lock()
	s.patched = append(s.patched, name)
	s.mu.Unlock()
	if name == "first" {
		<-s.answer
	}
	return "8", nil
}

// A node's clock that is ahead makes no mark from the future.
func TestHandleAhead(t *testing.T) {
	w, e := newWorld(), kill()
	e.Time = time.Unix(1000, 0).AddDate(1, 0, 0)
	w.want(t, w.handle(t, e), "annotated/marked", "ack")
	if len(w.patches) != 1 || !strings.Contains(w.patches[0], `\"time\":\"1970-01-01T00:16:40Z\"`) {
		t.Errorf("patches %q", w.patches)
	}
	clock := w.Metrics.events.WithLabelValues("error", "clock")
	if n := testutil.ToFloat64(clock); n != 1 {
		t.Errorf("%g kills with a clock that is ahead, want 1", n)
	}
	e.Time = time.Unix(1001, 0) // what two clocks differ by
	w.handle(t, e)
	if n := testutil.ToFloat64(clock); n != 1 {
		t.Errorf("%g kills with a clock that is ahead, want 1", n)
	}
}

// An API server that does not answer holds up as many kills as may wait for it, and none that does not need it.
func TestHandleInFlight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		const using = 2
		w.InFlight = NewInFlight(using)
		w.Marker.API = frozen{w}
		var handled sync.WaitGroup
		begin := func(e *event.Event, to *worker) {
			data, _ := json.Marshal(e)
			subject, _ := e.Subject()
			handled.Go(func() {
				w.Handle(t.Context(), Message{Stored: bus.Stored{ID: "x", Subject: subject, Data: data, Seq: 9, Time: time.Unix(1000, 0)}, Attempt: 1, Acker: to})
			})
		}
		var acting, more, none worker
		begun := 0
		inPod := func() *event.Event { // of its own
			begun++
			e := kill()
			e.Container.PodUID = fmt.Sprint("uid-", begun)
			return e
		}
		for range using + using*QueueFactor {
			begin(inPod(), &acting)
		}
		synctest.Wait()
		begin(inPod(), &more)
		e := kill()
		e.Limit.Level = event.LevelContainer
		for range 100 {
			begin(e, &none)
		}
		synctest.Wait() // no time passes
		if acting.count("") != 0 || more.count("nak") != 1 || none.count("ack") != 100 {
			t.Errorf("at once: those that wait %q, one more %q, those that need no API %d", acting.all, more.all, none.count("ack"))
		}
		began := time.Now()
		handled.Wait()
		if took := time.Since(began); acting.count("nak") != using+using*QueueFactor || took > 2*mark.Timeout {
			t.Errorf("those that wait: %q after %s", acting.all, took)
		}
		// Their turns are free again.
		w.Marker.API = w
		var late worker
		begin(kill(), &late)
		handled.Wait()
		if late.count("ack") != 1 {
			t.Errorf("then: %q", late.all)
		}
	})
}

// frozen is an API server that does not answer.
type frozen struct{ *world }

func (frozen) Get(ctx context.Context, _, _ string) (*corev1.Pod, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

// worker is an Acker for several goroutines.
type worker struct {
	mu  sync.Mutex
	all []string
}

func (s *worker) add(act string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all = append(s.all, act)
}

func (s *worker) count(act string) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, a := range s.all {
		if act == "" || a == act {
			n++
		}
	}
	return n
}

func (s *worker) Ack()              { s.add("ack") }
func (s *worker) Term(string)       { s.add("term") }
func (s *worker) Nak(time.Duration) { s.add("nak") }

// Between the read and the patch the pod is reborn: the server's refusal, of either kind, ends the work.
func TestHandleRebornBetween(t *testing.T) {
	for _, refusal := range []error{
		apierrors.NewConflict(resource, "cart", errors.New("uid mismatch")), apierrors.NewInvalid(schema.GroupKind{Kind: "Pod"}, "cart", nil),
	} {
		w := newWorld()
		w.patched = []error{refusal}
		reborn := w.pod.DeepCopy()
		reborn.UID = "uid-2"
		w.Marker.API = &swap{world: w, then: reborn}
		w.want(t, w.handle(t, kill()), "skipped/reborn", "ack")
		if len(w.patches) != 1 {
			t.Errorf("%d patches", len(w.patches))
		}
	}
}

// swap replaces the pod after the first read.
type swap struct {
	*world
	then *corev1.Pod
}

func (s *swap) Get(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	pod, err := s.world.Get(ctx, namespace, name)
	s.pod = s.then
	return pod, err
}

// Errors that may pass are tried again, until the event is too old; each ends in an outcome.
func TestHandleErrors(t *testing.T) {
	forbidden := fmt.Errorf("patch pods: %w", apierrors.NewForbidden(resource, "cart", errors.New("no")))
	for _, tt := range []struct {
		name string
		err  error
		now  time.Time
		want string
	}{
		{"429", apierrors.NewTooManyRequests("slowly", 1), time.Unix(1001, 0), "none"},
		{"500", apierrors.NewInternalError(errors.New("x")), time.Unix(1001, 0), "none"},
		{"503", apierrors.NewServiceUnavailable("x"), time.Unix(1001, 0), "none"},
		{"401", apierrors.NewUnauthorized("x"), time.Unix(1001, 0), "none"},
		{"timeout", context.DeadlineExceeded, time.Unix(1001, 0), "none"},
		{"proxy", apierrors.NewGenericServerResponse(http.StatusBadGateway, "GET", resource, "cart", "x", 0, true), time.Unix(1001, 0), "none"},
		{"the last attempt", context.DeadlineExceeded, time.Unix(1600, 0), "failed/unavailable"},
		{"the last attempt before the server's own delay", apierrors.NewTooManyRequests("slowly", 60), time.Unix(1550, 0), "failed/unavailable"},
		{"403", forbidden, time.Unix(1001, 0), "none"},
		{"403 after a long wait", forbidden, time.Unix(1300, 0), "none"},
		{"400", apierrors.NewBadRequest("x"), time.Unix(1001, 0), "failed/rejected"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, get := range []bool{true, false} {
				w := newWorld()
				w.now = tt.now
				if get {
					w.getErr = []error{tt.err}
				} else {
					w.patched = []error{tt.err}
				}
				ack := "ack"
				if tt.want == "none" {
					ack = "nak"
				}
				o := w.handle(t, kill())
				w.want(t, o, tt.want, ack)
				if o != nil && o.Detail == "" {
					t.Error("the outcome tells no detail")
				}
			}
		})
	}
}

// An API server that starts has no roles yet. So 403 is tried again for half a minute, also for a kill that has waited for the
// server before.
func TestHandleForbidden(t *testing.T) {
	forbidden := apierrors.NewForbidden(resource, "cart", errors.New("no"))
	w := newWorld()
	for _, step := range []struct {
		now       int64
		want, ack string
	}{
		{1300, "none", "nak"},
		{1329, "none", "nak"},
		{1331, "failed/forbidden", "ack"},
		{1500, "none", "nak"}, // of another start
	} {
		w.now, w.getErr = time.Unix(step.now, 0), []error{forbidden}
		w.want(t, w.handle(t, kill()), step.want, step.ack)
	}
}

func TestHandleWaits(t *testing.T) {
	w := newWorld()
	w.find = pods.ErrUnknown
	w.want(t, w.handle(t, kill()), "none", "nak")
	w.now = time.Unix(1030, 0)
	w.want(t, w.handle(t, kill()), "skipped/not_found", "ack")
	// Who does not know what there is cannot say that there is none.
	w.stale = errors.New("the API server is away")
	w.want(t, w.handle(t, kill()), "none", "nak")
	w.now = time.Unix(1601, 0)
	w.want(t, w.handle(t, kill()), "skipped/too_old", "ack")
	// Nobody waits for the pod of a host's process.
	w = newWorld()
	w.find = pods.ErrUnknown
	e := kill()
	e.Container = nil
	w.want(t, w.handle(t, e), "skipped/host", "ack")
	e.Container = &event.Container{ContainerID: "c"}
	w.want(t, w.handle(t, e), "skipped/host", "ack")
}

// An init container can be killed before the kubelet has reported it.
func TestHandleWaitsForName(t *testing.T) {
	w := newWorld()
	e := kill()
	e.Limit, e.Scope = &event.Limit{Level: event.LevelContainer}, event.ScopeCgroup
	e.Container.ContainerID = strings.Repeat("5", 64)
	w.want(t, w.handle(t, e), "none", "nak")
	w.now = time.Unix(1010, 0) // a sandbox's ID is in no status
	w.want(t, w.handle(t, e), "skipped/level", "ack")
	// A mark does not wait.
	w = newWorld()
	e = kill()
	e.Container.ContainerID = strings.Repeat("5", 64)
	w.want(t, w.handle(t, e), "annotated/marked", "ack")
}

func TestHandlePublisherFull(t *testing.T) {
	w := newWorld()
	for _, err := range []error{bus.ErrFull, bus.ErrClosed} {
		w.full = err
		w.want(t, w.handle(t, kill()), "none", "nak")
	}
}

func TestHandleRefuses(t *testing.T) {
	good, err := json.Marshal(kill())
	if err != nil {
		t.Fatal(err)
	}
	const subject = "oom.v1.kill.global.node-1"
	with := func(change func(*event.Event)) []byte {
		e := kill()
		change(e)
		data, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, tt := range []struct {
		name, subject string
		data          []byte
		want          event.Reason
	}{
		{"empty", subject, nil, event.ReasonMalformed},
		{"no json", subject, []byte("\x1b[31m\n"), event.ReasonMalformed},
		{"incomplete", subject, []byte(`{"schema":"oom-tracer/v1"}`), event.ReasonMalformed},
		{"future", subject, []byte(strings.Replace(string(good), "v1", "v2", 1)), event.ReasonSchema},
		{"oversized", subject, append(good, make([]byte, 256<<10)...), event.ReasonOversized},
		{"another node", "oom.v1.kill.global.node-2", good, event.ReasonForged},
		{"another scope", "oom.v1.kill.cgroup.node-1", good, event.ReasonForged},
		{"no kill", subject, with(func(e *event.Event) { e.Outcome = event.OutcomeExiting }), event.ReasonForged},
		{"line in the id", subject, with(func(e *event.Event) { e.ID = "a\nNats-Msg-Id: b" }), event.ReasonMalformed},
		{"more than one token", subject, with(func(e *event.Event) { e.ID = "a.b" }), event.ReasonMalformed},
		{"long id", subject, with(func(e *event.Event) { e.ID = strings.Repeat("a", 201) }), event.ReasonMalformed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld()
			o := w.raw(t, tt.subject, tt.data)
			w.want(t, o, "failed/"+string(tt.want), "term "+string(tt.want))
			if o.Kill != "OOM-9" || o.Detail == "" || len(o.Detail) > text.MaxDetail || strings.ContainsAny(o.Detail, "\x1b\n") || o.Pod != nil {
				t.Errorf("outcome %+v", o)
			}
			if len(w.patches) > 0 {
				t.Error("something was patched")
			}
		})
	}
	w := newWorld()
	w.want(t, w.raw(t, "oom.v1.kill.a.b.c", good), "none", "term malformed")
}

// A forger's names do not make a patch that the server must refuse for its size.
func TestPatchIsSmall(t *testing.T) {
	w := newWorld()
	e := kill()
	e.Victim.Comm, e.Container.ContainerID = strings.Repeat("ü", 50_000), strings.Repeat("x", 100_000)
	w.want(t, w.handle(t, e), "annotated/marked", "ack")
	if n := len(w.patches[0]); n > 2000 {
		t.Errorf("the patch has %d bytes", n)
	}
}

func TestMetrics(t *testing.T) {
	w := newWorld()
	before, err := testutil.GatherAndCount(w.registry)
	if err != nil {
		t.Fatal(err)
	}
	w.handle(t, kill())
	w.pod.Annotations = map[string]string{key: "true", w.Marker.Terms.Summary: `{"event":"boot-1-2"}`}
	w.handle(t, kill())
	w.raw(t, "oom.v1.kill.global.node-1", nil)
	w.find = pods.ErrUnknown
	w.handle(t, kill())
	w.now = time.Unix(1030, 0)
	w.handle(t, kill())
	w.find = nil
	w.getErr = []error{context.DeadlineExceeded}
	w.pod.Annotations = nil
	w.handle(t, kill())
	w.stored["oom.v1.outcome.boot-1-2_annotate.node-1"] = string(w.out[0].Data)
	w.handle(t, kill())
	after, err := testutil.GatherAndCount(w.registry)
	if err != nil {
		t.Fatal(err)
	}
	if before != after {
		t.Errorf("%d series at the start, %d now: a label's value was not known", before, after)
	}
	for labels, want := range map[[3]string]float64{
		{"victims", "marked", "marked"}:     1,
		{"victims", "marked", "repeated"}:   1,
		{"victims", "failed", "malformed"}:  1,
		{"victims", "skipped", "not_found"}: 1,
		{"events", "observed", "kill"}:      7,
		{"events", "identified", "pod"}:     4,
		{"events", "skipped", "wait_pod"}:   1,
		{"events", "skipped", "repeated"}:   1,
		{"events", "error", "unavailable"}:  1,
		{"events", "error", "malformed"}:    1,
	} {
		vec := w.Metrics.victims
		if labels[0] == "events" {
			vec = w.Metrics.events
		}
		if got := testutil.ToFloat64(vec.WithLabelValues(labels[1], labels[2])); got != want {
			t.Errorf("%v is %g, want %g", labels, got, want)
		}
	}
	problems, err := testutil.GatherAndLint(w.registry)
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}

func TestDelay(t *testing.T) {
	for attempt, want := range map[uint64]time.Duration{0: firstDelay, 1: firstDelay, 2: 2 * firstDelay, 5: 4 * time.Second, 100: maxDelay, 1 << 40: maxDelay} {
		if got := delay(attempt, maxDelay); got < want/2 || got > want {
			t.Errorf("attempt %d waits %s, want at most %s", attempt, got, want)
		}
	}
}

// Whatever comes is acknowledged once, and changes no pod that it does not name.
func FuzzHandle(f *testing.F) {
	good, err := json.Marshal(kill())
	if err != nil {
		f.Fatal(err)
	}
	f.Add("oom.v1.kill.global.node-1", good)
	f.Add("oom.v1.kill.cgroup.node-1", good)
	f.Add("oom.v1.kill.>", []byte("{}"))
	f.Fuzz(func(t *testing.T, subject string, data []byte) {
		w := newWorld()
		w.Handle(t.Context(), Message{Stored: bus.Stored{Subject: subject, Data: data, Seq: 1, Time: w.now}, Acker: w})
		if len(w.acks) != 1 {
			t.Errorf("acknowledged: %q", w.acks)
		}
		for _, m := range w.out {
			if _, err := event.ParseOutcome(m.Data); err != nil || len(m.Data) > 4<<10 {
				t.Errorf("%v: outcome %s", err, m.Data)
			}
		}
	})
}

// TestWorkloads: kills are counted by workload, each once, however often it is delivered; and not more series than permitted.
func TestWorkloads(t *testing.T) {
	w := newWorld()
	w.Metrics = NewMetrics(prometheus.NewPedanticRegistry(), 2)
	w.Outcomes.Metrics = w.Metrics
	e := kill()
	w.handle(t, e)
	w.stored[w.out[0].Subject] = string(w.out[0].Data)
	w.handle(t, e) // delivered again
	e.Limit.Max = new(uint64(64 << 20))
	for i, level := range []event.LimitLevel{event.LevelPod, event.LevelContainer, event.LevelQoS} {
		e.ID, e.Limit.Level = fmt.Sprint("boot-1-", 3+i), level
		w.handle(t, e)
	}
	skipped := w.out[len(w.out)-1] // another replica has stored its outcome
	w.stored[skipped.Subject] = string(skipped.Data)
	w.handle(t, e)
	e.ID, e.Container = "boot-1-9", nil // in no pod
	w.handle(t, e)
	e.ID = strings.Repeat("x", 200)
	w.Metrics.workload(&event.Outcome{Kill: e.ID, Pod: &event.PodRef{Namespace: "shop", Name: "cart-1", Owner: "Deployment/cart"}, Container: "main"}, e)
	const want = `
# HELP oom_tracer_workload_kills_total Number of OOM kills in pods, by the workload that would replace the pod and by the level of the limit that was hit.
# TYPE oom_tracer_workload_kills_total counter
oom_tracer_workload_kills_total{container="",level="node",namespace="shop",owner="cart",owner_kind="Pod"} 1
oom_tracer_workload_kills_total{container="",level="pod",namespace="shop",owner="cart",owner_kind="Pod"} 1
oom_tracer_workload_kills_total{container="other",level="other",namespace="other",owner="other",owner_kind="other"} 3
`
	if err := testutil.CollectAndCompare(w.Metrics.workloads, strings.NewReader(want)); err != nil {
		t.Error(err)
	}
	const limit = `
# HELP oom_tracer_workload_limit_bytes Memory limit that was hit at the last OOM kill in the workload, in bytes.
# TYPE oom_tracer_workload_limit_bytes gauge
oom_tracer_workload_limit_bytes{container="",level="pod",namespace="shop",owner="cart",owner_kind="Pod"} 6.7108864e+07
oom_tracer_workload_limit_bytes{container="other",level="other",namespace="other",owner="other",owner_kind="other"} NaN
`
	if err := testutil.CollectAndCompare(w.Metrics.limits, strings.NewReader(limit)); err != nil {
		t.Error(err)
	}
	var m dto.Metric
	if err := w.Metrics.workloads.WithLabelValues("shop", "Pod", "cart", "", "node").Write(&m); err != nil || m.Counter.Exemplar.Label[0].GetValue() != "boot-1-2" {
		t.Errorf("exemplar %v, %v", m.Counter.Exemplar, err)
	}
}
