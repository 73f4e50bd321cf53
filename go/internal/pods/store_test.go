package pods

import (
	"encoding/json"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"
	"unique"
	"unsafe"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// id is a container's ID of one digit.
func id(digit string) string { return strings.Repeat(digit, 64) }

func key(t *testing.T, id string) ContainerID {
	t.Helper()
	key, ok := containerKey(id)
	if !ok {
		t.Fatalf("%s is no ID", id)
	}
	return key
}

const hash = "0123456789abcdef0123456789abcdef"

var terms = Terms{Mark: "a/mark", Summary: "a/kill", OptOut: "a/stay", Selector: map[string]string{"tier": "web"}}

func TestRead(t *testing.T) {
	yes, priority, now := true, int32(systemCriticalPriority), metav1.Now()
	in := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: "shop", Name: "cart", UID: "uid-1", ResourceVersion: "5", DeletionTimestamp: &now,
			Labels: map[string]string{"tier": "web", "x": "y"},
			Annotations: map[string]string{
				"a/mark": "", "a/stay": "", "a/kill": `{"event":"boot-1-2","annotation":"a/mark"}`, mirrorAnnotation: hash, hashAnnotation: hash,
			},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "DaemonSet", Name: "ds", Controller: &yes}},
		},
		Spec: corev1.PodSpec{NodeName: "node-1", Priority: &priority},
		Status: corev1.PodStatus{
			InitContainerStatuses: []corev1.ContainerStatus{{Name: "init", State: corev1.ContainerState{
				Terminated: &corev1.ContainerStateTerminated{ContainerID: "cri-o://" + id("1")},
			}}},
			ContainerStatuses: []corev1.ContainerStatus{
				{Name: "cart", RestartCount: 4, ContainerID: "containerd://" + id("2"), LastTerminationState: corev1.ContainerState{
					Terminated: &corev1.ContainerStateTerminated{ContainerID: "containerd://" + id("3")},
				}},
				{Name: "waits"}, {Name: "odd", ContainerID: id("4")}, {Name: "short", ContainerID: "docker://12"}, {Name: "letters", ContainerID: "docker://" + id("x")},
			},
			EphemeralContainerStatuses: []corev1.ContainerStatus{{Name: "debug", Image: "tools:1", ContainerID: "docker://" + id("5")}},
		},
	}
	got := terms.Read(in)
	init, cart, debug := unique.Make(ContainerSpec{Name: "init"}), unique.Make(ContainerSpec{Name: "cart"}), unique.Make(ContainerSpec{"debug", "tools:1"})
	want := &Pod{
		Namespace: "shop", Name: "cart", UID: "uid-1", ResourceVersion: "5", Node: "node-1", Hash: hash, Owner: "DaemonSet/ds", Mark: &Mark{Kill: "boot-1-2", Annotation: "a/mark"},
		Containers: []Container{{key(t, id("1")), init, 0}, {key(t, id("2")), cart, 4}, {key(t, id("3")), cart, 4}, {key(t, id("5")), debug, 0}},
		Mirror:     true, DaemonSet: true, Critical: true, Finished: true, Marked: true, OptOut: true, Selected: true,
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(Pod{}), cmp.Comparer(func(a, b unique.Handle[ContainerSpec]) bool { return a == b })); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	for digit, name := range map[string]string{"1": "init", "2": "cart", "3": "cart", "4": "", "5": "debug"} {
		got := got.Container(id(digit))
		if (got != nil) != (name != "") || got != nil && got.Spec.Value().Name != name {
			t.Errorf("container %s is %+v, want %q", digit, got, name)
		}
	}
}

// TestShared: the pods of a workload share the text of its names, and those of a node the node's name, however often garbage was
// collected between one pod and the next.
func TestShared(t *testing.T) {
	s := NewStore(0)
	var all []*Pod
	for i := range 3 {
		p := terms.Read(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: strings.Clone("shop"), UID: types.UID(fmt.Sprint("uid-", i)),
				OwnerReferences: []metav1.OwnerReference{{Kind: "StatefulSet", Name: "cart", Controller: new(true)}},
			},
			Spec: corev1.PodSpec{NodeName: strings.Clone("node-1")},
		})
		s.Set(p)
		all = append(all, p)
		runtime.GC()
		runtime.GC()
	}
	for _, p := range all {
		for text, first := range map[string]string{p.Namespace: all[0].Namespace, p.Owner: all[0].Owner, p.Node: all[0].Node} {
			if unsafe.StringData(text) != unsafe.StringData(first) {
				t.Errorf("pod %s has a text of its own: %q", p.UID, text)
			}
		}
	}
}

func TestOwner(t *testing.T) {
	for _, tt := range []struct{ kind, name, hash, want string }{
		{"ReplicaSet", "cart-5d4f", "5d4f", "Deployment/cart"},
		{"ReplicaSet", "-5d4f", "5d4f", "ReplicaSet/-5d4f"},
		{"ReplicaSet", "cart-5d4f", "", "ReplicaSet/cart-5d4f"},
		{"ReplicaSet", "cart", "5d4f", "ReplicaSet/cart"},
		{"StatefulSet", "db", "", "StatefulSet/db"},
		{"Job", "backup-29384756", "", "CronJob/backup"},
		{"Job", "backup-2024", "", "Job/backup-2024"},
		{"Job", "backup-2938475x", "", "Job/backup-2938475x"},
		{"Job", "-29384756", "", "Job/-29384756"},
	} {
		in := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{}, OwnerReferences: []metav1.OwnerReference{{Kind: "Other", Name: "x"}, {Kind: tt.kind, Name: tt.name, Controller: new(true)}}}}
		if tt.hash != "" {
			in.Labels["pod-template-hash"] = tt.hash
		}
		if got := terms.Read(in).Owner; got != tt.want {
			t.Errorf("%s %s (%s): %q, want %q", tt.kind, tt.name, tt.hash, got, tt.want)
		}
	}
	// Workloads that are no part of Kubernetes.
	for _, tt := range []struct{ kind, name, label, value, want string }{
		{"ReplicaSet", "cart-6c8b9", "rollouts-pod-template-hash", "6c8b9", "Rollout/cart"}, // Argo Rollouts
		{"ReplicaSet", "cart-6c8b9", "rollouts-pod-template-hash", "other", "ReplicaSet/cart-6c8b9"},
		{"Job", "train-workers-0", "jobset.sigs.k8s.io/jobset-name", "train", "JobSet/train"},
		{"Job", "train-workers-0", "jobset.sigs.k8s.io/jobset-name", "tra", "Job/train-workers-0"},
	} {
		in := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
			Labels:          map[string]string{tt.label: tt.value},
			OwnerReferences: []metav1.OwnerReference{{Kind: tt.kind, Name: tt.name, Controller: new(true)}},
		}}
		if got := terms.Read(in).Owner; got != tt.want {
			t.Errorf("%s %s (%s=%s): %q, want %q", tt.kind, tt.name, tt.label, tt.value, got, tt.want)
		}
	}
}

// TestRequest: what the scheduler reserves, which is more than the containers' sum.
func TestRequest(t *testing.T) {
	memory := func(size string) corev1.ResourceRequirements {
		return corev1.ResourceRequirements{Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(size)}}
	}
	always := corev1.ContainerRestartPolicyAlways
	podLevel := memory("300Mi")
	for name, tt := range map[string]struct {
		spec corev1.PodSpec
		want int64
	}{
		"none":           {corev1.PodSpec{Containers: []corev1.Container{{}}}, 0},
		"containers":     {corev1.PodSpec{Containers: []corev1.Container{{Resources: memory("100Mi")}, {Resources: memory("28Mi")}}}, 128 << 20},
		"a large init":   {corev1.PodSpec{Containers: []corev1.Container{{Resources: memory("100Mi")}}, InitContainers: []corev1.Container{{Resources: memory("200Mi")}}}, 200 << 20},
		"native sidecar": {corev1.PodSpec{Containers: []corev1.Container{{Resources: memory("100Mi")}}, InitContainers: []corev1.Container{{Resources: memory("50Mi"), RestartPolicy: &always}}}, 150 << 20},
		"overhead":       {corev1.PodSpec{Containers: []corev1.Container{{Resources: memory("100Mi")}}, Overhead: memory("20Mi").Requests}, 120 << 20},
		"of the pod":     {corev1.PodSpec{Containers: []corev1.Container{{}}, Resources: &podLevel}, 300 << 20},
	} {
		if got := terms.Read(&corev1.Pod{Spec: tt.spec}).Request; got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}

func TestReadNot(t *testing.T) {
	no, low := false, int32(systemCriticalPriority-1)
	pod := func(change func(*corev1.Pod)) *Pod {
		p := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Labels: map[string]string{"tier": "web"}, Annotations: map[string]string{}}}
		change(p)
		return terms.Read(p)
	}
	for name, p := range map[string]*Pod{
		"a controller of another kind": pod(func(p *corev1.Pod) {
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "DaemonSet", Controller: &no}}
		}),
		"another group": pod(func(p *corev1.Pod) {
			p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "x/v1", Kind: "DaemonSet"}}
		}),
		"a lower priority": pod(func(p *corev1.Pod) { p.Spec.Priority = &low }),
		"opt-out false":    pod(func(p *corev1.Pod) { p.Annotations["a/stay"] = "false" }),
		"a hash alone":     pod(func(p *corev1.Pod) { p.Annotations[hashAnnotation] = hash }),
		"a broken summary": pod(func(p *corev1.Pod) { p.Annotations["a/kill"] = "{" }),
		"running":          pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodRunning }),
	} {
		if diff := cmp.Diff(&Pod{Selected: true}, p, cmpopts.IgnoreUnexported(Pod{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if p := pod(func(p *corev1.Pod) { p.Annotations[mirrorAnnotation] = hash }); !p.Mirror || p.Hash != "" {
		t.Errorf("a mirror pod without the hash: %+v", p)
	}
	if p := pod(func(p *corev1.Pod) { p.Labels["tier"] = "db" }); p.Selected {
		t.Error("another label's value is selected")
	}
	if p := pod(func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }); !p.Finished {
		t.Error("a pod that has ended is not finished")
	}
	if p := (&Terms{}).Read(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{"": "x"}}}); p.Marked || p.OptOut || !p.Selected {
		t.Errorf("without terms: %+v", p)
	}
}

func TestFind(t *testing.T) {
	s := NewStore(time.Minute)
	now := time.Unix(1000, 0)
	s.now = func() time.Time { return now }
	with := func(p Pod, digits ...string) *Pod {
		for _, d := range digits {
			p.Containers = append(p.Containers, Container{ID: key(t, id(d)), Spec: unique.Make(ContainerSpec{Name: "c" + d})})
		}
		return &p
	}
	web := with(Pod{UID: "web", Node: "node-1"}, "1")
	for _, p := range []*Pod{
		web,
		with(Pod{UID: "unbound"}),
		with(Pod{UID: "mirror-1", Node: "node-1", Hash: hash}, "2"),
		with(Pod{UID: "mirror-2", Node: "node-2", Hash: hash}, "3"), // the same file on another node
		with(Pod{UID: "twin-1", Node: "node-3", Hash: "twins"}, "4"),
		with(Pod{UID: "twin-2", Node: "node-3", Hash: "twins"}, "5"),
	} {
		s.Set(p)
	}
	find := func(node, uid, container string) string {
		f, err := s.Find(node, uid, container)
		switch {
		case err != nil && f != (Found{}):
			t.Errorf("a pod came with %v", err)
		case errors.Is(err, ErrUnknown):
			return "unknown"
		case errors.Is(err, ErrOtherNode):
			return "other node"
		case errors.Is(err, ErrAmbiguous):
			return "ambiguous"
		case f.Gone:
			return "gone " + f.Pod.UID
		}
		return f.Pod.UID
	}
	want := func(node, uid, container, want string) {
		t.Helper()
		if got := find(node, uid, container); got != want {
			t.Errorf("pod %q, container %.4q on %s: %s, want %s", uid, container, node, got, want)
		}
	}
	want("node-1", "web", id("1"), "web")
	want("node-1", "web", id("9"), "web") // the pause container, or one that is new
	want("node-2", "web", id("1"), "other node")
	want("node-1", "unbound", "", "unknown")
	want("node-1", "none", id("1"), "unknown") // the UID counts where there is one
	want("node-1", "", id("1"), "web")
	want("node-2", "", id("1"), "unknown")
	want("node-1", "", "", "unknown")
	want("node-1", hash, id("2"), "mirror-1")
	want("node-2", hash, id("3"), "mirror-2")
	want("node-2", hash, id("2"), "mirror-2") // restarted since
	want("node-3", hash, "", "unknown")
	want("node-3", "twins", id("5"), "twin-2")
	want("node-3", "twins", id("1"), "ambiguous")

	// Its binding, another state of it, then its end.
	s.Set(with(Pod{UID: "unbound", Node: "node-1"}))
	want("node-1", "unbound", "", "unbound")
	s.Set(with(Pod{UID: "web", Node: "node-1", Marked: true}, "1"))
	if f, _ := s.Find("node-1", "web", ""); !f.Pod.Marked || web.Marked {
		t.Error("the new state is not known, or was written over the old one")
	}
	s.Delete(with(Pod{UID: "web", Node: "node-1"}, "1"))
	s.Delete(with(Pod{UID: "never seen", Node: "node-1"}))
	want("node-1", "web", id("1"), "gone web")
	want("node-2", "web", id("1"), "other node")
	want("node-1", "", id("1"), "gone web")
	want("node-1", "never seen", "", "gone never seen")
	if n := s.Len(); n != 5 {
		t.Errorf("%d pods", n)
	}
	s.Retain(map[string]struct{}{"twin-1": {}})
	want("node-1", hash, "", "gone mirror-1")
	want("node-3", "twins", "", "twin-1")
	if n := s.Len(); n != 1 || len(s.byNode) != 1 {
		t.Errorf("%d pods on %d nodes", n, len(s.byNode))
	}

	// Not for ever.
	now = now.Add(time.Minute + 1)
	s.Delete(with(Pod{UID: "twin-1", Node: "node-3"}))
	want("node-1", "web", "", "unknown")
	want("node-3", "twin-1", "", "gone twin-1")
	if len(s.gone) != 1 || len(s.order) != 1 {
		t.Errorf("%d, %d are remembered", len(s.gone), len(s.order))
	}
	// Not any number.
	for i := range maxGone + 10 {
		s.Delete(&Pod{UID: fmt.Sprint(i), Node: "node-9"})
	}
	if len(s.gone) != maxGone || len(s.order) != maxGone {
		t.Errorf("%d, %d are remembered", len(s.gone), len(s.order))
	}
}

// Whatever stands on a pod is read, and is nobody's mark that does not say so.
func FuzzRead(f *testing.F) {
	f.Add("example.com/mark", "true", `{"event":"boot-1-2","annotation":"example.com/mark","time":"2026-01-02T03:04:05Z"}`, "ReplicaSet", "web-5d4f", "5d4f", "containerd://"+strings.Repeat("a", 64))
	f.Add("kubernetes.io/config.mirror", "x", `{"event":1}`, "Job", "cron-29000000", "", "docker://x")
	f.Add("example.com/opt-out", "false", `[]`, "DaemonSet", "", "-", "://")
	f.Fuzz(func(t *testing.T, key, value, summary, kind, owner, hash, id string) {
		yes := true
		terms := Terms{Mark: "example.com/mark", Summary: "example.com/summary", Condition: "example.com/mark", OptOut: "example.com/opt-out", Selector: map[string]string{"app": "web"}}
		p := terms.Read(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: "shop", Name: "web", UID: "1", Labels: map[string]string{"pod-template-hash": hash, "app": value},
				Annotations:     map[string]string{key: value, terms.Summary: summary},
				OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: kind, Name: owner, Controller: &yes}},
			},
			Status: corev1.PodStatus{
				ContainerStatuses: []corev1.ContainerStatus{{Name: "main", ContainerID: id}},
				Conditions:        []corev1.PodCondition{{Type: corev1.PodConditionType(key), Status: corev1.ConditionTrue, Message: summary}},
			},
		})
		var s Summary
		valid := json.Unmarshal([]byte(summary), &s) == nil && s.Event != ""
		if (p.Mark != nil) != valid || p.Marked != (key == terms.Mark) || p.Selected != (value == "web") {
			t.Errorf("read %+v, mark %+v", p, p.Mark)
		}
		if p.OptOut != (key == terms.OptOut && value != "false") || p.DaemonSet != (kind == "DaemonSet") || !strings.Contains(p.Owner, "/") {
			t.Errorf("read %+v", p)
		}
		if c := p.Container(strings.TrimPrefix(id, "containerd://")); c != nil && c.Spec.Value().Name != "main" || len(p.Containers) > 1 {
			t.Errorf("containers %+v", p.Containers)
		}
	})
}

// What a patch has changed is in the store at once, unless the watch has delivered anything since: that may be newer.
func TestStorePatched(t *testing.T) {
	s := NewStore(time.Minute)
	find := func() *Pod {
		f, err := s.Find("node-1", "uid-1", "")
		if err != nil {
			t.Fatal(err)
		}
		return f.Pod
	}
	s.Set(&Pod{UID: "uid-1", Node: "node-1"})
	before := find()
	marked := *before
	marked.Marked = true
	s.Patched(before, &marked)
	if find() != &marked {
		t.Error("the mark is not in the store")
	}
	newer := &Pod{UID: "uid-1", Node: "node-1", Finished: true}
	s.Set(newer)
	s.Patched(&marked, before)
	if find() != newer {
		t.Error("what the watch has delivered was replaced")
	}
	s.Delete(newer)
	s.Patched(newer, &marked)
	if s.Has("uid-1") {
		t.Error("a pod that is gone came back")
	}
}
