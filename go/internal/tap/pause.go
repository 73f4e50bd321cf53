package tap

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

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// maxReason bounds the reason, in bytes: it is stored in one message, and shown with every kill.
const maxReason = 300

func newLedger(conn *bus.Conn, o options) *budget.Ledger {
	policy := o.config.Policy
	return &budget.Ledger{Entry: conn.KVEntry(budget.Key), Limits: policy.Budgets, Keep: policy.MaxEventAge, Now: time.Now}
}

// setPause replaces the pause, shows one that was in force, and returns whether there was one.
func setPause(ctx context.Context, conn *bus.Conn, p *budget.Pause, now time.Time, o options, stdout io.Writer) (bool, error) {
	before, err := newLedger(conn, o).SetPause(ctx, p)
	if errors.Is(err, nats.ErrPermissionViolation) {
		return false, fmt.Errorf("%w (user %q may not change the pause: set nats.user to oom-operator, with the password under operator in the chart's Secret)", err, o.config.NATS.User)
	}
	if err != nil || (&budget.State{Pause: before}).Paused(now) == nil {
		return false, err
	}
	fmt.Fprintf(stdout, "was %s\n", paused(before, now))
	return true, nil
}

func pause(ctx context.Context, conn *bus.Conn, o options, stdout, _ io.Writer) error {
	now := time.Now().UTC()
	p := &budget.Pause{Reason: o.reason, By: whoami(), Since: now}
	if o.duration > 0 {
		until := now.Add(o.duration)
		p.Until = &until
	}
	if _, err := setPause(ctx, conn, p, now, o, stdout); err != nil {
		return err
	}
	fmt.Fprintf(stdout, "%s\n", paused(p, now))
	return nil
}

func resume(ctx context.Context, conn *bus.Conn, o options, stdout, _ io.Writer) error {
	was, err := setPause(ctx, conn, nil, time.Now(), o, stdout)
	switch {
	case err != nil:
		return err
	case was:
		fmt.Fprintln(stdout, "marking resumed")
	default:
		fmt.Fprintln(stdout, "marking was not paused")
	}
	return nil
}

// restore replaces an invalid state by its newest valid revision, or by an empty one.
func restore(ctx context.Context, conn *bus.Conn, o options, stdout, _ io.Writer) error {
	revisions, err := conn.KVEntry(budget.Key).History(ctx)
	if err != nil {
		return err
	}
	if o.empty {
		revisions = []budget.Revision{{Data: budget.Initial(), Time: time.Now()}}
	}
	from, valid, err := newLedger(conn, o).Restore(ctx, revisions)
	switch {
	case err != nil && !o.empty:
		return fmt.Errorf("%w (--empty starts with no pause and no budget used)", err)
	case err != nil:
		return err
	case valid:
		fmt.Fprintln(stdout, "the state is valid, nothing changed")
	case o.empty:
		fmt.Fprintln(stdout, "the state is empty: marking is not paused, and no budget is used")
	default:
		fmt.Fprintf(stdout, "restored the state of %s; %s status shows it\n", from.Time.UTC().Format(time.RFC3339), o.name)
	}
	return nil
}

// whoami names the user for the people who see the pause. It proves nothing.
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

// paused is a pause in words.
func paused(p *budget.Pause, now time.Time) string {
	s := fmt.Sprintf("paused by %s %s: %s", text.Printable(p.By), ago(now.Sub(p.Since)), text.Printable(p.Reason))
	if p.Until != nil {
		s += fmt.Sprintf(" (until %s)", p.Until.UTC().Format(time.RFC3339))
	}
	return s
}

// status shows the pause and the budgets.
func status(ctx context.Context, conn *bus.Conn, o options, w, _ io.Writer) error {
	s, err := newLedger(conn, o).State(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	if o.output == "json" {
		line, err := json.Marshal(&s)
		if err != nil {
			return fmt.Errorf("write: %w", err)
		}
		_, err = fmt.Fprintf(w, "%s\n", text.JSON(line))
		return err
	}
	switch p := s.Paused(now); {
	case p != nil:
		fmt.Fprintln(w, paused(p, now))
	case o.config.Policy.Annotation == "":
		fmt.Fprintln(w, "observing: policy.annotation is empty in this config")
	default:
		fmt.Fprintln(w, "marking")
	}
	limits := o.config.Policy.Budgets
	marks := s.Since(now.Add(-limits.Window))
	fmt.Fprintf(w, "\nmarks within %s, of what this config allows:\n", limits.Window)
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
