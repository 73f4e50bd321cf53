package notify

import (
	"encoding/json"
	"flag"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

var update = flag.Bool("update", false, "write the golden files anew")

// TestMessages: what each receiver gets, about kills of an owner, a kill in no known pod, and gaps.
func TestMessages(t *testing.T) {
	until := time.Date(2026, 1, 2, 4, 0, 0, 0, time.UTC)
	for _, receiver := range []string{slack, alertmanager, webhook} {
		f, err := newFormat(receiver, "")
		if err != nil {
			t.Fatal(err)
		}
		var all strings.Builder
		for _, items := range examples() {
			n := newNotification(keyOf(items[0]), items, f.escape)
			n.Link = "https://grafana.example.com/d/oom"
			body, err := f.body(n, until)
			if err != nil {
				t.Fatal(err)
			}
			var indented any
			if err := json.Unmarshal(body, &indented); err != nil {
				t.Fatal(err)
			}
			encoder := json.NewEncoder(&all)
			encoder.SetEscapeHTML(false)
			encoder.SetIndent("", "  ")
			if err := encoder.Encode(indented); err != nil {
				t.Fatal(err)
			}
		}
		oomtest.Golden(t, receiver+".json", all.String(), *update)
	}
}

// TestIncident: the processes of one incident are one line, of two incidents two.
func TestIncident(t *testing.T) {
	items := examples()[0][:3]
	for n, i := range items {
		i.kill.Incident = &event.Incident{ID: fmt.Sprint("incident-", n/2), Group: true, Index: uint32(n % 2)}
	}
	n := newNotification(keyOf(items[0]), items, func(s string) string { return s })
	if len(n.Items) != 2 || n.Count != 3 || !strings.HasPrefix(n.Items[0].Text, "OOM killer killed 2 processes: java[1], java[2] (rss 1.0 GiB in all) in container app") {
		t.Errorf("%+v", n)
	}
}

// TestInjection: names of a cluster's users mention nobody in Slack, are no links, and no control characters.
func TestInjection(t *testing.T) {
	f, err := newFormat(slack, "{{.Title}} {{.Group}} {{.Namespace}} {{.Owner}} {{range .Items}}{{.Pod}} {{.Container}} {{.ID}} {{.Text}}{{end}} <https://x|y>")
	if err != nil {
		t.Fatal(err)
	}
	const bad = "<!channel>&\x1b[31m\u202e"
	i := examples()[0][0]
	o := *i.outcome
	o.Pod = &event.PodRef{Namespace: bad, Name: bad, Owner: "Deployment/" + bad}
	o.Container, o.Detail = bad, bad
	i.kill.ID, i.kill.Victim.Comm, i.outcome = bad, bad, &o
	n := newNotification(keyOf(i), []*item{i}, f.escape)
	body, err := f.body(n, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	var message struct{ Text string }
	if err := json.Unmarshal(body, &message); err != nil {
		t.Fatal(err)
	}
	text, ok := strings.CutSuffix(message.Text, " <https://x|y>")
	if !ok || strings.ContainsAny(text, "<>\x1b\u202e") || strings.Contains(text, "&\\") || strings.Count(text, "&lt;!channel&gt;&amp;\\x1b[31m") < 8 {
		t.Errorf("%q", message.Text)
	}
}

// TestTemplates: a template that cannot work is refused at the start. One that fails later is replaced by the default, and says so.
func TestTemplates(t *testing.T) {
	for own, want := range map[string]string{
		"{{.Title":                  "unclosed action",
		"{{.Nothing}}":              "can't evaluate field Nothing",
		"{{(index .Items 5).Text}}": "index out of range",
		"{{if .Cause}}x{{end}}":     "the text is empty",
		`{{range 2000}}{{range 10}}x{{end}}{{end}}`: "longer than 16384 bytes",
	} {
		if _, err := newFormat(slack, own); err == nil || !strings.Contains(err.Error(), "notify.slack.template: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", own, err)
		}
	}
	f, err := newFormat(slack, `{{range .Items}}{{if eq .Node "node-2"}}{{index .Node 99}}{{end}}ok{{end}}`)
	if err != nil {
		t.Fatal(err)
	}
	for node, fails := range map[string]bool{"node-1": false, "node-2": true} {
		i := examples()[2][0]
		i.kill.Node.Name = node
		body, err := f.body(newNotification(keyOf(i), []*item{i}, f.escape), time.Time{})
		if (err != nil) != fails || strings.Contains(string(body), "OOM: node") != fails {
			t.Errorf("%s: %v: %s", node, err, body)
		}
	}
}

// TestRead: what is no kill and no gap, or speaks of another node than its subject, is refused.
func TestRead(t *testing.T) {
	kill, err := json.Marshal(event.Event{
		Schema: event.Schema, ID: "boot-1-2", Seq: 1, BoottimeNS: 1, Time: time.Unix(1000, 0), Node: event.Node{Name: "node-1", BootID: "boot"}, Scope: event.ScopeGlobal,
		Outcome: event.OutcomeKilled, Victim: event.Victim{PID: 1, TID: 1},
	})
	if err != nil {
		t.Fatal(err)
	}
	gap := func(count string) string {
		return `{"schema":"oom-tracer/v1","id":"g","time":"2026-01-01T00:00:00Z","node":{"name":"node-1"},"cause":"other_node","count":` + count + `}`
	}
	stored := time.Unix(999, 0)
	for _, tt := range []struct{ subject, data, err string }{
		{"oom.v1.kill.global.node-1", string(kill), ""},
		{"oom.v1.gap.other_node.node-1", gap("1"), ""},
		{"oom.v1.gap.other_node.node-1", gap("0"), "nothing"},
		{"oom.v1.kill.global.node-2", string(kill), `the subject's node is "node-2"`},
		{"oom.v1.gap.other_node.node-2", gap("1"), `the subject's node is "node-2"`},
		{"oom.v1.kill.global.node-1", "{", "parse event"},
		{"oom.v1.kill.global.node-1", strings.Repeat(" ", maxMessage) + string(kill), "the maximum is"},
		{"oom.v1.kill.global.node-1", strings.Replace(string(kill), "/v1", "/v9", 1), "schema"},
		{"oom.v1.outcome.x.node-1", string(kill), "neither kill nor gap"},
		{"other", string(kill), "subject"},
	} {
		i, err := read(bus.Stored{Subject: tt.subject, Data: []byte(tt.data), Time: stored})
		switch {
		case tt.err == "nothing" && i == nil && err == nil:
		case tt.err == "" && err == nil && i != nil && !i.time.After(stored):
		case tt.err != "" && err != nil && strings.Contains(err.Error(), tt.err):
		default:
			t.Errorf("%s %.100s: %+v, %v; want %s", tt.subject, tt.data, i, err, tt.err)
		}
	}
}

// Whatever a message says, each receiver gets valid JSON, or the message is refused.
func FuzzRead(f *testing.F) {
	for _, items := range examples() {
		for _, i := range items {
			var message any = i.kill
			subject := "oom.v1.kill.cgroup.node-1"
			if i.gap != nil {
				message, subject = i.gap, "oom.v1.gap."+string(i.gap.Cause)+".node-1"
			}
			data, err := json.Marshal(message)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(subject, data)
		}
	}
	var formats []*format
	for _, receiver := range []string{slack, alertmanager, webhook} {
		f, err := newFormat(receiver, "")
		if err != nil {
			panic(err)
		}
		formats = append(formats, f)
	}
	f.Fuzz(func(t *testing.T, subject string, data []byte) {
		i, err := read(bus.Stored{Subject: subject, Data: data, Time: time.Unix(1e9, 0)})
		if err != nil || i == nil {
			return
		}
		for _, f := range formats {
			body, err := f.body(newNotification(keyOf(i), []*item{i}, f.escape), time.Unix(2e9, 0))
			if err != nil || !json.Valid(body) {
				t.Errorf("%v: %s", err, body)
			}
		}
	})
}

// A template of a user is refused, or makes a text of every example.
func FuzzTemplate(f *testing.F) {
	for _, own := range []string{
		slackText, plainText, "{{.Nothing}}", `{{range .Items}}{{printf "%s %d" .Text $.Count | html}}{{end}}`, `{{define "a"}}{{template "a"}}{{end}}{{template "a"}}`,
	} {
		f.Add(own)
	}
	endless := regexp.MustCompile(`range|printf|print`) // of a number, and to a width: they take their time
	f.Fuzz(func(t *testing.T, own string) {
		if endless.MatchString(own) && regexp.MustCompile(`\d{4}`).MatchString(own) {
			return
		}
		format, err := newFormat(slack, own)
		if err != nil {
			return
		}
		for _, items := range examples() {
			body, err := format.body(newNotification(keyOf(items[0]), items, format.escape), time.Time{})
			if err != nil || !json.Valid(body) {
				t.Errorf("%v: %s", err, body)
			}
		}
	})
}
