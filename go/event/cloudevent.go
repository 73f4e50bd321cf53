package event

import "net/url"

// CloudEvent returns the headers that make a message a CloudEvent 1.0 in binary mode: its data stays as it is (CloudEvents
// 1.0.3, NATS protocol binding, section 3.1). id is unique for the source, which is the node's tracer, or, for outcomes and evictions, the annotator.
//
// It returns nil for a subject that ParseSubject refuses.
func CloudEvent(subject, id string) map[string][]string {
	kind, _, node, err := ParseSubject(subject)
	if err != nil {
		return nil
	}
	source := "/oom-tracer/" + node
	if kind == KindOutcome || kind == KindEviction {
		source = "/oom-annotator"
	}
	return map[string][]string{
		"ce-specversion":     {"1.0"},
		"ce-type":            {"com.github.oom-tracer." + string(kind) + ".v1"},
		"ce-source":          {source},
		"ce-id":              {url.PathEscape(id)},
		"ce-datacontenttype": {"application/json"},
	}
}
