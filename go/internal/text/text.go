// Package text renders an event as the one line that people read.
//
// Rule of the package: names come from the machine's users (a task may call itself anything), and
// events from whoever may publish, so nothing of an event reaches a terminal but printable ASCII.
package text

import (
	"bytes"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// timeLayout is RFC 3339 in milliseconds, always of one width in UTC.
const timeLayout = "2006-01-02T15:04:05.000Z07:00"

// The columns' widths: the longest values that are met in practice. What is longer still moves the
// rest of its own line.
const (
	outcomeWidth = len("already_exiting")
	scopeWidth   = len("mempolicy")
	victimWidth  = len("fifteen-letters[4194304]") // TASK_COMM_LEN - 1, PID_MAX_LIMIT
	heldWidth    = len("rss 1023.9 GiB")
	limitWidth   = len("limit container? 1023.9 GiB")
	// Node names have no width in common: their column grows with them, up to that of a label
	// (RFC 1123), for lines must fit somewhere.
	maxNodeWidth = 63
)

// Table renders events as lines whose columns line up with those of the lines before. Its zero value
// renders without color.
type Table struct {
	// Color adds ANSI escapes.
	Color bool

	nodeWidth int
}

// Line is the event without a newline: time, node, outcome, scope, victim, what it held, whose limit,
// where, and who asked for the memory unless it was the victim.
func (t *Table) Line(e *event.Event) string {
	outcomeColor := yellow
	switch e.Outcome {
	case event.OutcomeKilled:
		outcomeColor = boldRed
	case event.OutcomeExiting:
		outcomeColor = dim
	}
	columns := []string{
		t.start(e.Time, e.Node.Name),
		t.paint(outcomeColor, pad(Printable(string(e.Outcome)), outcomeWidth)),
		pad(Printable(string(e.Scope)), scopeWidth),
		t.paint(bold, pad(Victim(e), victimWidth)),
		pad(held(e), heldWidth),
		pad(limit(e), limitWidth),
		where(e),
	}
	if tr := e.Trigger; tr != nil && tr.PID != e.Victim.PID {
		columns = append(columns, t.paint(dim, "asked by "+process(tr.Comm, tr.PID)))
	}
	return strings.Join(columns, "  ")
}

// start is what all lines begin with. The column of the nodes grows with them.
func (t *Table) start(at time.Time, node string) string {
	node = Printable(node)
	t.nodeWidth = min(max(t.nodeWidth, len(node)), maxNodeWidth)
	return t.paint(dim, at.UTC().Format(timeLayout)) + "  " + pad(node, t.nodeWidth)
}

// OutcomeLine is a kill and its outcome without a newline: the line of the kill, then what became of it.
// Either may be nil, where it is not known.
func (t *Table) OutcomeLine(e *event.Event, o *event.Outcome) string {
	var line string
	if e != nil {
		line = t.Line(e)
	} else {
		line = t.start(o.Time, o.Node) + "  kill " + Printable(o.Kill)
	}
	if o == nil {
		return line + "  " + t.paint(yellow, "no outcome")
	}
	color := yellow
	switch o.Result {
	case event.ResultAnnotated:
		color = bold
	case event.ResultSkipped:
		color = dim
	case event.ResultFailed:
		color = boldRed
	}
	said := word(string(o.Result)) + " (" + word(string(o.Reason)) + ")"
	if p := o.Pod; p != nil {
		said += " " + word(p.Namespace) + "/" + word(p.Name)
		if o.Container != "" {
			said += " container " + word(o.Container) + restarts(o)
		}
	}
	line += "  " + t.paint(color, said)
	if o.Detail != "" {
		line += "  " + Printable(o.Detail)
	}
	return line
}

// GapLine is a gap without a newline, with the columns of an event as far as they have a meaning.
func (t *Table) GapLine(g *event.Gap) string {
	return strings.Join([]string{
		t.start(g.Time, g.Node.Name),
		t.paint(boldYellow, pad("GAP", outcomeWidth)),
		pad(Printable(string(g.Cause)), scopeWidth),
		t.paint(bold, Gap(g)),
	}, "  ")
}

// Missing is how many kills are missing.
func Missing(g *event.Gap) string {
	switch {
	case g.Count != nil:
		return fmt.Sprintf("%d kills missing", *g.Count)
	case g.CountMax != nil:
		return fmt.Sprintf("at most %d kills missing", *g.CountMax)
	}
	return "an unknown number of kills missing"
}

// Gap is Missing, and of which seqs or of which time, as far as it is known.
func Gap(g *event.Gap) string {
	line := Missing(g)
	if g.LastSeq > 0 {
		line += fmt.Sprintf(", seq %d..%d", g.FirstSeq, g.LastSeq)
	}
	if g.Since != nil && g.Until != nil {
		line += fmt.Sprintf(", from %s to %s", g.Since.UTC().Format(timeLayout), g.Until.UTC().Format(timeLayout))
	}
	return line
}

// EvictionLine is an eviction by the kubelet without a newline.
func (t *Table) EvictionLine(e *event.Eviction) string {
	return strings.Join([]string{
		t.start(e.Time, e.Node),
		t.paint(yellow, pad("evicted", outcomeWidth)),
		pad("kubelet", scopeWidth),
		"pod " + word(e.Pod.Namespace) + "/" + word(e.Pod.Name) + ": " + strings.TrimSpace(Printable(e.Message)),
	}, "  ")
}

// GapLine is the gap as the only line of a table.
func GapLine(g *event.Gap, color bool) string {
	t := Table{Color: color}
	return t.GapLine(g)
}

// Line is the event as the only line of a table.
func Line(e *event.Event, color bool) string {
	t := Table{Color: color}
	return t.Line(e)
}

// The parameters of ANSI's Select Graphic Rendition.
const (
	bold    = "1"
	dim     = "2"
	boldRed = "1;31"
	yellow  = "33"

	boldYellow = "1;33"
)

func (t *Table) paint(sgr, s string) string {
	if !t.Color {
		return s
	}
	return "\x1b[" + sgr + "m" + s + "\x1b[0m"
}

// pad fills s, which is ASCII, up with spaces.
func pad(s string, width int) string { return fmt.Sprintf("%-*s", width, s) }

// Victim is a killed process by its name and process ID.
func Victim(e *event.Event) string {
	if e.Victim.PID == 0 {
		return fmt.Sprintf("thread %d", e.Victim.TID)
	}
	return process(e.Victim.Comm, e.Victim.PID)
}

// process is a name and a process ID. A task may also have no name at all.
func process(comm string, pid uint32) string {
	if comm == "" {
		comm = "?"
	}
	return fmt.Sprintf("%s[%d]", Printable(comm), pid)
}

func held(e *event.Event) string {
	m := e.Victim.Memory
	if m == nil {
		return "rss ?"
	}
	return "rss " + Size(m.AnonRSS+m.FileRSS+m.ShmemRSS)
}

func limit(e *event.Event) string {
	l := e.Limit
	if l == nil {
		return "limit ?"
	}
	s := "limit " + Printable(string(l.Level))
	if l.Inferred {
		s += "?"
	}
	if l.Max != nil {
		s += " " + Size(*l.Max)
	}
	return s
}

func where(e *event.Event) string {
	var parts []string
	if c := e.Container; c != nil {
		switch {
		case c.PodUID != "" && c.Static:
			parts = append(parts, "static pod "+Printable(c.PodUID))
		case c.PodUID != "":
			parts = append(parts, "pod "+Printable(c.PodUID))
		}
		if c.ContainerID != "" {
			parts = append(parts, fmt.Sprintf("container %.12s", Printable(c.ContainerID)))
		}
	}
	switch {
	case parts != nil:
		return strings.Join(parts, " ")
	case e.Victim.Cgroup != nil && e.Victim.Cgroup.Path != "":
		return word(e.Victim.Cgroup.Path)
	default:
		return "-"
	}
}

// Size renders a number of bytes with one decimal in the largest binary unit that fits.
func Size(n uint64) string {
	const units = "KMGTPE"
	if n < 1024 {
		return strconv.FormatUint(n, 10) + " B"
	}
	value, unit := float64(n)/1024, 0
	// What would be rounded to 1024.0 belongs to the next unit.
	for value >= 1023.95 && unit < len(units)-1 {
		value /= 1024
		unit++
	}
	return fmt.Sprintf("%.1f %ciB", value, units[unit])
}

// MaxDetail bounds the detail of an outcome, in bytes.
const MaxDetail = 500

// unescape takes back what strconv.QuoteToASCII does for the sake of Go's syntax alone.
var unescape = strings.NewReplacer(`\\`, `\`, `\"`, `"`)

// Truncate cuts s to at most n bytes of valid UTF-8.
func Truncate(s string, n int) string { return strings.ToValidUTF8(s[:min(len(s), n)], "") }

// Detail makes s fit into the detail of an outcome.
func Detail(s string) string { return Truncate(Printable(s), MaxDetail) }

// Printable leaves printable ASCII as it is and writes everything else as Go escapes it in a string:
// control characters, and letters that would read backwards, look like others or have no certain
// width. A backslash stays as it is, for systemd's unit names are full of them; who must tell \x1b from
// an escape character looks at the JSON.
func Printable(s string) string {
	quoted := strconv.QuoteToASCII(s)
	return unescape.Replace(quoted[1 : len(quoted)-1])
}

// word is s without spaces: with them it could pretend to be what follows.
func word(s string) string { return strings.ReplaceAll(Printable(s), " ", `\x20`) }

// JSON returns valid JSON as the same value on one line of ASCII, for JSON allows what a terminal may
// act on: U+007F, U+0080 to U+009F, and bytes that are not UTF-8.
func JSON(data []byte) []byte {
	var out bytes.Buffer
	for len(data) > 0 {
		r, n := utf8.DecodeRune(data)
		data = data[n:]
		switch {
		case r < 0x20: // white space between the tokens
			out.WriteByte(' ')
		case r < 0x7f:
			out.WriteByte(byte(r))
		case r <= 0xffff:
			fmt.Fprintf(&out, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&out, `\u%04x\u%04x`, high, low)
		}
	}
	return out.Bytes()
}
