package notify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

// Name is the name of the durable consumer and of the connection.
const Name = "oom-notify"

// workers is how many kills wait for their outcomes at once. A kill that has waited for its worker longer than for its outcome waits no more.
const workers = 32

// sendGrace is how long a message that is on its way may take at the end.
const sendGrace = 2 * time.Second

// alertsPath is where Alertmanager takes alerts.
const alertsPath = "/api/v2/alerts"

// Run sends messages until ctx ends, or the connection to NATS is closed permanently.
func Run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	registry := obs.NewRegistry(Name)
	receivers, counters, err := newReceivers(cfg.Notify, registry, log)
	if err != nil {
		return err
	}
	conn, err := bus.Connect(ctx, cfg.NATS, bus.Options{Name: Name, Background: true}, log)
	if err != nil {
		return err
	}
	defer conn.Close()
	consumer, err := bus.NewConsumer(conn, bus.ConsumeOptions{
		Name: Name, Subjects: []string{"oom.v1." + string(event.KindKill) + ".>", "oom.v1." + string(event.KindGap) + ".>"}, Workers: workers,
	})
	if err != nil {
		return err
	}
	n := &notifier{
		cfg: cfg.Notify, receivers: receivers, last: conn.Last, held: make(chan struct{}, maxHeld), metrics: counters, log: log,
	}
	server, err := obs.Listen(cfg.Notify.Listen, registry, obs.Checks{Ready: n.register(registry, func() error {
		if !conn.Connected() {
			return bus.ErrDisconnected
		}
		return consumer.Failing()
	})}, log)
	if err != nil {
		return err
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	sending, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	var sends, serves sync.WaitGroup
	for _, r := range receivers {
		sends.Go(func() { r.run(ctx, sending) })
	}
	serves.Go(func() {
		if err := server.Serve(ctx); err != nil {
			cancel(err)
		}
	})
	log.Info("sending messages", "version", obs.Version().Version, "receivers", len(receivers), "group_wait", cfg.Notify.GroupWait,
		"group_interval", cfg.Notify.GroupInterval, "max_age", cfg.Notify.MaxAge)
	err = consumer.Run(ctx, n.handle)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = errors.Join(err, cause)
	}
	cancel(nil)
	grace := time.AfterFunc(sendGrace, cut)
	sends.Wait()
	grace.Stop()
	if count := consumer.Release(); count > 0 {
		log.Info("kills and gaps returned to the stream", "count", count)
	}
	serves.Wait()
	log.Info("stopped")
	return err
}

// newReceivers makes the receivers of the config.
func newReceivers(cfg config.Notify, registry prometheus.Registerer, log *slog.Logger) (receivers []*receiver, m *metrics, err error) {
	for _, r := range []struct {
		name, path string
		config.Receiver
	}{{slack, "", cfg.Slack}, {alertmanager, alertsPath, cfg.Alertmanager}, {webhook, "", cfg.Webhook}} {
		if !r.Enabled() {
			continue
		}
		f, wrong := newFormat(r.name, r.Template)
		p, unusable := newPoster("notify."+r.name, r.path, r.Receiver)
		if err = errors.Join(err, wrong, unusable); err == nil {
			receivers = append(receivers, newReceiver(r.name, cfg, f, p.post, nil, log))
		}
	}
	if err == nil && len(receivers) == 0 {
		err = fmt.Errorf("notify: no receiver: set notify.slack.url_file, notify.alertmanager.url or notify.webhook.url")
	}
	if err != nil {
		return nil, nil, err
	}
	var names []string
	for _, r := range receivers {
		names = append(names, r.name)
	}
	m = newMetrics(registry, names)
	for _, r := range receivers {
		r.metrics = m
	}
	return receivers, m, nil
}

// register registers the metrics of what is now, and returns the checks of /readyz.
func (n *notifier) register(registry prometheus.Registerer, nats func() error) map[string]obs.Check {
	failing := map[string]func() error{"nats": nats}
	for _, r := range n.receivers {
		failing[r.name] = r.failing
	}
	promauto.With(registry).NewGaugeFunc(prometheus.GaugeOpts{
		Name: "oom_tracer_notify_waiting", Help: "Number of kills and gaps in memory until every receiver has taken the message about them; further ones wait in the stream.",
	}, func() float64 { return float64(len(n.held)) })
	return obs.ReadyChecks(registry, "nats (kills and gaps can be read), and each receiver (it took the last message).", failing)
}
