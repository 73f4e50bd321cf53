package event

import (
	"strings"
	"time"
)

// Eviction says that the kubelet evicted a pod because its node ran low on memory (node-pressure eviction). The kernel killed
// nothing for it. The annotator publishes it, with what the pod's status says, and no more.
type Eviction struct {
	Schema string `json:"schema"`
	// ID is EvictionID of the pod; it is also the JetStream message ID. The stream keeps one eviction of a pod.
	ID string `json:"id"`
	// Time is when the pod had ended, by the clock of its node, in seconds: the lastTransitionTime of its condition DisruptionTarget.
	Time time.Time `json:"time"`
	Node string    `json:"node"`
	Pod  PodRef    `json:"pod"`
	// Message is the status message of the kubelet, at most 2000 bytes of it: the threshold, and the containers that used more memory
	// than they request.
	Message string `json:"message"`
}

// EvictionID is the ID of the eviction of a pod. The kubelet evicts a pod once.
func EvictionID(podUID string) string { return podUID + "/eviction" }

// Subject is the NATS subject under which the eviction is published: oom.v1.eviction.<pod UID>.<node>. No other message has it, so
// that the server can refuse a second one.
func (e *Eviction) Subject() (string, error) {
	return Subject(KindEviction, strings.ToLower(e.Pod.UID), e.Node)
}

// ParseEviction reads one eviction, as Parse reads an event.
func ParseEviction(data []byte) (Eviction, error) {
	var e Eviction
	if err := parse("eviction", data, &e, &e.Schema); err != nil {
		return Eviction{}, err
	}
	if err := missing("eviction", []field{
		{"id", e.ID == ""},
		{"time", e.Time.IsZero()},
		{"node", e.Node == ""},
		{"pod.uid", e.Pod.UID == ""},
	}); err != nil {
		return Eviction{}, err
	}
	return e, nil
}
