package removeannotated

import "k8s.io/apimachinery/pkg/runtime"

// The default keys of oom-annotator.
const (
	DefaultAnnotationKey        = "oom-tracer.alpha.kubernetes.io/evict-me"
	DefaultSummaryAnnotationKey = "oom-tracer.alpha.kubernetes.io/last-kill"
)

// SetDefaultsRemoveAnnotatedArgs sets the defaults. The descheduler calls it after the validation.
func SetDefaultsRemoveAnnotatedArgs(obj runtime.Object) {
	args := obj.(*RemoveAnnotatedArgs)
	if args.AnnotationKey == "" {
		args.AnnotationKey = DefaultAnnotationKey
	}
	if args.SummaryAnnotationKey == "" {
		args.SummaryAnnotationKey = DefaultSummaryAnnotationKey
	}
}
