package annotate

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// What Kubernetes Events may cost the API server. client-go's recorder would drop the last kills of a crash
// loop for good; here they are in the next write of the same Event, which comes also when no kill does.
const (
	eventInterval   = time.Minute      // between two writes of one Event, at least
	eventLife       = 10 * time.Minute // after so long without a kill the next one begins another Event
	eventsPerSec    = 10               // of all Events
	eventsAtOnce    = 50
	maxSeries       = 5000
	maxEventName    = 253  // bytes, of a DNS-1123 subdomain
	maxEventMessage = 1024 // bytes (NoteLengthLimit in pkg/apis/core/validation/events.go)
	eventReason     = "OOMKilled"
	drainEvents     = time.Second // on the way down
)

// EventAPI is what is asked of the API server.
type EventAPI interface {
	CreateEvent(ctx context.Context, e *corev1.Event) error
	PatchEvent(ctx context.Context, namespace, name string, patch []byte) error
}

// Events writes a Kubernetes Event for each kill: on the pod, and on the node where more than a pod ran out of
// memory. Kills in one container, and those of one node, that follow each other are one Event with a count.
// As all Events of Kubernetes they are best effort: what could not be written for ten minutes is given up,
// and counted. NATS has it all.
type Events struct {
	api      EventAPI
	instance string // of this program: a host's name
	log      *slog.Logger
	now      func() time.Time
	limit    *rate.Limiter
	kills    *prometheus.CounterVec
	writes   prometheus.Counter

	wake chan struct{} // holds a token when there is something new

	mu      sync.Mutex
	series  map[seriesKey]*series
	failing string // the last error, told once
}

type seriesKey struct{ uid, container string }

// series is one Event.
type series struct {
	namespace, name string
	about           corev1.ObjectReference
	message         string    // of the last kill
	count, written  int       // kills, and those of them that the API server knows of
	first, last     time.Time // kills
	heard           time.Time // when the last one was told
	due             time.Time // not to be written before
}

// NewEvents makes the writer. Nothing is written before Run.
func NewEvents(api EventAPI, instance string, log *slog.Logger) *Events {
	v := &Events{
		api: api, instance: instance, log: log, now: time.Now, limit: rate.NewLimiter(eventsPerSec, eventsAtOnce),
		kills: prometheus.NewCounterVec(prometheus.CounterOpts{
			Subsystem: "oom_tracer", Name: "kubernetes_events_total",
			Help: "Kills by what became of their Kubernetes Events, on pods and on nodes: written, failed (given up) or dropped (too many at once).",
		}, []string{"result"}),
		writes: prometheus.NewCounter(prometheus.CounterOpts{
			Subsystem: "oom_tracer", Name: "kubernetes_event_writes_total",
			Help: "Requests to the API server to create or update a Kubernetes Event.",
		}),
		wake: make(chan struct{}, 1), series: map[seriesKey]*series{},
	}
	for _, result := range []string{"written", "failed", "dropped"} {
		v.kills.WithLabelValues(result)
	}
	return v
}

// Describe implements prometheus.Collector.
func (v *Events) Describe(ch chan<- *prometheus.Desc) {
	v.kills.Describe(ch)
	v.writes.Describe(ch)
}

// Collect implements prometheus.Collector.
func (v *Events) Collect(ch chan<- prometheus.Metric) {
	v.kills.Collect(ch)
	v.writes.Collect(ch)
}

// Tell implements Teller. It never blocks.
func (v *Events) Tell(e *event.Event, o *event.Outcome, others string) {
	if o.Reason == event.ReasonTooOld {
		return // news of long ago
	}
	if others != "" {
		others = "; " + others
	}
	if p := o.Pod; p != nil {
		v.add(e, text.Sentence(e, o, false)+others, corev1.ObjectReference{
			APIVersion: "v1", Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: types.UID(p.UID),
		}, o.Container)
	}
	if e.BeyondPod() {
		// As the kubelet does: its UID is the node's name.
		v.add(e, text.Sentence(e, o, true)+others, corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: o.Node, UID: types.UID(o.Node)}, "")
	}
}

func (v *Events) add(e *event.Event, message string, about corev1.ObjectReference, container string) {
	key := seriesKey{string(about.UID), container}
	v.mu.Lock()
	defer v.mu.Unlock()
	now := v.now()
	s := v.series[key]
	if s != nil && now.Sub(s.heard) > eventLife {
		v.end(key, s)
		s = nil
	}
	if s == nil {
		if len(v.series) >= maxSeries {
			v.kills.WithLabelValues("dropped").Inc()
			return
		}
		// Of the first kill, so that whoever begins the series again after a crash makes no second Event.
		sum := sha256.Sum256([]byte(e.ID + "/" + string(about.UID)))
		suffix := "." + hex.EncodeToString(sum[:8])
		name := strings.TrimRight(about.Name[:min(len(about.Name), maxEventName-len(suffix))], "-.") + suffix
		s = &series{namespace: about.Namespace, name: name, about: about, first: e.Time}
		if s.namespace == "" {
			s.namespace = metav1.NamespaceDefault
		}
		v.series[key] = s
	}
	s.message, s.last, s.heard = cut(message, maxEventMessage), e.Time, now
	s.count++
	v.signal()
}

// end forgets a series.
func (v *Events) end(key seriesKey, s *series) {
	v.kills.WithLabelValues("failed").Add(float64(s.count - s.written))
	delete(v.series, key)
}

func (v *Events) signal() {
	select {
	case v.wake <- struct{}{}:
	default:
	}
}

// Run writes until ctx ends, and then what is left within a moment.
func (v *Events) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainEvents)
			defer cancel()
			v.write(last, true)
			return
		case <-v.wake:
		case <-timer.C:
		}
		timer.Reset(v.write(ctx, false))
	}
}

// write writes the series that are due, or all that are not written. It returns how long nothing else is.
func (v *Events) write(ctx context.Context, all bool) (idle time.Duration) {
	now := v.now()
	idle = eventInterval
	var due []seriesKey
	v.mu.Lock()
	for _, key := range slices.Collect(maps.Keys(v.series)) {
		switch s := v.series[key]; {
		case now.Sub(s.heard) > eventLife:
			v.end(key, s)
		case s.count == s.written:
		case all || !now.Before(s.due):
			due = append(due, key)
		default:
			idle = min(idle, s.due.Sub(now))
		}
	}
	v.mu.Unlock()
	for _, key := range due {
		if v.limit.Wait(ctx) != nil {
			return 0
		}
		v.writeOne(ctx, key)
		idle = 0 // more may have come
	}
	return idle
}

func (v *Events) writeOne(ctx context.Context, key seriesKey) {
	v.mu.Lock()
	s := *v.series[key] // only this goroutine takes them away, but Tell, which puts another one there
	v.mu.Unlock()
	v.writes.Inc()
	err := v.put(ctx, &s)
	v.mu.Lock()
	defer v.mu.Unlock()
	v.note(err)
	now, kept := v.series[key], s
	if now == nil || now.name != s.name {
		return
	}
	now.due = v.now().Add(eventInterval)
	switch {
	case err == nil:
		v.kills.WithLabelValues("written").Add(float64(kept.count - now.written))
		now.written = kept.count
	case apierrors.IsNotFound(unwrap(err)), apierrors.IsInvalid(unwrap(err)):
		// The namespace is gone, or this Event can never be: the next kill may be told.
		v.end(key, now)
	}
}

// put creates a series' Event, or updates it.
func (v *Events) put(ctx context.Context, s *series) error {
	create := s.written == 0
	for range 2 {
		if create {
			err := v.api.CreateEvent(ctx, &corev1.Event{
				ObjectMeta:     metav1.ObjectMeta{Namespace: s.namespace, Name: s.name},
				InvolvedObject: s.about, Type: corev1.EventTypeWarning, Reason: eventReason, Message: s.message,
				FirstTimestamp: metav1.NewTime(s.first), LastTimestamp: metav1.NewTime(s.last), Count: int32(s.count),
				Source:              corev1.EventSource{Component: "oom-tracer", Host: v.instance},
				ReportingController: "oom-tracer", ReportingInstance: v.instance,
			})
			if !apierrors.IsAlreadyExists(unwrap(err)) {
				return err
			}
		}
		patch, err := json.Marshal(map[string]any{"message": s.message, "count": s.count, "lastTimestamp": metav1.NewTime(s.last)})
		if err != nil {
			return fmt.Errorf("write the patch of an Event: %w", err)
		}
		if err = v.api.PatchEvent(ctx, s.namespace, s.name, patch); create || !apierrors.IsNotFound(unwrap(err)) {
			return err
		}
		create = true // it has outlived its time on the server
	}
	return nil
}

// note says once why Events cannot be written.
func (v *Events) note(err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	if text != v.failing && err != nil {
		v.log.Warn("kubernetes event cannot be written, will try again", "error", err)
	}
	v.failing = text
}
