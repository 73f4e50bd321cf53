package report

import (
	"bytes"
	"cmp"
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"maps"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/advice"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

//go:embed page.html
var pageHTML string

const (
	// maxRows is how many nodes of each kind, and how many namespaces, have a line in the timeline.
	maxRows = 30
	// maxWorkloads is how many workloads are shown.
	maxWorkloads = 20
	// maxListed bounds the lists in a story.
	maxListed = 5

	minute = "2006-01-02 15:04"
	second = "2006-01-02 15:04:05"
	clock  = "15:04:05.000"
)

// page is what the template shows. Its strings are printable ASCII.
type page struct {
	Title, Range string
	Summary      []string // what happened
	Silence      []string // what it means that nothing else is shown
	Ticks        []tick
	Nodes        []row
	MoreNodes    []string
	Namespaces   []row
	More         string // namespaces
	Workloads    []workload
	Incidents    []story
	Dropped      string
	Notes        []string
}

// tick is a moment on the axis.
type tick struct {
	X     float64 // in percent
	At    float64 // in a track
	Label string
}

// row is a line of the timeline.
type row struct {
	Name, Kills string
	Verdict     string // what silence means here; empty for a namespace
	Proven      bool
	Gaps        []string
	Track       track
}

// track is an SVG, 1000 wide and 24 high.
type track struct {
	Title string
	Ticks []tick
	Bands []band
	Bars  []bar
}

type band struct {
	Class, Title string
	X, Width     float64
}

type bar struct {
	X, Y, Width, Height float64
	Title               string
	Incident            int // 0: none that is shown
}

type workload struct {
	Number      int
	Name, Facts string
	Advice      string
	Chart       track
}

// story is an incident in sentences.
type story struct {
	Number             int
	When, Node         string
	Cause, Who, Result string
	Killed             string
	Lead, Asked, Limit string
	Memory             *memory
	NoMemory           string
	Others             []string
	Victims            []string
	MoreVictims        string
	Done               []done
	Advice             []advised
}

type memory struct {
	Title string
	Text  string
	Parts []part
}

type part struct {
	X, Width   float64
	Number     int // its color
	Name, Size string
}

type done struct{ Time, Text string }

type advised struct {
	Name, Text string
	Workload   int // 0: it is not among those that are shown
}

// Write writes the report. The workloads are all rows of oom-tap top, those with the most kills first.
func (r *Report) Write(w io.Writer, s Stream, top []Workload) error {
	t, err := template.New("report").Parse(pageHTML)
	if err != nil {
		return fmt.Errorf("parse the template of the report: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, r.page(s, top)); err != nil {
		return fmt.Errorf("render the report: %w", err)
	}
	if _, err := w.Write(out.Bytes()); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

func (r *Report) page(s Stream, top []Workload) *page {
	shown := r.incidents
	if r.o.Incident != "" {
		shown = slices.DeleteFunc(slices.Clone(shown), func(i *incident) bool { return !i.wanted })
	}
	shown = largest(shown, maxIncidents)
	slices.SortStableFunc(shown, func(a, b *incident) int { return a.first.Compare(b.first) })
	numbers := make(map[*incident]int, len(shown))
	for n, i := range shown {
		numbers[i] = n + 1
	}
	p := &page{
		Title: "OOM kills",
		Range: fmt.Sprintf("%s to %s UTC", r.o.From.UTC().Format(minute), r.o.Until.UTC().Format(minute)),
		Ticks: ticks(r.o.From, r.o.Until),
	}
	if r.o.Incident != "" {
		p.Title = "OOM incident"
	}
	if r.o.Namespace != "" {
		p.Title += " in namespace " + text.Printable(r.o.Namespace)
	}
	if r.o.Node != "" {
		p.Title += " on node " + text.Printable(r.o.Node)
	}
	unproven := r.timeline(p, s, numbers)
	p.Summary, p.Silence = r.summary(), r.silence(s, unproven)

	if r.o.Incident != "" {
		hit := map[string]bool{}
		for _, i := range shown {
			for _, k := range i.full {
				hit[k.workload] = true
			}
		}
		top = slices.DeleteFunc(slices.Clone(top), func(w Workload) bool { return !hit[w.Name] })
	}
	byName := map[string]Workload{}
	for _, w := range top {
		byName[w.Name] = w
	}
	for n, w := range top[:min(len(top), maxWorkloads)] {
		p.Workloads = append(p.Workloads, r.workload(n+1, w))
	}
	for n, i := range shown {
		p.Incidents = append(p.Incidents, i.story(n+1, byName, p.Workloads))
	}
	if r.o.Incident == "" {
		if dropped, kills := r.droppedBy(shown); dropped > 0 {
			p.Dropped = fmt.Sprintf("%s with %s more are counted above and have no story: these %d have the most kills.", count(dropped, "incident"), count(kills, "kill"), len(shown))
		}
	}
	p.Notes = r.notes(s)
	return p
}

// droppedBy returns how many incidents and kills are not shown.
func (r *Report) droppedBy(shown []*incident) (incidents, kills int) {
	incidents, kills = r.dropped+len(r.incidents)-len(shown), r.kills
	for _, i := range shown {
		kills -= i.kills
	}
	return incidents, kills
}

func (r *Report) summary() []string {
	span := r.o.Until.Sub(r.o.From).Round(time.Second)
	incidents := len(r.incidents) + r.dropped
	hit := 0
	for _, n := range r.nodes {
		if n.kills > 0 {
			hit++
		}
	}
	var all []string
	if r.kills == 0 {
		all = append(all, fmt.Sprintf("No OOM kill is known in these %s.", duration(span)))
	} else {
		first := fmt.Sprintf("In these %s the stream has %s in %s, on %d of %s",
			duration(span), count(r.kills, "OOM kill"), count(incidents, "incident"), hit, count(len(r.nodes), "node"))
		if r.o.Namespace == "" {
			named := 0
			for name := range r.namespaces {
				if !strings.HasPrefix(name, "(") {
					named++
				}
			}
			first += " and in " + count(named, "namespace")
		}
		all = append(all, first+".")
		var causes []string
		for _, c := range []struct {
			cause cause
			text  string
		}{
			{ownLimit, "a pod or a container reached its own memory limit"},
			{nodeWide, "the node, or several of its pods together, ran out of memory"},
			{unclear, "something else, or something that is not proven, was the cause"},
		} {
			if n := r.causes[c.cause]; n > 0 {
				causes = append(causes, fmt.Sprintf("in %d %s", n, c.text))
			}
		}
		all = append(all, upper(strings.Join(causes, "; "))+".")
	}
	if marked := r.results[event.ResultAnnotated]; marked > 0 {
		ends := []string{}
		open := marked
		for _, e := range []struct {
			result event.Result
			text   string
		}{{event.ResultEvicted, "left its node"}, {event.ResultRefused, "had to stay"}, {event.ResultExpired, "was not evicted in time"}} {
			if n := r.results[e.result]; n > 0 {
				ends = append(ends, fmt.Sprintf("%d %s", n, e.text))
				open -= n
			}
		}
		if open > 0 {
			ends = append(ends, fmt.Sprintf("of %d no end is known", open))
		}
		all = append(all, fmt.Sprintf("%s led to a mark for eviction: %s.", count(marked, "kill"), strings.Join(ends, ", ")))
	}
	return all
}

// silence says where it is proven that nothing else was killed.
func (r *Report) silence(s Stream, unproven []string) (all []string) {
	const rule = "no kill is shown there, none happened"
	silent := "Where " + rule
	if r.o.Namespace != "" {
		silent = "Where no kill is shown there, none is known in this namespace"
	}
	switch known := len(r.nodes); {
	case known == 0:
		all = append(all, "No node is known, so silence proves nothing.")
	case len(unproven) == 0:
		all = append(all, fmt.Sprintf("%s was watched all the time, without a gap. %s.", every(known), silent))
	default:
		names := strings.Join(unproven[:min(len(unproven), maxListed)], ", ")
		if len(unproven) > maxListed {
			names += ", ..."
		}
		all = append(all, fmt.Sprintf("On %d of %s kills may be missing (%s): silence proves nothing there.", len(unproven), count(known, "node"), names))
		if rest := known - len(unproven); rest > 0 {
			all = append(all, fmt.Sprintf("The other %d was watched all the time, without a gap. %s.", rest, silent))
			if rest > 1 {
				all[len(all)-1] = strings.Replace(all[len(all)-1], " was ", " were ", 1)
			}
		}
	}
	if s.Unreadable > 0 {
		all = append(all, fmt.Sprintf("But %s could not be read, and may have been a kill.", count(s.Unreadable, "message")))
	}
	if begin := r.lost(s); !begin.IsZero() {
		all = append(all, fmt.Sprintf("The stream begins at %s UTC: what was before is not in it any more.", begin.UTC().Format(second)))
	}
	return all
}

func every(nodes int) string {
	if nodes == 1 {
		return "The only node"
	}
	return fmt.Sprintf("Each of the %d nodes", nodes)
}

// lost is when the stream begins, if that is after the begin of the report.
func (r *Report) lost(s Stream) time.Time {
	if s.Begin.After(r.o.From) {
		return s.Begin
	}
	return time.Time{}
}

// timeline makes the rows of the nodes and of the namespaces. It returns the nodes whose silence proves nothing.
func (r *Report) timeline(p *page, s Stream, numbers map[*incident]int) (unproven []string) {
	type line struct {
		name string
		n    *node
		row  row
	}
	var lines []line
	most := uint32(1)
	for name, n := range r.nodes {
		l := line{name: name, n: n, row: row{Name: text.Printable(name), Kills: count(n.kills, "kill")}}
		l.row.Verdict, l.row.Proven = r.verdict(n, s)
		if !l.row.Proven {
			unproven = append(unproven, l.row.Name)
		}
		lines = append(lines, l)
		most = max(most, slices.Max(n.at[:]))
	}
	for _, n := range r.namespaces {
		most = max(most, slices.Max(n.at[:]))
	}
	slices.Sort(unproven)
	slices.SortFunc(lines, func(a, b line) int {
		switch {
		case a.n.kills != b.n.kills:
			return cmp.Compare(b.n.kills, a.n.kills)
		case a.row.Proven != b.row.Proven && b.row.Proven:
			return -1
		case a.row.Proven != b.row.Proven:
			return 1
		}
		return cmp.Compare(a.name, b.name)
	})
	links := map[string]*[slots]int{}
	link := func(name string, i *incident, slot int) {
		of := links[name]
		if of == nil {
			of = &[slots]int{}
			links[name] = of
		}
		if of[slot] == 0 {
			of[slot] = numbers[i]
		}
	}
	for _, i := range slices.SortedFunc(maps.Keys(numbers), func(a, b *incident) int { return cmp.Compare(numbers[a], numbers[b]) }) {
		for _, k := range i.full {
			slot := r.slot(k.event.Time)
			link("node "+k.event.Node.Name, i, slot)
			if o := k.outcome; o != nil && o.Pod != nil {
				link("namespace "+o.Pod.Namespace, i, slot)
			} else {
				link("namespace "+k.workload, i, slot)
			}
		}
	}
	rows, hidden := map[string]int{}, map[string]int{}
	for _, l := range lines {
		kind := "kills"
		switch {
		case l.n.kills == 0 && l.row.Proven:
			kind = "silent"
		case l.n.kills == 0:
			kind = "unproven"
		}
		if rows[kind]++; rows[kind] > maxRows {
			hidden[kind]++
			continue
		}
		l.row.Track = r.track(l.n.at[:], most, links["node "+l.name])
		l.row.Track.Title = fmt.Sprintf("Node %s: %s. %s", l.row.Name, l.row.Kills, l.row.Verdict)
		l.row.Track.Ticks = p.Ticks
		l.row.Track.Bands = r.bands(l.n, s)
		l.row.Gaps = r.gaps(l.n)
		p.Nodes = append(p.Nodes, l.row)
	}
	for _, of := range []struct{ kind, text string }{
		{"kills", "with kills"}, {"unproven", "without a known kill, where kills may be missing"}, {"silent", "that were watched all the time, without a gap and without a kill"},
	} {
		if n := hidden[of.kind]; n > 0 {
			p.MoreNodes = append(p.MoreNodes, fmt.Sprintf("And %d more %s %s.", n, plural(n, "node"), of.text))
		}
	}
	names := slices.SortedFunc(maps.Keys(r.namespaces), func(a, b string) int {
		return cmp.Or(cmp.Compare(r.namespaces[b].kills, r.namespaces[a].kills), cmp.Compare(a, b))
	})
	for n, name := range names {
		if n >= maxRows {
			p.More = fmt.Sprintf("And %d more %s.", len(names)-n, plural(len(names)-n, "namespace"))
			break
		}
		of := r.namespaces[name]
		l := row{Name: text.Printable(name), Kills: count(of.kills, "kill"), Track: r.track(of.at[:], most, links["namespace "+name])}
		l.Track.Title = fmt.Sprintf("Namespace %s: %s", l.Name, l.Kills)
		l.Track.Ticks = p.Ticks
		p.Namespaces = append(p.Namespaces, l)
	}
	return unproven
}

// verdict says what it means that no other kill of a node is shown, and whether it is proven that there was none.
func (r *Report) verdict(n *node, s Stream) (string, bool) {
	from := r.o.From
	var why []string
	if begin := r.lost(s); !begin.IsZero() {
		from = begin
		why = append(why, "not in the stream any more before "+begin.UTC().Format(second))
	}
	if gaps := len(n.gaps) + n.more; gaps > 0 {
		why = append(why, count(gaps, "gap"))
	}
	switch st := n.status; {
	case st == nil:
		why = append(why, "no status of it is known")
	default:
		if st.Since.After(from) {
			why = append(why, "recording began at "+st.Since.UTC().Format(second))
		}
		if !st.Watched && st.Heard.Before(r.o.Until) {
			why = append(why, fmt.Sprintf("%s, last heard at %s", text.Printable(st.State), st.Heard.UTC().Format(second)))
		}
		if st.Unpublished > 0 {
			why = append(why, count64(st.Unpublished, "record")+" not published yet")
		}
	}
	switch {
	case why != nil && n.kills == 0:
		return "Silent, which proves nothing: " + strings.Join(why, "; "), false
	case why != nil:
		return "Kills may be missing: " + strings.Join(why, "; "), false
	case n.kills > 0:
		return "Watched all the time, no gap", true
	case r.o.Namespace != "":
		return "Watched all the time, no gap: no kill in this namespace is known", true
	}
	return "Watched all the time, no gap: nothing was killed", true
}

// bands are the times in which a node was watched, or was not, or nobody knows.
func (r *Report) bands(n *node, s Stream) (all []band) {
	add := func(class, title string, from, until time.Time) {
		x, end := r.x(from), r.x(until)
		if end <= x && class != "gap" {
			return
		}
		width := max(end-x, 4) // or a gap of a moment would be invisible
		all = append(all, band{class, title, min(x, 1000-width), width})
	}
	from := r.o.From
	if begin := r.lost(s); !begin.IsZero() {
		add("unknown", "not in the stream any more", from, begin)
		from = begin
	}
	if st := n.status; st == nil {
		add("unknown", "no status is known", from, r.o.Until)
	} else {
		since, heard := st.Since, st.Heard
		if since.Before(from) {
			since = from
		}
		if st.Watched || heard.After(r.o.Until) {
			heard = r.o.Until
		}
		if heard.Before(since) {
			heard = since
		}
		add("unknown", "before the recording that is known", from, since)
		add("watched", "watched", since, heard)
		add("unknown", text.Printable(st.State), heard, r.o.Until)
	}
	for _, g := range n.gaps {
		from, until := gapSpan(g)
		if from.IsZero() {
			from = r.o.From
		}
		add("gap", "gap: "+text.Missing(g), from, until)
	}
	return all
}

// gapSpan is when the missing kills happened, as far as that is known. The begin may be zero.
func gapSpan(g *event.Gap) (from, until time.Time) {
	until = g.Time
	if g.Since != nil {
		from = *g.Since
	}
	if g.Until != nil {
		until = *g.Until
	}
	return from, until
}

func (r *Report) gaps(n *node) (all []string) {
	for _, g := range n.gaps[:min(len(n.gaps), maxListed)] {
		from, until := gapSpan(g)
		when := "Up to "
		if !from.IsZero() {
			when = from.UTC().Format(second) + " to "
		}
		all = append(all, fmt.Sprintf("Gap: %s%s, %s (%s)", when, until.UTC().Format(second), text.Missing(g), words(string(g.Cause))))
	}
	if rest := len(n.gaps) + n.more - len(all); rest > 0 {
		all = append(all, fmt.Sprintf("And %d more %s", rest, plural(rest, "gap")))
	}
	return all
}

// x is the place of a moment, from 0 to 1000.
func (r *Report) x(t time.Time) float64 {
	at := t.Sub(r.o.From).Seconds() / r.o.Until.Sub(r.o.From).Seconds() * 1000
	return round(max(0, min(at, 1000)))
}

func round(x float64) float64 { return math.Round(x*10) / 10 }

// merged is the series in fewer parts, for a small chart.
func (s *series) merged() []uint32 {
	const parts = 24
	at := make([]uint32, parts)
	for slot, kills := range s.at {
		at[slot*parts/slots] += kills
	}
	return at
}

// track draws a series. The height grows with the root, so that one kill stays visible beside a hundred.
func (r *Report) track(at []uint32, most uint32, links *[slots]int) track {
	const height = 20.0
	width, step := 1000/float64(len(at)), r.o.Until.Sub(r.o.From)/time.Duration(len(at))
	var t track
	for slot, kills := range at {
		if kills == 0 {
			continue
		}
		high := round(max(8, height*math.Sqrt(float64(kills)/float64(most))))
		from := r.o.From.Add(time.Duration(slot) * step).UTC()
		b := bar{
			X: round(float64(slot) * width), Y: 24 - high, Width: round(width - 1), Height: high,
			Title: fmt.Sprintf("%s to %s UTC: %s", from.Format(second), from.Add(step).Format("15:04:05"), count(int(kills), "kill")),
		}
		if links != nil {
			b.Incident = links[slot]
		}
		t.Bars = append(t.Bars, b)
	}
	return t
}

func (r *Report) workload(number int, w Workload) workload {
	facts := count(w.Kills, "kill")
	if w.Trend == "rising" || w.Trend == "falling" {
		facts += ", " + w.Trend
	}
	facts += ", last at " + w.Last.UTC().Format(second)
	if w.Level != "" {
		facts += "; limit of the last: " + words(string(w.Level))
		if w.Limit != nil {
			facts += " " + text.Size(*w.Limit)
		}
	}
	facts += fmt.Sprintf("; largest victim: %s, rss %s", text.Printable(cmp.Or(w.Victim, "?")), text.Size(w.Largest))
	v := workload{Number: number, Name: text.Printable(w.Name), Facts: facts, Advice: sentence(w.Advice.Sentence)}
	if s := r.workloads[w.Name]; s != nil {
		at := s.merged()
		v.Chart = r.track(at, slices.Max(at), nil)
	}
	v.Chart.Title = fmt.Sprintf("Kills of %s over time: %s", v.Name, count(w.Kills, "kill"))
	return v
}

// story tells an incident.
func (i *incident) story(number int, top map[string]Workload, shown []workload) story {
	first := i.full[0]
	e := first.event
	s := story{
		Number: number, When: i.first.UTC().Format(second), Node: text.Printable(e.Node.Name),
		Cause: ranOut(e), Killed: count(i.kills, "process"),
	}
	names := i.names()
	s.Who = text.Printable(strings.Join(names[:min(len(names), 2)], ", "))
	if len(names) > 2 {
		s.Who += fmt.Sprintf(" and %d more", len(names)-2)
	}
	s.Lead = i.lead()
	s.Asked = asked(e)
	s.Limit = whoseLimit(e)
	s.Memory, s.NoMemory = i.memory()
	if i.others != "" {
		s.Others = append(s.Others, sentence(i.others))
	}
	if i.pods != nil && i.others == "" {
		s.Others = append(s.Others, podsThen(i.pods))
	}
	for _, k := range i.full {
		s.Victims = append(s.Victims, k.line())
	}
	if rest := i.kills - len(i.full); rest > 0 {
		s.MoreVictims = fmt.Sprintf("And %d more.", rest)
	}
	s.Done, s.Result = i.done()
	for _, name := range names[:min(len(names), 2)] {
		w, ok := top[name]
		if !ok || w.Advice.Rule == "" {
			continue
		}
		a := advised{Name: text.Printable(name), Text: sentence(w.Advice.Sentence)}
		for _, v := range shown {
			if v.Name == a.Name {
				a.Workload, a.Text = v.Number, sentence(w.Advice.Clause)
			}
		}
		if w.Advice.Rule == advice.None {
			a.Text = sentence(w.Advice.Sentence)
		}
		s.Advice = append(s.Advice, a)
	}
	return s
}

// names are the workloads that were hit, in order.
func (i *incident) names() (all []string) {
	for _, k := range i.full {
		if !slices.Contains(all, k.workload) {
			all = append(all, k.workload)
		}
	}
	return all
}

// lead is the incident as a Kubernetes Event has it, without what became of the pod.
func (i *incident) lead() string {
	s := text.Sentence{Killed: i.kills, Cause: text.Cause(i.full[0].event), RSS: &i.rss, Unproven: true}
	places := 0
	for n, k := range i.full {
		s.Unproven = s.Unproven && k.event.Outcome != event.OutcomeKilled
		if k.event.Victim.Memory == nil {
			s.RSS = nil
		}
		if n < maxListed {
			s.Victims = append(s.Victims, text.Victim(k.event))
		}
		if where := k.where(); !slices.Contains(s.Where, where) {
			if places++; places <= 2 {
				s.Where = append(s.Where, where)
			}
		}
	}
	if places > 2 {
		s.Where = append(s.Where, fmt.Sprintf("and %d more places", places-2))
	}
	if clause := advice.Clause(i.full[0].event); clause != "" {
		s.Cause += "; " + clause
	}
	lead := sentence(s.String())
	if i.group {
		lead += " Its cgroup wants all its processes killed together (memory.oom.group)."
	}
	return lead
}

// where is the container and the pod of a kill, or its cgroup.
func (k *kill) where() string {
	o := k.outcome
	if o == nil {
		o = &event.Outcome{}
	}
	where := text.Where(k.event, o, true)
	if c := k.event.Container; c != nil && o.Pod == nil && c.PodUID != "" {
		where += " of the pod with the UID " + text.Printable(c.PodUID)
	}
	if where == "" && k.event.Victim.Cgroup != nil {
		where = "the cgroup " + text.Printable(k.event.Victim.Cgroup.Path)
	}
	return cmp.Or(strings.TrimSpace(where), "a place that is not known")
}

// line is one victim.
func (k *kill) line() string {
	v := &k.event.Victim
	line := fmt.Sprintf("%s  %s", k.event.Time.UTC().Format(clock), text.Victim(k.event))
	if m := v.Memory; m != nil {
		line += fmt.Sprintf(", rss %s (anon %s, file %s, shared %s)", text.Size(m.AnonRSS+m.FileRSS+m.ShmemRSS), text.Size(m.AnonRSS), text.Size(m.FileRSS), text.Size(m.ShmemRSS))
		if m.Swap > 0 {
			line += ", swap " + text.Size(m.Swap)
		}
	}
	line += ", in " + k.where()
	if v.OOMScoreAdj != nil {
		line += fmt.Sprintf(", oom_score_adj %d", *v.OOMScoreAdj)
	}
	if k.event.Outcome == event.OutcomeUnknown {
		line += "; whether the kernel killed it is not proven"
	}
	return line
}

// ranOut is what ran out, in a few words.
func ranOut(e *event.Event) string {
	switch e.Scope {
	case event.ScopeGlobal:
		return "node out of memory"
	case event.ScopeCpuset:
		return "memory of a cpuset"
	case event.ScopeMempolicy:
		return "memory of a memory policy"
	case event.ScopeSysrq:
		return "requested by SysRq"
	case event.ScopeCgroup:
	default:
		return "cause unknown"
	}
	l := e.Limit
	if l == nil {
		return "limit of a cgroup"
	}
	what := map[event.LimitLevel]string{
		event.LevelNode: "limit of the node", event.LevelKubepods: "limit of all pods", event.LevelQoS: "limit of a QoS class",
		event.LevelPod: "pod limit", event.LevelContainer: "container limit",
	}[l.Level]
	what = cmp.Or(what, "limit of a cgroup")
	if l.Max != nil {
		what += " " + text.Size(*l.Max)
	}
	return what
}

// asked is who asked for memory.
func asked(e *event.Event) string {
	switch t := e.Trigger; {
	case e.Scope == event.ScopeSysrq:
		return "Nobody: somebody requested the kill by SysRq."
	case t == nil:
		return "Not known: the kernel's hooks did not show it."
	case t.PID == e.Victim.PID:
		return fmt.Sprintf("The victim itself, %s.", text.Victim(e))
	default:
		asker := event.Event{Victim: event.Victim{PID: t.PID, TID: t.TID, Comm: t.Comm}}
		return fmt.Sprintf("%s, and not the victim.", text.Victim(&asker))
	}
}

// whoseLimit is the limit with its cgroup.
func whoseLimit(e *event.Event) string {
	l := e.Limit
	if l == nil {
		return "Not known."
	}
	what := "Of the node"
	if l.Level != event.LevelNode {
		what = upper(words(string(l.Level))) + " level"
	}
	if l.Max != nil {
		what += ", " + text.Size(*l.Max)
	}
	if l.Usage != nil {
		what += ", of which " + text.Size(*l.Usage) + " were used"
	}
	if l.Cgroup != nil {
		what += ", cgroup " + text.Printable(l.Cgroup.Path)
	}
	if l.Inferred {
		what += " (inferred: the kernel did not name the owner)"
	}
	return what + "."
}

// memory is what the memory was used for.
func (i *incident) memory() (*memory, string) {
	if i.breakdown == nil {
		return nil, "Not known: nothing was read after the kill."
	}
	b := i.breakdown.Breakdown
	whole, of := uint64(0), "the memory of the node"
	switch {
	case b.Limit != nil:
		of = "the limit"
		if b.Limit.Max != nil {
			whole = *b.Limit.Max
			of += " of " + text.Size(whole)
		}
	case b.Total != nil:
		whole = *b.Total
		of = "the node's " + text.Size(whole)
	}
	kinds := slices.DeleteFunc(text.Kinds(b), func(k text.Kind) bool { return k.Bytes == nil || *k.Bytes == 0 })
	slices.SortStableFunc(kinds, func(a, b text.Kind) int { return cmp.Compare(*b.Bytes, *a.Bytes) })
	sum := uint64(0)
	for _, k := range kinds {
		sum += min(*k.Bytes, math.MaxUint64/16)
	}
	scale := max(whole, sum, 1)
	m := &memory{}
	x := 0.0
	var list []string
	for n, k := range kinds {
		width := round(float64(*k.Bytes) / float64(scale) * 1000)
		list = append(list, text.Size(*k.Bytes)+" "+k.Name)
		m.Parts = append(m.Parts, part{X: x, Width: min(width, 1000-x), Number: min(n, 5), Name: k.Name, Size: text.Size(*k.Bytes)})
		x = min(round(x+width), 1000)
	}
	after := time.Duration(min(b.AfterNS, 1<<62)).Round(time.Millisecond)
	m.Text = fmt.Sprintf("%s after the kill, of %s", after, of)
	if b.Usage != nil {
		m.Text += ", " + text.Size(*b.Usage) + " were used"
	}
	if list == nil {
		list = []string{"nothing that could be read"}
	}
	m.Title = "Of " + of + ": " + strings.Join(list, ", ")
	m.Text += "."
	if b.Gone {
		m.Text += " The cgroup was removed before all of it was read."
	}
	if part := text.LargePart(b); part != "" {
		m.Text += " " + sentence(part) + " The kernel cannot free that."
	}
	if len(b.Processes) > 0 {
		var largest []string
		for _, p := range b.Processes[:min(len(b.Processes), maxListed)] {
			one := text.Victim(&event.Event{Victim: event.Victim{PID: p.PID, Comm: p.Comm}}) + " " + text.Size(p.RSS)
			if p.Victim {
				one += " (a victim)"
			}
			largest = append(largest, one)
		}
		m.Text += " The largest processes then: " + strings.Join(largest, ", ")
		if seen := b.ProcessesSeen; seen != nil && int(*seen) > len(largest) {
			m.Text += fmt.Sprintf(" (of %d)", *seen)
		}
		m.Text += "."
	}
	return m, ""
}

// podsThen is what the pods of the node used, by their UIDs.
func podsThen(n *event.Neighbours) string {
	var pods []string
	for i := range n.Pods[:min(len(n.Pods), maxListed)] {
		p := &n.Pods[i]
		one := fmt.Sprintf("the pod with the UID %s %s", text.Printable(p.PodUID), text.Size(p.Usage))
		if p.Max != nil {
			one += " of " + text.Size(*p.Max)
		}
		if p.Victim {
			one += " (a victim)"
		}
		pods = append(pods, one)
	}
	if pods == nil {
		return "No pod used any memory."
	}
	return "Of the pods then used: " + strings.Join(pods, ", ") + "."
}

// done is what was done about it, in the order of time, and in one word.
func (i *incident) done() (all []done, result string) {
	type act struct {
		at   time.Time
		done done
	}
	var acts []act
	seen := map[string]bool{}
	best, missing := event.Result(""), 0
	add := func(o *event.Outcome, what string) {
		if o.Pod != nil {
			what = text.Printable(o.Pod.Namespace+"/"+o.Pod.Name) + ": " + what
		}
		if !seen[what] {
			seen[what] = true
			acts = append(acts, act{o.Time, done{o.Time.UTC().Format(clock), what}})
		}
	}
	rank := []event.Result{"", event.ResultSkipped, event.ResultObserved, event.ResultFailed, event.ResultAnnotated, event.ResultExpired, event.ResultRefused, event.ResultEvicted}
	for _, k := range i.full {
		if k.outcome == nil {
			missing++
			continue
		}
		for _, o := range []*event.Outcome{k.outcome, k.end} {
			if o != nil && slices.Index(rank, o.Result) > slices.Index(rank, best) {
				best = o.Result
			}
		}
		if k.outcome.Reason != event.ReasonAlready || k.end != nil {
			add(k.outcome, text.Fate(k.outcome))
		}
		if k.end != nil {
			add(k.end, ended(k.end))
		}
	}
	slices.SortStableFunc(acts, func(a, b act) int { return a.at.Compare(b.at) })
	for _, a := range acts {
		all = append(all, a.done)
	}
	if missing > 0 {
		all = append(all, done{Text: fmt.Sprintf("Of %s no outcome is known (does oom-annotator run?).", count(missing, "kill"))})
	}
	if all == nil {
		all = append(all, done{Text: "Nothing: each pod was marked already."})
	}
	switch {
	case best == "":
		return all, "no outcome known"
	case best == event.ResultSkipped || best == event.ResultObserved:
		return all, "not marked"
	case best == event.ResultAnnotated:
		return all, "marked"
	}
	return all, words(string(best))
}

// ended is what became of a mark.
func ended(o *event.Outcome) string {
	what := map[event.Reason]string{
		event.ReasonEvicted: "evicted, through the API", event.ReasonLeft: "has left its node without an eviction that was seen",
		event.ReasonEvictor: "had to stay, and the mark was removed", event.ReasonLifetime: "the mark expired: nobody evicted the pod in time",
		event.ReasonReconfigured: "the mark was removed, for the configuration changed",
	}[o.Reason]
	if what == "" {
		what = words(string(o.Result)) + ": " + words(string(o.Reason))
	}
	if o.Detail != "" {
		what += " (" + text.Printable(o.Detail) + ")"
	}
	return what
}

func (r *Report) notes(s Stream) []string {
	notes := []string{
		fmt.Sprintf("Range: %s to %s UTC. Made at %s UTC.", r.o.From.UTC().Format(second), r.o.Until.UTC().Format(second), r.o.Made.UTC().Format(second)),
		"All times are in UTC. The time of a kill is that of the node's clock. A kill is in the range if it happened before its end and was stored after its begin.",
		fmt.Sprintf("%s read.", count(s.Messages, "message")),
		fmt.Sprintf("An incident is the kills of one decision of the kernel, or at the same limit or for the memory of the same node with less than %s between them.", duration(together)),
	}
	if s.Unreadable > 0 {
		notes = append(notes, fmt.Sprintf("%s could not be read and are left out.", count(s.Unreadable, "message")))
	}
	if begin := r.lost(s); !begin.IsZero() {
		notes = append(notes, fmt.Sprintf("Not in the stream any more: what was stored before %s UTC.", begin.UTC().Format(second)))
	} else {
		notes = append(notes, "The stream has the whole range.")
	}
	if s.Unnamed > 0 {
		hint := ""
		if r.o.Namespace != "" {
			hint = " They are left out, and may be of this namespace."
		}
		notes = append(notes, fmt.Sprintf("%s in pods without an outcome: their pods are not known (does oom-annotator run?).%s", count(s.Unnamed, "kill"), hint))
	}
	if r.kills > 0 && r.first.Before(r.o.From) {
		notes = append(notes, fmt.Sprintf("The first kill happened at %s UTC, and was stored later. The timeline has it at its begin.", r.first.UTC().Format(second)))
	}
	if r.kills > 0 && r.last.After(r.o.Until) {
		notes = append(notes, "A kill is later than the range: the clock of its node is ahead. The timeline has it at its end.")
	}
	return notes
}

// ticks are the full hours, or the like, of the axis.
func ticks(from, until time.Time) (all []tick) {
	span := until.Sub(from)
	step := 365 * 24 * time.Hour
	for _, s := range []time.Duration{
		time.Minute, 2 * time.Minute, 5 * time.Minute, 10 * time.Minute, 15 * time.Minute, 30 * time.Minute, time.Hour, 2 * time.Hour, 3 * time.Hour, 6 * time.Hour,
		12 * time.Hour, 24 * time.Hour, 2 * 24 * time.Hour, 7 * 24 * time.Hour, 14 * 24 * time.Hour, 30 * 24 * time.Hour, 90 * 24 * time.Hour,
	} {
		if span/s <= 6 {
			step = s
			break
		}
	}
	for t := from.UTC().Truncate(step); t.Before(until); t = t.Add(step) {
		x := t.Sub(from).Seconds() / span.Seconds() * 100
		if x < 0 {
			continue
		}
		label := t.Format("15:04")
		if t.Equal(t.Truncate(24 * time.Hour)) {
			label = t.Format("2 Jan")
		}
		all = append(all, tick{round(x), round(10 * x), label})
	}
	return all
}

func count(n int, what string) string { return count64(uint64(n), what) }

func count64(n uint64, what string) string { return fmt.Sprintf("%d %s", n, plural(n, what)) }

func plural[N int | uint64](n N, what string) string {
	switch {
	case n == 1:
		return what
	case strings.HasSuffix(what, "s"):
		return what + "es"
	}
	return what + "s"
}

// duration is a time span without zeros at its end.
func duration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// words is a constant such as own_limit for people.
func words(s string) string { return strings.ReplaceAll(text.Printable(s), "_", " ") }

func upper(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:]
}

// sentence is printable, begins with a capital letter and ends with a full stop.
func sentence(s string) string {
	s = text.Printable(s)
	if s == "" {
		return s
	}
	return strings.TrimSuffix(upper(s), ".") + "."
}
