// Package pods keeps the pods of the cluster, reduced to what decides whether a pod may be marked, and finds the pod of a kill.
//
// Rule of the package: a pod is found only if everything that is known about the kill matches it. If two match, none is found.
//
// # Why a watch
//
// The alternative is to list the pods of a node (spec.nodeName) when it reports a kill. For 150,000 pods on 10,000 nodes:
//
//   - A list costs nothing until a kill comes, then some 15 pods of 5 KB each and a round trip. A bad roll-out that runs many
//     nodes out of memory costs one list for each node, when the API server can least afford it. It cannot find a pod that is
//     gone by then, and cannot decide anything while the API server is away.
//   - A watch costs memory, and the decoding of every change of every pod, in each replica. A whole pod takes some 22 KB.
//     Reduced to Pod, 150,000 pods are some 60 MB of live heap. make bench-annotate measures it; deploy/docs/scale.md has
//     the figures.
//
// The cost of a watch does not rise when nodes run out of memory, and only a few replicas pay it.
package pods

import (
	"encoding/hex"
	"encoding/json"
	"strings"
	"time"
	"unique"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	resourcehelper "k8s.io/component-helpers/resource"

	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// Annotations of the kubelet (pkg/kubelet/types/pod_update.go): on a mirror pod both hold the UID of its
// static pod.
const (
	mirrorAnnotation = "kubernetes.io/config.mirror"
	hashAnnotation   = "kubernetes.io/config.hash"
)

// systemCriticalPriority is the lowest priority of system components (SystemCriticalPriority in
// pkg/apis/scheduling/types.go). Users' own classes stay below half of it.
const systemCriticalPriority = 2_000_000_000

// Pod is a pod, reduced to what is needed. It must not be changed.
type Pod struct {
	Namespace, Name, UID string
	// ResourceVersion is of the state that was read. The API server refuses a patch that names an old one.
	ResourceVersion string
	Node            string // empty: not bound yet
	// Hash is the UID that the kubelet gave a static pod. It is set on its mirror pod.
	Hash       string
	Containers []Container
	// Owner is the controller that would replace the pod, as <kind>/<name>; empty: none would.
	Owner string
	// Request is the memory request, in bytes.
	Request int64
	// Mark is the summary of the kill that the pod was marked for; nil: none.
	Mark *Mark
	// LowMemory is set if the kubelet evicted the pod because its node ran low on memory.
	LowMemory *LowMemory
	// Condition is the ID of the event in the condition of the policy, empty if the condition is not true.
	Condition string

	Mirror    bool // is the mirror pod of a static pod
	DaemonSet bool
	Critical  bool // has the priority of system components
	Finished  bool // has ended, or is about to be deleted
	Evicted   bool // through the eviction API (condition DisruptionTarget)
	Marked    bool // carries the annotation of the policy
	OptOut    bool // carries the annotation that protects it
	Selected  bool // has the labels of the policy

	of unique.Handle[workload] // keeps the text of Namespace and Owner, which many pods share
}

// workload is what the pods of a workload have in common.
type workload struct{ namespace, owner string }

// Mark is the content of a pod's summary.
type Mark struct {
	Kill string // event.Event's ID
	Time time.Time
	// Annotation is the key of the annotation that was set with it, empty if the pod no longer has that.
	Annotation string
}

// LowMemory is what the kubelet says of a pod that it evicted because its node ran low on memory.
type LowMemory struct {
	Time    time.Time // in seconds
	Message string
}

// Kill is the ID of the event that the pod was marked for, empty if there is none.
func (p *Pod) Kill() string {
	if p.Mark == nil {
		return ""
	}
	return p.Mark.Kill
}

// Workload is what would replace the pod, or the pod itself, as <namespace>/<kind>/<name>. Budgets count by it.
func (p *Pod) Workload() string {
	if p.Owner == "" {
		return p.Namespace + "/Pod/" + p.Name
	}
	return p.Namespace + "/" + p.Owner
}

// Container is a container ID in a pod's status, its container, and how often the kubelet has restarted that.
type Container struct {
	ID       ContainerID
	Spec     unique.Handle[ContainerSpec] // many pods have the same
	Restarts uint32
}

// ContainerSpec is a container of a pod.
type ContainerSpec struct{ Name, Image string }

// ContainerID is the first half of an ID. IDs are random, and 16 bytes are as unique as a UID.
type ContainerID [16]byte

// Terms are the annotations, labels and the condition that Read reads.
type Terms struct {
	Mark    string // the key of the annotation of the policy; empty: there is none
	Summary string // the key of the annotation with a Summary
	// Condition is the type of the condition that is set with Mark; empty: none. The kubelet does not change types that are
	// not its own (mergePodStatus in pkg/kubelet/status/status_manager.go).
	Condition corev1.PodConditionType
	OptOut    string // the key of the annotation that protects; empty: there is none
	Selector  map[string]string
}

// Summary is the annotation with the kill that a pod was marked for, in JSON. It is for people, and the annotator recognises its
// own mark by Event.
type Summary struct {
	Event string `json:"event"` // the event's ID
	// Annotation is the key of the annotation that was set with it. deploy/manifests/admission.yaml reads it, and Event, from this text.
	Annotation string    `json:"annotation"`
	Time       time.Time `json:"time"`
	Scope      string    `json:"scope"`
	Level      string    `json:"level,omitempty"`
	Container  string    `json:"container,omitempty"` // its name, else its ID
	Victim     string    `json:"victim,omitempty"`    // the process
	PID        uint32    `json:"pid,omitempty"`
	Usage      *uint64   `json:"usage,omitempty"` // of what exceeded the limit, in bytes
	Limit      *uint64   `json:"limit,omitempty"`
	Node       string    `json:"node"`
}

// Read reduces a pod.
func (t *Terms) Read(in *corev1.Pod) *Pod {
	all := in.Name + string(in.UID) + in.ResourceVersion // one allocation for each of 150,000 pods
	uid, version := len(in.Name), len(in.Name)+len(in.UID)
	p := &Pod{
		Name:            all[:uid],
		UID:             all[uid:version],
		ResourceVersion: all[version:],
		Node:            in.Spec.NodeName,
		Critical:        in.Spec.Priority != nil && *in.Spec.Priority >= systemCriticalPriority,
		Finished:        in.DeletionTimestamp != nil || in.Status.Phase == corev1.PodSucceeded || in.Status.Phase == corev1.PodFailed,
		Selected:        true,
	}
	if mirror, ok := in.Annotations[mirrorAnnotation]; ok {
		p.Mirror = true
		// The kubelet sets both annotations to the same value. A pod with one of them is not a mirror pod.
		if mirror == in.Annotations[hashAnnotation] {
			p.Hash = mirror
		}
	}
	if owner := metav1.GetControllerOfNoCopy(in); owner != nil {
		p.DaemonSet = owner.Kind == "DaemonSet" && strings.HasPrefix(owner.APIVersion, "apps/")
		p.Owner = topOwner(owner, in.Labels)
	}
	p.of = unique.Make(workload{in.Namespace, p.Owner})
	p.Namespace, p.Owner = p.of.Value().namespace, p.of.Value().owner
	requests := resourcehelper.PodRequests(in, resourcehelper.PodResourcesOptions{})
	p.Request = requests.Memory().Value()
	if t.Mark != "" {
		_, p.Marked = in.Annotations[t.Mark]
	}
	if value, ok := in.Annotations[t.OptOut]; ok && t.OptOut != "" && value != "false" {
		p.OptOut = true
	}
	for key, value := range t.Selector {
		if got, ok := in.Labels[key]; !ok || got != value {
			p.Selected = false
		}
	}
	if text, ok := in.Annotations[t.Summary]; ok {
		var s Summary
		if json.Unmarshal([]byte(text), &s) == nil && s.Event != "" { // else no annotator wrote it
			p.Mark = &Mark{Kill: s.Event, Time: s.Time}
			if _, ok := in.Annotations[s.Annotation]; ok {
				p.Mark.Annotation = s.Annotation
			}
		}
	}
	for i := range in.Status.Conditions {
		// Set by the eviction subresource (addConditionAndDeletePod in pkg/registry/core/pod/storage/eviction.go).
		c := &in.Status.Conditions[i]
		p.Evicted = p.Evicted || c.Type == corev1.DisruptionTarget && c.Status == corev1.ConditionTrue && c.Reason == "EvictionByEvictionAPI"
		if c.Type == t.Condition && c.Status == corev1.ConditionTrue && t.Condition != "" {
			p.Condition = c.Message
		}
		if c.Type == corev1.DisruptionTarget && c.Status == corev1.ConditionTrue && c.Reason == corev1.PodReasonTerminationByKubelet && lowMemory(&in.Status) {
			p.LowMemory = &LowMemory{Time: c.LastTransitionTime.Time, Message: text.Truncate(in.Status.Message, maxMessage)}
		}
	}
	for _, statuses := range [][]corev1.ContainerStatus{
		in.Status.InitContainerStatuses, in.Status.ContainerStatuses, in.Status.EphemeralContainerStatuses,
	} {
		for i := range statuses {
			s := &statuses[i]
			if p.Containers == nil {
				p.Containers = make([]Container, 0, len(in.Spec.Containers)) // mostly just that
			}
			p.addContainer(s, s.ContainerID)
			// The status of a restarted container also has the ID of the previous one, which was killed.
			for _, state := range []*corev1.ContainerState{&s.State, &s.LastTerminationState} {
				if state.Terminated != nil {
					p.addContainer(s, state.Terminated.ContainerID)
				}
			}
		}
	}
	return p
}

// maxMessage bounds the kubelet's message about an eviction, in bytes.
const maxMessage = 2000

// lowMemory reports whether the kubelet evicted a pod because its node ran low on memory (evictPod and evictionMessage in
// pkg/kubelet/eviction). The reason alone would not do: the kubelet also writes it for disks and PIDs, for a volume above its limit, and
// on pods that it rejects.
func lowMemory(s *corev1.PodStatus) bool {
	return s.Phase == corev1.PodFailed && s.Reason == "Evicted" && strings.HasPrefix(s.Message, "The node was low on resource: memory. ")
}

// topOwner is the owner of an owner that is created for each change or run. It is derived from names: reading the owner's owner
// would need permissions for all of them.
func topOwner(owner *metav1.OwnerReference, labels map[string]string) string {
	kind, name := owner.Kind, owner.Name
	switch kind {
	case "ReplicaSet": // <workload>-<hash>, and the pod has the hash as a label, whose key depends on the workload
		for label, workload := range map[string]string{
			"pod-template-hash":          "Deployment", // getNewReplicaSet in pkg/controller/deployment/sync.go
			"rollouts-pod-template-hash": "Rollout",    // DefaultRolloutUniqueLabelKey in argo-rollouts
		} {
			if stem, ok := strings.CutSuffix(name, "-"+labels[label]); ok && labels[label] != "" && stem != "" {
				return workload + "/" + stem
			}
		}
	case "Job":
		if set := labels["jobset.sigs.k8s.io/jobset-name"]; set != "" && strings.HasPrefix(name, set+"-") {
			return "JobSet/" + set
		}
		// <cronjob>-<minutes since 1970> (getJobName in pkg/controller/cronjob/cronjob_controllerv2.go)
		if i := strings.LastIndexByte(name, '-'); i > 0 && len(name)-i > 8 && strings.Trim(name[i+1:], "0123456789") == "" {
			kind, name = "CronJob", name[:i]
		}
	}
	return kind + "/" + name
}

// addContainer adds <runtime>://<id>.
func (p *Pod) addContainer(s *corev1.ContainerStatus, id string) {
	_, digits, ok := strings.Cut(id, "://")
	key, isID := containerKey(digits)
	if !ok || !isID {
		return
	}
	for _, c := range p.Containers {
		if c.ID == key {
			return
		}
	}
	p.Containers = append(p.Containers, Container{ID: key, Spec: unique.Make(ContainerSpec{s.Name, s.Image}), Restarts: uint32(max(s.RestartCount, 0))})
}

// containerKey parses an ID of 64 hexadecimal digits.
func containerKey(id string) (key ContainerID, ok bool) {
	var all [32]byte
	if len(id) != 2*len(all) {
		return key, false
	}
	_, err := hex.Decode(all[:], []byte(id))
	copy(key[:], all[:])
	return key, err == nil
}

// Unnamed reports whether id is a container ID that is not in the pod's status.
func (p *Pod) Unnamed(id string) bool {
	_, ok := containerKey(id)
	return ok && p.Container(id) == nil
}

// Container is the container with that ID. It is nil if the status does not have the ID: that of the pause container, or that of a
// container that started a moment ago.
func (p *Pod) Container(id string) *Container {
	key, ok := containerKey(id)
	if !ok {
		return nil
	}
	for i := range p.Containers {
		if p.Containers[i].ID == key {
			return &p.Containers[i]
		}
	}
	return nil
}
