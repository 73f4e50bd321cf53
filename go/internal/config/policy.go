package config

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// Mark takes Annotation apart; both are empty where nothing is to be marked. A key that stands alone has the
// value "true".
func (p *Policy) Mark() (key, value string) {
	key, value, ok := strings.Cut(p.Annotation, "=")
	if key != "" && !ok {
		value = "true"
	}
	return key, value
}

// OwnLimit is the word of policy.levels for the limits of a pod itself: event.LevelContainer and event.LevelPod. The
// kubelet gives a pod whose containers all have limits their sum, so that a container that is alone in its pod reaches
// its limit at either of the two levels.
const OwnLimit = "own"

// OnLevel tells whether Levels name a level, by itself or as a part of OwnLimit.
func (p *Policy) OnLevel(level event.LimitLevel) bool {
	return slices.Contains(p.Levels, string(level)) || ownLimit(string(level)) && slices.Contains(p.Levels, OwnLimit)
}

func ownLimit(level string) bool {
	return level == string(event.LevelContainer) || level == string(event.LevelPod)
}

// policyFaults is the part of faults for the section policy; it reports to bad and clash.
func (c *Config) policyFaults(bad func(key, format string, args ...any), clash func(key, other, format string, args ...any)) {
	p := c.Policy
	if p.Annotation != "" {
		key, value := p.Mark()
		if err := checkKey(key); err != nil {
			bad("policy.annotation", "must be key=value, a key or empty: the key %v", err)
		} else if err := checkAnnotationValue(value); err != nil {
			bad("policy.annotation", "must be key=value, a key or empty: the value %v", err)
		} else if key == c.Annotator.SummaryAnnotation {
			clash("policy.annotation", "annotator.summary_annotation", "must not have the key of annotator.summary_annotation")
		}
		if key != "" && key == p.OptOutAnnotation {
			clash("policy.annotation", "policy.opt_out_annotation", "must not have the key of policy.opt_out_annotation")
		}
	}
	if p.Condition != "" {
		if err := checkKey(p.Condition); err != nil {
			bad("policy.condition", "must be a domain, a slash and a name, or empty: it %v", err)
		} else if !strings.Contains(p.Condition, "/") { // Ready, DisruptionTarget, ...: the kubelet's and the control plane's
			bad("policy.condition", "must be a domain, a slash and a name, or empty, not %s: types without a domain are Kubernetes' own", show(p.Condition))
		}
	}
	var scopes []string
	for _, s := range event.Scopes() {
		if s != event.ScopeUnknown { // proves nothing, so that nothing may be done on its word
			scopes = append(scopes, string(s))
		}
	}
	words := func(key string, values, allowed []string) {
		if len(values) == 0 {
			bad(key, "must not be empty: to act on nothing, leave policy.annotation empty")
		}
		for i, v := range values {
			if !slices.Contains(allowed, v) {
				bad(key, "must be one of %s, not %s", strings.Join(allowed, ", "), show(v))
			} else if slices.Contains(values[:i], v) {
				bad(key, "names %s twice", v)
			}
		}
	}
	words("policy.scopes", p.Scopes, scopes)
	var levels []string
	for _, l := range event.LimitLevels() {
		levels = append(levels, string(l))
	}
	words("policy.levels", p.Levels, append(levels, OwnLimit))
	for _, l := range p.Levels {
		if ownLimit(l) && slices.Contains(p.Levels, OwnLimit) {
			bad("policy.levels", "names %s and %s, but %s is a part of %s: delete one of them", OwnLimit, l, l, OwnLimit)
		}
	}

	for _, list := range []struct {
		key    string
		values []string
	}{{"policy.namespaces.include", p.Namespaces.Include}, {"policy.namespaces.exclude", p.Namespaces.Exclude}} {
		for i, v := range list.values {
			if len(v) > 63 || !dnsLabel.MatchString(v) {
				bad(list.key, "must be names of namespaces, which %s is not", show(v))
			} else if slices.Contains(list.values[:i], v) {
				bad(list.key, "names %s twice", v)
			}
		}
	}
	for _, v := range p.Namespaces.Exclude {
		if slices.Contains(p.Namespaces.Include, v) {
			clash("policy.namespaces.exclude", "policy.namespaces.include", "names %s, and so does policy.namespaces.include", v)
		}
	}
	for _, k := range slices.Sorted(maps.Keys(p.Selector)) {
		if err := checkKey(k); err != nil {
			bad(join("policy.selector", k), "a label's key %v", err)
		}
		if v := p.Selector[k]; v != "" && (len(v) > 63 || !qualifiedName.MatchString(v)) {
			bad(join("policy.selector", k), "a label's value must be at most 63 letters, digits, '-', '_' or '.', the first and the last a letter or digit, not %s", show(v))
		}
	}
	if p.OptOutAnnotation != "" {
		if err := checkKey(p.OptOutAnnotation); err != nil {
			bad("policy.opt_out_annotation", "%v", err)
		} else if p.OptOutAnnotation == c.Annotator.SummaryAnnotation {
			clash("policy.opt_out_annotation", "annotator.summary_annotation", "must differ from annotator.summary_annotation")
		}
	}
}

// The rules of k8s.io/apimachinery/pkg/util/validation, which this package does without: it is in the
// node agent too. A test holds them against the originals.
var (
	dnsLabel      = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	qualifiedName = regexp.MustCompile(`^([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$`)
)

// checkKey checks the key of an annotation or a label (IsQualifiedName). Kubernetes lets the prefix of an
// annotation's key have capitals; here it may not.
func checkKey(key string) error {
	prefix, name, ok := strings.Cut(key, "/")
	if !ok {
		prefix, name = "", key
	}
	_, notDNS := event.NodeToken(prefix)
	if ok && notDNS != nil || len(name) > 63 || !qualifiedName.MatchString(name) {
		return fmt.Errorf("must be a name of at most 63 letters, digits, '-', '_' or '.', the first and the last a letter or digit, with a DNS name and a slash before it or not, not %s", show(key))
	}
	return nil
}

// maxValue bounds an annotation's value, in bytes. Kubernetes has a bound for all annotations of an object,
// 256 KiB (TotalAnnotationSizeLimitB), and takes any text.
const maxValue = 1 << 10

func checkAnnotationValue(value string) error {
	if len(value) > maxValue || !utf8.ValidString(value) || strings.ContainsFunc(value, unicode.IsControl) {
		return fmt.Errorf("must be at most %d bytes of UTF-8 without control characters, not %s", maxValue, show(value))
	}
	return nil
}
