//go:build node && sidebyside

package nodetest

import (
	"fmt"
	"maps"
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
	for _, pod := range pods {
		for _, c := range slices.Concat(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses) {
			for _, ended := range []*corev1.ContainerStateTerminated{c.State.Terminated, c.LastTerminationState.Terminated} {
				if ended == nil {
					continue
				}
				_, id, _ := strings.Cut(ended.ContainerID, "://")
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

// TestSideBySide causes each kind of kill on a real node, and prints beside what OOM Tracer recorded what Kubernetes itself says of it: the
// status of the container, and the Event of the kubelet.
func TestSideBySide(t *testing.T) {
	l := start(t)
	l.Apply("go/internal/nodetest/testdata/lab.yaml")
	l.secondNode()
	l.install()
	r := l.tail()
	l.Namespace("shop")
	l.shop()
	k := l.watch()
	everyKill := func(*event.Event) bool { return true }
	fmt.Println("SIDE \nSIDE ### A real node: kubelet and containerd\nSIDE ")
	fmt.Println("SIDE | kind of kill | killed | OOM Tracer: stored | status of the container | Event SystemOOM of the node |\nSIDE |---|---|---|---|---|")
	for _, s := range stories() {
		before := len(r.killed(everyKill))
		ahead, err := l.Machine.offset()
		if err != nil {
			t.Fatal(err)
		}
		took := l.tell(t, r, s)
		time.Sleep(20 * time.Second) // the kubelet looks at its containers every second, and this node is slow
		kills := r.killed(everyKill)[before:]
		statuses, events, first := map[string]int{}, 0, map[string]time.Duration{}
		k.mu.Lock()
		for _, kill := range kills {
			when := kill.Time.Add(-ahead)
			said := "none: the container lives on"
			if kill.Container == nil {
				said = "none: no container"
			} else if ended, ok := k.statuses[kill.Container.ContainerID]; ok {
				said = ended.reason
				first[said] = ended.at.Sub(when)
			}
			statuses[said]++
			if at, ok := k.systemOOM[int(kill.Victim.PID)]; ok {
				events++
				first["event"] = at.Sub(when)
			}
		}
		k.mu.Unlock()
		var status []string
		for _, said := range slices.Sorted(maps.Keys(statuses)) {
			text := fmt.Sprintf("%d × %s", statuses[said], said)
			if after, ok := first[said]; ok {
				text += fmt.Sprintf(" (%.1f s)", after.Seconds())
			}
			status = append(status, text)
		}
		system := "–"
		if events > 0 {
			system = fmt.Sprintf("%d of %d (%.1f s)", events, len(kills), first["event"].Seconds())
		}
		fmt.Printf("SIDE | %s | %d | %d of %d (%.1f s) | %s | %s |\n", s.name, len(kills), len(kills), len(kills), took["stored"].Seconds(), strings.Join(status, "; "), system)
	}
}
