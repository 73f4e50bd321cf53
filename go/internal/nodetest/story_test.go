//go:build node

package nodetest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

const (
	namespace = "oom-tracer"
	evictMe   = "oom-tracer.alpha.kubernetes.io/evict-me"
)

// install does what deploy/docs/install.md says.
func (l *Lab) install() {
	l.t.Helper()
	began := time.Now()
	for _, args := range [][]string{
		{"create", "namespace", namespace},
		{"label", "namespace", namespace, "pod-security.kubernetes.io/enforce=privileged"},
	} {
		if out, err := l.kubectl(l.t.Context(), "", args...); err != nil {
			l.t.Fatalf("kubectl %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
	l.helm(append([]string{"install", "oom-tracer", repository(l, "deploy/chart"), "--wait", "--timeout", "10m"}, l.values()...)...)
	l.logf("helm install to all pods ready: %.0f s", time.Since(began).Seconds())
}

// upgrade changes values, and waits until the tracer's pod is a new one.
func (l *Lab) upgrade(set ...string) {
	l.t.Helper()
	args := append([]string{"upgrade", "oom-tracer", repository(l, "deploy/chart"), "--wait", "--timeout", "10m"}, l.values()...)
	for _, s := range set {
		args = append(args, "--set", s)
	}
	l.helm(args...)
	if out, err := l.kubectl(l.t.Context(), "", "-n", namespace, "rollout", "status", "daemonset/oom-tracer", "--timeout=5m"); err != nil {
		l.diagnose()
		l.t.Fatalf("the tracer does not come up again: %v: %s", err, out)
	}
}

func (l *Lab) values() []string {
	return []string{
		"--namespace", namespace, "--set-string", "image.tag=" + os.Getenv("OOM_TEST_TAG"), // a commit may have digits alone
		"--values", repository(l, "deploy/examples/single-node.yaml"), "--values", repository(l, "deploy/examples/evict.yaml"),
		"--values", repository(l, "go/internal/nodetest/testdata/values.yaml"),
	}
}

func repository(l *Lab, file string) string {
	l.t.Helper()
	path, err := kubetest.Path(file)
	if err != nil {
		l.t.Fatal(err)
	}
	return path
}

// secondNode makes an object of a node without a machine, and keeps it ready: the descheduler does nothing on a
// cluster with fewer than two, and with nodeFit only what would fit elsewhere is evicted. The scheduler prefers the other.
func (l *Lab) secondNode() {
	l.t.Helper()
	const name = "node-2"
	l.Node(name, func(n *corev1.Node) {
		n.Spec.Taints = []corev1.Taint{{Key: "object", Effect: corev1.TaintEffectPreferNoSchedule}}
	})
	seconds := int32(40)
	leases := l.Client.CoordinationV1().Leases(corev1.NamespaceNodeLease)
	now := metav1.NowMicro()
	holder := name
	lease, err := leases.Create(l.t.Context(), &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &holder, LeaseDurationSeconds: &seconds, RenewTime: &now},
	}, metav1.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	go func() {
		for {
			select {
			case <-l.t.Context().Done():
				return
			case <-time.After(10 * time.Second):
			}
			now := metav1.NowMicro()
			lease.Spec.RenewTime = &now
			if next, err := leases.Update(l.t.Context(), lease, metav1.UpdateOptions{}); err == nil {
				lease = next
			} else if next, err := leases.Get(l.t.Context(), name, metav1.GetOptions{}); err == nil {
				lease = next
			}
		}
	}()
}

// record is what NATS has stored, by the node's clock.
type record struct {
	mu       sync.Mutex
	kills    []kill
	outcomes []event.Outcome
	gaps     []event.Gap
	seqs     map[uint64]map[uint64]int // epoch, seq: how often
}

type kill struct {
	event.Event
	stored time.Time
}

// tail reads the record until the test ends.
func (l *Lab) tail() *record {
	l.t.Helper()
	l.Apply("go/internal/nodetest/testdata/nats.yaml")
	secret, err := l.Client.CoreV1().Secrets(namespace).Get(l.t.Context(), "oom-tracer-nats", metav1.GetOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
	password := filepath.Join(l.t.TempDir(), "tap")
	write(l.t, password, secret.Data["tap"])
	var conn *bus.Conn
	l.await("NATS can be reached on the node's port", 2*time.Minute, func() (err error) {
		conn, err = bus.Connect(l.t.Context(), config.NATS{URL: "nats://" + natsAddr, User: "oom-tap", PasswordFile: password},
			bus.Options{Name: "oom-tap"}, slog.New(slog.DiscardHandler))
		return err
	})
	l.t.Cleanup(conn.Close)
	r := &record{seqs: map[uint64]map[uint64]int{}}
	go func() {
		err := bus.Tail(l.t.Context(), conn, bus.TailOptions{Since: time.Unix(0, 0), Follow: true}, r.take)
		if err != nil && l.t.Context().Err() == nil {
			l.t.Errorf("read the record: %v", err)
		}
	}()
	return r
}

func (r *record) take(m bus.Stored) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	count := func(epoch, first, last uint64) {
		if r.seqs[epoch] == nil {
			r.seqs[epoch] = map[uint64]int{}
		}
		for seq := first; seq <= last && seq > 0; seq++ {
			r.seqs[epoch][seq]++
		}
	}
	switch {
	case strings.HasPrefix(m.Subject, "oom.v1.kill."), strings.HasPrefix(m.Subject, "oom.v1.exiting."):
		e, err := event.Parse(m.Data)
		if err != nil {
			return fmt.Errorf("%s: %w", m.Subject, err)
		}
		count(e.Node.Epoch, e.Seq, e.Seq)
		if strings.HasPrefix(m.Subject, "oom.v1.kill.") {
			r.kills = append(r.kills, kill{e, m.Time})
		}
	case strings.HasPrefix(m.Subject, "oom.v1.outcome."):
		o, err := event.ParseOutcome(m.Data)
		if err != nil {
			return fmt.Errorf("%s: %w", m.Subject, err)
		}
		r.outcomes = append(r.outcomes, o)
	case strings.HasPrefix(m.Subject, "oom.v1.gap."):
		g, err := event.ParseGap(m.Data)
		if err != nil {
			return fmt.Errorf("%s: %w", m.Subject, err)
		}
		count(g.Node.Epoch, g.FirstSeq, g.LastSeq)
		r.gaps = append(r.gaps, g)
	}
	return nil
}

// killed are the kills for which is returns true.
func (r *record) killed(is func(*event.Event) bool) []kill {
	r.mu.Lock()
	defer r.mu.Unlock()
	var some []kill
	for _, k := range r.kills {
		if is(&k.Event) {
			some = append(some, k)
		}
	}
	return some
}

// outcome is the one of a kill and stage.
func (r *record) outcome(id string, stage string) (event.Outcome, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := slices.IndexFunc(r.outcomes, func(o event.Outcome) bool { return o.Kill == id && o.Stage == stage })
	if i < 0 {
		return event.Outcome{}, false
	}
	return r.outcomes[i], true
}

func (r *record) gapsNow() []event.Gap {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.gaps)
}

// whole returns an error unless every seq of every epoch is there once.
func (r *record) whole() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for epoch, seqs := range r.seqs {
		for seq := uint64(1); seq <= uint64(len(seqs)); seq++ {
			if seqs[seq] != 1 {
				errs = append(errs, fmt.Errorf("epoch %d: seq %d is in %d events and gaps", epoch, seq, seqs[seq]))
			}
		}
	}
	return errors.Join(errs...)
}

// pod is one that waits. Each change is applied before it is made.
func podSpec(changes ...func(*corev1.PodSpec)) corev1.PodSpec {
	no, yes, user, second := false, true, int64(1000), int64(1)
	spec := corev1.PodSpec{
		TerminationGracePeriodSeconds: &second,
		SecurityContext: &corev1.PodSecurityContext{
			RunAsNonRoot: &yes, RunAsUser: &user, SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeRuntimeDefault},
		},
		Containers: []corev1.Container{{Name: "main", Image: "localhost/pod:1"}},
	}
	for _, change := range changes {
		change(&spec)
	}
	for _, containers := range [][]corev1.Container{spec.InitContainers, spec.Containers} {
		for i := range containers {
			containers[i].SecurityContext = &corev1.SecurityContext{
				AllowPrivilegeEscalation: &no, Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}},
			}
		}
	}
	return spec
}

func memory(limit string) corev1.ResourceRequirements {
	return corev1.ResourceRequirements{
		Requests: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("1Mi"), corev1.ResourceCPU: resource.MustParse("1m")},
		Limits:   corev1.ResourceList{corev1.ResourceMemory: resource.MustParse(limit)},
	}
}

func limited(limit string) func(*corev1.PodSpec) {
	return func(s *corev1.PodSpec) { s.Containers[0].Resources = memory(limit) }
}

func side(s *corev1.PodSpec) {
	s.Containers = append(s.Containers, corev1.Container{Name: "side", Image: "localhost/pod:1"})
}

func (l *Lab) pod(name string, changes ...func(*corev1.PodSpec)) {
	l.t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: podSpec(changes...)}
	if _, err := l.Client.CoreV1().Pods("shop").Create(l.t.Context(), pod, metav1.CreateOptions{}); err != nil {
		l.t.Fatal(err)
	}
}

func (l *Lab) deployment(name string) {
	l.t.Helper()
	labels := map[string]string{"app": name}
	_, err := l.Client.AppsV1().Deployments("shop").Create(l.t.Context(), &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: name},
		Spec: appsv1.DeploymentSpec{
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: podSpec()},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		l.t.Fatal(err)
	}
}

// running finds the pod of this name or of the Deployment of this name, other than the one with the UID not, once all
// its containers run.
func (l *Lab) running(name, not string) *corev1.Pod {
	l.t.Helper()
	var found *corev1.Pod
	l.await(name+" runs", 6*time.Minute, func() error {
		list, err := l.Client.CoreV1().Pods("shop").List(l.t.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, pod := range list.Items {
			if pod.Name != name && pod.Labels["app"] != name && pod.Name != name+"-"+nodeName || string(pod.UID) == not {
				continue
			}
			for _, c := range pod.Status.Conditions {
				if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue && pod.DeletionTimestamp == nil {
					found = &pod
					return nil
				}
			}
		}
		return errors.New("no such pod is ready")
	})
	return found
}

// allPods lets a pod take memory until all pods together reach their limit. The programs that the pods run are read by the node before, so that
// their pages are charged to it: otherwise the kernel reclaims them from the pods and reads them again, for minutes, and kills nobody.
func (l *Lab) allPods(pod string) {
	l.t.Helper()
	l.Machine.Must(`pods=/sys/fs/cgroup/kubepods.slice
for i in 1 2 3; do
	echo 150M >$pods/memory.reclaim || true # as much as there is
	for p in $(find $pods -name cgroup.procs | xargs cat); do cat /proc/$p/exe >/dev/null || true; done
done`)
	l.exec(pod, "main", "3000")
}

// exec runs the program in a container of a pod, which takes memory there. It may well be killed.
func (l *Lab) exec(pod, container string, args ...string) {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), 5*time.Minute)
	defer cancel()
	out, err := l.kubectl(ctx, "", append([]string{"exec", "-n", "shop", pod, "-c", container, "--", "/pod"}, args...)...)
	if err == nil {
		l.t.Errorf("%s/%s took %s MiB and was not killed: %s", pod, container, args[0], out)
	}
}
