package removeannotated

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"sigs.k8s.io/descheduler/pkg/api"
	"sigs.k8s.io/descheduler/pkg/descheduler/evictions"
	podutil "sigs.k8s.io/descheduler/pkg/descheduler/pod"
	fakehandle "sigs.k8s.io/descheduler/pkg/framework/fake"
	frameworktypes "sigs.k8s.io/descheduler/pkg/framework/types"
)

// What runs on a real API server stands in ../e2e. Here are the faults that it cannot be made to have.

// handle refuses nothing, and keeps what it was asked to evict.
type handle struct {
	fakehandle.HandleImpl
	evicted []string
}

func (h *handle) Evictor() frameworktypes.Evictor { return h }
func (h *handle) Filter(*v1.Pod) bool             { return true }
func (h *handle) PreEvictionFilter(*v1.Pod) bool  { return true }
func (h *handle) Evict(_ context.Context, pod *v1.Pod, _ evictions.EvictOptions) error {
	h.evicted = append(h.evicted, pod.Name)
	return nil
}

// TestNodeFails: a node whose pods cannot be listed is reported, and the others are processed.
func TestNodeFails(t *testing.T) {
	pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "web", Namespace: "shop", UID: "1", Annotations: map[string]string{DefaultAnnotationKey: "true"}}}
	h := &handle{}
	h.ClientsetImpl = fake.NewClientset(pod)
	h.GetPodsAssignedToNodeFuncImpl = func(node string, filter podutil.FilterFunc) ([]*v1.Pod, error) {
		if node == "node-1" {
			return nil, errors.New("no such index")
		}
		return podutil.ConvertToPods([]any{pod}, filter), nil
	}
	args := &RemoveAnnotatedArgs{}
	SetDefaultsRemoveAnnotatedArgs(args)
	plugin, err := newPlugin(t.Context(), args, h, &Reasons{})
	if err != nil {
		t.Fatal(err)
	}
	nodes := []*v1.Node{{ObjectMeta: metav1.ObjectMeta{Name: "node-1"}}, {ObjectMeta: metav1.ObjectMeta{Name: "node-2"}}}
	status := plugin.Deschedule(t.Context(), nodes)
	if status == nil || status.Err == nil || !strings.Contains(status.Err.Error(), "node node-1: no such index") {
		t.Errorf("status %v", status)
	}
	if len(h.evicted) != 1 {
		t.Errorf("evicted %v", h.evicted)
	}
}

// TestValidate: each fault is named with its arg, all of them at once.
func TestValidate(t *testing.T) {
	for name, test := range map[string]struct {
		args RemoveAnnotatedArgs
		want []string // parts of the error
	}{
		"none": {},
		"all": {args: RemoveAnnotatedArgs{
			AnnotationKey: "Example.com/Go", Values: []string{"", "yes"}, Namespaces: &api.Namespaces{Exclude: []string{"kube-system"}},
			LabelSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"a": "b"}}, MinAge: "1m", MaxAge: "1m", SummaryAnnotationKey: "x",
		}},
		"keys":      {RemoveAnnotatedArgs{AnnotationKey: "a b", SummaryAnnotationKey: "/c"}, []string{`annotationKey: "a b" is not a valid annotation key`, `summaryAnnotationKey: "/c" is not a valid annotation key`}},
		"reason":    {RemoveAnnotatedArgs{AnnotationKey: strings.Repeat("a.", 50) + "com/" + strings.Repeat("k", 30)}, []string{"annotationKey: it has 134 bytes"}},
		"values":    {RemoveAnnotatedArgs{Values: []string{"a", "b", "a"}}, []string{`values: "a" is listed twice`}},
		"both":      {RemoveAnnotatedArgs{Namespaces: &api.Namespaces{Include: []string{"a"}, Exclude: []string{"b"}}}, []string{"namespaces: include and exclude"}},
		"namespace": {RemoveAnnotatedArgs{Namespaces: &api.Namespaces{Include: []string{"kube-*"}}}, []string{`namespaces: "kube-*" is not a valid namespace`}},
		"selector": {RemoveAnnotatedArgs{LabelSelector: &metav1.LabelSelector{MatchExpressions: []metav1.LabelSelectorRequirement{{Key: "a", Operator: "Near"}}}},
			[]string{`labelSelector: "Near" is not a valid label selector operator`}},
		"ages":     {RemoveAnnotatedArgs{MinAge: "-1s", MaxAge: "1d"}, []string{`minAge: "-1s" is not a positive duration`, `maxAge: "1d" is not a positive duration`}},
		"min, max": {RemoveAnnotatedArgs{MinAge: "2h", MaxAge: "1h"}, []string{"minAge: 2h is greater than maxAge, 1h"}},
	} {
		t.Run(name, func(t *testing.T) {
			err := ValidateRemoveAnnotatedArgs(&test.args)
			if (err == nil) != (test.want == nil) {
				t.Fatal(err)
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), "RemoveAnnotated: "+want) {
					t.Errorf("%v\ndoes not contain %s", err, want)
				}
			}
		})
	}
}

// The annotator's summary is text that anybody who may change the pod may write: without a time of the kill in its range there is no
// eviction.
func FuzzCheckAge(f *testing.F) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, summary := range []string{`{"time":"2026-01-02T03:03:05Z"}`, `{"time":"2027-01-02T03:03:05Z"}`, `{"time":null}`, `{}`, `[`, ""} {
		f.Add(summary)
	}
	d := &RemoveAnnotated{args: &RemoveAnnotatedArgs{SummaryAnnotationKey: "summary"}, minAge: time.Second, maxAge: time.Hour}
	f.Fuzz(func(t *testing.T, summary string) {
		pod := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{"summary": summary}}}
		if err := d.checkAge(pod, now); err != nil {
			return
		}
		var killed struct{ Time time.Time }
		if err := json.Unmarshal([]byte(summary), &killed); err != nil || now.Sub(killed.Time) < d.minAge || now.Sub(killed.Time) > d.maxAge {
			t.Errorf("evicted for %s", summary)
		}
	})
}
