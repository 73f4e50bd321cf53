//go:build bench

package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

const benchNodes = 10_000

// benchPods are those of a simulated API server: 150,000, unless OOM_BENCH_SIMULATED says otherwise.
var benchPods = sync.OnceValue(func() int {
	if n, err := strconv.Atoi(os.Getenv("OOM_BENCH_SIMULATED")); err == nil {
		return n
	}
	return 150_000
})

// figures are what is measured, for build/bench-annotate.json and the log.
func figure(t *testing.T, name string, value any) {
	t.Logf("%-40s %v", name, value)
	file := filepath.Join(os.Getenv("OOM_TEST_BUILD"), "bench-annotate.json")
	all := map[string]any{}
	if data, err := os.ReadFile(file); err == nil {
		_ = json.Unmarshal(data, &all)
	}
	all[name] = fmt.Sprint(value)
	data, err := json.MarshalIndent(all, "", "  ")
	if err == nil {
		err = os.WriteFile(file, append(data, '\n'), 0o644)
	}
	if err != nil {
		t.Error(err)
	}
}

// benchPod is a pod as a cluster has them: two containers, a dozen environment variables, managed fields. What does not
// tell pods apart is made once: the server that has them shall not be what is measured.
func benchPod(i int) corev1.Pod {
	base := baseBenchPod()
	p := benchPodWithout(i)
	p.ManagedFields, p.Spec.Containers, p.Status.Conditions = base.ManagedFields, base.Spec.Containers, base.Status.Conditions
	p.Status.ContainerStatuses = slices.Clone(base.Status.ContainerStatuses)
	for c := range p.Status.ContainerStatuses {
		p.Status.ContainerStatuses[c].ContainerID = fmt.Sprintf("containerd://%064x", 2*i+c)
	}
	return p
}

func benchPodWithout(i int) corev1.Pod {
	yes := true
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: fmt.Sprintf("team-%d", i%200), Name: fmt.Sprintf("deployment-%d-7d9c5b8f6d-%05x", i%5000, i), ResourceVersion: strconv.Itoa(1000 + i),
			UID:             types.UID(fmt.Sprintf("5b1a7a5e-1c1d-4b6f-8a55-%012x", i)),
			Labels:          map[string]string{"app": fmt.Sprint("deployment-", i%5000), "pod-template-hash": "7d9c5b8f6d", "team": fmt.Sprint("team-", i%200)},
			Annotations:     map[string]string{"prometheus.io/scrape": "true", "checksum/config": strings.Repeat("0123456789abcdef", 4)},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: fmt.Sprint("deployment-", i%5000, "-7d9c5b8f6d"), Controller: &yes}},
		},
		Spec:   corev1.PodSpec{NodeName: fmt.Sprintf("ip-10-%d-%d.eu-central-1.compute.internal", i%benchNodes/250, i%benchNodes%250), ServiceAccountName: "default"},
		Status: corev1.PodStatus{Phase: corev1.PodRunning, PodIP: "10.0.0.1", HostIP: "10.0.0.2"},
	}
}

var baseBenchPod = sync.OnceValue(func() corev1.Pod {
	var p corev1.Pod
	for range 3 {
		p.ManagedFields = append(p.ManagedFields, metav1.ManagedFieldsEntry{
			Manager: "kubelet", Operation: "Update", APIVersion: "v1", FieldsType: "FieldsV1",
			FieldsV1: metav1.NewFieldsV1(`{"f:status":{` + strings.Repeat(`"f:conditions":{".":{},"k:{\"type\":\"Ready\"}":{".":{}}},`, 12) + `"f:x":{}}}`),
		})
	}
	for c := range 2 {
		container := corev1.Container{
			Name: []string{"main", "sidecar"}[c], Image: "registry.example.com/team/image:v1.2.3",
			Resources: corev1.ResourceRequirements{Limits: corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("512Mi")}},
		}
		for e := range 12 {
			container.Env = append(container.Env, corev1.EnvVar{Name: fmt.Sprint("SOME_VARIABLE_", e), Value: "some-value-that-is-not-short"})
		}
		p.Spec.Containers = append(p.Spec.Containers, container)
		p.Status.ContainerStatuses = append(p.Status.ContainerStatuses, corev1.ContainerStatus{
			Name: container.Name, Image: container.Image, ImageID: container.Image + "@sha256:" + strings.Repeat("0123456789abcdef", 4),
			Ready: true,
		})
	}
	for _, kind := range []corev1.PodConditionType{corev1.PodReady, corev1.PodInitialized, corev1.PodScheduled, corev1.ContainersReady} {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: kind, Status: corev1.ConditionTrue, LastTransitionTime: metav1.Now()})
	}
	return p
})

// largeCluster answers like an API server with benchPods() pods that nobody changes, in trouble where it says so: to fill a
// real one with as many takes many minutes and gigabytes.
type largeCluster struct {
	watchList bool // it streams all pods, as servers do from Kubernetes 1.34 on
	// Of every 50 requests it refuses one with 429, and of every 400 pages one because its continue token has expired.
	trouble bool

	t     *testing.T
	codec *protobuf.Serializer
	raw   *protobuf.RawSerializer
	asked atomic.Int64
	lists atomic.Int64 // those that began at the first page
}

func (c *largeCluster) start(t *testing.T) *rest.Config {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		t.Fatal(err)
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	c.t, c.codec, c.raw = t, protobuf.NewSerializer(scheme, scheme), protobuf.NewRawSerializer(scheme, scheme)
	server := httptest.NewServer(c)
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return &rest.Config{Host: server.URL}
}

func (c *largeCluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	from, _ := strconv.Atoi(query.Get("continue"))
	limit, _ := strconv.Atoi(query.Get("limit"))
	asked := c.asked.Add(1)
	refuse := func(code int, reason metav1.StatusReason) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		fmt.Fprintf(w, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":%q}`, code, reason)
	}
	switch {
	case c.trouble && asked%50 == 1:
		refuse(http.StatusTooManyRequests, metav1.StatusReasonTooManyRequests)
	case query.Get("watch") != "" && query.Has("sendInitialEvents") && !c.watchList:
		refuse(http.StatusUnprocessableEntity, metav1.StatusReasonInvalid)
	case query.Get("watch") != "":
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf;stream=watch")
		w.WriteHeader(http.StatusOK)
		if query.Has("sendInitialEvents") {
			c.stream(w)
		}
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	case c.trouble && from == 100_000 && c.lists.Load() == 1:
		refuse(http.StatusGone, metav1.StatusReasonExpired)
	default:
		if from == 0 {
			c.lists.Add(1)
		}
		list := corev1.PodList{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "PodList"}, ListMeta: metav1.ListMeta{ResourceVersion: "1000000"}}
		for i := from; i < min(from+limit, benchPods()); i++ {
			list.Items = append(list.Items, benchPod(i))
		}
		if from+limit < benchPods() {
			list.Continue = strconv.Itoa(from + limit)
		}
		w.Header().Set("Content-Type", "application/vnd.kubernetes.protobuf")
		if err := c.codec.Encode(&list, w); err != nil {
			c.t.Error(err)
		}
	}
}

// stream writes every pod, and the bookmark that says that these were all.
func (c *largeCluster) stream(w io.Writer) {
	out := protobuf.LengthDelimitedFramer.NewFrameWriter(w)
	send := func(kind watch.EventType, pod *corev1.Pod) error {
		pod.TypeMeta = metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}
		var object, frame bytes.Buffer
		if err := c.codec.Encode(pod, &object); err != nil {
			return err
		}
		if err := c.raw.Encode(&metav1.WatchEvent{Type: string(kind), Object: runtime.RawExtension{Raw: object.Bytes()}}, &frame); err != nil {
			return err
		}
		_, err := out.Write(frame.Bytes())
		return err
	}
	for i := range benchPods() {
		pod := benchPod(i)
		if err := send(watch.Added, &pod); err != nil {
			return // the client has gone
		}
	}
	_ = send(watch.Bookmark, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{
		ResourceVersion: "1000000", Annotations: map[string]string{metav1.InitialEventsAnnotationKey: "true"},
	}})
}

// memory reads a line of /proc/<pid>/status, in MiB.
func memory(t *testing.T, pid int, key string) float64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			var kib float64
			fmt.Sscan(value, &kib)
			return kib / 1024
		}
	}
	t.Fatalf("no %s", key)
	return 0
}

// cpuTime is the time that a process has used, in user space and in the kernel.
func cpuTime(t *testing.T, pid int) time.Duration {
	t.Helper()
	var used unix.Timespec
	if err := unix.ClockGettime(int32(^pid)<<3|2, &used); err != nil { // MAKE_PROCESS_CPUCLOCK in include/linux/posix-timers.h
		t.Fatal(err)
	}
	return time.Duration(used.Nano())
}

// benchReady starts an annotator that only observes, and measures what it took until it was ready.
func benchReady(t *testing.T, c *largeCluster, name string) *rig {
	began := time.Now()
	r := newRig(t, (&kubetest.Cluster{}).In(t), c.start(t), func(cfg *config.Config) { cfg.Policy.Annotation, cfg.Log.Level = "", "info" })
	for deadline := began.Add(10 * time.Minute); ; time.Sleep(50 * time.Millisecond) { // on a machine that does other things too
		status, body := r.get("/readyz")
		if status == http.StatusOK {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("not ready: %s", body)
		}
	}
	figure(t, "pods_listed_s"+name, time.Since(began).Seconds())
	pid := r.annotator.cmd.Process.Pid
	figure(t, "rss_listed_mib"+name, memory(t, pid, "VmRSS"))
	figure(t, "rss_peak_mib"+name, memory(t, pid, "VmHWM"))
	figure(t, "cpu_listed_s"+name, cpuTime(t, pid).Seconds())
	if n := c.lists.Load(); c.watchList && n > 0 || n > 2 {
		t.Errorf("%d lists began at the first page", n)
	}
	return r
}

// TestBenchRealPods: the same with as many pods as a real API server is given here, which streams them.
func TestBenchRealPods(t *testing.T) {
	count := 10_000
	if text := os.Getenv("OOM_BENCH_PODS"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	c := kubetest.StartWith(t, kubetest.Options{Args: map[string]string{"audit-policy-file": "", "audit-log-path": ""}})
	for i := range 200 {
		c.Namespace(fmt.Sprint("team-", i))
	}
	account := c.Annotator()
	var creating sync.WaitGroup
	var failed atomic.Int64
	for w := range 16 {
		creating.Go(func() {
			for i := w; i < count; i += 16 {
				pod := benchPod(i)
				pod.ResourceVersion, pod.UID, pod.ManagedFields = "", "", nil
				pod.OwnerReferences[0].UID = "0f1e2d3c"
				if _, err := c.Client.CoreV1().Pods(pod.Namespace).Create(t.Context(), &pod, metav1.CreateOptions{}); err != nil {
					if failed.Add(1) == 1 {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	creating.Wait()
	if failed.Load() > 0 {
		t.FailNow()
	}
	began := time.Now()
	r := newRig(t, c, account, func(cfg *config.Config) { cfg.Policy.Annotation = "" })
	r.ready()
	figure(t, "real_pods", count)
	figure(t, "real_pods_ready_s", time.Since(began).Seconds())
	figure(t, "real_pods_rss_peak_mib", memory(t, r.annotator.cmd.Process.Pid, "VmHWM"))
	if _, body := r.get("/metrics"); !strings.Contains(body, fmt.Sprintf("oom_tracer_known_pods %d", count)) {
		t.Error("not all pods are known")
	}
}

// TestBenchMemory: memory and start-up of the annotator in a cluster of 150,000 pods on 10,000 nodes, and how
// many kills a second are decided there.
func TestBenchMemory(t *testing.T) {
	others := map[string]*largeCluster{"_pages": {}, "_trouble": {trouble: true}, "_stream_trouble": {watchList: true, trouble: true}}
	if os.Getenv("OOM_BENCH_SIMULATED") != "" {
		others = nil
	}
	for name, c := range others {
		t.Run(name, func(t *testing.T) { benchReady(t, c, name) })
	}
	r := benchReady(t, &largeCluster{watchList: true}, "")
	one := benchPod(1)
	figure(t, "simulated_pods", benchPods())
	figure(t, "bytes_of_a_pod_in_the_api", one.Size())
	pid := r.annotator.cmd.Process.Pid
	_, body := r.get("/metrics")
	for _, key := range []string{"go_memstats_heap_inuse_bytes ", "go_memstats_alloc_bytes "} {
		if _, rest, ok := strings.Cut(body, "\n"+key); ok {
			value, _, _ := strings.Cut(rest, "\n")
			f, _ := strconv.ParseFloat(value, 64)
			figure(t, strings.TrimSpace(key)+"_mib", f/1024/1024)
		}
	}

	// The kills wait in the stream, so that nobody publishes while they are decided.
	freeze := func(s unix.Signal) {
		if err := unix.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
	}
	freeze(unix.SIGSTOP)
	const kills = 20_000
	var events []event.Event
	for i := range kills {
		j := i * 7 % benchPods()
		pod := benchPod(j)
		e := r.killOf(&pod, fmt.Sprintf("%064x", 2*j))
		e.Node.Name = pod.Spec.NodeName
		events = append(events, e)
	}
	for i := 0; i < kills; i += 5000 {
		r.publish(events[i : i+5000]...)
		for r.publisher.Pending() > 0 {
			time.Sleep(time.Millisecond)
		}
	}
	used := cpuTime(t, pid)
	freeze(unix.SIGCONT)
	for i := range kills {
		if o := r.outcome(); o.Result != event.ResultObserved || o.Container == "" {
			t.Fatalf("outcome %d: %+v", i, o)
		}
	}
	figure(t, "cpu_ms_per_decision", float64((cpuTime(t, pid)-used).Microseconds())/1000/kills)
	// By the server's clock.
	first, last := time.Time{}, time.Time{}
	err := bus.Tail(t.Context(), r.conn, bus.TailOptions{Subjects: []string{"oom.v1.outcome.>"}, Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		if first.IsZero() {
			first = m.Time
		}
		last = m.Time
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	figure(t, "decisions_per_s", float64(kills)/last.Sub(first).Seconds())
	figure(t, "rss_after_mib", memory(t, pid, "VmRSS"))
}

// TestBenchCPU: CPU time of the annotator's process for a kill that marks its pod, and for a further kill in a marked pod.
func TestBenchCPU(t *testing.T) {
	const kills, repeats = 500, 20
	c := kubetest.StartWith(t, kubetest.Options{Args: map[string]string{"audit-policy-file": "", "audit-log-path": ""}})
	c.Node(node)
	c.Namespace("shop")
	var all []*corev1.Pod
	for i := range kills {
		all = append(all, c.Pod("shop", fmt.Sprint("pod-", i), node))
	}
	r := newRig(t, c, c.Annotator(), func(cfg *config.Config) { cfg.Log.Level = "info" })
	r.ready()
	pid := r.annotator.cmd.Process.Pid
	measure := func(name string, count int, want event.Result, publish func()) {
		before := cpuTime(t, pid)
		publish()
		for range count {
			if o := r.outcome(); o.Result != want {
				t.Errorf("outcome %s/%s of %s, want %s", o.Result, o.Reason, o.Kill, want)
			}
		}
		figure(t, "cpu_ms_per_"+name, float64((cpuTime(t, pid)-before).Microseconds())/1000/float64(count))
	}
	mark := func(pods []*corev1.Pod, pause time.Duration) func() {
		return func() {
			for _, pod := range pods {
				r.publish(r.killOf(pod, ""))
				time.Sleep(pause)
			}
		}
	}
	// Each claim writes all marks of the window: ten an hour as shipped, and here all.
	const few, more = 50, 100
	measure("mark", few, event.ResultAnnotated, mark(all[:few], 15*time.Millisecond))
	measure("mark_in_a_storm", more-few, event.ResultAnnotated, mark(all[few:more], 0))
	measure("mark_of_500", kills-more, event.ResultAnnotated, mark(all[more:], 15*time.Millisecond))
	measure("repeat", kills*repeats, event.ResultSkipped, func() {
		for range repeats {
			for _, pod := range all {
				r.publish(r.killOf(pod, ""))
			}
			for r.publisher.Pending() > 0 {
				time.Sleep(time.Millisecond)
			}
		}
	})
}

// TestBenchIdle: CPU time of the annotator's process in a minute without kills, and how often it woke. One of the pods is marked.
func TestBenchIdle(t *testing.T) {
	c := kubetest.StartWith(t, kubetest.Options{Args: map[string]string{"audit-policy-file": "", "audit-log-path": ""}})
	c.Node(node)
	c.Namespace("shop")
	r := newRig(t, c, c.Annotator(), keep)
	r.ready()
	e := r.killOf(c.Pod("shop", "pod", node), "")
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	time.Sleep(10 * time.Second) // its Event
	pid := r.annotator.cmd.Process.Pid
	used, woke := cpuTime(t, pid), wakeups(t, pid)
	time.Sleep(time.Minute)
	figure(t, "idle_cpu_s_a_minute", (cpuTime(t, pid) - used).Seconds())
	figure(t, "idle_wakeups_a_minute", wakeups(t, pid)-woke)
	figure(t, "idle_rss_mib", memory(t, pid, "VmRSS"))
}

// wakeups is how often the threads of a process have waited.
func wakeups(t *testing.T, pid int) (n int) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		t.Fatalf("list threads: %d, %v", len(tasks), err)
	}
	for _, task := range tasks {
		data, err := os.ReadFile(task)
		if err != nil {
			continue // it has ended
		}
		if _, rest, ok := strings.Cut(string(data), "\nvoluntary_ctxt_switches:"); ok {
			count := 0
			fmt.Sscan(rest, &count)
			n += count
		}
	}
	return n
}

// TestBenchLatency: from real kills, each in a pod of its own and by the limit of all pods, to the annotation as a
// watcher of the real API server sees it. It begins at the time that the kernel gave the kill.
func TestBenchLatency(t *testing.T) {
	c := kubetest.Start(t)
	c.Node(node)
	c.Namespace("shop")
	account := c.Annotator()
	const kills = 1000
	var all []*corev1.Pod
	for i := range kills {
		all = append(all, c.Pod("shop", fmt.Sprint("pod-", i), node))
	}
	r, burstable := benchRig(t, c, account)

	w, err := c.Client.CoreV1().Pods("shop").Watch(t.Context(), metav1.ListOptions{ResourceVersion: all[kills-1].ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	took := make(chan []time.Duration, 1)
	go func() {
		var seen []time.Duration
		for e := range w.ResultChan() {
			pod, ok := e.Object.(*corev1.Pod)
			if !ok || e.Type != watch.Modified || pod.Annotations[evictMe] == "" {
				continue
			}
			now := time.Now()
			if seen = append(seen, now.Sub(summary(t, pod).Time)); len(seen) == kills {
				break
			}
		}
		took <- seen
	}()
	for _, pod := range all {
		killIn(t, burstable, pod, c.ContainerID(pod, "main"))
		time.Sleep(10 * time.Millisecond)
	}
	time.AfterFunc(10*time.Second, w.Stop) // some may be on their way
	seen := <-took
	figure(t, "kills_annotated", fmt.Sprintf("%d of %d", len(seen), kills))
	if len(seen) < kills {
		t.Error("not every kill is on its pod")
	}
	percentiles(t, "kill_to_annotation", seen)

	r.connect()
	var stored []time.Duration
	err = bus.Tail(t.Context(), r.conn, bus.TailOptions{Subjects: []string{"oom.v1.kill.>"}, Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		e, err := event.Parse(m.Data)
		stored = append(stored, m.Time.Sub(e.Time))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	percentiles(t, "of_this_kill_to_jetstream", stored)
}

// TestBenchLoop: from real kills to the eviction, by the clocks of the kernel and of the API server's audit log: with a
// descheduler that looks without a pause, which is what all parts take together, and with one that comes every 10 s.
// All runs as it ships, but that the policies let a hundred pods go at once.
func TestBenchLoop(t *testing.T) {
	path, err := kubetest.Path("deploy/descheduler/policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	shipped, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	policy := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, regexp.MustCompile(`(?m)^maxNoOf.*\n`).ReplaceAll(shipped, nil), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, bench := range []struct {
		name, interval string
	}{{"no_interval", "100ms"}, {"interval_10s", "10s"}} {
		t.Run(bench.name, func(t *testing.T) {
			c := startLoop(t)
			account := c.Annotator()
			const kills = 120
			var all []*corev1.Pod
			for i := range kills {
				all = append(all, c.Pod("shop", fmt.Sprint("pod-", i), node, replicaSet))
			}
			_, burstable := benchRig(t, c, account)
			startDescheduler(t, c, "oom-descheduler", policy, bench.interval)
			for _, pod := range all {
				killIn(t, burstable, pod, c.ContainerID(pod, "main"))
				time.Sleep(rand.N(time.Second)) // not in step with the descheduler
			}
			marks, took := map[string]time.Time{}, []time.Duration{}
			eventually(t, "all are evicted", func() error {
				took = took[:0]
				for _, e := range c.Audit() {
					if e.User.Username != descheduler || e.ResponseStatus.Code != http.StatusCreated {
						continue
					}
					if marks[e.ObjectRef.Name].IsZero() {
						marks[e.ObjectRef.Name] = summary(t, c.GetPod("shop", e.ObjectRef.Name)).Time
					}
					took = append(took, e.RequestReceivedTimestamp.Sub(marks[e.ObjectRef.Name]))
				}
				if len(marks) < kills {
					return fmt.Errorf("%d of %d", len(marks), kills)
				}
				return nil
			})
			figure(t, "kills_evicted_"+bench.name, fmt.Sprintf("%d of %d", len(marks), kills))
			if len(took) > kills {
				t.Errorf("%d evictions of %d pods", len(took), kills)
			}
			percentiles(t, "kill_to_eviction_"+bench.name, took)
		})
	}
}

// benchRig starts a tracer and an annotator as they ship, but that inferred limits count, for not every machine permits
// hooks, and that a thousand pods may be marked. It returns the cgroup for pods, whose parent's limit is soon reached.
func benchRig(t *testing.T, c *kubetest.Cluster, account *rest.Config) (*rig, *cgroupfs.Cgroup) {
	t.Helper()
	root := oomtest.New(t, 512<<20)
	dir := t.TempDir()
	r := &rig{t: t, kubeconfig: c.Kubeconfig(account), configPath: filepath.Join(dir, "config.yaml")}
	// The tests' own places, and nothing else.
	err := os.WriteFile(r.configPath, fmt.Appendf(nil, `
node: {cgroup_root: %q, state_file: %s/state.json}
kernel: {pin_dir: %s/oom-tracer}
nats: {embedded: {listen: %q, dir: %s/nats}}
policy: {inferred_limits: true, budgets: {window: 1m, node: 0, owner: 0, cluster: 1000, cooldown: 0s}}
annotator: {listen: %q}
metrics: {listen: ""}
`, root.Path(), dir, oomtest.BPFFS(t), freePort(t), dir, freePort(t)), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if r.cfg, err = config.Load(r.configPath); err != nil {
		t.Fatal(err)
	}
	start(t, "oom-tracer", "--config", r.configPath, "--node-name", node)
	r.start()
	r.ready()
	kubepods := oomtest.Child(t, root, "kubepods", 16<<20)
	return r, oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited)
}

// killIn has a container of a pod killed.
func killIn(t *testing.T, parent *cgroupfs.Cgroup, pod *corev1.Pod, containerID string) {
	t.Helper()
	group, err := parent.Child("pod"+string(pod.UID), cgroupfs.Unlimited)
	if err != nil {
		t.Fatal(err)
	}
	container, err := group.Child(containerID, cgroupfs.Unlimited)
	if err != nil {
		t.Fatal(err)
	}
	if killed := oomtest.Storm(t, container, 1, 32, "plain"); len(killed) != 1 {
		t.Errorf("%d were killed", len(killed))
	}
	// At once: a thousand of them are work for the kernel.
	if err := errors.Join(container.Remove(), group.Remove()); err != nil {
		t.Error(err)
	}
}

func percentiles(t *testing.T, name string, took []time.Duration) {
	slices.Sort(took)
	for _, p := range []int{50, 90, 99} {
		if len(took) >= 100 {
			figure(t, fmt.Sprintf("%s_p%d_ms", name, p), float64(took[len(took)*p/100-1].Microseconds())/1000)
		}
	}
}
