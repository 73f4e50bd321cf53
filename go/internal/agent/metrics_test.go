package agent

import (
	"errors"
	"flag"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// fakeSides stands for all that is read at the scrape.
type fakeSides struct {
	tier      loader.Tier
	notify    loader.Notify
	prototype loader.Prototype
	stats     loader.Stats
	statsErr  error
	received  uint64
	caughtUp  uint64
	counts    loader.Counts
	connected bool
	pending   int
	acked     uint64
}

func (f *fakeSides) Tier() loader.Tier            { return f.tier }
func (f *fakeSides) Notify() loader.Notify        { return f.notify }
func (f *fakeSides) Prototype() loader.Prototype  { return f.prototype }
func (f *fakeSides) Stats() (loader.Stats, error) { return f.stats, f.statsErr }
func (f *fakeSides) Received() uint64             { return f.received }
func (f *fakeSides) CaughtUp() uint64             { return f.caughtUp }
func (f *fakeSides) Counts() loader.Counts        { return f.counts }
func (f *fakeSides) Connected() bool              { return f.connected }

func (f *fakeSides) Pending() int  { return f.pending }
func (f *fakeSides) Acked() uint64 { return f.acked }

// fakeMetrics are the metrics of a tracer that is not there.
func fakeMetrics(f *fakeSides) *metrics {
	m := newMetrics()
	m.kernel, m.conn, m.publisher = f, f, f
	m.unseen = func() (atLeast, atMost uint64, err error) {
		kernel, err := obs.KernelOOMKills("testdata/proc")
		atLeast, atMost = new(reconciled).bounds(f.counts, kernel)
		return atLeast, atMost, err
	}
	return m
}

// register makes the registry that a tracer makes, but for the kernel's own counter, which is that of a
// fixture.
func register(t *testing.T, m *metrics) *prometheus.Registry {
	t.Helper()
	vmstat := t.TempDir()
	if err := os.WriteFile(vmstat+"/vmstat", []byte("nr_free_pages 1\noom_kill 42\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	registry := obs.NewRegistry("oom-tracer")
	registry.MustRegister(m, obs.NewOOMKillCollector(vmstat))
	return registry
}

var buildLabels = regexp.MustCompile(`(goversion|revision|version)="[^"]*"`)

// exposition is our own part of what a scrape gets, with what the build decides taken out.
func exposition(t *testing.T, registry *prometheus.Registry) string {
	t.Helper()
	scrape := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(scrape, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if scrape.Code != http.StatusOK {
		t.Fatalf("%d: %s", scrape.Code, scrape.Body)
	}
	var ours strings.Builder
	for line := range strings.Lines(scrape.Body.String()) {
		if strings.HasPrefix(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE "), "oom_tracer_") {
			ours.WriteString(line)
		}
	}
	return buildLabels.ReplaceAllString(ours.String(), `$1="…"`)
}

// Every name, label and help text, from the first scrape on: alerts and dashboards are written to them.
func TestMetricsExposition(t *testing.T) {
	m := fakeMetrics(&fakeSides{tier: loader.TierStack, notify: loader.NotifyPerf, prototype: loader.PrototypeTask, counts: loader.Counts{KernelBase: 42}})
	registry := register(t, m)
	oomtest.Golden(t, "metrics-start.golden", exposition(t, registry), *update)
	problems, err := testutil.GatherAndLint(registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("lint: %s: %s", p.Metric, p.Text)
	}
}

// What happens moves the series that it should, and no other.
func TestMetricsCount(t *testing.T) {
	m := fakeMetrics(&fakeSides{
		tier: loader.TierNone, notify: loader.NotifyRingbuf, prototype: loader.PrototypePID, connected: true, received: 7, caughtUp: 3,
		// The kernel's 42 are 32 more than its base. Of 20 kills seen, 2 in groups; 3 exits may have become kills.
		counts:  loader.Counts{Head: 30, Acked: 26, Lost: 2, Killed: 20, Unknown: 4, Exiting: 3, Groups: 2, Unhooked: 20, KernelBase: 10},
		stats:   loader.Stats{Seen: 10, Sent: 8, Refused: 2},
		pending: 6, acked: 5,
	})
	pod := &event.Container{PodUID: "u", ContainerID: "c"}
	for _, e := range []event.Event{
		{Outcome: event.OutcomeKilled, Scope: event.ScopeCgroup, Container: pod, Limit: &event.Limit{Level: event.LevelContainer}},
		{Outcome: event.OutcomeKilled, Scope: event.ScopeCgroup},
		{Outcome: event.OutcomeKilled, Scope: event.ScopeGlobal, Limit: &event.Limit{Level: event.LevelNode}},
		{Outcome: event.OutcomeUnknown, Scope: event.ScopeUnknown, Container: &event.Container{ContainerID: "c"}},
		{Outcome: event.OutcomeExiting, Scope: event.ScopeGlobal, Container: &event.Container{PodUID: "u"}},
		{Outcome: event.OutcomeExiting, Scope: event.ScopeCgroup, Container: &event.Container{PodUID: "v"}},
	} {
		m.observe(&e)
	}
	m.published.Observe(0.003)
	m.events.WithLabelValues("error", "decode").Inc()
	m.gaps.WithLabelValues("wrapped").Inc()
	oomtest.Golden(t, "metrics-counted.golden", exposition(t, register(t, m)), *update)
}

// A count that cannot be read is absent and an error of the scrape, never 0; the rest is served.
func TestMetricsStatsFail(t *testing.T) {
	m := fakeMetrics(&fakeSides{statsErr: errors.New("read map oom_stats: bad file descriptor")})
	registry := register(t, m)
	families, err := registry.Gather()
	if err == nil || !strings.Contains(err.Error(), "bad file descriptor") {
		t.Errorf("gather: %v", err)
	}
	var names []string
	for _, family := range families {
		names = append(names, family.GetName())
	}
	if slices.Contains(names, "oom_tracer_samples_total") || !slices.Contains(names, "oom_tracer_publish_pending") || !slices.Contains(names, "oom_tracer_kills_total") {
		t.Errorf("served: %v", names)
	}
	// And over HTTP, where a tracer serves it.
	ctx := t.Context()
	server, err := obs.Listen("127.0.0.1:0", registry, obs.Checks{}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(ctx) }()
	client := http.Client{Timeout: 10 * time.Second}
	response, err := client.Get("http://" + server.Addr() + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s, %v", response.Status, err)
	}
	if strings.Contains(string(body), "\noom_tracer_samples_total{") || !strings.Contains(string(body), "\noom_tracer_publish_pending 0\n") {
		t.Errorf("served over HTTP:\n%s", body)
	}
}
