//go:build node

package nodetest

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// outcomeTime is how long an outcome may take after a kill: a node out of memory thrashes.
const outcomeTime = 4 * time.Minute

// TestNode is one story on one cluster, for it takes minutes to bring one up. Its parts follow each other, and a part that
// fails does not end the others.
func TestNode(t *testing.T) {
	l := start(t)
	l.Apply("go/internal/nodetest/testdata/lab.yaml")
	l.secondNode()
	l.install()
	r := l.tail()
	l.Namespace("shop")
	if out, err := l.kubectl(t.Context(), "", "label", "namespace", "shop", "pod-security.kubernetes.io/enforce=restricted"); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Run("Quiet", func(t *testing.T) { l.in(t).testQuiet(t) })
	t.Run("Confined", func(t *testing.T) { l.in(t).testConfined(t) })
	t.Run("Doctor", func(t *testing.T) { l.in(t).testDoctor(t) })
	t.Run("Kills", func(t *testing.T) { l.in(t).testKills(t, r) })
	t.Run("Laptop", func(t *testing.T) { l.in(t).testLaptop(t) })
	t.Run("Life", func(t *testing.T) { l.in(t).testLife(t, r) })
	t.Run("Memory", func(t *testing.T) { l.in(t).memory() })
	t.Run("Uninstall", func(t *testing.T) { l.in(t).testUninstall(t) })
}

// in is the same cluster for a part, which then fails by itself.
func (l *Lab) in(t *testing.T) *Lab {
	in := *l
	in.t, in.Cluster = t, l.Cluster.In(t)
	machine := *l.Machine
	machine.t = t
	in.Machine = &machine
	return &in
}

// testDoctor: on a stock Debian kernel perf events are refused, and the product works without.
func (l *Lab) testDoctor(t *testing.T) {
	if got := l.Machine.Must("cat /proc/sys/kernel/perf_event_paranoid"); got != "3" {
		t.Fatalf("kernel.perf_event_paranoid is %s: not what Debian ships", got)
	}
	out, err := l.kubectl(t.Context(), "", "exec", "-n", namespace, "daemonset/oom-tracer", "--", "/oom-tracer", "doctor", "--config", "/etc/oom-tracer/config/config.yaml")
	t.Logf("doctor, in the pod:\n%s", out)
	if err != nil {
		t.Errorf("doctor: %v", err)
	}
	for _, want := range []string{`(?m)^ok .*hooks .*fentry`, `(?i)perf_event_paranoid.* 3`, `(?i)ring buffer`} {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("doctor does not say %s", want)
		}
	}
	if strings.Contains(out, "fail ") {
		t.Error("doctor says that something fails")
	}
}

// testLaptop: kubectl oom needs nothing but a kubeconfig, with kubectl itself and a kubelet that forwards the port.
func (l *Lab) testLaptop(t *testing.T) {
	for command, want := range map[string]string{"nodes": nodeName, "top": "shop/"} {
		cmd := exec.CommandContext(t.Context(), l.kubectlPath(), "oom", command)
		cmd.Env = []string{"KUBECONFIG=" + l.kubeconfig, "HOME=" + t.TempDir(), "PATH=" + filepath.Dir(oomtest.Program(t, "kubectl-oom"))}
		out, err := cmd.CombinedOutput()
		t.Logf("kubectl oom %s:\n%s", command, out)
		if err != nil || !strings.Contains(string(out), want) {
			t.Errorf("kubectl oom %s does not show %s: %v", command, want, err)
		}
	}
}

// testConfined: our processes are confined as the distribution and the chart have it, and a node out of memory takes them last.
func (l *Lab) testConfined(t *testing.T) {
	for name, want := range map[string][]string{
		"oom-tracer":      {"adj=-998", "Seccomp:\t2", "NoNewPrivs:\t1", "cri-containerd.apparmor.d (enforce)", "CapEff:\t000000c401000000"},
		"oom-annotator":   {"adj=-997", "Seccomp:\t2", "NoNewPrivs:\t1", "cri-containerd.apparmor.d (enforce)", "CapEff:\t0000000000000000"},
		"oom-auth":        {"adj=-997", "Seccomp:\t2", "NoNewPrivs:\t1", "cri-containerd.apparmor.d (enforce)", "CapEff:\t0000000000000000"},
		"oom-descheduler": {"adj=-997", "Seccomp:\t2", "cri-containerd.apparmor.d (enforce)", "CapEff:\t0000000000000000"},
		"nats":            {"adj=-997", "Seccomp:\t2", "cri-containerd.apparmor.d (enforce)", "CapEff:\t0000000000000000"},
	} {
		out := l.Machine.Must(`pid=$(pidof ` + name + `); echo adj=$(cat /proc/$pid/oom_score_adj); cat /proc/$pid/attr/current; grep -E '^(Seccomp|NoNewPrivs|CapEff):' /proc/$pid/status`)
		for _, w := range want {
			if !strings.Contains(out, w) {
				t.Errorf("%s has not %q:\n%s", name, w, out)
			}
		}
	}
}

// testQuiet: a first install writes no error.
func (l *Lab) testQuiet(t *testing.T) {
	for _, name := range []string{"daemonset/oom-tracer", "deployment/oom-annotator", "deployment/oom-auth", "statefulset/oom-tracer-nats"} {
		log, err := l.kubectl(t.Context(), "", "logs", "-n", namespace, name, "--all-containers")
		if err != nil {
			t.Error(err)
		}
		t.Logf("%s:\n%s", name, log)
		for line := range strings.Lines(log) {
			// A tracer that comes before oom-auth comes again.
			early := strings.Contains(line, `authentication error - Token "[REDACTED]"`)
			if !early && regexp.MustCompile(`level=ERROR|\[ERR\]|Permissions Violation`).MatchString(line) {
				t.Errorf("a first install is not quiet: %s: %s", name, line)
			}
		}
	}
}

// story is a kill, and what must become of it.
type story struct {
	name      string
	container string // of the victim, empty: not in a pod
	scope     event.Scope
	levels    []event.LimitLevel
	outcome   string // result/reason
	processes int    // at least; 1: exactly
	deleted   bool   // the pod, with the kill: nothing is written about it any more
	cause     func(l *Lab)
}

// make makes the pod or Deployment that a story kills; of init, its cause does.
func (l *Lab) make(name string) {
	l.t.Helper()
	switch name {
	case "container", "gone", "reborn", "away", "child":
		l.pod(name, limited("32Mi"), side)
	case "pod":
		l.pod(name, side, func(s *corev1.PodSpec) { m := memory("48Mi"); s.Resources = &m })
	case "static":
		l.Machine.Must(`mkdir -p /etc/kubernetes/manifests && cat >/etc/kubernetes/manifests/static.yaml <<'END'
apiVersion: v1
kind: Pod
metadata: {name: static, namespace: shop}
spec:
  securityContext: {runAsNonRoot: true, runAsUser: 1000, seccompProfile: {type: RuntimeDefault}}
  containers:
    - name: main
      image: localhost/pod:1
      securityContext: {allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
      resources: {limits: {memory: 32Mi}, requests: {cpu: 1m}}
END`)
	case "cart", "web":
		l.deployment(name)
	}
}

// shop makes the pods that are to be killed, and one that is not.
func (l *Lab) shop() {
	l.t.Helper()
	l.pod("bystander")
	names := []string{"container", "pod", "static", "cart", "web"}
	for _, name := range names {
		l.make(name)
	}
	for _, name := range append(names, "bystander") {
		l.running(name, "")
	}
}

func (l *Lab) testKills(t *testing.T, r *record) {
	l.shop()
	for _, s := range stories() {
		t.Run(s.name, func(t *testing.T) { l.in(t).tell(t, r, s) })
	}
	t.Run("Untouched", func(t *testing.T) { l.in(t).testUntouched(t) })
	t.Run("Console", func(t *testing.T) { l.in(t).testConsole(t, r) })
}

// stories are the kinds of kills on a node, in the order in which they disturb it more and more.
func stories() []story {
	own := []event.LimitLevel{event.LevelContainer, event.LevelPod}
	return []story{
		{name: "container", container: "main", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelContainer}, outcome: "skipped/level",
			processes: 2, cause: func(l *Lab) { l.exec("container", "main", "64", "3") }},
		{name: "pod", container: "main", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelPod}, outcome: "skipped/level", cause: func(l *Lab) { l.exec("pod", "main", "96") }},
		{name: "static", container: "main", scope: event.ScopeCgroup, levels: own, outcome: "skipped/", cause: func(l *Lab) { l.exec("static-"+nodeName, "main", "64") }},
		{name: "init", container: "prepare", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelContainer}, outcome: "skipped/level", cause: func(l *Lab) {
			l.pod("init", limited("64Mi"), func(s *corev1.PodSpec) {
				s.RestartPolicy = corev1.RestartPolicyNever
				s.InitContainers = []corev1.Container{{Name: "prepare", Image: "localhost/pod:1", Args: []string{"64"}, Resources: memory("16Mi")}}
			})
		}},
		{name: "cart", container: "main", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelKubepods}, outcome: "annotated/marked",
			cause: func(l *Lab) { l.allPods(l.running("cart", "").Name) }},
		{name: "web", container: "main", scope: event.ScopeGlobal, levels: []event.LimitLevel{event.LevelNode}, outcome: "annotated/marked",
			cause: func(l *Lab) { l.nodeOutOfMemory(l.running("web", "").Name) }},
		{name: "service", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelOther}, outcome: "skipped/host", processes: 1,
			cause: func(l *Lab) {
				l.Machine.Must("systemd-run --quiet --wait --collect --unit=greedy -p MemoryMax=16M -p MemorySwapMax=0 /usr/local/bin/pod 64 || true")
			}},
	}
}

// nodeOutOfMemory leaves the node less memory than the limit of all pods, and has a pod take the rest.
func (l *Lab) nodeOutOfMemory(pod string) {
	l.t.Helper()
	// A service that the OOM killer does not take.
	l.Machine.Must(`systemd-run --quiet --unit=holder -p OOMScoreAdjust=-1000 /bin/sh -c 'head -c 500M /dev/zero | tail -n 1 | sleep 600'
for i in $(seq 120); do
	[ $(cat /sys/fs/cgroup/system.slice/holder.service/memory.current) -lt 500000000 ] || break
	sleep 1
done
# This ends the thrashing before it lasts for minutes: MGLRU does not evict the working set of a second.
echo 1000 >/sys/kernel/mm/lru_gen/min_ttl_ms`)
	defer l.Machine.Must("systemctl stop holder; echo 0 >/sys/kernel/mm/lru_gen/min_ttl_ms")
	l.exec(pod, "main", "3000")
}

// tell causes the kill, waits for all that must follow, and prints when it did. It returns how long each took after the kill.
func (l *Lab) tell(t *testing.T, r *record, s story) map[string]time.Duration {
	var victim *corev1.Pod
	if s.container != "" && s.name != "init" {
		victim = l.running(s.name, "")
	}
	known := map[string]bool{}
	for _, k := range r.killed(func(*event.Event) bool { return true }) {
		known[k.ID] = true
	}
	requests := len(l.Audit())
	ahead, err := l.Machine.offset()
	if err != nil {
		t.Fatal(err)
	}
	s.cause(l)
	if s.name == "init" {
		pod, err := l.Client.CoreV1().Pods("shop").Get(t.Context(), "init", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		victim = pod
	}
	var uid string
	if victim != nil {
		uid = string(victim.UID)
		if hash := victim.Annotations["kubernetes.io/config.hash"]; hash != "" {
			uid = hash
		}
	}
	var kills []kill
	var outcome event.Outcome
	l.await("the kill has an outcome", outcomeTime, func() error {
		kills = r.killed(func(e *event.Event) bool {
			if known[e.ID] {
				return false
			}
			if uid == "" {
				return e.Container == nil
			}
			return e.Container != nil && e.Container.PodUID == uid
		})
		if len(kills) == 0 {
			return errors.New("NATS has no such kill")
		}
		if len(kills) < s.processes {
			return fmt.Errorf("NATS has %d kills", len(kills))
		}
		// Of several processes of a pod one is why it is marked, and the others find it marked already.
		for _, k := range kills {
			o, ok := r.outcome(k.ID, event.StageAnnotate)
			if !ok {
				return errors.New("one has no outcome")
			}
			if outcome.Kill == "" || o.Result == event.ResultAnnotated {
				outcome = o
			}
		}
		return nil
	})
	first := kills[slices.IndexFunc(kills, func(k kill) bool { return k.ID == outcome.Kill })]
	took := map[string]time.Duration{}
	done := func(stage string, when time.Time, detail string) {
		took[stage] = when.Sub(first.Time.Add(-ahead))
		l.logf("  %+9.3f s  %s%s", took[stage].Seconds(), stage, detail)
	}
	l.logf("%s: the kernel killed %s[%d] (%d processes), scope %s, tier %s", s.name, first.Victim.Comm, first.Victim.PID, len(kills), first.Scope, first.Node.Tier)
	done("stored", first.stored.Add(-ahead), "")
	done("outcome", outcome.Time.Add(-ahead), fmt.Sprintf(": %s (%s)", outcome.Result, outcome.Reason))

	if s.processes == 1 && len(kills) != 1 {
		t.Errorf("%d kills, not %d", len(kills), s.processes)
	}
	for _, k := range kills {
		if k.Scope != s.scope || k.Outcome != event.OutcomeKilled || k.Limit == nil && s.scope != event.ScopeGlobal {
			t.Errorf("kill %s: scope %s, outcome %s, limit %+v", k.ID, k.Scope, k.Outcome, k.Limit)
		}
		if k.Limit != nil && !slices.Contains(s.levels, k.Limit.Level) {
			t.Errorf("kill %s: level %s", k.ID, k.Limit.Level)
		}
		if k.Incident == nil || first.Incident == nil || s.processes > 1 && k.Incident.ID != first.Incident.ID {
			t.Errorf("kill %s: incident %+v", k.ID, k.Incident)
		}
	}
	if got := string(outcome.Result) + "/" + string(outcome.Reason); !strings.HasPrefix(got, s.outcome) {
		t.Errorf("outcome %s, not %s: %+v", got, s.outcome, outcome)
	}
	if s.container == "" {
		return took
	}
	if outcome.Pod == nil || outcome.Pod.UID != string(victim.UID) || outcome.Container != s.container {
		t.Errorf("outcome of pod %+v, container %q", outcome.Pod, outcome.Container)
	}
	if s.deleted {
		return took
	}
	// request finds one of those that came since, by the audit log.
	request := func(what string, patience time.Duration, is func(kubetest.AuditEvent) bool) {
		t.Helper()
		l.await(what, patience, func() error {
			for _, e := range l.Audit()[requests:] {
				if e.ResponseStatus.Code < 300 && is(e) {
					done(what, e.RequestReceivedTimestamp.Time, "")
					return nil
				}
			}
			return errors.New("no such request")
		})
	}
	by := func(e kubetest.AuditEvent, account string) bool {
		return e.User.Username == "system:serviceaccount:"+namespace+":"+account
	}
	request("Event", time.Minute, func(e kubetest.AuditEvent) bool {
		return by(e, "oom-annotator") && e.ObjectRef.Resource == "events" && strings.Contains(string(e.RequestObject), string(victim.UID))
	})
	// The reason is OOMKilled, or Error where containerd has not seen the kill: of the node's memory, or at a container's start.
	if s.processes != 1 {
		request("kubelet status", 2*time.Minute, func(e kubetest.AuditEvent) bool {
			reason := regexp.MustCompile(`"exitCode":137,.*?"reason":"(\w+)"`).FindSubmatch(e.RequestObject)
			if e.User.Username != "system:node:"+nodeName || e.ObjectRef.Subresource != "status" || e.ObjectRef.Name != victim.Name || reason == nil {
				return false
			}
			l.logf("               the kubelet says %s", reason[1])
			return true
		})
	}
	if outcome.Result != event.ResultAnnotated {
		return took
	}
	request("annotated", time.Minute, func(e kubetest.AuditEvent) bool {
		return by(e, "oom-annotator") && e.Verb == "patch" && e.ObjectRef.Resource == "pods" && e.ObjectRef.Name == victim.Name &&
			strings.Contains(string(e.RequestObject), evictMe)
	})
	request("evicted", 3*time.Minute, func(e kubetest.AuditEvent) bool {
		return by(e, "oom-descheduler") && e.ObjectRef.Subresource == "eviction" && e.ObjectRef.Name == victim.Name
	})
	request("gone", 3*time.Minute, func(e kubetest.AuditEvent) bool {
		return e.Verb == "delete" && e.User.Username == "system:node:"+nodeName && e.ObjectRef.Name == victim.Name
	})
	replacement := l.running(s.name, string(victim.UID))
	for _, c := range replacement.Status.Conditions {
		if c.Type == corev1.PodReady {
			done("replaced", c.LastTransitionTime.Time, ": "+replacement.Name+" is ready (to the second)")
		}
	}
	l.await("the last word on it", time.Minute, func() error {
		o, ok := r.outcome(first.ID, event.StageClose)
		if !ok || o.Result != event.ResultEvicted {
			return fmt.Errorf("outcome of the stage close: %t %s", ok, o.Result)
		}
		done("closed", o.Time.Add(-ahead), fmt.Sprintf(": %s (%s)", o.Result, o.Reason))
		return nil
	})
	return took
}

// testUntouched: only the pods of web and cart were marked or evicted, and none of ours was killed.
func (l *Lab) testUntouched(t *testing.T) {
	for _, e := range l.Audit() {
		may := strings.HasPrefix(e.ObjectRef.Name, "web-") || strings.HasPrefix(e.ObjectRef.Name, "cart-")
		annotator := e.User.Username == "system:serviceaccount:"+namespace+":oom-annotator" && e.ObjectRef.Resource == "pods"
		if (annotator || e.ObjectRef.Subresource == "eviction") && !may {
			t.Errorf("%s %s %s %s/%s by %s", e.Verb, e.ObjectRef.Resource, e.ObjectRef.Subresource, e.ObjectRef.Namespace, e.ObjectRef.Name, e.User.Username)
		}
	}
	pods, err := l.Client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, pod := range pods.Items {
		if _, marked := pod.Annotations[evictMe]; marked {
			t.Errorf("%s/%s is marked", pod.Namespace, pod.Name)
		}
		for _, status := range pod.Status.ContainerStatuses {
			job := pod.Labels["batch.kubernetes.io/job-name"] != "" // it tries until NATS is there
			if pod.Namespace == namespace && !job && status.RestartCount > 0 {
				t.Errorf("%s/%s was restarted %d times: %+v", pod.Namespace, pod.Name, status.RestartCount, status.LastTerminationState.Terminated)
			}
		}
	}
}

var killedLine = regexp.MustCompile(`Killed process (\d+) `)

// testConsole: the kernel's own lines name the same processes, once each.
func (l *Lab) testConsole(t *testing.T, r *record) {
	onConsole, inRecord := map[string]bool{}, map[string]bool{}
	for _, m := range killedLine.FindAllStringSubmatch(l.Machine.Must("dmesg"), -1) {
		onConsole[m[1]] = true
	}
	for _, k := range r.killed(func(*event.Event) bool { return true }) {
		inRecord[fmt.Sprint(k.Victim.PID)] = true
	}
	for pid := range onConsole {
		if !inRecord[pid] {
			t.Errorf("the console says that %s was killed, NATS has no such event", pid)
		}
	}
	for pid := range inRecord {
		if !onConsole[pid] {
			t.Errorf("NATS has a kill of %s, of which the console says nothing", pid)
		}
	}
	l.logf("victims: %d on the console, %d on NATS", len(onConsole), len(inRecord))
	if err := r.whole(); err != nil {
		t.Error(err)
	}
	if gaps := r.gapsNow(); len(gaps) > 0 {
		t.Errorf("gaps: %+v", gaps)
	}
}
