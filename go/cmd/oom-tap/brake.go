package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/user"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// maxReason bounds what one may say, in bytes: it is shared in one message, and shown with every kill.
const maxReason = 300

// brake runs pause, resume, status and restore.
func brake(ctx context.Context, conn *bus.Conn, command string, cfg config.Config, o options, stdout io.Writer) error {
	entry := conn.KVEntry(budget.Key)
	ledger := &budget.Ledger{Entry: entry, Limits: cfg.Policy.Budgets, Keep: cfg.Policy.MaxEventAge, Now: time.Now}
	var err error
	switch command {
	case "pause":
		now := time.Now().UTC()
		p := &budget.Pause{Reason: o.reason, By: whoami(), Since: now}
		if o.duration > 0 {
			until := now.Add(o.duration)
			p.Until = &until
		}
		var before *budget.Pause
		if before, err = ledger.SetPause(ctx, p); err == nil {
			if before != nil && holds(before, now) {
				fmt.Fprintf(stdout, "was %s\n", paused(before, now))
			}
			fmt.Fprintf(stdout, "%s\n", paused(p, now))
		}
	case "resume":
		var before *budget.Pause
		if before, err = ledger.SetPause(ctx, nil); err == nil {
			now := time.Now()
			if before == nil || !holds(before, now) {
				fmt.Fprintln(stdout, "marking was not paused")
			} else {
				fmt.Fprintf(stdout, "was %s\nmarking goes on\n", paused(before, now))
			}
		}
	case "restore":
		err = restore(ctx, entry, ledger, o.empty, stdout)
	default:
		var state budget.State
		if state, err = ledger.State(ctx); err == nil {
			err = status(stdout, &state, cfg.Policy, o.output, time.Now())
		}
	}
	if errors.Is(err, nats.ErrPermissionViolation) && (command == "pause" || command == "resume") {
		return fmt.Errorf("%w (user %q may not: give nats.user oom-operator and its password, in the chart's Secret the key operator)", err, cfg.NATS.User)
	}
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return fmt.Errorf("%w: make it with: oom-tap setup --config %s", err, o.configPath)
	}
	return err
}

// restore replaces a state that is refused by the newest revision that is valid, or by an empty one.
func restore(ctx context.Context, entry *bus.KVEntry, ledger *budget.Ledger, empty bool, stdout io.Writer) error {
	revisions, err := entry.History(ctx)
	if err != nil {
		return err
	}
	if empty {
		revisions = []budget.Revision{{Data: budget.Initial(), Time: time.Now()}}
	}
	from, valid, err := ledger.Restore(ctx, revisions)
	switch {
	case err != nil && !empty:
		return fmt.Errorf("%w (--empty begins anew: no pause, and no budget is used)", err)
	case err != nil:
		return err
	case valid:
		fmt.Fprintln(stdout, "the state is valid, nothing is changed")
	case empty:
		fmt.Fprintln(stdout, "the state is empty: marking is not paused, and no budget is used")
	default:
		fmt.Fprintf(stdout, "restored the state of %s; what oom-tap status shows holds now\n", from.Time.UTC().Format(time.RFC3339))
	}
	return nil
}

// whoami says who pauses, for people: it proves nothing.
func whoami() string {
	name := "uid " + fmt.Sprint(os.Getuid())
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	if host, err := os.Hostname(); err == nil {
		name += "@" + host
	}
	return name
}

func holds(p *budget.Pause, now time.Time) bool {
	return (&budget.State{Pause: p}).Paused(now) != nil
}

// paused is a pause in words.
func paused(p *budget.Pause, now time.Time) string {
	s := fmt.Sprintf("paused by %s %s: %s", text.Printable(p.By), ago(now.Sub(p.Since)), text.Printable(p.Reason))
	if p.Until != nil {
		s += fmt.Sprintf(" (until %s)", p.Until.UTC().Format(time.RFC3339))
	}
	return s
}

// status shows the pause and the budgets.
func status(w io.Writer, s *budget.State, policy config.Policy, output string, now time.Time) error {
	if output == "json" {
		line, err := json.Marshal(s)
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		_, err = fmt.Fprintf(w, "%s\n", text.JSON(line))
		return err
	}
	switch p := s.Paused(now); {
	case p != nil:
		fmt.Fprintln(w, paused(p, now))
	case policy.Annotation == "":
		fmt.Fprintln(w, "observing: policy.annotation is empty in this config")
	default:
		fmt.Fprintln(w, "marking")
	}
	limits := policy.Budgets
	marks := s.Since(now.Add(-limits.Window))
	fmt.Fprintf(w, "\nwithin %s, at most by this config:\n", limits.Window)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(table, "cluster\t%s\n", of(len(marks), limits.Cluster))
	for _, kind := range []struct {
		name  string
		limit int
		key   func(budget.Mark) string
	}{
		{"node", limits.Node, func(m budget.Mark) string { return m.Node }},
		{"owner", limits.Owner, func(m budget.Mark) string { return m.Owner }},
	} {
		used, last := map[string]int{}, map[string]time.Time{}
		var keys []string
		for _, m := range marks {
			k := kind.key(m)
			if used[k] == 0 {
				keys = append(keys, k)
			}
			used[k]++
			last[k] = m.Time
		}
		slices.Sort(keys)
		for _, k := range keys {
			line := of(used[k], kind.limit)
			if left := last[k].Add(limits.Cooldown).Sub(now); left > 0 {
				line += fmt.Sprintf("\tcooldown for %s", left.Round(time.Second))
			}
			fmt.Fprintf(table, "%s %s\t%s\n", kind.name, text.Printable(k), line)
		}
	}
	if len(marks) > 0 {
		fmt.Fprintln(table, "\nTIME\tNODE\tOWNER\tKILL")
	}
	for _, m := range slices.Backward(marks) {
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", m.Time.UTC().Format(time.RFC3339), text.Printable(m.Node), text.Printable(m.Owner), text.Printable(m.Kill))
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

func of(used, limit int) string {
	if limit == 0 {
		return fmt.Sprint(used)
	}
	return fmt.Sprintf("%d of %d", used, limit)
}
