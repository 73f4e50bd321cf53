package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

// The way down ends within five seconds of a SIGTERM, whatever hangs. The loader bounds its own step.
const (
	stopTime  = 4500 * time.Millisecond // of all steps together
	drainTime = 1500 * time.Millisecond // of publishing what is left
)

// tracer is the pipeline: loader -> wire -> bus.
type tracer struct {
	cfg        config.Config
	log        *slog.Logger
	loader     *loader.Loader
	converter  wire.Converter
	server     *embedded.Server // nil with an external NATS
	conn       *bus.Conn
	publisher  *bus.Publisher
	metrics    *metrics
	http       *obs.Server
	lines      *printer
	neighbours *neighbourReader
	state      *stateFile
	base       atomic.Pointer[uint64] // the kernel base, until it is set
	reconciled reconciled
	lastRecord time.Time // when the last record was handed over
}

// ackTag is the tag of a message: what its acknowledgement frees.
type ackTag struct {
	event       bool   // and not a gap
	boottime    uint64 // of the event's kill
	gap         string // the ID of a gap that is in no journal
	first, last uint64 // records
}

// Run traces until ctx ends.
func Run(ctx context.Context, cfg config.Config, node string, stdout io.Writer, log *slog.Logger) error {
	cli.Protect(log)
	t, err := start(ctx, cfg, node, stdout, log)
	switch {
	case err == nil:
		return t.run(ctx)
	case ctx.Err() != nil: // a stop while it waited for something is no failure
		log.Info("stopped before it had begun", "while", err)
		return nil
	}
	return err
}

// start brings everything up. Recording begins first: the journal keeps the kills while the rest waits, as for NATS.
func start(ctx context.Context, cfg config.Config, node string, stdout io.Writer, log *slog.Logger) (_ *tracer, err error) {
	self, err := thisNode(node)
	if err != nil {
		return nil, err
	}
	t := &tracer{cfg: cfg, log: log, converter: wire.Converter{
		Node: self, CgroupRoot: cfg.Node.CgroupRoot, PageSize: uint64(os.Getpagesize()), GFPFlags: loader.GFPFlags(), Now: now,
	}}
	defer func() {
		if err != nil {
			t.close(time.Now().Add(stopTime))
		}
	}()
	t.state = openStateFile(cfg.Node.StateFile, log)
	t.loader, err = loader.Open(ctx, loader.Options{
		Tier: loader.Tier(cfg.Kernel.Tier), Notify: loader.Notify(cfg.Kernel.Notify), JournalSize: uint64(cfg.Kernel.JournalSize),
		PinDir: cfg.Kernel.PinDir, Log: log,
	})
	if err != nil {
		return nil, fmt.Errorf("%w (for the reason: oom-tracer doctor)", err)
	}
	t.converter.Node.Epoch = t.loader.EpochNS()
	if cfg.NATS.URL == "" {
		if t.server, err = embedded.Start(cfg.NATS.Embedded, log); err != nil {
			return nil, err
		}
	}
	// An external NATS, or the disk of the embedded one, may come later than this agent.
	natsOptions := bus.Options{Name: bus.TracerName(node), Background: true}
	if t.server != nil { // whoever fills its port keeps this process from nothing
		natsOptions.InProcess = t.server
	}
	t.conn, err = bus.Connect(ctx, cfg.NATS, natsOptions, log)
	if err != nil {
		return nil, err
	}
	if t.server != nil && !embedded.DiskTrouble(t.server.Ready()) {
		err := bus.EnsureStreams(ctx, t.conn, t.cfg.NATS.Stream)
		if embedded.DiskTrouble(err) || t.server.Ready() != nil {
			log.Warn("cannot make the streams, will retry: kills wait in the journal", "error", err)
			t.server.Suspect()
		} else if err != nil {
			return nil, err
		}
	}
	t.metrics = newMetrics()
	t.lines = newPrinter(stdout, cfg.Log.Kills, func() { t.metrics.events.WithLabelValues("skipped", "print").Inc() })
	if t.publisher, err = bus.NewPublisher(t.conn, bus.Window, t.hooks(), log); err != nil {
		return nil, fmt.Errorf("make the publisher: %w", err)
	}
	t.metrics.kernel, t.metrics.publisher, t.metrics.conn = t.loader, t.publisher, t.conn
	t.metrics.unseen = func() (atLeast, atMost uint64, err error) {
		counts, kernel, err := t.stable()
		if err == nil {
			atLeast, atMost = t.reconciled.bounds(counts, kernel)
		}
		return atLeast, atMost, err
	}
	t.neighbours = newNeighbourReader(cfg.Node, t.metrics.neighbours, log)
	if err := t.begin(); err != nil {
		return nil, err
	}

	registry := obs.NewRegistry("oom-tracer")
	registry.MustRegister(t.metrics, obs.NewOOMKillCollector("/proc"))
	t.http, err = obs.Listen(cfg.Metrics.Listen, registry, obs.Checks{
		Health: map[string]obs.Check{"reader": t.loader.Alive, "jetstream": t.natsHealthy},
		Ready:  map[string]obs.Check{"reader": t.loader.Alive, "nats": t.natsReady},
	}, log)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	server := cfg.NATS.URL
	if t.server != nil {
		server = t.server.ClientURL() + " (embedded)"
	}
	log.Info("tracing oom kills",
		"version", obs.Version().Version, "node", node, "kernel", self.Kernel, "tier", string(t.loader.Tier()),
		"notify", string(t.loader.Notify()), "prototype", string(t.loader.Prototype()), "pinned", t.loader.Pinned(), "nats", server, "metrics", t.http.Addr())
	return t, nil
}

// storeStarted makes the streams of an embedded server that was started anew, and has its store checked.
func (t *tracer) storeStarted(ctx context.Context) error {
	if err := bus.EnsureStreams(ctx, t.conn, t.cfg.NATS.Stream); err != nil {
		return err
	}
	t.state.expire()
	return nil
}

// natsHealthy fails when only a restart of this process may cure the embedded server.
func (t *tracer) natsHealthy(context.Context) error {
	if t.server == nil {
		return nil
	}
	return t.server.Healthy()
}

// natsReady fails while events cannot be stored. That passes by itself.
func (t *tracer) natsReady(context.Context) error {
	var err error
	if t.server != nil {
		err = t.server.Ready()
	}
	if !t.conn.Connected() {
		return errors.Join(err, bus.ErrDisconnected)
	}
	return errors.Join(err, t.publisher.Failing())
}

// run works until ctx ends or a part fails, then goes down along the flow.
func (t *tracer) run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	// These two outlive ctx: they must carry what the loader reads until it has ended.
	downstream, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var last, first sync.WaitGroup // to end
	for _, run := range []func(context.Context) error{t.publisher.Run, t.http.Serve} {
		last.Go(func() {
			if err := run(downstream); err != nil {
				cancel(err)
			}
		})
	}
	if t.server != nil {
		first.Go(func() { t.server.Supervise(ctx, t.storeStarted, t.publisher.Failing) })
	}
	first.Go(func() { t.neighbours.run(ctx, t.publishNeighbours) })
	first.Go(func() { t.keepState(ctx) })
	first.Go(func() { t.report(ctx) })

	stopped := make(chan time.Time, 1)
	context.AfterFunc(ctx, func() { stopped <- time.Now() })
	err := t.loader.Run(ctx, loader.Handler{Record: t.record, Lost: t.lost})
	if err != nil {
		err = fmt.Errorf("read kills: %w", err)
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = errors.Join(err, cause)
	}
	cancel(nil)
	deadline := (<-stopped).Add(stopTime)
	bounded, done := context.WithDeadline(downstream, deadline)
	defer done()
	wait(bounded, first.Wait)

	draining, drained := context.WithTimeout(bounded, drainTime)
	defer drained()
	if left, drainErr := t.publisher.Drain(draining); left > 0 && t.loader.Pinned() {
		t.log.Warn("stopping with unpublished events: the next start reads them from the journal, or reports them as a gap", "left", left, "error", drainErr)
	} else if left > 0 {
		err = errors.Join(err, fmt.Errorf("%d events could not be published before the stop: %w", left, drainErr))
	}
	if t.conn.Connected() {
		if statusErr := t.publishStatus(draining, event.PhaseStop); statusErr != nil {
			t.log.Warn("could not publish the stop status", "error", statusErr)
		}
	}
	t.save(bounded, true)
	stop()
	wait(bounded, last.Wait)
	err = errors.Join(err, t.close(deadline))
	if t.loader.Pinned() {
		t.log.Info("stopped; the kernel keeps recording for the next start (to end it: oom-tracer unload)")
	} else {
		t.log.Info("stopped")
	}
	return err
}

func wait(ctx context.Context, something func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		something()
	}()
	select {
	case <-done:
	case <-ctx.Done():
	}
}

// close releases what start took, in the order of the flow. It may find a half-started tracer.
func (t *tracer) close(deadline time.Time) error {
	if t.loader != nil {
		t.loader.Close()
	}
	if t.lines != nil {
		t.lines.close()
	}
	ctx, cancel := context.WithDeadline(context.Background(), deadline)
	defer cancel()
	if t.conn != nil {
		wait(ctx, t.conn.Close) // which may wait for a server that does not answer
	}
	if t.server == nil {
		return nil
	}
	return t.server.Shutdown(ctx)
}

// record publishes one record. It returns false while the publisher is full: the journal keeps the others.
func (t *tracer) record(seq uint64, sample []byte) bool {
	// instead publishes a gap in the place of the event.
	instead := func(cause event.GapCause, count uint64, stage, reason string) bool {
		taken := t.gap(seqGap(cause, seq, count))
		if taken {
			t.metrics.events.WithLabelValues(stage, reason).Inc()
		}
		return taken
	}
	record, err := wire.Decode(sample)
	if err != nil {
		taken := instead(event.GapUnreadable, 1, "error", "decode")
		if taken {
			t.log.Error("cannot decode a record", "seq", seq, "error", err, "bytes", len(sample), "head", fmt.Sprintf("%x", sample[:min(len(sample), 64)]))
		}
		return taken
	}
	if !t.converter.OnNode(record) {
		return instead(event.GapOtherNode, 0, "skipped", "other_node")
	}
	e := t.converter.Event(record)
	m, err := message(e.MsgID(), &e, ackTag{event: true, boottime: e.BoottimeNS, first: seq, last: seq})
	if err == nil {
		err = t.publisher.Enqueue(m)
	}
	if errors.Is(err, bus.ErrFull) || err != nil && !instead(event.GapDropped, 1, "error", "encode") {
		return false
	}
	if err != nil {
		t.log.Error("cannot publish an event", "id", e.ID, "seq", seq, "error", err)
	}
	t.state.touch()
	t.metrics.observe(&e)
	t.neighbours.observe(&e)
	t.lines.print(&e, func() string { return text.Line(&e, false) })
	t.lastRecord = e.Time
	return true
}

// message is what is published of an event, a gap or a status.
func message(id string, of interface{ Subject() (string, error) }, tag ackTag) (bus.Msg, error) {
	subject, err := of.Subject()
	if err != nil {
		return bus.Msg{}, err
	}
	data, err := json.Marshal(of)
	if err != nil {
		return bus.Msg{}, fmt.Errorf("write %s as json: %w", id, err)
	}
	return bus.Msg{ID: id, Subject: subject, Data: data, Tag: tag}, nil
}

func (t *tracer) hooks() bus.Hooks {
	return bus.Hooks{
		OnAck: func(m bus.Msg, _ bool) {
			tag := m.Tag.(ackTag)
			if tag.event {
				_, boottime := now() // the wall clock may be set meanwhile
				t.metrics.published.Observe(time.Duration(boottime - tag.boottime).Seconds())
			}
			t.ack(tag)
			if t.publisher.Pending() <= bus.Window/2 {
				t.loader.Resume()
			}
		},
		OnRetry: func(bus.Msg, error) {
			t.metrics.events.WithLabelValues("error", "publish").Inc()
			if t.server != nil {
				t.server.Suspect()
			}
		},
		OnDrop: func(m bus.Msg, _ error) *bus.Msg {
			t.metrics.events.WithLabelValues("error", "dropped").Inc()
			tag := m.Tag.(ackTag)
			if tag.event {
				return t.dropped(tag)
			}
			t.ack(tag)
			return nil
		},
	}
}

func (t *tracer) ack(tag ackTag) {
	defer t.state.touch()
	if tag.last > 0 {
		t.loader.Ack(tag.first, tag.last)
	}
	if tag.gap != "" {
		t.state.remove(tag.gap)
		if t.state.empty() {
			t.startBase()
		}
	}
}

// thisNode is what every event says of its node, but for the tier.
func thisNode(name string) (event.Node, error) {
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return event.Node{}, fmt.Errorf("read the boot id: %w", err)
	}
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return event.Node{}, fmt.Errorf("read the kernel's release: %w", err)
	}
	return event.Node{Name: name, BootID: strings.TrimSpace(string(bootID)), Kernel: strings.TrimSpace(string(release))}, nil
}

// now reads the wall clock and CLOCK_BOOTTIME, in nanoseconds, together.
func now() (time.Time, uint64) {
	var boot unix.Timespec
	// Fails only for a clock that the kernel does not have; this one is there since 2.6.39.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	return time.Now(), uint64(boot.Nano())
}

// printer writes kills and gaps to standard output, as log.kills says. It never waits for whoever reads that.
type printer struct {
	format  string
	lines   chan string
	done    chan struct{}
	dropped func()
}

func newPrinter(w io.Writer, format string, dropped func()) *printer {
	p := &printer{format: format, lines: make(chan string, 1024), done: make(chan struct{}), dropped: dropped}
	go func() {
		defer close(p.done)
		for line := range p.lines {
			fmt.Fprintln(w, line)
		}
	}()
	return p
}

func (p *printer) print(v any, asText func() string) {
	var line string
	switch p.format {
	case config.KillsNone:
		return
	case config.KillsJSON:
		data, err := json.Marshal(v)
		if err != nil { // it is not on NATS either, and the log has it
			return
		}
		line = string(data)
	default:
		line = asText()
	}
	select {
	case p.lines <- line:
	default:
		p.dropped()
	}
}

// close waits for what is still to be written, for a moment.
func (p *printer) close() {
	close(p.lines)
	select {
	case <-p.done:
	case <-time.After(200 * time.Millisecond):
	}
}

// Unload ends the recording that continues in the kernel.
func Unload(ctx context.Context, dir string, force bool, stdout io.Writer) error {
	if dir == "" {
		fmt.Fprintln(stdout, "nothing is pinned: kernel.pin_dir is empty")
		return nil
	}
	switch unpublished, err := loader.Unload(ctx, dir, force); {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, loader.ErrNoBPFFS):
		fmt.Fprintf(stdout, "nothing is pinned in %s\n", dir)
	case err != nil:
		return fmt.Errorf("unload: %w", err)
	case unpublished > 0:
		fmt.Fprintf(stdout, "unloaded; %d records that were not published are gone\n", unpublished)
	default:
		fmt.Fprintln(stdout, "unloaded: nothing records kills now")
	}
	return nil
}
