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
	speaker        speaker
}

// Builder builds the plugin from args that were validated and have their defaults. What reasons has heard it says of
// the pods that it may not evict.
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
		speaker:  speaker{instance: instance(), now: time.Now, pods: map[types.UID]*said{}},
	}
	if removeAnnotatedArgs.Namespaces != nil {
		d.namespaces = *removeAnnotatedArgs.Namespaces
	}
	if removeAnnotatedArgs.LabelSelector != nil { // nil would select nothing
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

// Name is the plugin's name.
func (d *RemoveAnnotated) Name() string { return PluginName }

// Deschedule evicts the marked pods of the nodes. What goes wrong with one node or pod does not stop the rest.
func (d *RemoveAnnotated) Deschedule(ctx context.Context, nodes []*v1.Node) *frameworktypes.Status {
	logger := klog.FromContext(klog.NewContext(ctx, d.logger)).WithValues("ExtensionPoint", frameworktypes.DescheduleExtensionPoint)
	var marked []*v1.Pod
	var errs []error
	for _, node := range nodes {
		logger.V(2).Info("Processing node", "node", klog.KObj(node))
		// Pods that have ended are not listed: they hold no memory any more.
		pods, err := podutil.ListPodsOnANode(node.Name, d.handle.GetPodsAssignedToNodeFunc(), func(pod *v1.Pod) bool {
			return d.marked(pod) && pod.DeletionTimestamp == nil
		})
		if err != nil {
			errs = append(errs, fmt.Errorf("list the pods of node %s: %w", node.Name, err))
			continue
		}
		marked = append(marked, pods...)
	}

	// Where a limit does not let all of them go, those of the lowest priority go first.
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
		if errors.As(err, new(passing)) || ctx.Err() != nil {
			continue
		}
		if err := d.speaker.say(ctx, d.handle.ClientSet(), pod, err.Error()); err != nil {
			logger.Error(err, "Cannot write the Event that says why a marked pod stays", "pod", klog.KObj(pod))
		}
	}
	d.speaker.endCycle()
	return &frameworktypes.Status{Err: errors.Join(errs...)}
}

// marked tells whether a pod carries the annotation, with a value that counts.
func (d *RemoveAnnotated) marked(pod *v1.Pod) bool {
	value, ok := pod.Annotations[d.args.AnnotationKey]
	if len(d.args.Values) == 0 {
		return ok && value != "false"
	}
	return ok && slices.Contains(d.args.Values, value)
}

// passing is why a pod stays that is no news to those who wait for it to go: it is so for now, or it may be the pod of
// another profile.
type passing string

func (p passing) Error() string { return string(p) }

// instance names this process where several run.
func instance() string {
	host, err := os.Hostname()
	if err != nil {
		return "oom-descheduler"
	}
	return host[:min(len(host), 128)] // ReportingInstanceLengthLimit
}

// evict evicts a pod, or says why it stays.
func (d *RemoveAnnotated) evict(ctx context.Context, pod *v1.Pod) error {
	if err := d.check(pod, time.Now()); err != nil {
		return err
	}
	// What the cache knows may be old, and an eviction names no UID: it would hit a pod of the same name that
	// was born since, or one whose mark somebody has just taken back.
	now, err := d.handle.ClientSet().CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
	switch {
	case err != nil:
		return passing("read it again: " + err.Error())
	case now.UID != pod.UID:
		return passing("another pod has its name now")
	case !d.marked(now):
		return passing("its mark is gone")
	case now.DeletionTimestamp != nil:
		return passing("it is being deleted")
	}
	return d.handle.Evictor().Evict(ctx, now, evictions.EvictOptions{StrategyName: PluginName, Reason: d.args.AnnotationKey})
}

// check is why a marked pod is not to be evicted.
func (d *RemoveAnnotated) check(pod *v1.Pod, now time.Time) error {
	include, exclude := d.namespaces.Include, d.namespaces.Exclude
	switch {
	case len(include) > 0 && !slices.Contains(include, pod.Namespace):
		return passing("its namespace is not included")
	case slices.Contains(exclude, pod.Namespace):
		return passing("its namespace is excluded")
	case !d.selector.Matches(labels.Set(pod.Labels)):
		return passing("its labels do not match")
	}
	if err := d.checkAge(pod, now); err != nil {
		return err
	}
	evictor := d.handle.Evictor()
	for _, filter := range []func(*v1.Pod) bool{evictor.Filter, evictor.PreEvictionFilter} {
		if why, ok := d.reasons.hear(func() bool { return filter(pod) }); !ok {
			if why == "" { // of a plugin that does not say
				why = "no reason given"
			}
			return fmt.Errorf("refused by an evictor plugin's filter: %s", why)
		}
	}
	return nil
}

// checkAge holds the time of the kill against the bounds, if there are any.
func (d *RemoveAnnotated) checkAge(pod *v1.Pod, now time.Time) error {
	if d.minAge == 0 && d.maxAge == 0 {
		return nil
	}
	var summary struct {
		Time time.Time `json:"time"`
	}
	text, ok := pod.Annotations[d.args.SummaryAnnotationKey]
	if !ok {
		return fmt.Errorf("it has no annotation %s to say when it was hit", d.args.SummaryAnnotationKey)
	}
	if err := json.Unmarshal([]byte(text), &summary); err != nil {
		return fmt.Errorf("its annotation %s does not say when it was hit: %w", d.args.SummaryAnnotationKey, err)
	}
	age := now.Sub(summary.Time)
	switch {
	case summary.Time.IsZero():
		return fmt.Errorf("its annotation %s does not say when it was hit", d.args.SummaryAnnotationKey)
	case age < 0: // nor would it ever be too old
		return fmt.Errorf("hit in the future, at %s: the clock of its node is ahead of this one", summary.Time.Format(time.RFC3339Nano))
	case age < d.minAge:
		return passing(fmt.Sprintf("hit %s ago, less than minAge, %s", age.Round(time.Millisecond), d.minAge))
	case d.maxAge > 0 && age > d.maxAge:
		return fmt.Errorf("hit at %s, longer ago than maxAge, %s", summary.Time.Format(time.RFC3339), d.maxAge)
	}
	return nil
}
