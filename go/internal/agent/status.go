package agent

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

// statusTime bounds one attempt to publish a status.
const statusTime = 5 * time.Second

// report says that the node is watched: at the start, then at every interval give or take a tenth, so that
// thousands of nodes do not speak as one. What cannot be said now is said later, with what is true then.
func (t *tracer) report(ctx context.Context) {
	phase := event.PhaseStart
	for ctx.Err() == nil {
		interval := t.cfg.Node.StatusInterval
		pause := interval - interval/10 + rand.N(interval/5)
		t.unseen(ctx)
		attempt, cancel := context.WithTimeout(ctx, statusTime)
		err := t.publishStatus(attempt, phase)
		cancel()
		if err == nil {
			phase = event.PhaseAlive
		} else {
			if t.conn.Connected() && ctx.Err() == nil {
				t.log.Warn("cannot publish the node's status", "error", err)
			}
			// That NATS is back may be seen soon; that it refuses, not too often.
			pause = min(pause, 2*statusTime)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

func (t *tracer) publishStatus(ctx context.Context, phase event.Phase) error {
	s := t.status(phase)
	m, err := message(s.ID, &s, ackTag{})
	if err != nil {
		return err
	}
	if _, err := t.conn.JetStream().PublishMsg(ctx, m.NATS(), jetstream.WithRetryAttempts(0)); err != nil {
		return fmt.Errorf("publish %s: %w", m.Subject, err)
	}
	return nil
}

func (t *tracer) status(phase event.Phase) event.NodeStatus {
	counts, kernel, err := t.stable()
	wall, boottime := now()
	at := func(boottimeNS uint64) time.Time { return wall.Add(-time.Duration(boottime - boottimeNS)).UTC() }
	s := event.NodeStatus{
		Schema: event.Schema, Time: wall.UTC(), Node: t.converter.Node, Phase: phase,
		Version: obs.Version().Version, Prototype: string(t.loader.Prototype()), Pinned: t.loader.Pinned(),
		Since: at(t.converter.Node.Epoch), Seq: counts.Head, Acked: counts.Acked, Lost: counts.Lost,
	}
	s.ID = fmt.Sprintf("%s-status-%d", s.Node.BootID, boottime)
	s.Node.Tier = string(t.loader.Tier())
	if phase != event.PhaseStop {
		s.Due = new(s.Time.Add(t.cfg.Node.StatusInterval * 11 / 10))
	}
	if err == nil {
		atLeast, atMost := t.reconciled.bounds(counts, kernel)
		s.Unseen = &event.Bounds{AtLeast: atLeast, AtMost: atMost}
	}
	if counts.LastKillNS > 0 {
		s.LastKill = new(at(counts.LastKillNS))
	}
	return s
}
