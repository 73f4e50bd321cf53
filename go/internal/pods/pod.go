// Package pods is what is known of the cluster's pods: which one a kill hit, and what of it decides whether
// it may be marked.
//
// Rule of the package: a pod is named only when everything that is known of the kill fits it. Two that fit
// are none.
//
// # Why a watch
//
// The other way would be to list the pods of a node (spec.nodeName) when a kill comes from there, with a
// short cache. Both were weighed for 150,000 pods on 10,000 nodes:
//
//   - A list on demand costs nothing until a kill comes, then some 15 pods of 5 KB each and a round trip before
//     every decision that finds no fresh list. When a bad roll-out runs many nodes out of memory at once,
//     which is when the API server has least to spare, it costs one list a node: 10,000 of them. It cannot
//     name a pod that is gone by then, nor decide anything while the API server is away.
//   - A watch costs memory, and the decoding of every change of every pod, all the time and in each replica.
//     Stored whole, as the original does on every node, a pod takes some 22 KB. Reduced to the fields of Pod
//     while they are read, 150,000 pods are some 60 MB of live heap. make bench-annotate measures memory, time
//     until ready and decisions a second; deploy/docs/scale.md has the figures.
//
// The watch is what keeps its cost constant when things go wrong, and it is paid by a few replicas, not on
// the nodes.
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

// Pod is one pod, reduced to what is needed. Nobody may change one.
type Pod struct {
	Namespace, Name, UID string
	Node                 string // empty: not bound yet
	// Hash is the UID that the kubelet gave a static pod, on the mirror pod that stands for it.
	Hash       string
	Containers []Container
	// Owner is what would make a new pod in this one's place, as <kind>/<name>; empty: nothing would.
	Owner string
	// Request is how much memory the scheduler reserves for it, in bytes.
	Request int64
	// Mark is what the pod was marked for; nil: nothing.
	Mark *Mark
	// Condition is the ID of the event that the condition of the policy names, empty where that is not true.
	Condition string

	Mirror    bool // stands for a static pod
	DaemonSet bool
	Critical  bool // of the priority of system components
	Finished  bool // has ended, or is about to be deleted
	Evicted   bool // through the eviction API (condition DisruptionTarget)
	Marked    bool // carries the annotation of the policy
	OptOut    bool // carries the annotation that protects it
	Selected  bool // has the labels of the policy
}

// Mark is what a pod's summary says.
type Mark struct {
	Kill string // event.Event's ID
	Time time.Time
	// Annotation is the key of the annotation that was set with it, empty where the pod does not carry that any more.
	Annotation string
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

// Container is an ID that stands in a pod's status, and the name of the container that has or had it.
type Container struct {
	ID   ContainerID
	Name string
}

// ContainerID is the first half of an ID, which is random: 16 bytes are as unique as a UID.
type ContainerID [16]byte

// Terms are the names in the configuration that decide how a pod is read.
type Terms struct {
	Mark    string // the key of the annotation of the policy; empty: there is none
	Summary string // the key of the annotation with a Summary
	// Condition is the type of the condition that goes with Mark; empty: there is none. The kubelet leaves a type that is
	// not its own as it is (mergePodStatus in pkg/kubelet/status/status_manager.go).
	Condition corev1.PodConditionType
	OptOut    string // the key of the annotation that protects; empty: there is none
	Selector  map[string]string
}

// Summary is the annotation that says, in JSON, which kill a pod was marked for. It is for people, and for
// the annotator itself, which recognises its own work by Event.
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

// Read reduces a pod of the API.
func (t *Terms) Read(in *corev1.Pod) *Pod {
	both := in.Name + string(in.UID) // one allocation for each of 150,000 pods
	p := &Pod{
		Namespace: unique.Make(in.Namespace).Value(), // many pods have the same
		Name:      both[:len(in.Name)],
		UID:       both[len(in.Name):],
		Node:      unique.Make(in.Spec.NodeName).Value(),
		Critical:  in.Spec.Priority != nil && *in.Spec.Priority >= systemCriticalPriority,
		Finished:  in.DeletionTimestamp != nil || in.Status.Phase == corev1.PodSucceeded || in.Status.Phase == corev1.PodFailed,
		Selected:  true,
	}
	if mirror, ok := in.Annotations[mirrorAnnotation]; ok {
		p.Mirror = true
		// The kubelet writes the same value twice; what has one of them is no mirror pod of it.
		if mirror == in.Annotations[hashAnnotation] {
			p.Hash = mirror
		}
	}
	if owner := metav1.GetControllerOfNoCopy(in); owner != nil {
		p.DaemonSet = owner.Kind == "DaemonSet" && strings.HasPrefix(owner.APIVersion, "apps/")
		p.Owner = unique.Make(topOwner(owner, in.Labels)).Value()
	}
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
		if json.Unmarshal([]byte(text), &s) == nil && s.Event != "" { // else it is nobody's
			p.Mark = &Mark{Kill: s.Event, Time: s.Time}
			if _, ok := in.Annotations[s.Annotation]; ok {
				p.Mark.Annotation = unique.Make(s.Annotation).Value()
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
	}
	for _, statuses := range [][]corev1.ContainerStatus{
		in.Status.InitContainerStatuses, in.Status.ContainerStatuses, in.Status.EphemeralContainerStatuses,
	} {
		for i := range statuses {
			s := &statuses[i]
			if p.Containers == nil {
				p.Containers = make([]Container, 0, len(in.Spec.Containers)) // mostly just that
			}
			p.addContainer(s.Name, s.ContainerID)
			// Of a container that was restarted the status names the one before as well, and that is the
			// one that was killed.
			for _, state := range []*corev1.ContainerState{&s.State, &s.LastTerminationState} {
				if state.Terminated != nil {
					p.addContainer(s.Name, state.Terminated.ContainerID)
				}
			}
		}
	}
	return p
}

// topOwner is the owner above one that is made anew for each change or run. To ask for the owner's owner
// would take the right to read all of them: their names tell.
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

// addContainer takes <runtime>://<id>.
func (p *Pod) addContainer(name, id string) {
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
	p.Containers = append(p.Containers, Container{ID: key, Name: unique.Make(name).Value()})
}

// containerKey is an ID of 64 hexadecimal digits.
func containerKey(id string) (key ContainerID, ok bool) {
	var all [32]byte
	if len(id) != 2*len(all) {
		return key, false
	}
	_, err := hex.Decode(all[:], []byte(id))
	copy(key[:], all[:])
	return key, err == nil
}

// Unnamed reports whether id is a container's, and no status names that container.
func (p *Pod) Unnamed(id string) bool {
	_, ok := containerKey(id)
	return ok && p.Container(id) == ""
}

// Container is the name of the container of that ID, empty when no status names it: of the pause container
// there is none, and that of a new container comes a moment after it.
func (p *Pod) Container(id string) string {
	key, ok := containerKey(id)
	if !ok {
		return ""
	}
	for _, c := range p.Containers {
		if c.ID == key {
			return c.Name
		}
	}
	return ""
}
