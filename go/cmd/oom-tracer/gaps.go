package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// What is missing, and how that is known: from holes in the seqs, from the kernel's own count of kills,
// and, over restarts and reboots, from a file.

// procRoot is /proc, or what stands for it in a test: where the kernel's own count is read.
type procRoot string

// remembered is what the file says: up to where kills had been told.
type remembered struct {
	BootID string    `json:"boot_id"`
	Time   time.Time `json:"time"`
	// Clean: the tracer ended by itself, having told everything up to here.
	Clean bool `json:"clean"`
	// Kernel is the kernel's own count, as far as it was explained; absent where it does not count.
	Kernel *uint64 `json:"kernel_oom_kills,omitempty"`
	Epoch  uint64  `json:"epoch"`
	Head   uint64  `json:"seq"`
	Acked  uint64  `json:"acked"`
	// Untold are gaps that NATS has not acknowledged yet: no journal has them.
	Untold []event.Gap `json:"untold,omitempty"`
}

// memory is the file.
type memory struct {
	path   string
	before *remembered // what it said at the start; nil if there was none

	writing sync.Mutex // what is newer is written later

	mu     sync.Mutex // guards what follows
	last   loader.Counts
	untold []event.Gap
	stale  bool // untold has changed since the file was written
}

// tell keeps a gap until it is told.
func (m *memory) tell(g event.Gap) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.untold, m.stale = append(m.untold, g), true
}

// told forgets a gap.
func (m *memory) told(id string) {
	if m == nil {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	n := len(m.untold)
	m.untold = slices.DeleteFunc(m.untold, func(g event.Gap) bool { return g.ID == id })
	m.stale = m.stale || len(m.untold) != n
}

// outdated reports whether the file does not say what is so now.
func (m *memory) outdated(now loader.Counts) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stale || m.last != now
}

// openMemory reads the file. One that says nothing sensible is an error: to go on as if there had been
// none would hide a gap.
func openMemory(path string) (*memory, error) {
	if path == "" {
		return nil, nil
	}
	m := &memory{path: path}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read node.state_file: %w", err)
	}
	var before remembered
	if err := json.Unmarshal(data, &before); err != nil {
		return nil, fmt.Errorf("read node.state_file %s: %w (what happened before cannot be told without it; delete it to go on)", path, err)
	}
	m.before = &before
	return m, nil
}

// write replaces the file in one step, on the disk: a node that ran out of memory may be reset next.
func (m *memory) write(r remembered) (err error) {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write node.state_file: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(m.path), 0o755); err != nil {
		return fmt.Errorf("write node.state_file: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(m.path), filepath.Base(m.path)+".*")
	if err != nil {
		return fmt.Errorf("write node.state_file: %w", err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(append(data, '\n'))
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), m.path)
	}
	if err != nil {
		return fmt.Errorf("write node.state_file: %w", err)
	}
	return nil
}

// nothingMissed writes the file as if a tracer of this node had ended just now.
func nothingMissed(path, node string) error {
	self, err := thisNode(node)
	if err != nil {
		return err
	}
	r := remembered{BootID: self.BootID, Time: time.Now().UTC(), Clean: true}
	if kernel, err := obs.KernelOOMKills("/proc"); err == nil {
		r.Kernel = &kernel
	}
	return (&memory{path: path}).write(r)
}

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
	var before *remembered
	if t.memory != nil {
		before = t.memory.before
	}
	sameBoot := before != nil && before.BootID == t.converter.Node.BootID

	var gaps []event.Gap
	fresh := t.loader.Fresh()
	if fresh {
		missed := kernel - min(kernel, counts.Killed+counts.KilledAgain)
		g := event.Gap{Cause: event.GapBoot, Since: &booted}
		exact := true
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
	room := true
	if before != nil {
		for _, g := range before.Untold { // by a tracer that ended before they were on NATS
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
	// Here an error ends it: that the file cannot be written shows at the start, and not after a reboot. It
	// comes before the base, after which the next start does not look for what was missed before this one.
	if t.memory != nil {
		if err := t.memory.write(t.remembered(false)); err != nil {
			return err
		}
	}
	if fresh {
		t.loader.SetKernelBase(kernel - min(kernel, counts.Killed+counts.KilledAgain))
	}
	t.unseen(context.Background())
	return nil
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
	case event.GapUnseen:
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, t.loader.Counts().KernelBase)
	default:
		g.ID = event.GapID(g.Node.BootID, g.Cause, g.Node.Epoch, 0)
	}
	if !t.publish(g, tag) {
		return false
	}
	t.metrics.gaps.WithLabelValues(string(g.Cause)).Inc()
	t.lines.print(text.GapLine(&g, false))
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
		t.memory.tell(g)
	}
	if err == nil {
		err = t.enqueue(g.ID, subject, &g, tag)
	}
	if err != nil && tag.gap != "" {
		t.memory.told(g.ID) // the caller tries again
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
		t.remember(ctx, false) // before the base, or a tracer that ends now has told nobody
		t.loader.SetKernelBase(counts.KernelBase + atLeast)
	}
}

// remembered is what the file is to say now.
func (t *tracer) remembered(clean bool) remembered {
	counts, kernel, known := t.stable()
	r := remembered{
		BootID: t.converter.Node.BootID, Time: time.Now().UTC(), Clean: clean,
		Epoch: t.converter.Node.Epoch, Head: counts.Head, Acked: counts.Acked,
	}
	if known {
		atLeast, _ := counts.Unseen(kernel)
		explained := kernel - min(kernel, atLeast)
		r.Kernel = &explained
	}
	t.memory.mu.Lock()
	defer t.memory.mu.Unlock()
	t.memory.last, t.memory.stale = counts, false
	r.Untold = slices.Clone(t.memory.untold)
	return r
}

// remember writes the file.
func (t *tracer) remember(ctx context.Context, clean bool) {
	if t.memory == nil || ctx.Err() != nil {
		return
	}
	t.memory.writing.Lock()
	defer t.memory.writing.Unlock()
	if err := t.memory.write(t.remembered(clean)); err != nil {
		t.memory.mu.Lock()
		t.memory.stale = true
		t.memory.mu.Unlock()
		t.log.Error("cannot remember up to where kills were told", "error", err)
	}
}

// keepTime is how often the file is brought up to date, if there was a kill.
const keepTime = time.Second

// keep keeps the file up to date until ctx ends. Between kills it looks at memory and does nothing.
func (t *tracer) keep(ctx context.Context) {
	if t.memory == nil {
		return
	}
	tick := time.NewTicker(keepTime)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if t.memory.outdated(t.loader.Counts()) {
				t.remember(ctx, false)
			}
		case <-ctx.Done():
			return
		}
	}
}
