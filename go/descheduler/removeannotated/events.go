package removeannotated

import (
	"context"
	"fmt"
	"strings"
	"time"

	v1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/klog/v2"
)

// eventReason is the reason of the Events on marked pods that are not evicted. The descheduler uses the same reason if its policy
// has evictionFailureEventNotification. oom-annotator reads them.
const eventReason = "EvictionFailed"

const (
	// refresh is how often an Event is written again while its pod stays for the same reason: well within the hour after
	// which an API server deletes it (--event-ttl).
	refresh = 10 * time.Minute
	maxNote = 1024 // bytes (NoteLengthLimit in pkg/apis/core/validation/events.go)
)

// lastEvent is the last Event on a pod.
type lastEvent struct {
	name, note string
	count      int32
	at         time.Time // when it was written
	seen       bool      // in this cycle
}

// eventWriter writes why marked pods are not evicted: one Event for each reason, so that a cycle without changes writes nothing.
// It is for one goroutine.
type eventWriter struct {
	instance string
	now      func() time.Time
	pods     map[types.UID]*lastEvent
}

// write writes why a pod is not evicted.
func (s *eventWriter) write(ctx context.Context, client kubernetes.Interface, pod *v1.Pod, why string) error {
	note := "marked pod stays: " + why
	note = strings.ToValidUTF8(note[:min(len(note), maxNote)], "")
	now := s.now()
	last := s.pods[pod.UID]
	if last != nil {
		last.seen = true
	}
	events := client.EventsV1().Events(pod.Namespace)
	if last != nil && last.note == note {
		last.count++
		if now.Sub(last.at) < refresh {
			return nil
		}
		patch := fmt.Appendf(nil, `{"series":{"count":%d,"lastObservedTime":%q}}`, last.count, now.UTC().Format(metav1.RFC3339Micro))
		_, err := events.Patch(ctx, last.name, types.MergePatchType, patch, metav1.PatchOptions{})
		if err == nil {
			last.at = now
			return nil
		}
		if !apierrors.IsNotFound(err) {
			return fmt.Errorf("update the event %s/%s: %w", pod.Namespace, last.name, err)
		}
	}
	event := &eventsv1.Event{
		// Named as client-go's recorders do.
		ObjectMeta:          metav1.ObjectMeta{Namespace: pod.Namespace, Name: fmt.Sprintf("%s.%x", strings.TrimRight(pod.Name[:min(len(pod.Name), 200)], "-."), now.UnixNano())},
		EventTime:           metav1.NewMicroTime(now),
		ReportingController: "oom-descheduler",
		ReportingInstance:   s.instance,
		Action:              "Descheduled",
		Reason:              eventReason,
		Regarding:           v1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID},
		Note:                note,
		Type:                v1.EventTypeWarning,
	}
	if _, err := events.Create(ctx, event, metav1.CreateOptions{}); err != nil {
		return fmt.Errorf("create an event on %s: %w", klog.KObj(pod), err)
	}
	s.pods[pod.UID] = &lastEvent{name: event.Name, note: note, count: 1, at: now, seen: true}
	return nil
}

// endCycle removes the pods that write was not called for in this cycle.
func (s *eventWriter) endCycle() {
	for uid, last := range s.pods {
		if !last.seen {
			delete(s.pods, uid)
		}
		last.seen = false
	}
}
