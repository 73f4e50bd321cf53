package removeannotated

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/klog/v2"

	"sigs.k8s.io/descheduler/pkg/api"
	"sigs.k8s.io/descheduler/pkg/descheduler/evictions"
	podutil "sigs.k8s.io/descheduler/pkg/descheduler/pod"
	"sigs.k8s.io/descheduler/pkg/framework/pluginregistry"
	frameworktypes "sigs.k8s.io/descheduler/pkg/framework/types"
)

// PluginName is the plugin's name in a DeschedulerPolicy.
const PluginName = "RemoveAnnotated"

var _ frameworktypes.DeschedulePlugin = &RemoveAnnotated{}

// RemoveAnnotated evicts the pods that an annotation marks.
type RemoveAnnotated struct {
	logger         klog.Logger
	handle         frameworktypes.Handle
	args           *RemoveAnnotatedArgs
	namespaces     api.Namespaces
	selector       labels.Selector
	minAge, maxAge time.Duration // 0: no bound
	reasons        *Reasons
	events         eventWriter
}

// Builder builds the plugin from args that were validated and have their defaults. reasons has the reasons of the evictor plugins.
func Builder(reasons *Reasons) pluginregistry.PluginBuilder {
	return func(ctx context.Context, args runtime.Object, handle frameworktypes.Handle) (frameworktypes.Plugin, error) {
		return newPlugin(ctx, args, handle, reasons)
	}
}

func newPlugin(ctx context.Context, args runtime.Object, handle frameworktypes.Handle, reasons *Reasons) (*RemoveAnnotated, error) {
	removeAnnotatedArgs, ok := args.(*RemoveAnnotatedArgs)
	if !ok {
		return nil, fmt.Errorf("want args to be of type RemoveAnnotatedArgs, got %T", args)
	}
	d := &RemoveAnnotated{
		logger:   klog.FromContext(ctx).WithValues("plugin", PluginName),
		handle:   handle,
		args:     removeAnnotatedArgs,
		selector: labels.Everything(),
		reasons:  reasons,
		events:   eventWriter{instance: instance(), now: time.Now, pods: map[types.UID]*lastEvent{}},
	}
	if removeAnnotatedArgs.Namespaces != nil {
		d.namespaces = *removeAnnotatedArgs.Namespaces
	}
	if removeAnnotatedArgs.LabelSelector != nil { // a nil selector matches nothing
		var err error
		if d.selector, err = metav1.LabelSelectorAsSelector(removeAnnotatedArgs.LabelSelector); err != nil {
			return nil, fmt.Errorf("labelSelector: %w", err)
		}
	}
	var errs []error
	if d.minAge, d.maxAge, errs = removeAnnotatedArgs.ages(); len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return d, nil
}

// Name is the name of the plugin.
func (d *RemoveAnnotated) Name() string { return PluginName }

// Deschedule evicts the marked pods of the nodes. An error with one node or pod does not stop the rest.
func (d *RemoveAnnotated) Deschedule(ctx context.Context, nodes []*v1.Node) *frameworktypes.Status {
	logger := klog.FromContext(klog.NewContext(ctx, d.logger)).WithValues("ExtensionPoint", frameworktypes.DescheduleExtensionPoint)
	var marked []*v1.Pod
	var errs []error
	for _, node := range nodes {
		logger.V(2).Info("Processing node", "node", klog.KObj(node))
		// Pods that have ended are not listed: they use no memory.
		pods, err := podutil.ListPodsOnANode(node.Name, d.handle.GetPodsAssignedToNodeFunc(), func(pod *v1.Pod) bool {
			return d.marked(pod) && pod.DeletionTimestamp == nil
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("list the pods of node %s: %w", node.Name, err))
			continue
		}
		marked = append(marked, pods...)
	}

	// If a limit does not permit all evictions, pods of the lowest priority come first.
	podutil.SortPodsBasedOnPriorityLowToHigh(marked)
	var total *evictions.EvictionTotalLimitError
	for _, pod := range marked {
		var err error = total
		if total == nil {
			err = d.evict(ctx, pod)
		}
		if err == nil {
			continue
		}
		errors.As(err, &total)
		logger.V(1).Info("Marked pod stays", "pod", klog.KObj(pod), "node", pod.Spec.NodeName, "why", err.Error())
		if errors.As(err, new(transient)) || ctx.Err() != nil {
			continue
		}
		if err := d.events.write(ctx, d.handle.ClientSet(), pod, err.Error()); err != nil {
			logger.Error(err, "Could not write the event on a marked pod that stays", "pod", klog.KObj(pod))
		}
	}
	d.events.endCycle()
	return &frameworktypes.Status{Err: errors.Join(errs...)}
}

// marked reports whether a pod has the annotation, with one of the values.
func (d *RemoveAnnotated) marked(pod *v1.Pod) bool {
	value, ok := pod.Annotations[d.args.AnnotationKey]
	if len(d.args.Values) == 0 {
		return ok && value != "false"
	}
	return ok && slices.Contains(d.args.Values, value)
}

// transient is a reason that gets no Event: it will pass, or the pod may belong to another profile.
type transient string

func (t transient) Error() string { return string(t) }

// instance is the name of this process in Events.
func instance() string {
	host, err := os.Hostname()
	if err != nil {
		return "oom-descheduler"
	}
	return host[:min(len(host), 128)] // ReportingInstanceLengthLimit
}

// evict evicts a pod, or returns why it stays.
func (d *RemoveAnnotated) evict(ctx context.Context, pod *v1.Pod) error {
	if err := d.check(pod, time.Now()); err != nil {
		return err
	}
	// The cache may be out of date, and an eviction names no UID: it would hit a new pod of the same name, or one whose mark
	// was just removed.
	now, err := d.handle.ClientSet().CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	switch {
	case err != nil:
		return transient("could not read it again: " + err.Error())
	case now.UID != pod.UID:
		return transient("another pod has its name now")
	case !d.marked(now):
		return transient("its mark was removed")
	case now.DeletionTimestamp != nil:
		return transient("it is being deleted")
	}
	return d.handle.Evictor().Evict(ctx, now, evictions.EvictOptions{StrategyName: PluginName, Reason: d.args.AnnotationKey})
}

// check returns why a marked pod must not be evicted.
func (d *RemoveAnnotated) check(pod *v1.Pod, now time.Time) error {
	include, exclude := d.namespaces.Include, d.namespaces.Exclude
	switch {
	case len(include) > 0 && !slices.Contains(include, pod.Namespace):
		return transient("its namespace is not included")
	case slices.Contains(exclude, pod.Namespace):
		return transient("its namespace is excluded")
	case !d.selector.Matches(labels.Set(pod.Labels)):
		return transient("its labels do not match")
	}
	if err := d.checkAge(pod, now); err != nil {
		return err
	}
	evictor := d.handle.Evictor()
	for _, filter := range []func(*v1.Pod) bool{evictor.Filter, evictor.PreEvictionFilter} {
		if why, ok := d.reasons.capture(func() bool { return filter(pod) }); !ok {
			if why == "" { // the plugin logged nothing
				why = "no reason given"
			}
			return fmt.Errorf("refused by an evictor plugin's filter: %s", why)
		}
	}
	return nil
}

// checkAge compares the time of the kill with minAge and maxAge.
func (d *RemoveAnnotated) checkAge(pod *v1.Pod, now time.Time) error {
	if d.minAge == 0 && d.maxAge == 0 {
		return nil
	}
	var summary struct {
		Time time.Time `json:"time"`
	}
	text, ok := pod.Annotations[d.args.SummaryAnnotationKey]
	if !ok {
		return fmt.Errorf("the time of its kill is unknown: it has no annotation %s", d.args.SummaryAnnotationKey)
	}
	if err := json.Unmarshal([]byte(text), &summary); err != nil {
		return fmt.Errorf("the time of its kill is unknown: annotation %s: %w", d.args.SummaryAnnotationKey, err)
	}
	age := now.Sub(summary.Time)
	switch {
	case summary.Time.IsZero():
		return fmt.Errorf("the time of its kill is unknown: annotation %s has none", d.args.SummaryAnnotationKey)
	case age < 0: // it would never be too old
		return fmt.Errorf("hit in the future, at %s: the clock of its node is ahead of this one", summary.Time.Format(time.RFC3339Nano))
	case age < d.minAge:
		return transient(fmt.Sprintf("hit %s ago, less than minAge, %s", age.Round(time.Millisecond), d.minAge))
	case d.maxAge > 0 && age > d.maxAge:
		return fmt.Errorf("hit at %s, longer ago than maxAge, %s", summary.Time.Format(time.RFC3339), d.maxAge)
	}
	return nil
}
