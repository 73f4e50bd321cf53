package notify

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"text/template"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/advice"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	maxItems   = 10       // incidents or gaps that a message has one by one
	maxVictims = 4        // processes of an incident that are named
	maxText    = 16 << 10 // bytes of the text of a message
)

// groupKey is what the items of a message have in common.
type groupKey struct {
	kind             event.Kind
	namespace, owner string         // of a kill in a pod: the owner is Kind/name
	node             string         // of another kill
	cause            event.GapCause // of a gap
}

// keyOf is the group of an item. A pod that nobody would replace is its own owner.
func keyOf(i *item) groupKey {
	if i.gap != nil {
		return groupKey{kind: event.KindGap, cause: i.gap.Cause}
	}
	if i.outcome == nil || i.outcome.Pod == nil {
		return groupKey{kind: event.KindKill, node: i.kill.Node.Name}
	}
	p := i.outcome.Pod
	owner := p.Owner
	if owner == "" {
		owner = "Pod/" + p.Name
	}
	return groupKey{kind: event.KindKill, namespace: p.Namespace, owner: owner}
}

// String is the same for all messages about one group.
func (k groupKey) String() string {
	switch {
	case k.kind == event.KindGap:
		return "gap/" + text.Printable(string(k.cause))
	case k.owner == "":
		return "node/" + text.Printable(k.node)
	}
	return text.Printable(k.namespace + "/" + k.owner)
}

// Notification is a message: what a template gets, and the JSON of the webhook. Its strings are printable ASCII.
type Notification struct {
	Kind string `json:"kind"` // kill or gap
	// Group is the same in all messages about one owner, node or cause of gaps.
	Group string `json:"group"`
	Title string `json:"title"`
	Text  string `json:"text"` // what the template makes
	// Namespace, OwnerKind and Owner are those of the pods, Node that of kills outside of known pods, Cause that of gaps.
	Namespace string `json:"namespace,omitempty"`
	OwnerKind string `json:"owner_kind,omitempty"`
	Owner     string `json:"owner,omitempty"`
	Node      string `json:"node,omitempty"`
	Cause     string `json:"cause,omitempty"`
	// Count is how many kills, or gaps, the message is about. First and Last are the times of the first and the last one.
	Count int       `json:"count"`
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	// Items are the first incidents, or gaps. More is how many others there are.
	Items []Item `json:"items"`
	More  int    `json:"more"`
	Link  string `json:"link,omitempty"` // notify.link
}

// Item is an incident of the OOM killer, with one or more kills in one group, or a gap.
type Item struct {
	ID        string    `json:"id"` // of its first kill, or of the gap
	Time      time.Time `json:"time"`
	Node      string    `json:"node"`
	Pod       string    `json:"pod,omitempty"`
	Container string    `json:"container,omitempty"`
	Result    string    `json:"result,omitempty"` // of the outcome
	Reason    string    `json:"reason,omitempty"`
	Text      string    `json:"text"` // the sentence
}

// newNotification makes the message about the items of a group, of which there is at least one. escape is applied to each string.
func newNotification(key groupKey, items []*item, escape func(string) string) *Notification {
	word := func(s string) string { return escape(text.Printable(s)) }
	slices.SortStableFunc(items, func(a, b *item) int { return a.time.Compare(b.time) })
	n := &Notification{
		Kind: string(key.kind), Group: escape(key.String()), Namespace: word(key.namespace), Node: word(key.node), Cause: word(string(key.cause)),
		Count: len(items), First: items[0].time.UTC(), Last: items[len(items)-1].time.UTC(), Items: []Item{},
	}
	kind, name, _ := strings.Cut(key.owner, "/")
	n.OwnerKind, n.Owner = word(kind), word(name)
	n.Title = title(n, items)

	var order []string
	incidents := map[string][]*item{}
	for _, i := range items {
		id := i.id()
		if incidents[id] == nil {
			order = append(order, id)
		}
		incidents[id] = append(incidents[id], i)
	}
	n.More = max(len(order)-maxItems, 0)
	for _, id := range order[:len(order)-n.More] {
		first := incidents[id][0]
		item := Item{Time: first.time.UTC()}
		if g := first.gap; g != nil {
			item.ID, item.Node, item.Text = word(g.ID), word(g.Node.Name), escape(text.Gap(g))
		} else {
			item.ID, item.Node, item.Text = word(first.kill.ID), word(first.kill.Node.Name), escape(sentence(incidents[id]))
			if o := first.outcome; o != nil {
				item.Container, item.Result, item.Reason = word(o.Container), word(string(o.Result)), word(string(o.Reason))
				if o.Pod != nil {
					item.Pod = word(o.Pod.Name)
				}
			}
		}
		n.Items = append(n.Items, item)
	}
	return n
}

// id is the same for the kills of one incident in one pod.
func (i *item) id() string {
	if i.gap != nil {
		return i.gap.ID
	}
	if i.kill.Incident == nil {
		return i.kill.MsgID()
	}
	id := i.kill.Node.Name + " " + i.kill.Incident.ID
	if i.outcome != nil && i.outcome.Pod != nil {
		id += " " + i.outcome.Pod.UID
	}
	return id
}

func title(n *Notification, items []*item) string {
	switch {
	case n.Kind == string(event.KindKill) && n.Owner != "":
		return fmt.Sprintf("OOM: %s %s/%s: %s", n.OwnerKind, n.Namespace, n.Owner, kills(n.Count))
	case n.Kind == string(event.KindKill):
		return fmt.Sprintf("OOM: node %s: %s, not in a known pod", n.Node, kills(n.Count))
	}
	missing, exact := uint64(0), true
	nodes := map[string]bool{}
	for _, i := range items {
		nodes[i.gap.Node.Name] = true
		if exact = exact && i.gap.Count != nil; exact {
			missing += *i.gap.Count
		}
	}
	where := fmt.Sprintf("%d nodes", len(nodes))
	if len(nodes) == 1 {
		where = "node " + text.Printable(items[0].gap.Node.Name)
	}
	if exact {
		return fmt.Sprintf("OOM gap: %s: %s not recorded (%s)", where, kills(int(missing)), n.Cause)
	}
	return fmt.Sprintf("OOM gap: %s: kills may be missing (%s)", where, n.Cause)
}

func kills(count int) string {
	if count == 1 {
		return "1 kill"
	}
	return fmt.Sprintf("%d kills", count)
}

// sentence describes an incident.
func sentence(items []*item) string {
	e, o := items[0].kill, items[0].outcome
	s := text.Sentence{Killed: len(items), Unproven: true, Cause: text.Cause(e)}
	if clause := advice.Clause(e); clause != "" {
		s.Cause += "; " + clause
	}
	if o != nil {
		s.Fate = text.Fate(o)
	} else {
		o = &event.Outcome{}
	}
	if where := text.Where(e, o, true); where != "" {
		s.Where = []string{where}
	}
	rss, known := uint64(0), true
	for _, i := range items {
		if len(s.Victims) < maxVictims {
			s.Victims = append(s.Victims, text.Victim(i.kill))
		}
		s.Unproven = s.Unproven && i.kill.Outcome != event.OutcomeKilled
		if m := i.kill.Victim.Memory; m != nil {
			rss += m.AnonRSS + m.FileRSS + m.ShmemRSS
		} else {
			known = false
		}
	}
	if known {
		s.RSS = &rss
	}
	return s.String()
}

// format is how the messages of one kind of receiver look.
type format struct {
	escape   func(string) string
	own      *template.Template // nil: the default
	standard *template.Template
	encode   func(n *Notification, until time.Time) any
}

// The default texts.
const (
	plainText = `{{range .Items}}{{.Time.Format "2006-01-02 15:04:05"}} {{.Node}}: {{.Text}}
{{end}}{{if .More}}and {{.More}} more
{{end}}`
	slackText = `*{{.Title}}*{{range .Items}}
• {{.Time.Format "15:04:05"}} {{.Node}}: {{.Text}}{{end}}{{if .More}}
and {{.More}} more{{end}}{{if .Link}}
<{{.Link}}|Details>{{end}}`
)

// Names of receivers, in the config, in logs and in metrics.
const (
	slack        = "slack"
	alertmanager = "alertmanager"
	webhook      = "webhook"
)

// newFormat makes the format of a receiver. It fails on a template that is wrong, or does not work on examples of messages.
func newFormat(receiver, own string) (*format, error) {
	f := &format{escape: func(s string) string { return s }}
	standard := plainText
	switch receiver {
	case slack:
		standard = slackText
		// What a name may not do: mention people, or be a link (Slack: "Formatting text for app surfaces").
		f.escape = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;").Replace
		f.encode = func(n *Notification, _ time.Time) any { return map[string]string{"text": n.Text} }
	case alertmanager:
		f.encode = alert
	default:
		f.encode = func(n *Notification, _ time.Time) any { return n }
	}
	f.standard = template.Must(template.New("default").Parse(standard))
	if own == "" {
		return f, nil
	}
	var err error
	if f.own, err = template.New("template").Parse(own); err != nil {
		return nil, fmt.Errorf("notify.%s.template: %w", receiver, err)
	}
	for _, items := range examples() {
		if _, err := render(f.own, newNotification(keyOf(items[0]), items, f.escape)); err != nil {
			return nil, fmt.Errorf("notify.%s.template: %w", receiver, err)
		}
	}
	return f, nil
}

// body is the message for the receiver. With an error it has the default text.
func (f *format) body(n *Notification, until time.Time) (body []byte, err error) {
	if f.own != nil {
		n.Text, err = render(f.own, n)
	}
	if f.own == nil || err != nil {
		var wrong error
		if n.Text, wrong = render(f.standard, n); wrong != nil {
			n.Text = n.Title
			err = errors.Join(err, wrong)
		}
	}
	body, wrong := json.Marshal(f.encode(n, until))
	return body, errors.Join(err, wrong)
}

// errTooLong ends a template that makes too much.
var errTooLong = fmt.Errorf("the text is longer than %d bytes", maxText)

// bounded is a buffer of at most maxText bytes.
type bounded struct{ bytes.Buffer }

func (b *bounded) Write(p []byte) (int, error) {
	if b.Len()+len(p) > maxText {
		return 0, errTooLong
	}
	return b.Buffer.Write(p)
}

func render(t *template.Template, n *Notification) (string, error) {
	var b bounded
	if err := t.Execute(&b, n); err != nil {
		return "", err
	}
	out := strings.TrimSpace(strings.ToValidUTF8(b.String(), ""))
	if out == "" {
		return "", errors.New("the text is empty")
	}
	return out, nil
}

// alert is a message as an alert of Alertmanager (API v2, POST /alerts). The same labels are the same alert.
func alert(n *Notification, until time.Time) any {
	labels := map[string]string{"alertname": "OOMKill", "severity": "warning"}
	if n.Kind == string(event.KindGap) {
		labels["alertname"] = "OOMKillsNotRecorded"
	}
	for label, value := range map[string]string{
		"namespace": n.Namespace, "owner_kind": n.OwnerKind, "owner": n.Owner, "node": n.Node, "cause": n.Cause,
	} {
		if value != "" {
			labels[label] = value
		}
	}
	type alert struct {
		Labels       map[string]string `json:"labels"`
		Annotations  map[string]string `json:"annotations"`
		StartsAt     time.Time         `json:"startsAt"`
		EndsAt       time.Time         `json:"endsAt"`
		GeneratorURL string            `json:"generatorURL,omitempty"`
	}
	return []alert{{
		Labels: labels, Annotations: map[string]string{"summary": n.Title, "description": n.Text},
		StartsAt: n.First, EndsAt: until.UTC(), GeneratorURL: n.Link,
	}}
}

// examples are what the messages can be about: kills of an owner, a kill in no known pod, gaps.
func examples() [][]*item {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	node := event.Node{Name: "node-1"}
	limit := uint64(512 << 20)
	kill := func(pid uint32) *event.Event {
		return &event.Event{
			ID: fmt.Sprint("boot-", pid), Time: at, Node: node, Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled,
			Victim: event.Victim{PID: pid, TID: pid, Comm: "java", Memory: &event.Memory{AnonRSS: limit}},
			Limit:  &event.Limit{Level: event.LevelPod, Max: &limit},
		}
	}
	outcome := &event.Outcome{
		Result: event.ResultSkipped, Reason: event.ReasonLevel, Container: "app",
		Pod: &event.PodRef{Namespace: "shop", Name: "cart-7d4b9", UID: "uid", Owner: "Deployment/cart"},
	}
	var owned []*item
	for pid := range uint32(maxItems + 2) {
		owned = append(owned, &item{kill: kill(pid + 1), outcome: outcome, time: at})
	}
	return [][]*item{
		owned, owned[:1],
		{{kill: &event.Event{ID: "boot-1-1", Time: at, Node: node, Scope: event.ScopeUnknown}, time: at}},
		{{gap: &event.Gap{ID: "boot-gap", Time: at, Node: node, Cause: event.GapReboot}, time: at}},
		{{gap: &event.Gap{ID: "boot-gap-2", Time: at, Node: node, Cause: event.GapWrapped, Count: &limit, FirstSeq: 1, LastSeq: limit}, time: at}},
	}
}
