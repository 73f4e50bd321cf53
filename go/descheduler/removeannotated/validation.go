package removeannotated

import (
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilerrors "k8s.io/apimachinery/pkg/util/errors"
	"k8s.io/apimachinery/pkg/util/validation"
)

// maxReason is how long the reason of an Event may be, in bytes (API of events.k8s.io/v1).
const maxReason = 128

// ValidateRemoveAnnotatedArgs returns all errors in the args. The descheduler calls it before the defaults are set.
func ValidateRemoveAnnotatedArgs(obj runtime.Object) error {
	args := obj.(*RemoveAnnotatedArgs)
	var errs []error
	wrong := func(format string, a ...any) { errs = append(errs, fmt.Errorf("RemoveAnnotated: "+format, a...)) }

	key := func(arg, key string) {
		if key == "" {
			return // the default
		}
		for _, message := range validation.IsQualifiedName(strings.ToLower(key)) { // as the API server does
			wrong("%s: %q is not a valid annotation key: %s", arg, key, message)
		}
	}
	key("annotationKey", args.AnnotationKey)
	key("summaryAnnotationKey", args.SummaryAnnotationKey)
	if n := len(args.AnnotationKey); n > maxReason {
		wrong("annotationKey: it has %d bytes. It is the reason of the Event of the eviction, which may have %d", n, maxReason)
	}
	for i, value := range args.Values {
		if slices.Contains(args.Values[:i], value) {
			wrong("values: %q is listed twice", value)
		}
	}

	if args.Namespaces != nil {
		if len(args.Namespaces.Include) > 0 && len(args.Namespaces.Exclude) > 0 {
			wrong("namespaces: include and exclude exclude each other")
		}
		for _, namespace := range slices.Concat(args.Namespaces.Include, args.Namespaces.Exclude) {
			for _, message := range validation.IsDNS1123Label(namespace) {
				wrong("namespaces: %q is not a valid namespace: %s", namespace, message)
			}
		}
	}
	if args.LabelSelector != nil {
		if _, err := metav1.LabelSelectorAsSelector(args.LabelSelector); err != nil {
			wrong("labelSelector: %w", err)
		}
	}

	minAge, maxAge, ageErrs := args.ages()
	for _, err := range ageErrs {
		wrong("%w", err)
	}
	if maxAge > 0 && minAge > maxAge {
		wrong("minAge: %s is greater than maxAge, %s", args.MinAge, args.MaxAge)
	}
	return utilerrors.NewAggregate(errs)
}

// ages parses minAge and maxAge. 0 means no bound.
func (args *RemoveAnnotatedArgs) ages() (minAge, maxAge time.Duration, errs []error) {
	var err error
	if args.MinAge != "" {
		if minAge, err = time.ParseDuration(args.MinAge); err != nil || minAge <= 0 {
			errs = append(errs, fmt.Errorf("minAge: %q is not a positive duration such as 30s, 10m or 24h", args.MinAge))
		}
	}
	if args.MaxAge != "" {
		if maxAge, err = time.ParseDuration(args.MaxAge); err != nil || maxAge <= 0 {
			errs = append(errs, fmt.Errorf("maxAge: %q is not a positive duration such as 30s, 10m or 24h", args.MaxAge))
		}
	}
	return minAge, maxAge, errs
}
