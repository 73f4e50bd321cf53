package removeannotated

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	"sigs.k8s.io/descheduler/pkg/api"
	"sigs.k8s.io/descheduler/pkg/descheduler/evictions"
	podutil "sigs.k8s.io/descheduler/pkg/descheduler/pod"
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
}

// New builds the plugin from args that were validated and have their defaults.
func New(ctx context.Context, args runtime.Object, handle frameworktypes.Handle) (frameworktypes.Plugin, error) {
	removeAnnotatedArgs, ok := args.(*RemoveAnnotatedArgs)
	if !ok {
		return nil, fmt.Errorf("want args to be of type RemoveAnnotatedArgs, got %T", args)
	}
	d := &RemoveAnnotated{
		logger:   klog.FromContext(ctx).WithValues("plugin", PluginName),
		handle:   handle,
		args:     removeAnnotatedArgs,
		selector: labels.Everything(),
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
		pods, err := podutil.ListPodsOnANode(node.Name, d.handle.GetPodsAssignedToNodeFunc(), d.marked)
		if err != nil {
			errs = append(errs, fmt.Errorf("list the pods of node %s: %w", node.Name, err))
			continue
		}
		marked = append(marked, pods...)
	}

	// Where a limit does not let all of them go, those of the lowest priority go first.
	podutil.SortPodsBasedOnPriorityLowToHigh(marked)
	for i, pod := range marked {
		err := d.evict(ctx, pod)
		if err == nil {
			continue
		}
		logger.V(1).Info("Marked pod stays", "pod", klog.KObj(pod), "node", pod.Spec.NodeName, "why", err.Error())
		var total *evictions.EvictionTotalLimitError
		if errors.As(err, &total) {
			logger.V(1).Info("Marked pods wait for the next cycle", "pods", klog.KObjSlice(marked[i:]))
			break
		}
	}
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
		return fmt.Errorf("read it anew: %w", err)
	case now.UID != pod.UID:
		return errors.New("another pod has its name now")
	case !d.marked(now):
		return errors.New("its mark is gone")
	}
	return d.handle.Evictor().Evict(ctx, now, evictions.EvictOptions{StrategyName: PluginName, Reason: d.args.AnnotationKey})
}

// check is why a marked pod is not to be evicted.
func (d *RemoveAnnotated) check(pod *v1.Pod, now time.Time) error {
	include, exclude := d.namespaces.Include, d.namespaces.Exclude
	switch {
	case len(include) > 0 && !slices.Contains(include, pod.Namespace):
		return errors.New("its namespace is not included")
	case slices.Contains(exclude, pod.Namespace):
		return errors.New("its namespace is excluded")
	case !d.selector.Matches(labels.Set(pod.Labels)):
		return errors.New("its labels do not match")
	}
	if err := d.checkAge(pod, now); err != nil {
		return err
	}
	switch evictor := d.handle.Evictor(); {
	case !evictor.Filter(pod):
		return errors.New("refused by an evictor plugin's filter (DefaultEvictor logs its reason at --v=4)")
	case !evictor.PreEvictionFilter(pod):
		return errors.New("refused by an evictor plugin's filter before the eviction (DefaultEvictor logs its reason)")
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
		return fmt.Errorf("hit %s ago, less than minAge, %s", age.Round(time.Millisecond), d.minAge)
	case d.maxAge > 0 && age > d.maxAge:
		return fmt.Errorf("hit %s ago, more than maxAge, %s", age.Round(time.Millisecond), d.maxAge)
	}
	return nil
}
