package removeannotated

import "k8s.io/apimachinery/pkg/runtime"

// What oom-annotator writes, as long as its config does not name other keys.
const (
	DefaultAnnotationKey        = "oom-tracer.alpha.kubernetes.io/evict-me"
	DefaultSummaryAnnotationKey = "oom-tracer.alpha.kubernetes.io/last-kill"
)

// SetDefaultsRemoveAnnotatedArgs sets what the policy leaves out. The descheduler calls it after the validation.
func SetDefaultsRemoveAnnotatedArgs(obj runtime.Object) {
	args := obj.(*RemoveAnnotatedArgs)
	if args.AnnotationKey == "" {
		args.AnnotationKey = DefaultAnnotationKey
	}
	if args.SummaryAnnotationKey == "" {
		args.SummaryAnnotationKey = DefaultSummaryAnnotationKey
	}
}
