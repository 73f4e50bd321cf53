package removeannotated

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/descheduler/pkg/api"
)

// +k8s:deepcopy-gen=true
// +k8s:deepcopy-gen:interfaces=k8s.io/apimachinery/pkg/runtime.Object

// RemoveAnnotatedArgs are the args of the plugin in a DeschedulerPolicy. A pod is evicted if it matches all of them.
type RemoveAnnotatedArgs struct {
	metav1.TypeMeta `json:",inline"`

	// AnnotationKey is the key of the annotation that marks a pod. Default: DefaultAnnotationKey.
	AnnotationKey string `json:"annotationKey,omitempty"`
	// Values are the values of the annotation that mark a pod. Default: all except "false".
	Values []string `json:"values,omitempty"`

	// Namespaces of the pods: only the included ones, or all except the excluded ones.
	Namespaces *api.Namespaces `json:"namespaces,omitempty"`
	// LabelSelector must match the labels of a pod.
	LabelSelector *metav1.LabelSelector `json:"labelSelector,omitempty"`

	// MinAge and MaxAge bound the age of the kill, both inclusive: 30s, 10m, 24h (time.ParseDuration). Default: no bound.
	// MinAge leaves time to remove a mark. MaxAge ignores marks that were made while no descheduler ran. If there is a
	// bound, pods without the time of the kill are not evicted.
	MinAge string `json:"minAge,omitempty"`
	MaxAge string `json:"maxAge,omitempty"`
	// SummaryAnnotationKey is the key of the annotation with the time of the kill: a JSON object with an RFC 3339 time in
	// "time". Default: DefaultSummaryAnnotationKey. Only MinAge and MaxAge need it.
	SummaryAnnotationKey string `json:"summaryAnnotationKey,omitempty"`
}
