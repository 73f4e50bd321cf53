package kubeevents

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/advice"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// Limits of the content of an Event. memory.oom.group may kill thousands of processes at once.
const (
	maxProcesses = 1000 // of an incident
	maxVictims   = 8    // that are named
	maxPlaces    = 4    // containers or pods that are named
	maxCounted   = 32   // IDs of counted incidents that are kept
)

// record is an addition to an Event: a kill, or what the other pods used after an incident.
type record struct {
	incident string
	kill     *kill
	after    string
}

// kill is one process of an incident.
type kill struct {
	index    uint32
	time     time.Time
	victim   string
	rss      *uint64
	unproven bool
	where    string
	pod      string
	cause    string
	fate     fate
}

// fate is the outcome for the pod of an incident. Of several outcomes the one with the highest rank is shown.
type fate struct {
	Rank  int    `json:"rank"`
	Index uint32 `json:"index"` // of the kill
	Text  string `json:"text"`
}

// newRecord makes the record of a kill. With pod it names the pod, for the Event on a node.
func newRecord(e *event.Event, o *event.Outcome, pod bool) record {
	r := record{incident: e.ID, kill: &kill{
		time: e.Time.UTC(), victim: text.Victim(e), unproven: e.Outcome != event.OutcomeKilled, where: text.Where(e, o, pod), cause: text.Cause(e),
	}}
	k := r.kill
	if clause := advice.Clause(e); clause != "" {
		k.cause += "; " + clause
	}
	if e.Incident != nil {
		r.incident, k.index = e.Incident.ID, e.Incident.Index
	}
	if m := e.Victim.Memory; m != nil {
		k.rss = new(m.AnonRSS + m.FileRSS + m.ShmemRSS)
	}
	if o.Pod != nil {
		k.pod = o.Pod.UID
	}
	k.fate = fate{Index: k.index, Text: text.Fate(o)}
	switch {
	case o.Result == event.ResultAnnotated:
		k.fate.Rank = 3
	case o.Result == event.ResultFailed:
		k.fate.Rank = 2
	case o.Reason != event.ReasonAlready: // the pod was marked for the first kill of the incident
		k.fate.Rank = 1
	}
	return r
}

// incident is one decision of the OOM killer, as far as it was recorded. The order of its kills does not matter, nor whether one
// is added twice.
type incident struct {
	ID        string    `json:"id"`
	Time      time.Time `json:"time"`      // of its first kill
	Processes []uint32  `json:"processes"` // event.Incident.Index of each, in order
	More      bool      `json:"more,omitempty"`
	Victims   []victim  `json:"victims"` // with the lowest indexes
	RSS       uint64    `json:"rss"`     // sum of those that are known, in bytes
	NoRSS     bool      `json:"no_rss,omitempty"`
	Unproven  bool      `json:"unproven,omitempty"` // no kill is proven
	Where     []string  `json:"where,omitempty"`
	Pods      []string  `json:"pods,omitempty"` // UIDs
	Cause     string    `json:"cause"`
	Fate      fate      `json:"fate"`
	After     string    `json:"after,omitempty"`
}

type victim struct {
	Index uint32 `json:"index"`
	Name  string `json:"name"`
}

// add adds a kill.
func (n *incident) add(k *kill) {
	if len(n.Processes) == 0 {
		n.Time, n.Unproven, n.Cause, n.Fate = k.time, true, k.cause, k.fate
	}
	at, again := slices.BinarySearch(n.Processes, k.index)
	if again {
		return
	}
	if len(n.Processes) >= maxProcesses {
		n.More = true
		return
	}
	n.Processes = slices.Insert(slices.Clone(n.Processes), at, k.index)
	if at <= len(n.Victims) && at < maxVictims {
		n.Victims = slices.Insert(slices.Clone(n.Victims), at, victim{k.index, k.victim})
		n.Victims = n.Victims[:min(len(n.Victims), maxVictims)]
	}
	if k.rss != nil {
		n.RSS += *k.rss
	} else {
		n.NoRSS = true
	}
	if k.time.Before(n.Time) {
		n.Time = k.time
	}
	n.Unproven = n.Unproven && k.unproven
	n.Where, n.Pods = insert(n.Where, k.where), insert(n.Pods, k.pod)
	if k.fate.Rank > n.Fate.Rank || k.fate.Rank == n.Fate.Rank && k.fate.Index < n.Fate.Index {
		n.Fate = k.fate
	}
}

// insert adds a word to a sorted set, and keeps the first maxPlaces.
func insert(set []string, word string) []string {
	at, again := slices.BinarySearch(set, word)
	if word == "" || again {
		return set
	}
	set = slices.Insert(slices.Clone(set), at, word)
	return set[:min(len(set), maxPlaces)]
}

// String is the message of the incident's Event.
func (n *incident) String() string {
	s := text.Sentence{
		Killed: len(n.Processes), More: n.More, Unproven: n.Unproven, Where: n.Where, Cause: n.Cause, Fate: n.Fate.Text, After: n.After,
	}
	for _, v := range n.Victims {
		s.Victims = append(s.Victims, v.Name)
	}
	if !n.NoRSS && !n.More {
		s.RSS = &n.RSS
	}
	if len(n.Where) == maxPlaces {
		s.Where = append(slices.Clone(n.Where[:maxPlaces-1]), "others")
	}
	if len(n.Pods) > 1 {
		s.Fate = "" // each pod has its own Event
	}
	return s.String()
}

// content is the content of an Event: the number of incidents, and the last one.
type content struct {
	version     string // the Event's resourceVersion; empty: there is no Event
	count       int
	first, last time.Time // kills
	state
}

// state is the part of content that has no field in an Event. It is stored in an annotation, so that several replicas, and later
// ones, can write the same Event.
type state struct {
	// Counted are the hashed IDs of the last incidents that were counted.
	Counted  []string `json:"counted"`
	Incident incident `json:"incident"`
}

// with returns the content with more records, and whether they changed it.
func (c content) with(records []record) (_ content, changed bool) {
	c.Counted = slices.Clone(c.Counted)
	for _, r := range records {
		same := c.Incident.ID == r.incident
		if r.kill == nil {
			if same && c.Incident.After != r.after {
				c.Incident.After, changed = r.after, true
			}
			continue
		}
		id := short(r.incident)
		if !slices.Contains(c.Counted, id) {
			c.Counted = append(c.Counted, id)
			c.Counted = c.Counted[max(len(c.Counted)-maxCounted, 0):]
			c.count++
			changed = true
		}
		if c.first.IsZero() || r.kill.time.Before(c.first) {
			c.first = r.kill.time
		}
		if r.kill.time.After(c.last) {
			c.last = r.kill.time
		}
		if !same && (c.Incident.ID == "" || r.kill.time.After(c.Incident.Time)) {
			c.Incident, same = incident{ID: r.incident}, true
		}
		if same { // an earlier incident only counts
			processes, more := len(c.Incident.Processes), c.Incident.More
			c.Incident.add(r.kill)
			changed = changed || len(c.Incident.Processes) != processes || c.Incident.More != more
		}
	}
	return c, changed
}

func short(id string) string {
	sum := sha256.Sum256([]byte(id))
	return hex.EncodeToString(sum[:6])
}
