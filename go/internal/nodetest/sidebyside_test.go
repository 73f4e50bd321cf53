//go:build node && sidebyside

package nodetest

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// kubernetes is what Kubernetes itself says of kills: what a user has without a tool.
type kubernetes struct {
	mu        sync.Mutex
	statuses  map[string]status // by container ID: how it ended
	present   map[string]bool   // container IDs that the pods' statuses have now
	systemOOM map[int]time.Time // by PID: the kubelet's Events of the node
}

type status struct {
	reason string
	at     time.Time // when the API server had it
}

var systemOOM = regexp.MustCompile(`pid: (\d+)`)

// watch looks at the pods and the node's Events until the test ends.
func (l *Lab) watch() *kubernetes {
	k := &kubernetes{statuses: map[string]status{}, systemOOM: map[int]time.Time{}}
	go func() {
		for ; l.t.Context().Err() == nil; time.Sleep(100 * time.Millisecond) {
			pods, err := l.Client.CoreV1().Pods("shop").List(l.t.Context(), metav1.ListOptions{})
			if err != nil {
				continue
			}
			events, err := l.Client.CoreV1().Events("").List(l.t.Context(), metav1.ListOptions{FieldSelector: "reason=SystemOOM"})
			if err != nil {
				continue
			}
			k.take(pods.Items, events.Items)
		}
	}()
	return k
}

func (k *kubernetes) take(pods []corev1.Pod, events []corev1.Event) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.present = map[string]bool{}
	for _, pod := range pods {
		for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
			k.present[containerID(c.ContainerID)] = true
			for _, ended := range []*corev1.ContainerStateTerminated{c.State.Terminated, c.LastTerminationState.Terminated} {
				if ended == nil {
					continue
				}
				id := containerID(ended.ContainerID)
				k.present[id] = true
				if _, ok := k.statuses[id]; !ok {
					k.statuses[id] = status{fmt.Sprintf("%s, exit code %d", ended.Reason, ended.ExitCode), time.Now()}
				}
			}
		}
	}
	for _, e := range events {
		if m := systemOOM.FindStringSubmatch(e.Message); m != nil {
			pid, _ := strconv.Atoi(m[1])
			if _, ok := k.systemOOM[pid]; !ok {
				k.systemOOM[pid] = time.Now()
			}
		}
	}
}

// containerID is one of the API without the name of the runtime.
func containerID(s string) string {
	_, id, _ := strings.Cut(s, "://")
	return id
}

// cells are what Kubernetes says of kills: the status of their containers, and the node's Events. ahead is the node's clock.
func (k *kubernetes) cells(kills []kill, ahead time.Duration) string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var statuses []string
	var events []time.Duration
	seen := map[string]bool{}
	for _, kill := range kills {
		when := kill.Time.Add(-ahead)
		if at, ok := k.systemOOM[int(kill.Victim.PID)]; ok {
			events = append(events, at.Sub(when))
		}
		if kill.Container == nil || seen[kill.Container.ContainerID] {
			continue
		}
		id := kill.Container.ContainerID
		seen[id] = true
		ended, ok := k.statuses[id]
		switch {
		case ok && k.present[id]:
			statuses = append(statuses, fmt.Sprintf("%s (%.1f s)", ended.reason, ended.at.Sub(when).Seconds()))
		case ok:
			statuses = append(statuses, fmt.Sprintf("%s (%.1f s), then gone with the pod", ended.reason, ended.at.Sub(when).Seconds()))
		case k.present[id]:
			statuses = append(statuses, "none: the container lives on")
		default:
			statuses = append(statuses, "none: gone with the pod")
		}
	}
	system := "–"
	if len(events) > 0 {
		system = fmt.Sprintf("%d (%.1f s)", len(events), slices.Min(events).Seconds())
	}
	return cmp.Or(strings.Join(statuses, "; "), "–") + " | " + system
}

// apiAway is how long the API server does not answer. After 40 s without its lease a node is not ready.
const apiAway = 30 * time.Second

// sideBySideStories are those of make test-node, and those in which the pod or the API server goes.
func sideBySideStories() []story {
	of := func(name string, cause func(l *Lab)) story {
		return story{name: name, container: "main", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelContainer}, outcome: "skipped/", cause: cause}
	}
	deleted := func(s story, then func(l *Lab)) story {
		s.deleted, s.cause = true, func(l *Lab) {
			l.exec(s.name, "main", "64")
			if err := l.Client.CoreV1().Pods("shop").Delete(l.t.Context(), s.name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
				l.t.Fatal(err)
			}
			then(l)
		}
		return s
	}
	return append(stories(),
		deleted(of("gone", nil), func(*Lab) {}),
		deleted(of("reborn", nil), func(l *Lab) { l.make("reborn") }),
		of("away", func(l *Lab) {
			id := containerID(l.running("away", "").Status.ContainerStatuses[0].ContainerID)
			defer l.Freeze()()
			l.Machine.Must(`sh -c 'echo $$ >"$0/cgroup.procs"; exec /usr/local/bin/pod 64' "$(find /sys/fs/cgroup/kubepods.slice -type d -name '*` + id + `*')" || true`)
			time.Sleep(apiAway)
		}),
		child)
}

// titles of the stories in the table.
var titles = map[string]string{
	"container": "container limit", "pod": "pod limit", "static": "static pod", "init": "init container", "cart": "limit of all pods", "web": "node out of memory",
	"service": "service of the host", "gone": "pod deleted at once, without a grace period", "reborn": "the same, and made again under its name",
	"away":  fmt.Sprintf("API server away for %.0f s", apiAway.Seconds()),
	"child": "child of a container's process, which lives on (`singleProcessOOMKill`)",
}

// TestSideBySide causes each kind of kill on a real node, and prints beside what OOM Tracer recorded what Kubernetes itself says of it: the
// status of the container, and the Event of the kubelet. How many were killed is counted in the kernel's log.
func TestSideBySide(t *testing.T) {
	l := start(t)
	l.Apply("go/internal/nodetest/testdata/lab.yaml")
	l.secondNode()
	l.install()
	r := l.tail()
	l.Namespace("shop")
	l.shop()
	k := l.watch()
	node, err := l.Client.CoreV1().Nodes().Get(t.Context(), nodeName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	info := node.Status.NodeInfo
	fmt.Printf("SIDE \nSIDE #### kubelet %s, %s, Linux %s\nSIDE \n", info.KubeletVersion, info.ContainerRuntimeVersion, info.KernelVersion)
	fmt.Println("SIDE | kind of kill | killed | OOM Tracer | status of the container | Event SystemOOM of the node |\nSIDE |---|---|---|---|---|")
	everyKill := func(*event.Event) bool { return true }
	logged := map[string]bool{}
	for _, s := range sideBySideStories() {
		switch s.name {
		case "gone", "reborn", "away":
			l.make(s.name)
		case "child":
			l.singleProcesses()
			l.make(s.name)
		}
		before := len(r.killed(everyKill))
		ahead, err := l.Machine.offset()
		if err != nil {
			t.Fatal(err)
		}
		took := l.tell(t, r, s)
		time.Sleep(20 * time.Second) // the kubelet looks at its containers every second, and this node is slow
		killed := 0
		for _, m := range killedLine.FindAllStringSubmatch(l.Machine.Must("dmesg"), -1) {
			if !logged[m[1]] {
				logged[m[1]] = true
				killed++
			}
		}
		kills := r.killed(everyKill)[before:]
		ours := fmt.Sprintf("%d of %d (%.1f s)", len(kills), killed, took["stored"].Seconds())
		if len(kills) != killed {
			t.Errorf("%s: OOM Tracer: %s", s.name, ours)
		}
		if s.container != "" { // tell has compared them
			ours += ", pod and container"
		}
		fmt.Printf("SIDE | %s | %d | %s | %s |\n", titles[s.name], killed, ours, k.cells(kills, ahead))
	}
}
