package tap

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/advice"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// advise keeps a kill for the advice of its row.
func (c *counter) advise(r *row, e *event.Event, o *event.Outcome) {
	if r.history == nil {
		r.history = &advice.History{}
	}
	r.history.Add(e, o)
	ids := []string{e.ID}
	if e.Incident != nil {
		ids = append(ids, e.Incident.ID)
	}
	for _, id := range ids {
		of := c.relatedTo(id)
		if !slices.Contains(of.histories, r.history) {
			of.histories = append(of.histories, r.history)
		}
		if of.pods != nil {
			r.history.AddPods(of.pods)
		}
	}
}

// advice is the advice for a row.
func (r *row) advice() advice.Advice {
	if r.history == nil {
		return advice.Advice{Clause: "-"}
	}
	return r.history.Advice()
}

// advise shows what to do about the workloads that were killed.
func advise(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	now := time.Now()
	c, err := count(ctx, conn, o, now, stderr)
	if err != nil {
		return err
	}
	var rows []*row
	for _, r := range c.sorted() {
		if r.history != nil && (o.workload == "" || strings.HasSuffix(r.Name, "/"+o.workload)) {
			rows = append(rows, r)
		}
	}
	write := writeAdvice
	switch o.output {
	case "json":
		write = writeAdviceJSON
	case "patch":
		write = writePatches
	}
	if err := write(stdout, stderr, rows, now); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	c.unseen(stderr)
	return nil
}

func writeAdvice(w, _ io.Writer, rows []*row, now time.Time) error {
	if len(rows) == 0 {
		_, err := fmt.Fprintln(w, "no kill of such a workload is known")
		return err
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "KILLS\tLAST\tWORKLOAD\tADVICE")
	for _, r := range rows {
		fmt.Fprintf(table, "%d\t%s\t%s\t%s\n", r.Kills, ago(now.Sub(r.Last)), text.Printable(r.Name), r.advice().Sentence)
	}
	return table.Flush()
}

func writeAdviceJSON(w, _ io.Writer, rows []*row, _ time.Time) error {
	encoder := json.NewEncoder(w)
	for _, r := range rows {
		if err := encoder.Encode(struct {
			Name  string    `json:"name"`
			Kills int       `json:"kills"`
			Last  time.Time `json:"last"` // of the stream
			advice.Advice
		}{r.Name, r.Kills, r.Last, r.advice()}); err != nil {
			return err
		}
	}
	return nil
}

// writePatches writes the patches, each a YAML document under what it is for and how to try it.
func writePatches(w, stderr io.Writer, rows []*row, _ time.Time) error {
	written := 0
	for _, r := range rows {
		a := r.advice()
		p := a.Patch
		if p == nil {
			continue
		}
		if written++; written > 1 {
			fmt.Fprintln(w, "---")
		}
		if _, err := fmt.Fprintf(w, "# %s\n# kubectl patch %s %s -n %s --patch-file FILE --dry-run=server\n%s",
			a.Sentence, strings.ToLower(p.Kind), p.Metadata.Name, p.Metadata.Namespace, p.YAML()); err != nil {
			return err
		}
	}
	if without := len(rows) - written; without > 0 || written == 0 {
		fmt.Fprintf(stderr, "oom-tap: no patch for %d of %d workloads; see oom-tap advise without --output\n", without, len(rows))
	}
	return nil
}
