package notify

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// Values of the labels result and reason.
const (
	resultSent    = "sent"
	resultFailed  = "failed" // it is tried again
	resultRefused = "refused"
	reasonRefused = "refused"
	reasonTooOld  = "too_old"
)

type metrics struct {
	messages  *prometheus.CounterVec
	notified  *prometheus.CounterVec
	givenUp   *prometheus.CounterVec
	templates *prometheus.CounterVec
	malformed prometheus.Counter
}

// newMetrics registers the metrics. Every series is there from the start, so that a rate includes the first event.
func newMetrics(registerer prometheus.Registerer, receivers []string) *metrics {
	register := promauto.With(registerer)
	m := &metrics{
		messages: register.NewCounterVec(prometheus.CounterOpts{
			Name: "oom_tracer_notify_messages_total",
			Help: "Number of attempts to send a message, by receiver and result (sent, failed: is tried again, refused: is given up).",
		}, []string{"receiver", "result"}),
		notified: register.NewCounterVec(prometheus.CounterOpts{
			Name: "oom_tracer_notify_notified_total", Help: "Number of kills and gaps in the messages that a receiver took.",
		}, []string{"receiver", "kind"}),
		givenUp: register.NewCounterVec(prometheus.CounterOpts{
			Name: "oom_tracer_notify_given_up_total",
			Help: "Number of kills and gaps that a receiver got no message about, by reason (refused, too_old: notify.max_age).",
		}, []string{"receiver", "reason"}),
		templates: register.NewCounterVec(prometheus.CounterOpts{
			Name: "oom_tracer_notify_template_errors_total",
			Help: "Number of messages with the default text, because the template of the config failed.",
		}, []string{"receiver"}),
		malformed: register.NewCounter(prometheus.CounterOpts{
			Name: "oom_tracer_notify_malformed_total", Help: "Number of messages of the stream that are no kill and no gap.",
		}),
	}
	for _, r := range receivers {
		for _, result := range []string{resultSent, resultFailed, resultRefused} {
			m.messages.WithLabelValues(r, result)
		}
		for _, kind := range []event.Kind{event.KindKill, event.KindGap} {
			m.notified.WithLabelValues(r, string(kind))
		}
		for _, reason := range []string{reasonRefused, reasonTooOld} {
			m.givenUp.WithLabelValues(r, reason)
		}
		m.templates.WithLabelValues(r)
	}
	return m
}
