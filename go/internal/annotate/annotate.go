package annotate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// The bounds of trying again.
const (
	conflicts    = 5 // how often a pod that changes under our hands is read anew at once
	firstRetry   = 250 * time.Millisecond
	lastRetry    = 15 * time.Second // the delay doubles up to here
	lastLook     = 4 * time.Second  // likewise, for a pod that is not known yet
	permitted    = 30 * time.Second // how long a missing permission is waited for: a server that starts has none
	maxDetail    = 500              // bytes of an outcome's detail
	maxComm      = 64               // bytes of a process's name; the kernel's have 15
	maxContainer = 64               // bytes of a container's ID
	handleTime   = 10 * time.Second // of one attempt to mark a pod
)

// conditionReason is that of the condition of a marked pod.
const conditionReason = "OOMKilled"

// API is what is asked of the API server.
type API interface {
	Get(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	Patch(ctx context.Context, namespace, name string, patch []byte) (*corev1.Pod, error)
	PatchStatus(ctx context.Context, namespace, name string, patch []byte) (*corev1.Pod, error)
}

// Finder knows the pods; see pods.Store.
type Finder interface {
	Find(node, uid, containerID string) (pods.Found, error)
}

// Outlet takes what is to be published; see bus.Publisher.
type Outlet interface {
	Enqueue(m bus.Msg) error
}

// Ledger gives the right to mark; see budget.Ledger.
type Ledger interface {
	Claim(ctx context.Context, kill, node, owner string, killed time.Time) (budget.Verdict, error)
	Release(ctx context.Context, kill string) error
}

// Last reads the last message on a subject of the stream. Its error wraps bus.ErrNoMessage where there is none; see bus.Conn.
type Last func(ctx context.Context, subject string) ([]byte, error)

// EventRecorder tells of kills in Kubernetes Events; see kubeevents.Recorder.
type EventRecorder interface {
	Record(e *event.Event, o *event.Outcome)
}

// Settler settles a message; see bus.Delivery.
type Settler interface {
	Ack()
	Retry(after time.Duration)
	Term(reason string)
}

// Message is one message of the stream.
type Message struct {
	bus.Stored
	Attempt uint64 // from 1
	Settler Settler
}

// Turns bound how many kills use the API server at once, and how many wait for that. The zero value lets all through.
type Turns struct{ waiting, using chan struct{} }

// NewTurns makes turns for so many at once. Eight times as many may wait.
func NewTurns(using int) Turns {
	return Turns{waiting: make(chan struct{}, Waiting*using), using: make(chan struct{}, using)}
}

// Waiting is how many may wait for each that uses the API server.
const Waiting = 8

// take waits for a turn. It reports false where too many wait already, or for too long.
func (t Turns) take(ctx context.Context) bool {
	if t.using == nil {
		return true
	}
	select {
	case t.waiting <- struct{}{}:
	default:
		return false
	}
	defer func() { <-t.waiting }()
	patience := time.NewTimer(handleTime)
	defer patience.Stop()
	select {
	case t.using <- struct{}{}:
		return true
	case <-patience.C:
	case <-ctx.Done():
	}
	return false
}

func (t Turns) end() {
	if t.using != nil {
		<-t.using
	}
}

// Annotator works on kills. Its methods may be called from any goroutine.
type Annotator struct {
	Policy config.Policy
	Terms  pods.Terms
	Wait   time.Duration // for a pod that is not known yet
	API    API
	Finder Finder
	// Stale is why Finder may not know what there is now, and nil when it does.
	Stale   func() error
	Ledger  Ledger
	Last    Last
	Outlet  Outlet
	Turns   Turns
	Events  EventRecorder // nil: none are written
	Metrics *Metrics
	Log     *slog.Logger
	Now     func() time.Time
}

// Terms are the names by which a configuration has pods read.
func Terms(cfg *config.Config) pods.Terms {
	mark, _ := cfg.Policy.Mark()
	return pods.Terms{
		Mark: mark, Summary: cfg.Annotator.SummaryAnnotation, Condition: corev1.PodConditionType(cfg.Policy.Condition),
		OptOut: cfg.Policy.OptOutAnnotation, Selector: cfg.Policy.Selector,
	}
}

// Hooks are for the publisher that is the Outlet: a message of the stream is settled when its outcome is
// stored, and not before.
func (a *Annotator) Hooks() bus.Hooks {
	return bus.Hooks{
		OnAck: func(m bus.Msg, duplicate bool) {
			t := m.Tag.(*tag)
			if t.stored != nil {
				t.stored(duplicate && !t.retried)
			}
			t.settle()
		},
		OnRetry: func(m bus.Msg, _ error) {
			m.Tag.(*tag).retried = true
			a.Metrics.failure("publish")
		},
		OnDrop: func(m bus.Msg, err error) *bus.Msg {
			a.Metrics.failure("dropped")
			a.Log.Error("outcome given up", "id", m.ID, "error", err)
			m.Tag.(*tag).settle()
			return nil
		},
	}
}

// tag is an outcome's on its way.
type tag struct {
	settle  func()           // the message that it is about
	stored  func(again bool) // the stream has stored it, or had one before; nil: nothing to do
	retried bool             // an attempt failed, and may have been stored all the same
}

// Handle works on one message until its outcome is on its way, or it is to come again.
func (a *Annotator) Handle(ctx context.Context, m Message) {
	a.Metrics.observed()
	e, refused := read(&m.Stored)
	if refused != nil {
		a.refuse(m, refused)
		return
	}
	c := newCase(e, &m.Stored, a.Now())
	if c.Ahead > clockTolerance {
		a.Metrics.failure(clockReason)
		a.Log.Warn("the clock of a node is ahead, the time of the stream counts", "node", e.Node.Name, "id", e.ID, "ahead", c.Ahead)
	}
	if e.Container != nil {
		c.Found, c.Err = a.Finder.Find(e.Node.Name, e.Container.PodUID, e.Container.ContainerID)
	}
	if a.early(&c, &m) {
		a.Metrics.waiting("pod")
		m.Settler.Retry(delay(m.Attempt, lastLook))
		return
	}
	d := Decide(&a.Policy, &c)
	if !d.Act && a.unnamed(&c, &m) {
		a.Metrics.waiting("container")
		m.Settler.Retry(delay(m.Attempt, lastLook))
		return
	}
	a.Metrics.identified(&c)
	if d.Act {
		// The API server may not answer. Those that need it must not hold up those that do not.
		if !a.Turns.take(ctx) {
			a.Metrics.waiting("turn")
			m.Settler.Retry(delay(m.Attempt, lastRetry))
			return
		}
		defer a.Turns.end()
		// A message that comes again may have been decided otherwise before: that stays.
		if a.repeated(ctx, m, e) {
			return
		}
		var err error
		if d, err = a.act(ctx, &c); err != nil {
			var again bool
			if d, again = a.failed(ctx, m, &c, err); again {
				return
			}
		}
	}
	repeated := d.Result == event.ResultAnnotated && !d.Act // not by this attempt
	o := a.outcome(e.ID, e.Node.Name, d)
	if p := c.Found.Pod; p != nil {
		o.Pod = &event.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID}
		o.Container = p.Container(e.Container.ContainerID)
		if d.Result == event.ResultAnnotated {
			key, value := a.Policy.Mark()
			o.Annotation = key + "=" + value
		}
	}
	if a.publish(m, o, m.Settler.Ack, repeated, a.Now().Sub(e.Time)) && a.Events != nil {
		a.Events.Record(e, o)
	}
}

// repeated settles a kill whose outcome the stream holds. Where it cannot look, the kill comes again.
func (a *Annotator) repeated(ctx context.Context, m Message, e *event.Event) bool {
	looking, cancel := context.WithTimeout(ctx, handleTime)
	defer cancel()
	before, err := stored(looking, a.Last, e.ID, e.Node.Name)
	switch {
	case err != nil:
		if ctx.Err() == nil {
			a.Log.Warn("could not look for an earlier outcome of the kill, will try again", "id", e.ID, "error", err)
			a.Metrics.failure(string(event.ReasonUnavailable))
		}
		m.Settler.Retry(delay(m.Attempt, lastRetry))
	case before != nil:
		a.Metrics.repeated()
		m.Settler.Ack()
	}
	return before != nil || err != nil
}

// stored reads the outcome of a kill from the stream. It returns nil and nil where there is none.
func stored(ctx context.Context, last Last, kill, node string) (*event.Outcome, error) {
	subject, err := event.OutcomeSubject(kill, event.StageAnnotate, node)
	if err != nil {
		return nil, err
	}
	data, err := last(ctx, subject)
	if errors.Is(err, bus.ErrNoMessage) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	o, err := event.ParseOutcome(data)
	if err != nil || o.Kill != kill {
		return nil, nil // on a NATS without accounts JetStream's own words can be stored there
	}
	return &o, nil
}

// early tells whether the pod may still become known.
func (a *Annotator) early(c *Case, m *Message) bool {
	e := c.Event
	if !errors.Is(c.Err, pods.ErrUnknown) || e.Container.PodUID == "" || c.Age > a.Policy.MaxEventAge {
		return false
	}
	return a.Now().Sub(m.Time) < a.Wait || a.Stale() != nil
}

// containerWait bounds how long a kill waits for the name of its container. A sandbox's is in no status.
const containerWait = 10 * time.Second

// unnamed tells whether the pod may still say which of its containers was hit: the kubelet reports a container some seconds
// after its start, and an init container can be killed within milliseconds. A mark does not wait for that.
func (a *Annotator) unnamed(c *Case, m *Message) bool {
	if c.Found.Pod == nil || c.Found.Gone || c.Age > a.Policy.MaxEventAge {
		return false
	}
	return c.Found.Pod.Unnamed(c.Event.Container.ContainerID) && a.Now().Sub(m.Time) < min(a.Wait, containerWait)
}

// delay is how long the nth attempt (from 1) is put off: doubling, and half of it random.
func delay(attempt uint64, most time.Duration) time.Duration {
	d := most
	if attempt < 16 {
		d = min(firstRetry<<max(attempt, 1)>>1, most)
	}
	return d/2 + rand.N(d/2)
}

// refuse ends a message that can never be processed.
func (a *Annotator) refuse(m Message, r *refusal) {
	kill := fmt.Sprintf("%s-%d", event.StreamName, m.Seq) // not its own ID, which may be another kill's
	a.Metrics.failure(string(r.reason))
	a.Log.Warn("message refused", "seq", m.Seq, "subject", m.Subject, "id", m.ID, "reason", string(r.reason), "error", r.err)
	term := func() { m.Settler.Term(string(r.reason)) }
	_, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		term() // there is no node to speak of
		return
	}
	o := a.outcome(kill, node, Decision{Result: event.ResultFailed, Reason: r.reason, Detail: fmt.Sprintf("message id %q: %v", m.ID, r.err)})
	a.publish(m, o, term, false, 0)
}

func (a *Annotator) outcome(kill, node string, d Decision) *event.Outcome {
	detail := text.Printable(d.Detail)
	return &event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID(kill, event.StageAnnotate), Kill: kill, Stage: event.StageAnnotate,
		Time: a.Now().UTC(), Result: d.Result, Reason: d.Reason, Detail: detail[:min(len(detail), maxDetail)], Node: node,
	}
}

// publish sends an outcome, and settles the message once it is stored. It reports whether it was taken.
func (a *Annotator) publish(m Message, o *event.Outcome, settle func(), repeated bool, latency time.Duration) bool {
	stored := func(again bool) {
		if again {
			a.Metrics.repeated()
		} else {
			a.Metrics.decided(o, repeated, latency)
		}
	}
	if err := enqueue(a.Outlet, o, &tag{settle: settle, stored: stored}); err != nil {
		if !errors.Is(err, bus.ErrClosed) { // the next replica's
			a.Log.Warn("outcome cannot be published now, its message comes again", "id", o.ID, "error", err)
			a.Metrics.failure("publish")
		}
		m.Settler.Retry(time.Second)
		return false
	}
	a.Log.Log(context.Background(), level(o), "kill", "id", o.Kill, "node", o.Node, "result", string(o.Result), "reason", string(o.Reason),
		"pod", podName(o.Pod), "container", o.Container, "detail", o.Detail)
	return true
}

// PublishMore publishes an outcome of a further stage of a kill.
func (a *Annotator) PublishMore(o *event.Outcome) error {
	return enqueue(a.Outlet, o, &tag{settle: func() {}})
}

func enqueue(outlet Outlet, o *event.Outcome, t *tag) error {
	subject, err := o.Subject()
	if err != nil {
		return err
	}
	data, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("write outcome %s: %w", o.ID, err)
	}
	return outlet.Enqueue(bus.Msg{ID: o.ID, Subject: subject, Data: data, Once: true, Tag: t})
}

func level(o *event.Outcome) slog.Level {
	switch o.Result {
	case event.ResultAnnotated:
		return slog.LevelInfo
	case event.ResultFailed:
		return slog.LevelError
	}
	return slog.LevelDebug
}

func podName(p *event.PodRef) string {
	if p == nil {
		return ""
	}
	return p.Namespace + "/" + p.Name
}

// act marks the pod. What the store knows may be old: the pod is read, the decision is made once more on
// what it is now, and the patch holds for just that state of it.
//
// The decision that it returns has Act set where this call made the mark.
func (a *Annotator) act(ctx context.Context, c *Case) (Decision, error) {
	ctx, cancel := context.WithTimeout(ctx, handleTime)
	defer cancel()
	known := c.Found.Pod
	var last error
	for try := range conflicts {
		if try > 0 {
			select {
			case <-time.After(time.Duration(10*try) * time.Millisecond):
			case <-ctx.Done():
				return Decision{}, ctx.Err()
			}
		}
		read, err := a.API.Get(ctx, known.Namespace, known.Name)
		if apierrors.IsNotFound(err) {
			return skip(event.ReasonGone), nil
		}
		if err != nil {
			return Decision{}, err
		}
		now := *c
		now.Found.Pod = a.Terms.Read(read)
		switch {
		case now.Found.Pod.UID != known.UID:
			return skip(event.ReasonReborn), nil
		case now.Found.Pod.Node != known.Node:
			return skip(event.ReasonOtherNode), nil
		}
		d := Decide(&a.Policy, &now)
		if !d.Act {
			return d, nil
		}
		c.Found.Pod = now.Found.Pod                     // its containers may be named by now
		annotated := now.Found.Pod.Kill() == c.Event.ID // and only its condition is missing
		if try == 0 && !annotated {
			if refused, err := a.claim(ctx, c); err != nil || refused.Result != "" {
				return refused, err
			}
		}
		if !annotated {
			var patch []byte
			if patch, err = a.patch(c.Event, now.Found.Pod, read.ResourceVersion); err != nil {
				return Decision{}, err
			}
			if read, err = a.API.Patch(ctx, known.Namespace, known.Name, patch); err == nil {
				annotated = true
			}
		}
		c.annotated = c.annotated || annotated
		// The annotation goes first: it is what says whose mark this is, and who takes it away takes back all of it.
		if annotated && a.Terms.Condition != "" {
			var patch []byte
			if patch, err = statusPatch(read, a.condition(c.Event.ID)); err != nil {
				return Decision{}, err
			}
			_, err = a.API.PatchStatus(ctx, known.Namespace, known.Name, patch)
		}
		switch {
		case err == nil, annotated && apierrors.IsNotFound(err): // it left at once, as it should
			return d, nil
		case apierrors.IsNotFound(err):
			return skip(event.ReasonGone), nil
		case apierrors.IsConflict(err), apierrors.IsInvalid(err):
			// It has changed, or is another one by now: that is seen when it is read again. An answer of
			// the second kind that stays is meant for the patch itself.
			last = err
		default:
			return Decision{}, err
		}
		if apierrors.IsInvalid(err) && try > 0 {
			break
		}
	}
	return Decision{}, last
}

// claim asks for the right to mark the pod. Where it is refused, the decision that it returns says why.
func (a *Annotator) claim(ctx context.Context, c *Case) (Decision, error) {
	v, err := a.Ledger.Claim(ctx, c.Event.ID, c.Event.Node.Name, ownerOf(c.Found.Pod), c.Event.Time)
	switch {
	case err != nil:
		return Decision{}, err
	case v.Paused != nil:
		return Decision{Result: event.ResultObserved, Reason: event.ReasonPaused, Detail: "by " + v.Paused.By + ": " + v.Paused.Reason}, nil
	case v.Refusal != "":
		return Decision{Result: event.ResultSkipped, Reason: event.ReasonBudget, Detail: string(v.Refusal)}, nil
	}
	return Decision{}, nil
}

// ownerOf names what budget.Mark counts as one owner.
func ownerOf(p *pods.Pod) string {
	if p.Owner == "" {
		return p.Namespace + "/Pod/" + p.Name
	}
	return p.Namespace + "/" + p.Owner
}

// patch is a JSON merge patch for one state of one pod: the server refuses it for any other.
func (a *Annotator) patch(e *event.Event, p *pods.Pod, resourceVersion string) ([]byte, error) {
	key, value := a.Policy.Mark()
	s := pods.Summary{
		Event: e.ID, Annotation: key, Time: e.Time, Scope: string(e.Scope), Level: string(e.Limit.Level),
		Container: p.Container(e.Container.ContainerID),
		Victim:    cut(e.Victim.Comm, maxComm), PID: e.Victim.PID, Usage: e.Limit.Usage, Limit: e.Limit.Max, Node: e.Node.Name,
	}
	if s.Container == "" {
		s.Container = cut(e.Container.ContainerID, maxContainer)
	}
	summary, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("write the summary: %w", err)
	}
	annotations := map[string]any{key: value, a.Terms.Summary: string(summary)}
	if p.Mark != nil && p.Mark.Annotation != "" {
		annotations[p.Mark.Annotation] = nil // of another configuration: the summary names it no longer
	}
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": p.UID, "resourceVersion": resourceVersion, "annotations": annotations,
	}})
	if err != nil {
		return nil, fmt.Errorf("write the patch: %w", err)
	}
	return patch, nil
}

// condition says in a pod's status for which kill it is marked.
func (a *Annotator) condition(kill string) map[string]any {
	return map[string]any{
		"type": a.Terms.Condition, "status": corev1.ConditionTrue, "reason": conditionReason, "message": kill,
		"lastTransitionTime": metav1.NewTime(a.Now()),
	}
}

// statusPatch is a strategic merge patch of one condition, for one state of one pod.
func statusPatch(read *corev1.Pod, condition map[string]any) ([]byte, error) {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": read.UID, "resourceVersion": read.ResourceVersion},
		"status":   map[string]any{"conditions": []any{condition}},
	})
	if err != nil {
		return nil, fmt.Errorf("write the patch of a condition: %w", err)
	}
	return patch, nil
}

func cut(s string, most int) string { return strings.ToValidUTF8(s[:min(len(s), most)], "") }

// failed decides what an error of the API server means: another attempt, which it then asks for, or a
// failure that is told.
func (a *Annotator) failed(ctx context.Context, m Message, c *Case, err error) (d Decision, again bool) {
	d = Decision{Result: event.ResultFailed, Detail: err.Error()}
	after, left := delay(m.Attempt, lastRetry), a.Policy.MaxEventAge-c.Age
	switch {
	case apierrors.IsForbidden(unwrap(err)):
		d.Reason = event.ReasonForbidden
		left = min(left, permitted-a.Now().Sub(m.Time))
	case apierrors.IsConflict(unwrap(err)), pods.Transient(err):
		d.Reason = event.ReasonUnavailable
	default:
		d.Reason = event.ReasonRejected
		left = 0
	}
	if seconds, ok := apierrors.SuggestsClientDelay(unwrap(err)); ok {
		after = max(after, time.Duration(seconds)*time.Second)
	}
	a.Metrics.failure(string(d.Reason))
	if ctx.Err() != nil {
		m.Settler.Retry(0) // this process ends, another goes on
		return d, true
	}
	if after < left {
		a.Log.Warn("pod cannot be marked yet, will try again", "id", c.Event.ID, "pod", c.Found.Pod.Namespace+"/"+c.Found.Pod.Name,
			"attempt", m.Attempt, "after", after, "error", err)
		m.Settler.Retry(after)
		return d, true
	}
	if d.Reason != event.ReasonUnavailable && !c.annotated { // else the mark may be there
		if err := a.release(ctx, c.Event.ID); err != nil {
			a.Log.Warn("could not give back the budget of a mark that was refused, will try again", "id", c.Event.ID, "error", err)
			m.Settler.Retry(delay(m.Attempt, lastRetry))
			return d, true
		}
	}
	return d, false
}

func (a *Annotator) release(ctx context.Context, kill string) error {
	ctx, cancel := context.WithTimeout(ctx, handleTime)
	defer cancel()
	return a.Ledger.Release(ctx, kill)
}

// unwrap is the API server's own error within err, else err.
func unwrap(err error) error {
	var status *apierrors.StatusError
	if errors.As(err, &status) {
		return status
	}
	return err
}
