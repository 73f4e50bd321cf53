package main

import (
	"context"
	"errors"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

// What is missing, and how that is known: from holes in the seqs, from the kernel's own count of kills,
// and, over restarts and reboots, from the state file.

// procRoot is /proc, or what stands for it in a test: where the kernel's own count is read.
type procRoot string

// stable reads the program's counts and the kernel's own at one moment: the kernel counts a kill some
// microseconds before it marks the victim. known is false where the kernel does not count.
func (t *tracer) stable() (counts loader.Counts, kernel uint64, known bool) {
	for range 100 {
		counts = t.loader.Counts()
		before, err := obs.KernelOOMKills(string(t.vmstat))
		if err != nil {
			return counts, 0, false
		}
		time.Sleep(2 * time.Millisecond)
		if kernel, err = obs.KernelOOMKills(string(t.vmstat)); err == nil && kernel == before && t.loader.Counts() == counts {
			break
		}
	}
	return counts, kernel, true
}

// begin tells what happened while nobody recorded, and begins to remember.
func (t *tracer) begin() error {
	counts, kernel, known := t.stable()
	now, boottime := now()
	booted := now.Add(-time.Duration(boottime)).UTC()
	var before *savedState
	lost := false
	if t.state != nil {
		before, lost = t.state.previous, t.state.lost
	}
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
			// What was told in the last second is not in the file, and an exiting task is no kill.
			exact = before.Clean && before.Head == before.Acked
		}
		switch {
		case !known && sameBoot: // nothing proves that there was none
			gaps = append(gaps, g)
		case known && missed > 0 && exact:
			g.Count = &missed
			gaps = append(gaps, g)
		case known && missed > 0:
			g.CountMax = &missed
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
			room = room && t.publish(g, settles{})
		}
	}
	for _, g := range gaps {
		room = room && t.gap(g)
	}
	if !room {
		return errors.New("the publish buffer has no room for what was missed before the start")
	}
	// What was written over before this start happened after the last that is known to have been told.
	t.told = now.Add(-time.Duration(boottime - t.converter.Node.Epoch))
	if sameBoot && before.Time.After(t.told) {
		t.told = before.Time
	}
	// With the base, the next start does not look for what was missed before this one. So it waits until that is in
	// the file, or on NATS where the file cannot be written.
	if fresh {
		base := kernel - min(kernel, counts.Killed+counts.KilledAgain)
		t.base.Store(&base)
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
	}
}

// gap fills in, publishes, counts and logs one gap. It returns false when the publisher's buffer is full.
func (t *tracer) gap(g event.Gap) bool {
	g.Schema, g.Node, g.Time = event.Schema, t.converter.Node, time.Now().UTC()
	g.Node.Tier = string(t.loader.Tier())
	if g.Until == nil {
		g.Until = &g.Time
	}
	tag := settles{}
	switch g.Cause {
	case event.GapWrapped, event.GapUnreadable:
		g.ID = event.SeqGapID(g.Node.BootID, g.Node.Epoch, g.FirstSeq, g.LastSeq)
		tag.first, tag.last = g.FirstSeq, g.LastSeq
	case event.GapStateLost: // at each start anew
		_, boottime := now()
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, boottime)
	case event.GapUnseen:
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, t.loader.Counts().KernelBase)
	default:
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, 0)
	}
	if !t.publish(g, tag) {
		return false
	}
	t.metrics.gaps.WithLabelValues(string(g.Cause)).Inc()
	t.lines.gap(&g)
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
	t.log.Warn("kills are missing", args...)
	return true
}

// publish hands a gap to the publisher. Unless it has a place in the journal, it is remembered until it is told.
func (t *tracer) publish(g event.Gap, tag settles) bool {
	subject, err := g.Subject()
	if tag.last == 0 {
		tag.gap = g.ID
		t.state.add(g)
	}
	if err == nil {
		err = t.enqueue(g.ID, subject, &g, tag)
	}
	if err != nil && tag.gap != "" {
		t.state.remove(g.ID) // the caller tries again
	}
	return err == nil
}

// lost tells of records that were written over before they were read.
func (t *tracer) lost(first, last uint64) bool {
	count := last - first + 1
	since := t.told.UTC()
	return t.gap(event.Gap{Cause: event.GapWrapped, Since: &since, FirstSeq: first, LastSeq: last, Count: &count})
}

// unseen tells of kills that the kernel counted and the program did not see, once.
func (t *tracer) unseen(ctx context.Context) {
	counts, kernel, known := t.stable()
	atLeast, atMost := counts.Unseen(kernel)
	if !known || atLeast == 0 || ctx.Err() != nil {
		return
	}
	g := event.Gap{Cause: event.GapUnseen, CountMax: &atMost}
	if atLeast == atMost {
		g.Count, g.CountMax = &atLeast, nil
	}
	if t.gap(g) {
		t.save(ctx, false) // before the base, or a tracer that ends now has told nobody
		t.loader.SetKernelBase(counts.KernelBase + atLeast)
	}
}
