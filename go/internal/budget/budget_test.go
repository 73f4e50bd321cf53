package budget

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

var start = time.Unix(1_000_000, 0).UTC()

// attempt is a claim at a time, of a kill that happened some time before.
type attempt struct {
	at, age           time.Duration
	kill, node, owner string
	want              Refusal
}

func TestClaim(t *testing.T) {
	const keep = 10 * time.Minute
	for _, tt := range []struct {
		name   string
		limits config.Budgets
		steps  []attempt
	}{
		{"cluster", config.Budgets{Window: time.Hour, Cluster: 2}, []attempt{
			{0, 0, "1", "n1", "a", ""},
			{time.Minute, 0, "2", "n2", "b", ""},
			{2 * time.Minute, 0, "3", "n3", "c", "cluster: 2 of 2 within 1h0m0s"},
			{2 * time.Minute, 0, "1", "n1", "a", ""}, // it has the right
			{time.Hour, 0, "4", "n4", "d", ""},       // the first one is an hour old
			{time.Hour, 0, "5", "n5", "e", "cluster: 2 of 2 within 1h0m0s"},
		}},
		{"node", config.Budgets{Window: time.Hour, Cluster: 10, Node: 1}, []attempt{
			{0, 0, "1", "n1", "a", ""},
			{0, 0, "2", "n1", "b", "node n1: 1 of 1 within 1h0m0s"},
			{0, 0, "3", "n2", "a", ""},
		}},
		{"owner", config.Budgets{Window: time.Hour, Cluster: 10, Owner: 1}, []attempt{
			{0, 0, "1", "n1", "a", ""},
			{0, 0, "2", "n2", "a", "owner a: 1 of 1 within 1h0m0s"},
			{0, 0, "3", "n1", "b", ""},
		}},
		{"cooldown", config.Budgets{Window: time.Hour, Cluster: 10, Cooldown: time.Minute}, []attempt{
			{0, 0, "1", "n1", "a", ""},
			{59 * time.Second, 0, "2", "n1", "b", "node n1: 1 of 1 within 1m0s"},
			{59 * time.Second, 0, "3", "n2", "a", "owner a: 1 of 1 within 1m0s"},
			{59 * time.Second, 0, "4", "n2", "b", ""},
			{time.Minute, 0, "5", "n1", "a", ""},
		}},
		{"no cooldown", config.Budgets{Window: time.Hour, Cluster: 10}, []attempt{
			{time.Second, time.Second, "1", "n1", "a", ""},
			{time.Second, time.Second, "2", "n1", "a", ""},
		}},
		// What was refused comes again when there is room, and is still refused: by its own time there was none.
		{"refused for good", config.Budgets{Window: time.Minute, Cluster: 1}, []attempt{
			{0, 0, "1", "n1", "a", ""},
			{30 * time.Second, 0, "2", "n2", "b", "cluster: 1 of 1 within 1m0s"},
			{2 * time.Minute, 90 * time.Second, "2", "n2", "b", "cluster: 1 of 1 within 1m0s"},
			{2 * time.Minute, 0, "3", "n3", "c", ""},
			{10*time.Minute + 30*time.Second, 10 * time.Minute, "2", "n2", "b", "cluster: 2 of 1 within 1m0s"},
		}},
		// A kill that waited long is held against what was marked meanwhile.
		{"late", config.Budgets{Window: time.Minute, Cluster: 1}, []attempt{
			{5 * time.Minute, 0, "1", "n1", "a", ""},
			{9 * time.Minute, 5 * time.Minute, "2", "n2", "b", "cluster: 1 of 1 within 1m0s"},
			{9 * time.Minute, 0, "3", "n2", "b", ""},
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s State
			for i, a := range tt.steps {
				now := start.Add(a.at)
				before := len(s.Marks)
				changed, got := s.claim(tt.limits, Mark{a.kill, a.node, a.owner, now}, now.Add(-a.age), keep)
				if got != a.want {
					t.Errorf("step %d: %q, want %q", i, got, a.want)
				}
				if got != "" && (changed || len(s.Marks) != before) {
					t.Errorf("step %d: refused, and changed", i)
				}
			}
		})
	}
}

// What nobody needs any more is forgotten, and nothing that somebody needs.
func TestClaimForgets(t *testing.T) {
	const keep = 10 * time.Minute
	limits := config.Budgets{Window: time.Minute, Cluster: 1000, Cooldown: 2 * time.Minute}
	var s State
	for i := range 100 {
		now := start.Add(time.Duration(i) * time.Minute)
		m := Mark{Kill: strings.Repeat("k", i+1), Node: strings.Repeat("n", i+1), Owner: strings.Repeat("o", i+1), Time: now}
		if got := s.Claim(limits, m, now, keep); got != "" {
			t.Fatal(got)
		}
		if i >= 12 && len(s.Marks) != 12 {
			t.Fatalf("%d marks after %d minutes", len(s.Marks), i)
		}
	}
}

func TestPaused(t *testing.T) {
	until := start.Add(time.Minute)
	for name, tt := range map[string]struct {
		pause *Pause
		at    time.Time
		want  bool
	}{
		"none":      {nil, start, false},
		"for ever":  {&Pause{}, start.AddDate(10, 0, 0), true},
		"until":     {&Pause{Until: &until}, until.Add(-1), true},
		"after":     {&Pause{Until: &until}, until, false},
		"long past": {&Pause{Until: &until}, until.AddDate(1, 0, 0), false},
	} {
		if got := (&State{Pause: tt.pause}).Paused(tt.at); (got != nil) != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestParse: only what is exactly a state is one.
func TestParse(t *testing.T) {
	for name, tt := range map[string]struct {
		data string
		want error
	}{
		"initial":           {string(Initial()), nil},
		"complete":          {`{"schema":"oom-tracer/budgets/v1","pause":{"reason":"x","by":"y","since":"2026-01-01T00:00:00Z"},"marks":[{"kill":"k","node":"n","owner":"o","time":"2026-01-01T00:00:00Z"}]}`, nil},
		"absent":            {"", ErrAbsent},
		"empty object":      {"{}", ErrState},
		"null":              {"null", ErrState},
		"acknowledgement":   {`{"stream":"OOM","seq":1038}`, ErrState},
		"event":             {`{"schema":"oom-tracer/v1","id":"boot-1-2","seq":1}`, ErrState},
		"state of before":   {`{"schema":"oom-tracer/v1"}`, ErrState},
		"newer state":       {`{"schema":"oom-tracer/budgets/v1","freeze":true}`, ErrState},
		"two states":        {string(Initial()) + string(Initial()), ErrState},
		"mark without time": {`{"schema":"oom-tracer/budgets/v1","marks":[{"kill":"k","node":"n","owner":"o"}]}`, ErrState},
		"mark without kill": {`{"schema":"oom-tracer/budgets/v1","marks":[{"node":"n","owner":"o","time":"2026-01-01T00:00:00Z"}]}`, ErrState},
		"no JSON":           {"direct", ErrState},
	} {
		if _, err := Parse([]byte(tt.data)); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(nil))
	f.Add(Initial())
	f.Add([]byte(`{"schema":"oom-tracer/budgets/v1","pause":{"reason":"x","by":"y","since":"2026-01-01T00:00:00Z"},"marks":[{"kill":"k","node":"n","owner":"o","time":"2026-01-01T00:00:00Z"}]}`))
	f.Add([]byte(`{"schema":"oom-tracer/v1"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := Parse(data)
		if err != nil {
			if !errors.Is(err, ErrState) {
				t.Errorf("error %q", err)
			}
			return
		}
		s.Claim(config.Budgets{Window: time.Hour, Cluster: 1}, Mark{Kill: "new"}, start, time.Minute)
	})
}
