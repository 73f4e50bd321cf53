// Command sidebyside runs what a user would pick instead of OOM Tracer, each as its project ships it, and prints a line of
// JSON for each OOM kill that it reports: to whom it is reported there (a channel, a node's Event) the line goes here.
package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/google/cadvisor/utils/oomparser"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/tools/record"
	"k8s.io/kubernetes/pkg/kubelet/oom"
	"k8s.io/node-problem-detector/pkg/systemlogmonitor"
	_ "k8s.io/node-problem-detector/pkg/systemlogmonitor/logwatchers"
)

// Kill is what a tool says of a kill.
type Kill struct {
	PID    int    `json:"pid,omitempty"` // 0: none
	Comm   string `json:"comm,omitempty"`
	Cgroup string `json:"cgroup,omitempty"` // of the victim
	Limit  string `json:"limit,omitempty"`  // the cgroup whose limit was reached
	Count  bool   `json:"count,omitempty"`  // it is counted by a metric
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "sidebyside:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "oomparser":
		return cadvisor()
	case len(args) == 1 && args[0] == "kubelet":
		return kubelet()
	case len(args) == 2 && args[0] == "npd":
		return nodeProblemDetector(args[1])
	case len(args) == 2 && args[0] == "gadget":
		return gadget(args[1])
	}
	return fmt.Errorf("usage: sidebyside oomparser | kubelet | npd CONFIG | gadget OBJECT")
}

func report(k Kill) error { return json.NewEncoder(os.Stdout).Encode(k) }

// cadvisor tails /dev/kmsg with the parser of the kubelet and cAdvisor.
func cadvisor() error {
	parser, err := oomparser.New()
	if err != nil {
		return err
	}
	kills := make(chan *oomparser.OomInstance)
	go parser.StreamOoms(kills)
	for k := range kills {
		// The names of the fields are the wrong way round: ContainerName is task_memcg.
		if err := report(Kill{PID: k.Pid, Comm: k.ProcessName, Cgroup: k.ContainerName, Limit: k.VictimContainerName}); err != nil {
			return err
		}
	}
	return nil
}

// kubelet is its oom watcher, which makes Events of the node.
func kubelet() error {
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(sink{})
	watcher, err := oom.NewWatcher(broadcaster.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: "kubelet", Host: "vm"}))
	if err != nil {
		return err
	}
	if err := watcher.Start(context.Background(), node); err != nil {
		return err
	}
	select {}
}

// nodeProblemDetector is its monitor of the kernel's log with its own file of rules, which counts in a metric. Its exporter makes Events
// of the node.
func nodeProblemDetector(config string) error {
	broadcaster := record.NewBroadcaster()
	broadcaster.StartRecordingToSink(sink{})
	recorder := broadcaster.NewRecorder(runtime.NewScheme(), corev1.EventSource{Component: "kernel-monitor", Host: "vm"})
	statuses, err := systemlogmonitor.NewLogMonitorOrDie(config).Start()
	if err != nil {
		return err
	}
	for status := range statuses {
		for _, e := range status.Events {
			if err := report(Kill{Count: true}); err != nil {
				return err
			}
			recorder.Eventf(node, corev1.EventTypeWarning, e.Reason, "%s", e.Message)
		}
	}
	return nil
}

// gadget is the BPF program of Inspektor Gadget's trace_oomkill, and a reader of its buffer in the place of Inspektor Gadget.
func gadget(object string) error {
	spec, err := ebpf.LoadCollectionSpec(object)
	if err != nil {
		return err
	}
	var event *btf.Struct
	if err := spec.Types.TypeByName("event", &event); err != nil {
		return err
	}
	offset := map[string]btf.Bits{}
	for _, m := range event.Members {
		offset[m.Name] = m.Offset
	}
	collection, err := ebpf.NewCollection(spec)
	if err != nil {
		return err
	}
	defer collection.Close()
	kprobe, err := link.Kprobe("oom_kill_process", collection.Programs["ig_oom_kill"], nil)
	if err != nil {
		return err
	}
	defer kprobe.Close()
	events, err := ringbuf.NewReader(collection.Maps["events"])
	if err != nil {
		return err
	}
	defer events.Close()
	for {
		record, err := events.Read()
		if err != nil {
			return err
		}
		comm, _, _ := bytes.Cut(record.RawSample[offset["tcomm"].Bytes():][:16], []byte{0})
		pid := binary.NativeEndian.Uint32(record.RawSample[offset["tpid"].Bytes():])
		if err := report(Kill{PID: int(pid), Comm: string(comm)}); err != nil {
			return err
		}
	}
}

var node = &corev1.ObjectReference{Kind: "Node", Name: "vm", UID: "vm"}

// sink is an API server that has each Event at once.
type sink struct{}

// The kubelet's and the kernel's words.
var named = []*regexp.Regexp{
	regexp.MustCompile(`victim process: (?P<comm>.*), pid: (?P<pid>\d+)`),
	regexp.MustCompile(`Killed process (?P<pid>\d+) \((?P<comm>.*)\) total-vm`),
}

func (sink) put(e *corev1.Event) (*corev1.Event, error) {
	for _, r := range named {
		if m := r.FindStringSubmatch(e.Message); m != nil {
			pid, _ := strconv.Atoi(m[r.SubexpIndex("pid")])
			return e, report(Kill{PID: pid, Comm: m[r.SubexpIndex("comm")]})
		}
	}
	return e, nil
}

func (s sink) Create(e *corev1.Event) (*corev1.Event, error)          { return s.put(e) }
func (s sink) Update(e *corev1.Event) (*corev1.Event, error)          { return s.put(e) }
func (s sink) Patch(e *corev1.Event, _ []byte) (*corev1.Event, error) { return s.put(e) }
