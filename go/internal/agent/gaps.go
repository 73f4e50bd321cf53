package agent

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// What is missing: known from holes in the seqs, the kernel's own count of kills and, over restarts, the state file.

// stable reads the program's counts and the kernel's own at one moment: the kernel counts a kill some
// microseconds before it marks the victim. It fails where the kernel does not count.
func (t *tracer) stable() (counts loader.Counts, kernel uint64, err error) {
	for range 100 {
		counts = t.loader.Counts()
		before, err := obs.KernelOOMKills("/proc")
		if err != nil {
			return counts, 0, err
		}
		time.Sleep(2 * time.Millisecond)
		if kernel, err = obs.KernelOOMKills("/proc"); err == nil && kernel == before && t.loader.Counts() == counts {
			break
		}
	}
	return counts, kernel, nil
}

// begin reports what happened while nobody recorded, and writes the state file for the first time.
func (t *tracer) begin() error {
	counts, kernel, err := t.stable()
	now, boottime := now()
	known, booted := err == nil, now.Add(-time.Duration(boottime)).UTC()
	before, lost := t.state.previous, t.state.lost
	sameBoot := before != nil && before.BootID == t.converter.Node.BootID

	var gaps []event.Gap
	fresh := t.loader.Fresh()
	if fresh {
		missed := kernel - min(kernel, counts.Killed+counts.KilledAgain)
		g := event.Gap{Cause: event.GapBoot, Since: &booted}
		exact := !lost // an earlier tracer of this boot may have published some of them
		if sameBoot {
			g = event.Gap{Cause: event.GapRestart, Since: &before.Time}
			if before.Head > before.Acked { // died with the tracer
				g.FirstSeq, g.LastSeq = before.Acked+1, before.Head
			}
			if before.Kernel == nil {
				known = false
			} else {
				missed -= min(missed, *before.Kernel)
				missed += before.Head - before.Acked
			}
			// What was published in the last second is not in the file, and an exiting task is no kill.
			exact = before.Clean && before.Head == before.Acked
		}
		var unread uint64 // by a tracer of another version
		if left := t.loader.Left(); left != nil && left.Head > left.Acked {
			unread = left.Head - left.Acked
			g.FirstSeq, g.LastSeq = left.Acked+1, left.Head
			if known && sameBoot && before.Kernel != nil { // what was published since the file was written is not missing
				published := left.Acked - min(left.Acked, before.Acked)
				missed -= min(missed, published)
			}
			exact = known && missed == unread
		}
		found := true
		switch {
		case !known && sameBoot: // nothing proves that there was none
		case known && missed > 0 && exact:
			g.Count = &missed
		case known && missed > 0:
			g.CountMax = &missed
		case unread > 0: // marks that the kernel does not count, or a kernel that does not
			g.CountMax = &unread
		default:
			found = false
		}
		if found {
			gaps = append(gaps, g)
		}
	}
	if before != nil && !sameBoot && (!before.Clean || before.Head > before.Acked) {
		g := event.Gap{Cause: event.GapReboot, Since: &before.Time, Until: &booted}
		if before.Head > before.Acked {
			g.FirstSeq, g.LastSeq = before.Acked+1, before.Head
		}
		gaps = append(gaps, g)
	}
	if lost {
		gaps = append(gaps, event.Gap{Cause: event.GapStateLost})
	}
	room := true
	if before != nil {
		for _, g := range before.Unpublished { // by a tracer that ended before they were on NATS
			room = room && !errors.Is(t.publish(g, ackTag{gap: g.ID}), bus.ErrFull)
		}
	}
	for _, g := range gaps {
		room = room && t.gap(g)
	}
	if !room {
		return errors.New("the publish buffer has no room for the gaps found at the start")
	}
	// What was written over before this start happened after the last record that is known to be published.
	t.lastRecord = now.Add(-time.Duration(boottime - t.converter.Node.Epoch))
	if sameBoot && before.Time.After(t.lastRecord) {
		t.lastRecord = before.Time
	}
	// With the base, the next start does not look for what was missed before this one. So it waits until that is in
	// the file, or on NATS where the file cannot be written.
	if fresh {
		t.base.Store(new(kernel - min(kernel, counts.Killed+counts.KilledAgain)))
	}
	t.save(context.Background(), false)
	if t.state.empty() {
		t.startBase()
	}
	t.unseen(context.Background())
	return nil
}

// startBase sets the kernel's count at the beginning of the epoch, once.
func (t *tracer) startBase() {
	if base := t.base.Swap(nil); base != nil {
		t.loader.SetKernelBase(*base)
		t.state.touch()
	}
}

func seqGap(cause event.GapCause, seq, count uint64) event.Gap {
	return event.Gap{Cause: cause, FirstSeq: seq, LastSeq: seq, Count: &count}
}

// gap fills in, publishes, counts and logs one gap. It returns false when the publisher has no room.
func (t *tracer) gap(g event.Gap) bool {
	tag := t.complete(&g)
	err := t.publish(g, tag)
	if errors.Is(err, bus.ErrFull) {
		return false
	}
	t.reportGap(&g, tag, err)
	return true
}

// complete fills in what every gap has. It returns what its acknowledgement frees: records, or the gap in the state file.
func (t *tracer) complete(g *event.Gap) ackTag {
	g.Schema, g.Node, g.Time = event.Schema, t.converter.Node, time.Now().UTC()
	g.Node.Tier = string(t.loader.Tier())
	if g.Until == nil {
		g.Until = &g.Time
	}
	if g.Since != nil && g.Since.After(*g.Until) { // the clock was set back
		g.Since = nil
	}
	switch g.Cause {
	case event.GapWrapped, event.GapUnreadable, event.GapDropped, event.GapOtherNode:
		g.ID = event.SeqGapID(g.Node.BootID, g.Node.Epoch, g.FirstSeq, g.LastSeq)
		return ackTag{first: g.FirstSeq, last: g.LastSeq}
	case event.GapStateLost, event.GapStoreLost: // each time anew
		_, boottime := now()
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, boottime)
	case event.GapUnseen:
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, t.loader.Counts().KernelBase)
	default:
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, 0)
	}
	return ackTag{gap: g.ID}
}

// dropped is the gap in the place of an event that NATS has refused for good; nil if there can be none.
func (t *tracer) dropped(tag ackTag) *bus.Msg {
	g := seqGap(event.GapDropped, tag.first, 1)
	tag = t.complete(&g)
	m, err := message(g.ID, &g, tag)
	if t.reportGap(&g, tag, err); err != nil {
		return nil
	}
	return &m
}

// reportGap counts and logs a gap, unless nothing is missing. One that cannot be published is in the log alone.
func (t *tracer) reportGap(g *event.Gap, tag ackTag, err error) {
	if err != nil {
		t.log.Error("cannot publish a gap", "id", g.ID, "error", err)
		t.ack(tag)
	}
	if !g.Missing() {
		return
	}
	t.metrics.gaps.WithLabelValues(string(g.Cause)).Inc()
	t.lines.print(g, func() string { return text.GapLine(g, false) })
	args := []any{"cause", string(g.Cause), "id", g.ID}
	if g.LastSeq > 0 {
		args = append(args, "first_seq", g.FirstSeq, "last_seq", g.LastSeq)
	}
	switch {
	case g.Count != nil:
		args = append(args, "count", *g.Count)
	case g.CountMax != nil:
		args = append(args, "count_max", *g.CountMax)
	default:
		args = append(args, "count", "unknown")
	}
	t.log.Warn("oom kills were not recorded (gap)", args...)
}

// publish hands a gap to the publisher. One that is in no journal is remembered until NATS has it.
func (t *tracer) publish(g event.Gap, tag ackTag) error {
	if tag.gap != "" {
		t.state.add(g)
	}
	m, err := message(g.ID, &g, tag)
	if err == nil {
		err = t.publisher.Enqueue(m)
	}
	if errors.Is(err, bus.ErrFull) && tag.gap != "" {
		t.state.remove(g.ID) // the caller tries again
	}
	return err
}

// lost reports records that were overwritten before they were read. Those that an earlier tracer got may be on NATS: it
// ended before it knew.
func (t *tracer) lost(first, last uint64, handed bool) bool {
	g := event.Gap{Cause: event.GapWrapped, Since: new(t.lastRecord.UTC()), FirstSeq: first, LastSeq: last}
	if n := last - first + 1; handed {
		g.CountMax = &n
	} else {
		g.Count = &n
	}
	return t.gap(g)
}

// unseen reports kills that the kernel counted and the program did not see, once.
func (t *tracer) unseen(ctx context.Context) {
	var counts loader.Counts
	var kernel, atLeast, atMost uint64
	for range 3 { // in the moment between the kernel's count and the mark there is one too many
		var err error
		if counts, kernel, err = t.stable(); err != nil || ctx.Err() != nil {
			return
		}
		if atLeast, atMost = t.reconciled.bounds(counts, kernel); atLeast == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if atLeast > 0 {
		g := event.Gap{Cause: event.GapUnseen, CountMax: &atMost}
		if atLeast == atMost {
			g.Count, g.CountMax = &atLeast, nil
		}
		if !t.gap(g) {
			return
		}
		t.save(ctx, false) // before the base: a tracer that ends now must not lose the gap
		t.loader.SetKernelBase(counts.KernelBase + atLeast)
		t.state.touch()
	}
	t.reconciled.advance(counts, kernel, atLeast)
}

// checkStore compares what the embedded NATS holds with what it held at the last reading, which may be that of an earlier
// tracer. What it has lost is a gap. The caller holds stateFile.writing.
func (t *tracer) checkStore(ctx context.Context) {
	if t.server == nil || t.server.Ready() != nil {
		return // once it works, the file is written
	}
	held, err := t.conn.Held(ctx)
	if err != nil {
		return
	}
	if before := t.state.held; before != nil {
		lost := before.Lost(held, t.cfg.NATS.Stream, time.Now())
		if lost > 0 && !t.gap(event.Gap{Cause: event.GapStoreLost, Since: &before.FirstTime, Until: &before.LastTime, CountMax: &lost}) {
			return
		}
	}
	t.state.held = &held
}

// reconciled holds the program's counts against the kernel's. What is uncertain (Counts.Unseen) since the last
// reading does not change what was certain before it.
type reconciled struct {
	mu      sync.Mutex
	read    bool // there is a reading since the base is known
	counts  loader.Counts
	kernel  uint64
	atLeast uint64 // until then, and not reported yet
}

// bounds are how many kills were not seen and not reported.
func (r *reconciled) bounds(c loader.Counts, kernel uint64) (atLeast, atMost uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	atLeast, atMost = c.Unseen(kernel)
	if r.read {
		since := c.Since(r.counts)
		since.KernelBase = r.kernel
		more, _ := since.Unseen(kernel)
		atLeast = min(max(atLeast, r.atLeast+more), atMost)
	}
	return atLeast, atMost
}

// advance makes this the last reading, without the kills that were reported.
func (r *reconciled) advance(c loader.Counts, kernel, reported uint64) {
	if c.KernelBase == math.MaxUint64 {
		return // not known yet
	}
	atLeast, _ := r.bounds(c, kernel)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.read, r.counts, r.kernel, r.atLeast = true, c, kernel, atLeast-min(atLeast, reported)
}
