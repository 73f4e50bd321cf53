package config

import (
	"slices"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/oom-tracer/oom-tracer/go/event"
)

func TestMark(t *testing.T) {
	for _, tt := range []struct{ annotation, key, value string }{
		{"", "", ""},
		{"a.b/c", "a.b/c", "true"},
		{"a.b/c=", "a.b/c", ""},
		{"a.b/c=d=e", "a.b/c", "d=e"},
	} {
		p := Policy{Annotation: tt.annotation}
		if key, value := p.Mark(); key != tt.key || value != tt.value {
			t.Errorf("%q is %q and %q", tt.annotation, key, value)
		}
	}
}

// A container that is alone in its pod reaches its limit at either level: one word means both.
func TestOwnLimit(t *testing.T) {
	for _, tt := range []struct {
		levels []string
		want   []event.LimitLevel
	}{
		{[]string{"own"}, []event.LimitLevel{event.LevelPod, event.LevelContainer}},
		{[]string{"node", "own"}, []event.LimitLevel{event.LevelNode, event.LevelPod, event.LevelContainer}},
		{[]string{"container"}, []event.LimitLevel{event.LevelContainer}},
		{[]string{"node", "kubepods"}, []event.LimitLevel{event.LevelNode, event.LevelKubepods}},
	} {
		p := Policy{Levels: tt.levels}
		var got []event.LimitLevel
		for _, l := range event.LimitLevels() {
			if p.OnLevel(l) {
				got = append(got, l)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("levels %v act on %v, want %v", tt.levels, got, tt.want)
		}
	}
}

// The rules are those of Kubernetes, for keys, for values of labels and for names of namespaces.
func TestRulesOfKubernetes(t *testing.T) {
	names := []string{
		"", "a", "A", "0", "-", "a-", "-a", "a.b", "a..b", ".a", "a_b", "_a", "a b", "a\n", "ä", "a:b", "=",
		strings.Repeat("a", 63), strings.Repeat("a", 64),
	}
	prefixes := append([]string{"example.com", "EXAMPLE.com", strings.Repeat("a.", 126) + "a", strings.Repeat("a.", 127) + "a", "a/b"}, names...)
	for _, name := range names {
		if got, want := name == "" || len(name) <= 63 && qualifiedName.MatchString(name), validation.IsValidLabelValue(name) == nil; got != want {
			t.Errorf("label value %q: %t", name, got)
		}
		if got, want := len(name) <= 63 && dnsLabel.MatchString(name), validation.IsDNS1123Label(name) == nil; got != want {
			t.Errorf("namespace %q: %t", name, got)
		}
		for _, key := range append([]string{name}, func() (all []string) {
			for _, p := range prefixes {
				all = append(all, p+"/"+name)
			}
			return all
		}()...) {
			if got, want := checkKey(key) == nil, validation.IsQualifiedName(key) == nil; got != want {
				t.Errorf("key %q: %t", key, got)
			}
		}
	}
	for value, ok := range map[string]bool{
		"": true, "true": true, "a b/ü": true, "a\n": false, "\x1b[31m": false, "\xff": false,
		strings.Repeat("a", 1024): true, strings.Repeat("a", 1025): false,
	} {
		if got := checkAnnotationValue(value) == nil; got != ok {
			t.Errorf("value %.20q: %t", value, got)
		}
	}
}
