package usage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

const uid = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f"

var id, other = strings.Repeat("a", 64), strings.Repeat("b", 64)

// files makes a tree of directories with files, and write adds to it.
func files(t *testing.T, all map[string]string) string {
	t.Helper()
	root := t.TempDir()
	write(t, root, all)
	return root
}

func write(t *testing.T, root string, all map[string]string) {
	t.Helper()
	for name, text := range all {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func TestPods(t *testing.T) {
	escaped := strings.ReplaceAll(uid, "-", "_")
	for _, tt := range []struct {
		name    string
		version int
		root    string
		files   map[string]string
		want    Pods
	}{
		{"cgroupfs, version 2", 2, "/", map[string]string{
			"kubepods/burstable/pod" + uid + "0/memory.current":                                 "300\n",
			"kubepods/burstable/pod" + uid + "0/memory.max":                                     "max\n",
			"kubepods/burstable/pod" + uid + "0/memory.low":                                     "1\n",
			"kubepods/burstable/pod" + uid + "0/memory.min":                                     "2\n",
			"kubepods/burstable/pod" + uid + "0/memory.swap.current":                            "3\n",
			"kubepods/burstable/pod" + uid + "0/memory.stat":                                    "anon 1\ninactive_file 100\nactive_file 5\n",
			"kubepods/burstable/pod" + uid + "0/" + strings.Repeat("a", 64) + "/memory.current": "299\n",
			"kubepods/besteffort/pod" + uid + "1/memory.current":                                "500\n",
			"kubepods/pod" + uid + "2/memory.current":                                           "400\n",
			"kubepods/pod" + uid + "2/memory.max":                                               "1000\n",
			"kubepods/pod0123456789abcdef0123456789abcdef/memory.current":                       "1\n",
			"system.slice/x.service/memory.current":                                             "9999\n",
			"user/pod" + uid + "9/memory.current":                                               "9999\n",
			"kubepods/other/memory.current":                                                     "9999\n",
			"kubepods/burstable/pod" + uid + "0/inside/kubepods/pod" + uid + "8/memory.current": "9999\n",
		}, Pods{Seen: 4, Largest: []event.PodMemory{
			{PodUID: uid + "1", QoS: "besteffort", Usage: 500},
			{PodUID: uid + "2", QoS: "guaranteed", Usage: 400, Max: new(uint64(1000))},
			{PodUID: uid + "0", QoS: "burstable", Usage: 300, WorkingSet: new(uint64(200)), Low: new(uint64(1)), Min: new(uint64(2)), Swap: new(uint64(3))},
		}}},
		{"systemd, version 1, with a cgroup-root", 1, "/", map[string]string{
			"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + escaped + "0.slice/memory.usage_in_bytes":       "300\n",
			"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + escaped + "0.slice/memory.limit_in_bytes":       "9223372036854771712\n",
			"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + escaped + "0.slice/memory.memsw.usage_in_bytes": "310\n",
			"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + escaped + "0.slice/memory.stat":                 "inactive_file 1\ntotal_inactive_file 50\n",
			"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + escaped + "1.slice/memory.usage_in_bytes":                                                  "5\n",
			"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + escaped + "1.slice/memory.limit_in_bytes":                                                  "4096\n",
		}, Pods{Seen: 2, Largest: []event.PodMemory{
			{PodUID: uid + "0", QoS: "burstable", Usage: 300, WorkingSet: new(uint64(250)), Swap: new(uint64(10))},
			{PodUID: uid + "1", QoS: "guaranteed", Usage: 5, Max: new(uint64(4096))},
		}}},
		{"a node of several on one kernel", 2, "/kind/node-1", map[string]string{
			"kind/node-1/kubelet/kubepods/pod" + uid + "0/memory.current": "1\n",
			"kind/node-2/kubelet/kubepods/pod" + uid + "1/memory.current": "2\n",
			"kubepods/pod" + uid + "2/memory.current":                     "3\n",
		}, Pods{Seen: 1, Largest: []event.PodMemory{{PodUID: uid + "0", QoS: "guaranteed", Usage: 1}}}},
		{"one that has just gone", 2, "/", map[string]string{
			"kubepods/pod" + uid + "0/cgroup.procs":   "",
			"kubepods/pod" + uid + "1/memory.current": "2\n",
		}, Pods{Seen: 1, Largest: []event.PodMemory{{PodUID: uid + "1", QoS: "guaranteed", Usage: 2}}}},
		{"--cgroup-root=/kubepods", 2, "/", map[string]string{
			"kubepods/kubepods/burstable/pod" + uid + "0/memory.current": "1\n",
			"kubepods/kubepods/pod" + uid + "1/memory.current":           "2\n",
		}, Pods{Seen: 2, Largest: []event.PodMemory{{PodUID: uid + "1", QoS: "guaranteed", Usage: 2}, {PodUID: uid + "0", QoS: "burstable", Usage: 1}}}},
		{"containers outside of their pod's cgroup", 2, "/", map[string]string{
			"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + escaped + "0.slice/memory.current":                      "4\n",
			"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + escaped + "0.slice/memory.max":                          "1000\n",
			"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + escaped + "0.slice/memory.stat":                         "inactive_file 1\n",
			"kubepods.slice/kubepods-pod" + escaped + "2.slice/cri-containerd-" + id + ".scope/memory.current":                         "6\n",
			"kubepods.slice/kubepods-pod" + escaped + "2.slice/memory.current":                                                         "7\n",
			"system.slice/containerd.service/kubepods-burstable-pod" + escaped + "0.slice:cri-containerd:" + id + "/memory.current":    "500\n",
			"system.slice/containerd.service/kubepods-burstable-pod" + escaped + "0.slice:cri-containerd:" + id + "/memory.stat":       "inactive_file 100\n",
			"system.slice/containerd.service/kubepods-burstable-pod" + escaped + "0.slice:cri-containerd:" + other + "/memory.current": "30\n",
			"system.slice/containerd.service/kubepods-burstable-pod" + escaped + "0.slice:cri-containerd:" + other + "/memory.stat":    "inactive_file 0\n",
			"system.slice/containerd.service/kubepods-besteffort-pod" + escaped + "3.slice:cri-containerd:" + id + "/memory.current":   "8\n",
		}, Pods{Seen: 3, Largest: []event.PodMemory{
			{PodUID: uid + "0", QoS: "burstable", Usage: 534, WorkingSet: new(uint64(433))},
			{PodUID: uid + "3", QoS: "besteffort", Usage: 8},
			{PodUID: uid + "2", QoS: "guaranteed", Usage: 7},
		}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tree := Tree{Mount: files(t, tt.files), Version: tt.version, Root: tt.root}
			got, err := tree.Pods(t.Context(), 3)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// What cannot be read is named, and costs nothing else.
func TestPodsRubbish(t *testing.T) {
	tree := Tree{Version: 2, Root: "/", Mount: files(t, map[string]string{
		"kubepods/pod" + uid + "0/memory.current": "lots\n",
		"kubepods/pod" + uid + "1/memory.current": "7\n",
		"kubepods/pod" + uid + "1/memory.max":     "-1\n",
		"kubepods/pod" + uid + "2/memory.current": "8\n",
		"kubepods/pod" + uid + "2/memory.stat":    "inactive_file many\ninactive_file\n",
	})}
	r, err := tree.Pods(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	want := []event.PodMemory{{PodUID: uid + "2", QoS: "guaranteed", Usage: 8}, {PodUID: uid + "1", QoS: "guaranteed", Usage: 7}}
	if diff := cmp.Diff(want, r.Largest); diff != "" || !r.Incomplete || r.Seen != 3 || len(r.Errors) != 2 {
		t.Errorf("%+v (-want +got):\n%s", r, diff)
	}
	all := fmt.Sprint(r.Errors)
	if !strings.Contains(all, "pod"+uid+"0/memory.current: strconv.ParseUint: parsing \"lots\"") || !strings.Contains(all, "memory.max") {
		t.Errorf("errors %s", all)
	}
	for _, root := range []string{"/none", "/kubepods/pod" + uid + "1"} {
		tree.Root = root
		if r, err := tree.Pods(t.Context(), 10); err == nil {
			t.Errorf("%s: %+v", root, r)
		}
	}
	tree.Root, tree.Mount = "/", files(t, map[string]string{"system.slice/x": ""})
	if _, err := tree.Pods(t.Context(), 10); !errors.Is(err, ErrNoPods) {
		t.Errorf("without pods: %v", err)
	}
}

// It ends, whatever is there.
func TestPodsBounds(t *testing.T) {
	oomtest.Slow(t) // makes many thousand directories
	all := map[string]string{}
	for i := range maxPods + 10 {
		all[fmt.Sprintf("kubepods/besteffort/pod%s%08x/memory.current", uid[:28], i)] = fmt.Sprintln(i)
	}
	tree := Tree{Version: 2, Root: "/", Mount: files(t, all)}
	r, err := tree.Pods(t.Context(), 5)
	if err != nil || r.Seen != maxPods || !r.Incomplete || len(r.Largest) != 5 || cap(r.Largest) != 5 {
		t.Errorf("%d seen, %d told, incomplete %t, %v", r.Seen, len(r.Largest), r.Incomplete, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if r, err := tree.Pods(ended, 5); err == nil && !r.Incomplete {
		t.Errorf("after the time: %+v", r)
	}
	// Other cgroups, as many as somebody has forgotten to remove.
	clear(all)
	for i := range maxDirs + 10 {
		all[fmt.Sprintf("d/%d/x", i)] = ""
	}
	tree.Mount = files(t, all)
	if _, err := tree.Pods(t.Context(), 5); !errors.Is(err, ErrNoPods) {
		t.Errorf("without pods: %v", err)
	}
	write(t, tree.Mount, map[string]string{"system.slice/k3s.service/kubepods/pod" + uid + "0/" + id + "/memory.current": "1\n", "system.slice/k3s.service/kubepods/pod" + uid + "0/memory.current": "2\n"})
	if r, err := tree.Pods(t.Context(), 5); err != nil || r.Seen != 1 || r.Incomplete || r.Largest[0].Usage != 2 {
		t.Errorf("with a pod: %+v, %v", r, err)
	}
	clear(all)
	for i := range maxDirs + 10 {
		all[fmt.Sprintf("d/%d/y/x", i)] = ""
	}
	write(t, tree.Mount, all)
	if r, err := tree.Pods(t.Context(), 5); err != nil || r.Seen != 1 || r.Incomplete {
		t.Errorf("with a pod where few others are: %+v, %v", r, err)
	}
	tree.Root = "/d"
	if r, err := tree.Pods(t.Context(), 5); err == nil || errors.Is(err, ErrNoPods) {
		t.Errorf("too many to search: %+v, %v", r, err)
	}
	tree.Root = "/"
	// Beside a pod that is found the others do not matter, unless its containers may be among them.
	write(t, tree.Mount, map[string]string{"kubepods/pod" + uid + "0/" + id + "/memory.current": "1\n", "kubepods/pod" + uid + "0/memory.current": "2\n"})
	if r, err := tree.Pods(t.Context(), 5); err != nil || r.Seen != 1 || r.Incomplete {
		t.Errorf("too many others: %+v, %v", r, err)
	}
	write(t, tree.Mount, map[string]string{"kubepods/pod" + uid + "1/memory.current": "0\n"})
	if r, err := tree.Pods(t.Context(), 5); err != nil || r.Seen < 2 || !r.Incomplete {
		t.Errorf("a pod without containers among too many others: %+v, %v", r, err)
	}
}
