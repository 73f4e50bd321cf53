//go:build bench

package tap

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

var messages = flag.Int("messages", 1_000_000, "the number of messages that the stream holds")

// TestTopMillion stores kills and their outcomes in a real NATS server, on disk, and times the real programs over all of them.
// The time is for whoever reads it, for it depends on the machine and what else it does. The memory must be bounded.
func TestTopMillion(t *testing.T) {
	s := start(t)
	stream := config.Default().NATS.Stream
	stream.MaxBytes = 100 << 30 // as shipped it holds 1 GiB: some 790,000 of these messages
	if err := bus.EnsureStreams(t.Context(), s.conn, stream); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	bytes, pod := fill(t, s, *messages)
	if held, err := s.conn.Held(t.Context()); err != nil || held.LastSeq-held.FirstSeq+1 != uint64(*messages) {
		t.Fatalf("the stream holds %+v (%v), want %d messages", held, err, *messages)
	}
	t.Logf("%d messages, %d MiB, stored in %v", *messages, bytes>>20, time.Since(began).Round(time.Second))
	// explain knows no pod here: it decides by the kills alone, and shows their outcomes.
	c := kubetest.Start(t)
	annotator := oomtest.Program(t, "oom-annotator")
	kubeconfig := c.Kubeconfig(c.Annotator())
	for _, command := range [][]string{
		{"oom-tap", "top"}, {"oom-tap", "top", "-o", "wide"}, {"oom-tap", "report"}, {"oom-tap", "pod", pod.Name, "-n", pod.Namespace, "--since", "1h"},
		{annotator, "explain", "--kubeconfig", kubeconfig},
	} {
		before := ownCPU(t)
		took, peak, cpu, out := timed(t, append(command, "--config", s.config)...)
		server := ownCPU(t) - before
		load, err := os.ReadFile("/proc/loadavg")
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(out, "\n")
		name := filepath.Base(command[0]) + " " + strings.Join(command[1:min(len(command), 4)], " ")
		t.Logf("%s: %.1f s on %d processors with a load of %.4s, CPU %.1f s (and %.1f s of the server), at most %d MiB\n%.2000s",
			name, took.Seconds(), runtime.NumCPU(), load, cpu.Seconds(), server.Seconds(), peak>>10, strings.Join(lines[:min(len(lines), 4)], "\n"))
		if peak == 0 || peak > 256<<10 {
			t.Errorf("%s took %d MiB", name, peak>>10)
		}
	}
}

// ownCPU is what this process has used, and so the server.
func ownCPU(t *testing.T) time.Duration {
	t.Helper()
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		t.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}

// timed runs a program. peak is the most memory that it held, in KiB: VmHWM, for ru_maxrss of a child begins with that of its
// parent, which is the server.
func timed(t *testing.T, command ...string) (took time.Duration, peak int, cpu time.Duration, stdout string) {
	t.Helper()
	cmd := exec.Command(command[0], command[1:]...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	began := time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for {
		select {
		case err := <-ended:
			if took = time.Since(began); err != nil || errOut.Len() > 0 && command[0] == "oom-tap" { // explain has a summary there
				t.Fatalf("%q: %v\n%.1000s", command, err, &errOut)
			}
			return took, peak, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), out.String()
		case <-time.After(50 * time.Millisecond):
			status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid)) // it may be gone
			if _, after, ok := strings.Cut(string(status), "VmHWM:"); ok {
				fmt.Sscan(after, &peak)
			}
		}
	}
}

// fill stores kills and their outcomes, and returns the pod of one: of 2,000 workloads on 500 nodes, some of them much more often than others.
func fill(t *testing.T, s *natsServer, n int) (bytes int, pod event.PodRef) {
	t.Helper()
	js, err := jetstream.New(s.conn.JetStream().Conn(), jetstream.WithPublishAsyncMaxPending(4000), jetstream.WithPublishAsyncErrHandler(func(_ jetstream.JetStream, _ *nats.Msg, err error) { t.Error(err) }))
	if err != nil {
		t.Fatal(err)
	}
	random := rand.New(rand.NewPCG(1, 2))
	send := func(subject, id string, v any) {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		bytes += len(data)
		if _, err := js.PublishAsync(subject, data, jetstream.WithMsgID(id), jetstream.WithStallWait(time.Minute)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range n / 2 {
		workload := int(random.ExpFloat64()*200) % 2000
		e, o := sampleKill(i, workload, fmt.Sprintf("worker-%d.example.com", random.IntN(500)))
		subject, err := e.Subject()
		if err != nil {
			t.Fatal(err)
		}
		send(subject, e.MsgID(), e)
		if subject, err = o.Subject(); err != nil {
			t.Fatal(err)
		}
		send(subject, o.ID, o)
		pod = *o.Pod
	}
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(5 * time.Minute):
		t.Fatal("the messages are not stored")
	}
	return bytes, pod
}

// sampleKill is the ith kill and its outcome, as the tracer and the annotator write them.
func sampleKill(i, workload int, node string) (*event.Event, *event.Outcome) {
	at := time.Date(2026, 11, 23, 2, 3, 4, i, time.UTC)
	uid := fmt.Sprintf("0f1e2d3c-4b5a-6978-8796-%012x", i%50_000)
	id := event.VictimID("1dd8105d-ffb3-46fb-940b-dc17365768a7", uint32(i%4_000_000+1000), uint64(8_011_705_978_461+i))
	path := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	containerID := fmt.Sprintf("%064x", i)
	cgroup := &event.Cgroup{Path: path + "/cri-containerd-" + containerID + ".scope", ID: uint64(48974 + i), Version: 2}
	limit := uint64(256<<20) << (workload % 4)
	pid := uint32(i%4_000_000 + 1000)
	return &event.Event{
			Schema: event.Schema, ID: id, Seq: uint64(i + 1), Time: at, BoottimeNS: 8_011_711_672_087 + uint64(i),
			Node:  event.Node{Name: node, BootID: "1dd8105d-ffb3-46fb-940b-dc17365768a7", Kernel: "6.12.38+deb13-amd64", Tier: "fentry", Epoch: 8_003_411_067_203},
			Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled,
			Victim: event.Victim{
				PID: pid, TID: pid, NSPID: 1, Comm: "java", UID: new(uint32(1000)), OOMScoreAdj: new(int16(968)), StartBoottimeNS: 8_011_705_978_461 + uint64(i),
				Cgroup: cgroup, Memory: &event.Memory{TotalVM: 4 * limit, AnonRSS: limit - 1<<20, FileRSS: 90112, PgTables: 57344, Batched: &event.Batched{AnonRSS: limit - 1<<20, FileRSS: 139264}},
			},
			Trigger:   &event.Trigger{PID: pid, TID: pid, Comm: "java", Cgroup: cgroup},
			Limit:     &event.Limit{Cgroup: &event.Cgroup{Path: path, ID: 48941, Version: 2}, Level: event.LevelPod, Max: &limit, Usage: &limit, SwapUsage: new(uint64)},
			Alloc:     &event.Alloc{GFPMask: "0xcc0", GFPFlags: []string{"GFP_KERNEL"}, TotalPages: limit / 4096},
			Incident:  &event.Incident{ID: event.IncidentID("1dd8105d-ffb3-46fb-940b-dc17365768a7", 8_011_711_672_087+uint64(i))},
			Container: &event.Container{PodUID: uid, ContainerID: containerID, Runtime: "containerd", QoS: "burstable"},
		}, &event.Outcome{
			Schema: event.Schema, ID: event.OutcomeID(id, event.StageAnnotate), Kill: id, Stage: event.StageAnnotate, Time: at,
			Result: event.ResultSkipped, Reason: event.ReasonLevel, Detail: "the limit is the pod's own", Node: node,
			Pod:       &event.PodRef{Namespace: fmt.Sprintf("team-%d", workload%40), Name: fmt.Sprintf("service-%d-5d4f7c9b8-x%d", workload, i%1000), UID: uid, Owner: fmt.Sprintf("Deployment/service-%d", workload)},
			Container: "main",
		}
}
