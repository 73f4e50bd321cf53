package mark

import (
	"context"
	"encoding/json"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	conditionReason = "OOMKilled"
	// In the summary, in bytes. An event may name anything; the kernel's and the runtimes' names are shorter.
	maxComm      = 64
	maxContainer = 64
)

// annotationPatch is the JSON merge patch that marks a pod.
func (m *Marker) annotationPatch(e *event.Event, p *pods.Pod) ([]byte, error) {
	key, value := m.Policy.Mark()
	s := pods.Summary{
		Event: e.ID, Annotation: key, Time: e.Time, Scope: string(e.Scope), Level: string(e.Limit.Level),
		Container: text.Truncate(e.Container.ContainerID, maxContainer),
		Victim:    text.Truncate(e.Victim.Comm, maxComm), PID: e.Victim.PID, Usage: e.Limit.Usage, Limit: e.Limit.Max, Node: e.Node.Name,
	}
	if c := p.Container(e.Container.ContainerID); c != nil {
		s.Container = c.Spec.Value().Name
	}
	summary, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("encode summary: %w", err)
	}
	annotations := map[string]any{key: value, m.Terms.Summary: string(summary)}
	if p.Mark != nil && p.Mark.Annotation != "" {
		annotations[p.Mark.Annotation] = nil // set by another configuration; the new summary does not name it
	}
	return metadataPatch(p, annotations)
}

// metadataPatch is a JSON merge patch of annotations, for one state of one pod.
func metadataPatch(p *pods.Pod, annotations map[string]any) ([]byte, error) {
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
		"uid": p.UID, "resourceVersion": p.ResourceVersion, "annotations": annotations,
	}})
	if err != nil {
		return nil, fmt.Errorf("encode patch: %w", err)
	}
	return patch, nil
}

// condition names in a pod's status the kill for which it is marked.
func (m *Marker) condition(kill string) map[string]any {
	return map[string]any{
		"type": m.Terms.Condition, "status": corev1.ConditionTrue, "reason": conditionReason, "message": kill,
		"lastTransitionTime": metav1.NewTime(m.Now()),
	}
}

// noCondition removes the condition.
func (m *Marker) noCondition() map[string]any {
	return map[string]any{"type": m.Terms.Condition, "$patch": "delete"}
}

// patchCondition applies a strategic merge patch of one condition to one state of one pod.
func (m *Marker) patchCondition(ctx context.Context, p *pods.Pod, condition map[string]any) (version string, err error) {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": p.UID, "resourceVersion": p.ResourceVersion},
		"status":   map[string]any{"conditions": []any{condition}},
	})
	if err != nil {
		return "", fmt.Errorf("encode patch of a condition: %w", err)
	}
	return m.API.PatchStatus(ctx, p.Namespace, p.Name, patch)
}
