//go:build node

package nodetest

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// testLife: the release is upgraded, its tracer is deleted and killed, and the node reboots, while processes are killed. What
// the kernel counts is what NATS has.
func (l *Lab) testLife(t *testing.T, r *record) {
	t.Run("Roll", func(t *testing.T) { l.in(t).testRoll(t, r) })
	t.Run("HelmTest", func(t *testing.T) {
		out := l.in(t).helm("test", "oom-tracer", "--namespace", namespace, "--logs", "--timeout", "6m")
		l.logf("helm test:\n%s", out)
	})
	t.Run("Seccomp", func(t *testing.T) { l.in(t).testSeccomp(t) })
	t.Run("SingleProcess", func(t *testing.T) { l.in(t).testSingleProcess(t, r) })
	t.Run("Reboot", func(t *testing.T) { l.in(t).testReboot(t, r) })
}

// storm has processes killed in a cgroup of its own, one after the other, until stop is called. It returns how often the
// kernel counted one.
func (l *Lab) storm() (stop func() int) {
	l.t.Helper()
	l.Machine.Must(`mkdir -p /sys/fs/cgroup/storm && echo 8M >/sys/fs/cgroup/storm/memory.max && rm -f /run/storm-ends
cat >/run/storm <<'END'
while [ ! -e /run/storm-ends ]; do
	sh -c 'echo $$ >/sys/fs/cgroup/storm/cgroup.procs; exec /usr/local/bin/pod 64' || true
	sleep 0.5
done
touch /run/storm-ended
END
rm -f /run/storm-ended
systemd-run --quiet --unit=storm /bin/sh /run/storm`)
	return func() int {
		out := l.Machine.Must(`touch /run/storm-ends
for i in $(seq 60); do [ ! -e /run/storm-ended ] || break; sleep 0.5; done
awk '/^oom_kill / {print $2}' /sys/fs/cgroup/storm/memory.events
rmdir /sys/fs/cgroup/storm`)
		n, err := strconv.Atoi(out)
		if err != nil {
			l.t.Fatalf("memory.events says %q", out)
		}
		return n
	}
}

// testRoll: helm upgrade to another seccomp profile, the shipped one; a deleted pod; kill -9.
func (l *Lab) testRoll(t *testing.T, r *record) {
	inStorm := func(e *event.Event) bool { return e.Victim.Cgroup != nil && e.Victim.Cgroup.Path == "/storm" }
	gaps := len(r.gapsNow())
	stop := l.storm()
	began := time.Now()
	l.upgrade("tracer.seccompProfile.type=Localhost", "tracer.seccompProfile.localhostProfile=oom-tracer.json")
	l.logf("helm upgrade under kills: %.0f s", time.Since(began).Seconds())
	before := l.tracerPod()
	if out, err := l.kubectl(t.Context(), "", "-n", namespace, "delete", "pod", before.Name, "--wait=true"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	l.await("the tracer's pod is a new one", 4*time.Minute, func() error {
		if pod := l.tracerPod(); pod == nil || pod.UID == before.UID || !ready(pod) {
			return errors.New("none is ready")
		}
		return nil
	})
	l.Machine.Must("kill -9 $(pidof oom-tracer)")
	l.await("the tracer's container was restarted", 4*time.Minute, func() error {
		pod := l.tracerPod()
		if pod == nil || !ready(pod) || pod.Status.ContainerStatuses[0].RestartCount == 0 {
			return errors.New("it is not ready")
		}
		return nil
	})
	want := stop()
	l.await("every kill is in the record", 2*time.Minute, func() error {
		if got := len(r.killed(inStorm)); got != want {
			return fmt.Errorf("the kernel counted %d, NATS has %d", want, got)
		}
		return nil
	})
	ids := map[string]bool{}
	for _, k := range r.killed(inStorm) {
		if ids[k.ID] {
			t.Errorf("kill %s is there twice", k.ID)
		}
		ids[k.ID] = true
	}
	if err := r.whole(); err != nil {
		t.Error(err)
	}
	if now := r.gapsNow(); len(now) != gaps {
		t.Errorf("gaps: %+v", now[gaps:])
	}
	l.logf("upgrade, deleted pod and kill -9: %d kills by the kernel's count, %d events, each once", want, len(ids))
}

func (l *Lab) tracerPod() *corev1.Pod {
	l.t.Helper()
	list, err := l.Client.CoreV1().Pods(namespace).List(l.t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=oom-tracer"})
	if err != nil {
		l.t.Fatal(err)
	}
	for _, pod := range list.Items {
		if pod.DeletionTimestamp == nil {
			return &pod
		}
	}
	return nil
}

func ready(pod *corev1.Pod) bool {
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady {
			return c.Status == corev1.ConditionTrue
		}
	}
	return false
}

// testSeccomp: under CRI-O's profile of mid-2023, which permits bpf with SYS_ADMIN alone, doctor names seccomp, and not the kernel.
func (l *Lab) testSeccomp(t *testing.T) {
	no, root, profile := false, int64(0), "crio.json"
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "seccomp", Namespace: namespace}, Spec: corev1.PodSpec{
		RestartPolicy: corev1.RestartPolicyNever, NodeSelector: map[string]string{corev1.LabelHostname: nodeName},
		SecurityContext: &corev1.PodSecurityContext{SeccompProfile: &corev1.SeccompProfile{Type: corev1.SeccompProfileTypeLocalhost, LocalhostProfile: &profile}},
		Containers: []corev1.Container{{
			Name: "doctor", Image: l.tracerPod().Spec.Containers[0].Image, Args: []string{"doctor"},
			Env:          []corev1.EnvVar{{Name: "NODE_NAME", Value: nodeName}},
			VolumeMounts: []corev1.VolumeMount{{Name: "config", MountPath: "/etc/oom-tracer"}},
			SecurityContext: &corev1.SecurityContext{
				RunAsUser: &root, AllowPrivilegeEscalation: &no,
				Capabilities: &corev1.Capabilities{Drop: []corev1.Capability{"ALL"}, Add: []corev1.Capability{"BPF", "PERFMON", "SYSLOG", "SYS_RESOURCE"}},
			},
		}},
		Volumes: []corev1.Volume{{Name: "config", VolumeSource: corev1.VolumeSource{ConfigMap: &corev1.ConfigMapVolumeSource{
			LocalObjectReference: corev1.LocalObjectReference{Name: "oom-tracer"}, Items: []corev1.KeyToPath{{Key: "tracer.yaml", Path: "config.yaml"}},
		}}}},
	}}
	pods := l.Client.CoreV1().Pods(namespace)
	if _, err := pods.Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	l.await("doctor has ended", 3*time.Minute, func() error {
		pod, err := pods.Get(t.Context(), "seccomp", metav1.GetOptions{})
		if err == nil && pod.Status.Phase != corev1.PodFailed && pod.Status.Phase != corev1.PodSucceeded {
			err = fmt.Errorf("its pod is %s", pod.Status.Phase)
		}
		return err
	})
	out, err := l.kubectl(t.Context(), "", "-n", namespace, "logs", "seccomp")
	t.Logf("doctor under CRI-O's profile:\n%s", out)
	if err != nil || !regexp.MustCompile(`(?m)^fail +bpf .*seccomp`).MatchString(out) {
		t.Errorf("doctor does not say that seccomp refuses bpf: %v", err)
	}
	if err := pods.Delete(t.Context(), "seccomp", metav1.DeleteOptions{}); err != nil {
		t.Error(err)
	}
}

// singleProcesses has the kernel kill one process of a container only, from now on.
func (l *Lab) singleProcesses() {
	l.t.Helper()
	l.Machine.Must("echo 'singleProcessOOMKill: true' >>/etc/kubernetes/kubelet.yaml && systemctl restart kubelet")
}

// child is the story of one that a container's process has.
var child = story{
	name: "child", container: "main", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelContainer},
	outcome: "skipped/level", processes: 1, cause: func(l *Lab) { l.exec("child", "main", "64") },
}

// testSingleProcess: with singleProcessOOMKill a child dies and its container lives on.
func (l *Lab) testSingleProcess(t *testing.T, r *record) {
	l.singleProcesses()
	l.make("child")
	before := l.running("child", "")
	l.tell(t, r, child)
	after := l.running("child", "")
	if after.UID != before.UID || after.Status.ContainerStatuses[0].RestartCount != 0 || after.Status.ContainerStatuses[0].State.Running == nil {
		t.Errorf("the container did not live on: %+v", after.Status.ContainerStatuses[0])
	}
}

// testReboot: a node that is reset comes back by itself; its record is there, and a gap says what nobody can know. From then on
// all its mounts are private, as k3d and Alpine have them.
func (l *Lab) testReboot(t *testing.T, r *record) {
	kills, gaps := len(r.killed(func(*event.Event) bool { return true })), len(r.gapsNow())
	boot := l.Machine.Must("cat /proc/sys/kernel/random/boot_id")
	l.Machine.Must(`mkdir -p /etc/systemd/system/containerd.service.d
printf '[Service]\nExecStartPre=/bin/mount --make-rprivate /\n' >/etc/systemd/system/containerd.service.d/private.conf`)
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, _ = l.Machine.Run(ctx, "sync; echo b >/proc/sysrq-trigger") // ends without an answer
	l.await("the node boots again", 10*time.Minute, func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		out, err := l.Machine.Run(ctx, "cat /proc/sys/kernel/random/boot_id")
		if err == nil && strings.TrimSpace(out) == boot {
			err = errors.New("it has not gone down yet")
		}
		return err
	})
	l.await("a gap says that the node was reset", 10*time.Minute, func() error {
		if now := r.gapsNow(); len(now) == gaps {
			return errors.New("there is none")
		}
		return nil
	})
	l.logf("reset to the gap in the record: %.0f s", time.Since(began).Seconds())
	now := r.gapsNow()
	if len(now) != gaps+1 || now[gaps].Cause != event.GapReboot {
		t.Errorf("gaps: %+v", now[gaps:])
	}
	if got := len(r.killed(func(*event.Event) bool { return true })); got < kills {
		t.Errorf("%d kills, there were %d before", got, kills)
	}
	for _, mount := range []string{"/", "/sys/fs/bpf", "/sys/fs/cgroup"} {
		if got := l.Machine.Must("findmnt -n -o PROPAGATION " + mount); got != "private" {
			t.Errorf("%s is mounted %q", mount, got)
		}
	}
	l.tell(t, r, story{name: "service", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelOther}, outcome: "skipped/host", processes: 1,
		cause: func(l *Lab) {
			l.Machine.Must("systemd-run --quiet --wait --collect --unit=greedy -p MemoryMax=16M -p MemorySwapMax=0 /usr/local/bin/pod 64 || true")
		}})
}

// memory prints what each of our pods holds: its cgroup's own figures.
func (l *Lab) memory() {
	l.t.Helper()
	out := l.Machine.Must(`for name in oom-tracer oom-annotator oom-auth nats oom-descheduler; do
	pid=$(pidof $name) || continue
	dir=/sys/fs/cgroup$(cut -d: -f3 /proc/${pid%% *}/cgroup)
	awk -v name=$name -v peak=$(cat $dir/memory.peak) '/^(anon|file|kernel) / {v[$1] = $2 / 1048576} END {printf "%-16s anon %.1f MiB, file %.1f, kernel %.1f, peak %.1f\n", name, v["anon"], v["file"], v["kernel"], peak / 1048576}' $dir/memory.stat
done`)
	if n := strings.Count(out, "peak"); n != 5 {
		l.t.Errorf("%d of our 5 containers were found", n)
	}
	l.logf("memory of our containers:\n%s", out)
}

// testUninstall: helm uninstall leaves what install.md says that it leaves, and that goes by the commands that it names.
func (l *Lab) testUninstall(t *testing.T) {
	l.helm("uninstall", "oom-tracer", "--namespace", namespace, "--wait", "--timeout", "5m")
	l.await("our pods are gone", 2*time.Minute, func() error {
		pods, err := l.Client.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{
			LabelSelector: "app.kubernetes.io/part-of=oom-tracer,app.kubernetes.io/name!=oom-tracer-test", // helm keeps what helm test has made
		})
		if err == nil && len(pods.Items) > 0 {
			err = fmt.Errorf("%d are there", len(pods.Items))
		}
		return err
	})
	out, err := l.kubectl(t.Context(), "", "get", "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings", "-o", "name",
		"-l", "app.kubernetes.io/part-of=oom-tracer")
	if err != nil || strings.Contains(out, "oom") {
		t.Errorf("what is left: %v: %s", err, out)
	}
	l.Machine.Must("test -d /sys/fs/bpf/oom-tracer && test -d /var/lib/oom-tracer && rm -r /sys/fs/bpf/oom-tracer /var/lib/oom-tracer")
	if out, err := l.kubectl(t.Context(), "", "-n", namespace, "delete", "pvc", "-l", "app.kubernetes.io/name=oom-tracer-nats"); err != nil || !strings.Contains(out, "deleted") {
		t.Errorf("delete the volume: %v: %s", err, out)
	}
}
