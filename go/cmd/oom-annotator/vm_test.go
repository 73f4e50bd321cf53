//go:build vm

package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// machineTime is how long a machine may take from its start to its last kill's outcome. On an idle host it is
// 10 s.
const machineTime = 3 * time.Minute

// TestVM is for what this host can or may not do: a kernel whose hooks prove whose limit it was, and that
// runs out of memory as a whole. A stock Debian kernel boots in QEMU, with tracer, hog and the cgroups of a
// kubelet; NATS, the API server and the annotator are the host's. All of it runs as it ships, with the shipped
// policy but for the cooldown: the node's two kills that count follow each other.
func TestVM(t *testing.T) {
	kernels := strings.Fields(os.Getenv("OOM_TEST_KERNELS"))
	if len(kernels) == 0 || len(kernels)%2 != 0 {
		t.Fatal("OOM_TEST_KERNELS does not say which kernels to boot: run the tests with make test-vm-annotate")
	}
	c := kubetest.Start(t)
	c.Namespace("shop")
	account := c.Annotator()
	for i := 0; i < len(kernels); i += 2 {
		t.Run(kernels[i], func(t *testing.T) {
			// QEMU without KVM is an emulator, and has faults: see tools/vm/test-vm.sh.
			var fault error
			for try := 1; try <= 2; try++ {
				if fault = testVM(t, c.In(t), account, fmt.Sprintf("vm-%s-%d", kernels[i], try), kernels[i+1]); fault == nil {
					return
				}
				t.Logf("try %d: %v", try, fault)
			}
			t.Error(fault)
		})
	}
}

// testVM returns an error if something befell the machine.
func testVM(t *testing.T, c *kubetest.Cluster, account *rest.Config, node, kernel string) error {
	natsAddr := startNATSServer(t, "")
	url := config.NATS{URL: "nats://" + natsAddr}
	r := externalRig(t, c, account, url, fmt.Sprintf("nats: {url: %q}\npolicy: {budgets: {cooldown: 0s}}\n", url.URL))
	r.ready()

	c.Node(node)
	pods := map[string]*corev1.Pod{}
	_, port, err := net.SplitHostPort(natsAddr)
	if err != nil {
		t.Fatal(err)
	}
	params := "oom.node=" + node + " oom.nats=" + port
	for _, kind := range []string{"container", "kubepods", "global"} {
		pod := c.Pod("shop", node+"-"+kind, node)
		pods[pod.Name] = pod
		params += fmt.Sprintf(" oom.%s=%s/%s", kind, pod.UID, c.ContainerID(pod, "main"))
	}
	holder := c.Pod("shop", node+"-holder", node)
	params += fmt.Sprintf(" oom.holder=%s/%s", holder.UID, c.ContainerID(holder, "main"))
	before := versions(t, c)

	m := startMachine(t, kernel, params)
	outcomes := map[string]event.Outcome{}
	for deadline := time.After(machineTime); len(outcomes) < len(pods); {
		select {
		case o := <-r.outcomes:
			if o.Pod == nil || pods[o.Pod.Name] == nil {
				t.Fatalf("outcome %+v, pod %+v", o, o.Pod)
			}
			outcomes[o.Pod.Name] = o
		case <-m.done:
			return fmt.Errorf("the machine has ended:\n%s", m.said())
		case <-r.annotator.done:
			t.Fatal("the annotator has ended")
		case <-deadline:
			return fmt.Errorf("%d outcomes after %s:\n%s", len(outcomes), machineTime, m.said())
		}
	}
	kills := map[string]event.Event{} // by ID
	err = bus.Tail(t.Context(), r.conn, bus.TailOptions{Subjects: []string{"oom.v1.kill.>"}, Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		e, err := event.Parse(m.Data)
		kills[e.ID] = e
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(kills) != len(pods) {
		t.Errorf("%d kills", len(kills))
	}
	for _, want := range []struct {
		kind, outcome string
		scope         event.Scope
		level         event.LimitLevel
	}{
		{"container", "skipped/level", event.ScopeCgroup, event.LevelContainer},
		{"kubepods", "annotated/marked", event.ScopeCgroup, event.LevelKubepods},
		{"global", "annotated/marked", event.ScopeGlobal, event.LevelNode},
	} {
		pod := pods[node+"-"+want.kind]
		o := outcomes[pod.Name]
		e := kills[o.Kill]
		if got := string(o.Result) + "/" + string(o.Reason); got != want.outcome || o.Pod.UID != string(pod.UID) || o.Container != "main" {
			t.Errorf("%s: outcome %s (%+v, pod %+v), want %s", pod.Name, got, o, o.Pod, want.outcome)
		}
		if e.Scope != want.scope || e.Limit == nil || e.Limit.Level != want.level || e.Limit.Inferred ||
			e.Node.Name != node || e.Node.Tier != "fentry" && e.Node.Tier != "kprobe" {
			t.Errorf("%s: event %+v, limit %+v", pod.Name, e, e.Limit)
		}
		if o.Result != event.ResultAnnotated {
			continue
		}
		delete(before, "shop/"+pod.Name+"/"+string(pod.UID))
		if now := c.GetPod("shop", pod.Name); now.Annotations[evictMe] != "true" || !strings.Contains(now.Annotations[lastKill], o.Kill) {
			t.Errorf("%s: annotations %v", pod.Name, now.Annotations)
		}
	}
	wantSame(t, c, before) // the holder's too, and the container's own
	// Who was not hit, and has it all.
	global, others := outcomes[node+"-global"].Kill, map[string]event.Neighbours{}
	eventually(t, "what the pods held is told", func() error {
		err := bus.Tail(t.Context(), r.conn, bus.TailOptions{Subjects: []string{"oom.v1.neighbours.>"}, Since: time.Unix(0, 0)}, func(m bus.Stored) error {
			n, err := event.ParseNeighbours(m.Data)
			others[n.Kill] = n
			return err
		})
		if err == nil && others[global].Kill == "" {
			err = fmt.Errorf("not for %s: %+v", global, others)
		}
		return err
	})
	n := others[global]
	if n.Scope != event.ScopeGlobal || n.Level != event.LevelNode || n.PodsSeen == nil || *n.PodsSeen < 2 || n.Incomplete || n.Incident != kills[global].Incident.ID ||
		n.Pods[0].PodUID != string(holder.UID) || n.Pods[0].Usage < 64<<20 || n.Pods[0].Max != nil {
		t.Errorf("neighbours %+v", n)
	}
	return nil
}

// machine is a virtual machine.
type machine struct {
	*process
	dir string
}

// startMachine boots a kernel of tools/vm/kernels.sh with tools/vm/node.sh. more are arguments of QEMU. It runs until the test ends.
func startMachine(t *testing.T, kernel, params string, more ...string) *machine {
	t.Helper()
	dir := t.TempDir()
	for to, from := range map[string]string{
		"init": "../../../tools/vm/init.sh", "bin/vm.test": "../../../tools/vm/node.sh", "bin/busybox": "/bin/busybox",
		"bin/oom-tracer": oomtest.Program(t, "static/oom-tracer"), "bin/hog": oomtest.Program(t, "hog"),
		"bin/vmxnet3.ko": filepath.Join(kernel, "vmxnet3.ko"),
	} {
		data, err := os.ReadFile(from)
		if err == nil {
			err = os.MkdirAll(filepath.Dir(filepath.Join(dir, "root", to)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "root", to), data, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	pack := exec.CommandContext(t.Context(), "sh", "-c", "cd root && find . | cpio --quiet -o -H newc -R 0:0 >../initramfs")
	pack.Dir = dir
	if out, err := pack.CombinedOutput(); err != nil {
		t.Fatalf("pack the initramfs: %v\n%s", err, out)
	}
	cgroup := "v2"
	if filepath.Base(kernel) == "bullseye" {
		cgroup = "v1" // so that both are seen
	}
	// Why these: tools/vm/test-vm.sh.
	m := &machine{dir: dir, process: &process{out: &oomtest.Output{}, done: make(chan struct{}), cmd: exec.Command("qemu-system-x86_64", append([]string{
		"-accel", "tcg,thread=multi", "-cpu", "max,-cx16", "-smp", "1", "-m", "512",
		"-nodefaults", "-no-user-config", "-display", "none", "-monitor", "none", "-no-reboot",
		"-serial", "file:" + filepath.Join(dir, "console.log"), "-serial", "file:" + filepath.Join(dir, "output.log"),
		"-netdev", "user,id=net", "-device", "vmxnet3,netdev=net",
		"-kernel", filepath.Join(kernel, "vmlinuz"), "-initrd", filepath.Join(dir, "initramfs"), "-append",
		"console=ttyS0 loglevel=4 panic=-1 oops=panic mitigations=off no_timer_check oom.cgroup=" + cgroup + " " + params}, more...)...)}}
	m.start(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(m.said())
		}
	})
	return m
}

// said is what the kernel and the programs in the machine had to say.
func (m *machine) said() string {
	var all strings.Builder
	for _, name := range []string{"console.log", "output.log"} {
		data, _ := os.ReadFile(filepath.Join(m.dir, name))
		fmt.Fprintf(&all, "--- %s\n%s\n", name, data)
	}
	return all.String()
}
