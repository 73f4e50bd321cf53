package event

import (
	"reflect"
	"testing"
)

func TestCloudEvent(t *testing.T) {
	want := func(kind, source, id string) map[string][]string {
		return map[string][]string{
			"ce-specversion": {"1.0"}, "ce-type": {"com.github.oom-tracer." + kind + ".v1"}, "ce-source": {source},
			"ce-id": {id}, "ce-datacontenttype": {"application/json"},
		}
	}
	for _, test := range []struct {
		subject, id string
		want        map[string][]string
	}{
		{"oom.v1.kill.cgroup.node-1_example", "0b-7", want("kill", "/oom-tracer/node-1.example", "0b-7")},
		{"oom.v1.node.status.node-1", "a b\"%é", want("node", "/oom-tracer/node-1", "a%20b%22%25%C3%A9")},
		{"oom.v1.outcome.0b-7_annotate.node-1", "0b-7-annotate", want("outcome", "/oom-annotator", "0b-7-annotate")},
		{"oom.v1.eviction.u-1.node-1", "u-1/eviction", want("eviction", "/oom-annotator", "u-1%2Feviction")},
		{"oom.v1.kill.cgroup", "x", nil},
		{"$KV.OOM_ANNOTATOR.key", "x", nil},
		{"", "", nil},
	} {
		if got := CloudEvent(test.subject, test.id); !reflect.DeepEqual(got, test.want) {
			t.Errorf("%s %s: %v, want %v", test.subject, test.id, got, test.want)
		}
	}
}
