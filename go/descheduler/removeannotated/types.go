package removeannotated

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/descheduler/pkg/api"
)

// +k8s:deepcopy-gen=true
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// RemoveAnnotatedArgs are the plugin's args in a DeschedulerPolicy. A pod is evicted if all of them hold for it.
type RemoveAnnotatedArgs struct {
	metav1.TypeMeta `json:",inline"`

	// AnnotationKey is the key of the annotation that marks a pod. Default: DefaultAnnotationKey.
	AnnotationKey string `json:"annotationKey,omitempty"`
	// Values are the values of the annotation that count. None: all but "false".
	Values []string `json:"values,omitempty"`

	// Namespaces are those of the pods: only those included, or all but those excluded.
	Namespaces *api.Namespaces `json:"namespaces,omitempty"`
	// LabelSelector is what the labels of a pod must match.
	LabelSelector *metav1.LabelSelector `json:"labelSelector,omitempty"`

	// MinAge and MaxAge bound how long ago a pod was hit, both inclusive: 30s, 10m, 24h (time.ParseDuration).
	// Empty: no bound. MinAge leaves time to take a mark back, MaxAge leaves alone what was marked while no
	// descheduler ran. A pod that does not say when it was hit is within no bound.
	MinAge string `json:"minAge,omitempty"`
	MaxAge string `json:"maxAge,omitempty"`
	// SummaryAnnotationKey is the key of the annotation that says when, as a JSON object with the time (RFC
	// 3339) in "time". Default: DefaultSummaryAnnotationKey. Only the bounds ask for it.
	SummaryAnnotationKey string `json:"summaryAnnotationKey,omitempty"`
}
