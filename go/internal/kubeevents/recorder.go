// Package kubeevents writes OOM kills as Kubernetes Events.
//
// Rule of the package: one Event describes a whole incident. It is written at once and completed later. A kill that is recorded
// twice, by any replica, is counted once.
package kubeevents

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// Limits of what Kubernetes Events cost the API server. client-go's recorder would drop the last kills of a crash loop. Here they
// are part of the next write of the same Event, which also happens if no further kill does.
const (
	eventInterval   = time.Minute      // minimum between two incidents that are written to one Event
	firstDelay      = time.Second      // until an incident is completed, or a write repeated; doubles up to eventInterval
	eventLife       = 10 * time.Minute // without a kill, until writes that fail are given up
	eventsPerSec    = 10               // of all Events
	eventsAtOnce    = 50
	maxSeries       = 5000
	maxPending      = 50_000 // records
	maxEventName    = 253    // bytes, of a DNS-1123 subdomain
	maxEventMessage = 1024   // bytes (NoteLengthLimit in pkg/apis/core/validation/events.go)
	maxTries        = 4      // of one write, while other replicas write too
	drainEvents     = time.Second
)

// Reason is the reason of every Event.
const Reason = "OOMKilled"

const (
	component = "oom-tracer"
	// stateKey is the annotation with the state of an Event.
	stateKey = "oom-tracer.alpha.kubernetes.io/incident"
)

// API is the part of the Kubernetes API that Events need; see pods.Client.
type API interface {
	// GetEvent returns nil and nil if there is no such Event.
	GetEvent(ctx context.Context, namespace, name string) (*corev1.Event, error)
	CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error)
	PatchEvent(ctx context.Context, namespace, name string, patch []byte) (*corev1.Event, error)
}

// Recorder writes a Kubernetes Event for each kill: on the pod, and on the node if more than the pod ran out of memory. The
// incidents of a container, and those of a node, are one Event with a count. Its message is about the last incident.
//
// Like all Events of Kubernetes they are best effort: what could not be written for ten minutes is given up, and counted. NATS
// has every kill.
type Recorder struct {
	api      API
	instance string // the name of this host
	log      *slog.Logger
	limit    *rate.Limiter
	kills    *prometheus.CounterVec
	writes   prometheus.Counter

	wake chan struct{} // holds a token if there are new records

	mu      sync.Mutex
	series  map[seriesKey]*series
	pending int    // records of all series
	failing string // the last error, logged once
}

type seriesKey struct{ uid, container string }

// series is one Event.
type series struct {
	namespace, name string
	about           corev1.ObjectReference
	known           content   // on the server
	pending         []record  // not written yet
	latest          string    // the ID of the last incident
	recorded        time.Time // when the last kill was
	attempted       time.Time // when it was last written, or that failed
	delay           time.Duration
	failed          bool
}

// NewRecorder makes a recorder, and registers its metrics. Nothing is written before Run.
func NewRecorder(api API, instance string, log *slog.Logger, registerer prometheus.Registerer) *Recorder {
	register := promauto.With(registerer)
	r := &Recorder{
		api: api, instance: instance, log: log, limit: rate.NewLimiter(eventsPerSec, eventsAtOnce),
		kills: register.NewCounterVec(prometheus.CounterOpts{
			Subsystem: "oom_tracer", Name: "kubernetes_events_total",
			Help: "Number of OOM kills recorded as Kubernetes Events, on pods and on nodes, by result: written, failed (given up) or dropped (too many at once).",
		}, []string{"result"}),
		writes: register.NewCounter(prometheus.CounterOpts{
			Subsystem: "oom_tracer", Name: "kubernetes_event_writes_total",
			Help: "Number of attempts to create or update a Kubernetes Event.",
		}),
		wake: make(chan struct{}, 1), series: map[seriesKey]*series{},
	}
	for _, result := range []string{"written", "failed", "dropped"} {
		r.kills.WithLabelValues(result)
	}
	return r
}

// Record takes a kill and its outcome. It never blocks.
func (r *Recorder) Record(e *event.Event, o *event.Outcome) {
	if o.Reason == event.ReasonTooOld {
		return // happened long ago
	}
	if p := o.Pod; p != nil {
		r.add(e, o, false, corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID),
		}, o.Container)
	}
	if e.BeyondPod() {
		// As the kubelet does: its UID is the node's name.
		r.add(e, o, true, corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: o.Node, UID: types.UID(o.Node)}, "")
	}
}

// Complete adds to the Events of an incident what the other pods used after it. Events that are about a later incident stay as
// they are. It never blocks.
func (r *Recorder) Complete(incident, after string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, s := range r.series {
		if s.latest == incident && r.pending < maxPending {
			s.pending = append(s.pending, record{incident: incident, after: after})
			r.pending++
			r.signal()
		}
	}
}

// add adds the record of a kill to a series. With pod it names the pod.
func (r *Recorder) add(e *event.Event, o *event.Outcome, pod bool, about corev1.ObjectReference, container string) {
	key := seriesKey{string(about.UID), container}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.series[key]
	if s == nil && len(r.series) >= maxSeries || r.pending >= maxPending {
		r.kills.WithLabelValues("dropped").Inc()
		return
	}
	if s == nil {
		// Every replica computes the same name.
		sum := sha256.Sum256([]byte(key.uid + "/" + key.container))
		suffix := "." + hex.EncodeToString(sum[:8])
		name := strings.TrimRight(about.Name[:min(len(about.Name), maxEventName-len(suffix))], "-.") + suffix
		s = &series{namespace: about.Namespace, name: name, about: about, delay: firstDelay}
		if s.namespace == "" {
			s.namespace = metav1.NamespaceDefault
		}
		r.series[key] = s
	}
	one := newRecord(e, o, pod)
	s.recorded, s.latest = time.Now(), one.incident
	s.pending = append(s.pending, one)
	r.pending++
	r.signal()
}

// kills is how many of the records are kills.
func kills(records []record) (n float64) {
	for _, one := range records {
		if one.kill != nil {
			n++
		}
	}
	return n
}

// end removes a series.
func (r *Recorder) end(key seriesKey, s *series) {
	r.kills.WithLabelValues("failed").Add(kills(s.pending))
	r.pending -= len(s.pending)
	delete(r.series, key)
}

func (r *Recorder) signal() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// Run writes until ctx ends. Then it writes what is pending, for at most drainEvents.
func (r *Recorder) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainEvents)
			defer cancel()
			r.write(last, true)
			return
		case <-r.wake:
		case <-timer.C:
		}
		if next, ok := r.write(ctx, false); ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
	}
}

// due is when a series must be written.
func (s *series) due() time.Time {
	switch {
	case s.attempted.IsZero():
		return s.attempted
	case !s.failed && slices.ContainsFunc(s.pending, func(one record) bool { return one.incident != s.known.Incident.ID }):
		return s.attempted.Add(eventInterval)
	}
	return s.attempted.Add(s.delay)
}

// write writes the series that are due, or all pending ones. It returns when the next one is due, if any.
func (r *Recorder) write(ctx context.Context, all bool) (next time.Time, ok bool) {
	type item struct {
		key seriesKey
		due time.Time
	}
	var due []item
	at := func(t time.Time) {
		if !ok || t.Before(next) {
			next, ok = t, true
		}
	}
	now := time.Now()
	r.mu.Lock()
	for key, s := range r.series {
		d := s.due()
		switch {
		case now.Sub(s.recorded) > eventLife:
			r.end(key, s)
			continue
		case len(s.pending) == 0:
		case all || !now.Before(d):
			due = append(due, item{key, d})
		default:
			at(d)
		}
		at(s.recorded.Add(eventLife + time.Second))
	}
	r.mu.Unlock()
	// Events that do not exist yet come first.
	slices.SortFunc(due, func(a, b item) int { return cmp.Or(a.due.Compare(b.due), strings.Compare(a.key.uid, b.key.uid)) })
	for _, one := range due {
		if r.limit.Wait(ctx) != nil {
			return now, true
		}
		r.writeOne(ctx, one.key)
		at(now) // more may have come
	}
	return next, ok
}

func (r *Recorder) writeOne(ctx context.Context, key seriesKey) {
	r.mu.Lock()
	s := r.series[key] // only this goroutine removes them
	records := s.pending
	s.pending = nil
	r.mu.Unlock()
	r.writes.Inc()
	known, err := r.put(ctx, s, records)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.note(err)
	s.attempted, s.failed = time.Now(), err != nil
	switch {
	case err == nil:
		if known.Incident.ID != s.known.Incident.ID {
			s.delay = firstDelay
		} else {
			s.delay = min(2*s.delay, eventInterval)
		}
		s.known = known
		r.kills.WithLabelValues("written").Add(kills(records))
		r.pending -= len(records)
	case apierrors.IsNotFound(err), apierrors.IsInvalid(err), errors.Is(err, errForeign):
		// The namespace is gone, or the Event can never be written. The next kill begins a new series.
		s.pending = append(records, s.pending...)
		r.end(key, s)
	default:
		s.pending = append(records, s.pending...)
		s.delay = min(2*s.delay, eventInterval)
		if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
			s.delay = max(s.delay, time.Duration(seconds)*time.Second)
		}
	}
}

// put adds records to the Event of a series, or creates it. It returns the new content. Other replicas that write at the same time
// lose nothing: an update names the version that was read.
func (r *Recorder) put(ctx context.Context, s *series, records []record) (content, error) {
	known := s.known
	var err error
	for range maxTries {
		now, changed := known.with(records)
		if known.version != "" && !changed {
			return known, nil // another replica has written all of it
		}
		var written *corev1.Event
		if written, err = r.send(ctx, s, now); err == nil {
			now.version = written.ResourceVersion
			return now, nil
		}
		switch {
		case known.version == "" && apierrors.IsAlreadyExists(err), apierrors.IsConflict(err):
			// Another replica was faster, or an earlier process has written it.
			if known, err = r.read(ctx, s); err != nil {
				return content{}, err
			}
		case known.version != "" && apierrors.IsNotFound(err):
			known.version = "" // the server has deleted it (--event-ttl)
		default:
			return content{}, err
		}
	}
	return content{}, err
}

// send creates the Event of a series, or updates the known version.
func (r *Recorder) send(ctx context.Context, s *series, c content) (*corev1.Event, error) {
	annotation, err := json.Marshal(c.state)
	if err != nil {
		return nil, fmt.Errorf("encode the state of an Event: %w", err)
	}
	message := text.Truncate(c.Incident.String(), maxEventMessage)
	annotations := map[string]string{stateKey: string(annotation)}
	if c.version == "" {
		return r.api.CreateEvent(ctx, &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Namespace: s.namespace, Name: s.name, Annotations: annotations},
			InvolvedObject: s.about, Type: corev1.EventTypeWarning, Reason: Reason, Message: message,
			FirstTimestamp: metav1.NewTime(c.first), LastTimestamp: metav1.NewTime(c.last), Count: int32(c.count),
			Source:              corev1.EventSource{Component: component, Host: r.instance},
			ReportingController: component, ReportingInstance: r.instance,
		})
	}
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"resourceVersion": c.version, "annotations": annotations},
		"message":  message, "count": c.count, "firstTimestamp": metav1.NewTime(c.first), "lastTimestamp": metav1.NewTime(c.last),
	})
	if err != nil {
		return nil, fmt.Errorf("encode the patch of an Event: %w", err)
	}
	return r.api.PatchEvent(ctx, s.namespace, s.name, patch)
}

// errForeign means that another component has an Event of that name.
var errForeign = errors.New("another component has an Event of that name")

// read reads the Event of a series. The content is empty if there is none.
func (r *Recorder) read(ctx context.Context, s *series) (content, error) {
	e, err := r.api.GetEvent(ctx, s.namespace, s.name)
	if err != nil || e == nil {
		return content{}, err
	}
	if e.Source.Component != component || e.InvolvedObject.UID != s.about.UID {
		return content{}, fmt.Errorf("update Event %s/%s: %w", s.namespace, s.name, errForeign)
	}
	c := content{version: e.ResourceVersion, count: int(e.Count), first: e.FirstTimestamp.Time, last: e.LastTimestamp.Time}
	if err := json.Unmarshal([]byte(e.Annotations[stateKey]), &c.state); err != nil {
		c.state = state{} // somebody removed it; the count is still right
	}
	return c, nil
}

// note logs once why Events cannot be written.
func (r *Recorder) note(err error) {
	failing := ""
	if err != nil {
		if failing = err.Error(); failing != r.failing {
			r.log.Warn("could not write a kubernetes event, will try again", "error", err)
		}
	}
	r.failing = failing
}
