package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

// savedState is what the state file holds: up to where kills were published.
type savedState struct {
	BootID string    `json:"boot_id"`
	Time   time.Time `json:"time"`
	Clean  bool      `json:"clean"` // the tracer stopped by itself, with everything published up to here
	// Kernel is the kernel's own count, as far as it was explained; absent where it does not count.
	Kernel      *uint64     `json:"kernel_oom_kills,omitempty"`
	Epoch       uint64      `json:"epoch"`
	Head        uint64      `json:"seq"`
	Acked       uint64      `json:"acked"`
	Unpublished []event.Gap `json:"untold,omitempty"` // gaps that NATS has not acknowledged yet: no journal has them
	Held        *bus.Held   `json:"held,omitempty"`   // what the stream of the embedded NATS held; absent with another NATS
}

// stateFile is the file that outlives tracers and boots (node.state_file). Neither a file that cannot be read nor one
// that cannot be written stops the tracer: the first is a gap, the second is tried again.
type stateFile struct {
	path     string        // empty: nothing outlives a restart
	previous *savedState   // what it held at the start; nil if there was none
	lost     bool          // there was one, and it could not be used
	changed  chan struct{} // holds a token when there may be something new to write

	writing sync.Mutex // what is newer is written later; guards what follows
	retries int        // failed writes in a row
	held    *bus.Held  // of the last reading, at the start of the one in the file

	mu          sync.Mutex // guards what follows
	last        loader.Counts
	unpublished []event.Gap
	stale       bool // the file has to be written, whatever the counts are
}

// maxState bounds what is read. Each gap takes less than 1 KiB.
const maxState = 16 << 20

// openStateFile reads the file. One that cannot be used is kept under another name.
func openStateFile(path string, log *slog.Logger) *stateFile {
	s := &stateFile{path: path, changed: make(chan struct{}, 1)}
	if path == "" {
		return s
	}
	dir, err := statedir.Open(filepath.Dir(path))
	if err == nil {
		defer dir.Close()
		s.previous, err = readState(dir, filepath.Base(path))
	}
	if s.previous != nil {
		s.held = s.previous.Held
	}
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return s
	}
	s.lost = true
	keptAs := ""
	if dir != nil {
		keptAs, _ = dir.SetAside(filepath.Base(path))
	}
	log.Error("cannot use the state file: kills that an earlier tracer did not publish are not known", "error", err, "kept_as", keptAs)
	return s
}

func readState(dir *statedir.Dir, name string) (*savedState, error) {
	data, err := dir.ReadFile(name, maxState)
	if err != nil {
		return nil, err
	}
	var state savedState
	if err := json.Unmarshal(data, &state); err != nil {
		return nil, fmt.Errorf("parse %s: %w", dir.Path(name), err)
	}
	if state.BootID == "" || state.Time.IsZero() {
		return nil, fmt.Errorf("parse %s: boot_id or time is missing", dir.Path(name))
	}
	return &state, nil
}

func (s *stateFile) write(state savedState) error {
	data, err := json.Marshal(state)
	if err != nil {
		return err
	}
	dir, err := statedir.Make(filepath.Dir(s.path))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.WriteFile(filepath.Base(s.path), append(data, '\n'))
}

// touch has the file written soon.
func (s *stateFile) touch() {
	select {
	case s.changed <- struct{}{}:
	default:
	}
}

// add keeps a gap until it is published.
func (s *stateFile) add(g event.Gap) {
	if s.path == "" {
		return
	}
	defer s.touch()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.unpublished, s.stale = append(s.unpublished, g), true
}

func (s *stateFile) remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := len(s.unpublished)
	s.unpublished = slices.DeleteFunc(s.unpublished, func(g event.Gap) bool { return g.ID == id })
	s.stale = s.stale || len(s.unpublished) != n
}

// expire has the file written, although nothing was recorded.
func (s *stateFile) expire() {
	defer s.touch()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stale = true
}

// empty reports whether there is no gap that has to be published yet.
func (s *stateFile) empty() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.unpublished) == 0
}

// outdated reports whether the file does not hold what is so now.
func (s *stateFile) outdated(now loader.Counts) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stale || s.last != now
}

// nothingMissed writes the file as if a tracer of this node had stopped just now.
func nothingMissed(path, node string) error {
	self, err := thisNode(node)
	if err != nil {
		return err
	}
	state := savedState{BootID: self.BootID, Time: time.Now().UTC(), Clean: true}
	if kernel, err := obs.KernelOOMKills("/proc"); err == nil {
		state.Kernel = &kernel
	}
	return (&stateFile{path: path}).write(state)
}

func (t *tracer) savedState(clean bool) savedState {
	counts, kernel, err := t.stable()
	state := savedState{
		BootID: t.converter.Node.BootID, Time: time.Now().UTC(), Clean: clean,
		Epoch: t.converter.Node.Epoch, Head: counts.Head, Acked: counts.Acked,
	}
	if err == nil {
		atLeast, _ := t.reconciled.bounds(counts, kernel)
		state.Kernel = new(kernel - min(kernel, atLeast))
	}
	t.state.mu.Lock()
	defer t.state.mu.Unlock()
	t.state.last, t.state.stale = counts, false
	state.Unpublished, state.Held = slices.Clone(t.state.unpublished), t.state.held
	return state
}

// How long after a kill the file is brought up to date; and after failed writes, from one to the other.
const (
	saveTime     = time.Second
	maxRetryTime = time.Minute
)

// save writes the file, and reports whether it did. After a failed write it is quiet until one succeeds.
func (t *tracer) save(ctx context.Context, clean bool) bool {
	s := t.state
	if s.path == "" || ctx.Err() != nil {
		return false
	}
	s.writing.Lock()
	defer s.writing.Unlock()
	t.checkStore(ctx)
	if err := s.write(t.savedState(clean)); err != nil {
		s.expire()
		t.metrics.stateErrors.Inc()
		if s.retries == 0 {
			t.log.Warn("cannot write state file, will retry: a restart or a reboot now may leave kills unreported", "error", err)
		}
		s.retries++
		return false
	}
	if s.retries > 0 {
		t.log.Info("state file can be written again", "path", s.path, "failed_writes", s.retries)
	}
	s.retries = 0
	t.startBase()
	return true
}

// keepState keeps the file up to date until ctx ends. Between kills it sleeps.
func (t *tracer) keepState(ctx context.Context) {
	if t.state.path == "" {
		return
	}
	for {
		select {
		case <-t.state.changed:
		case <-ctx.Done():
			return
		}
		// A storm is written once a second.
		for pause := saveTime; t.state.outdated(t.loader.Counts()); {
			select {
			case <-time.After(pause):
			case <-ctx.Done():
				return // run writes the last one
			}
			if pause = min(2*pause, maxRetryTime); t.save(ctx, false) {
				pause = saveTime
			}
		}
	}
}
