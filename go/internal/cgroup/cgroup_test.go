package cgroup_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroup"
)

const (
	uid   = "0b9de1c4-6a3f-4c57-9d21-7e5fa08c3b62"
	uid_  = "0b9de1c4_6a3f_4c57_9d21_7e5fa08c3b62"
	uid2  = "f47ac10b-58cc-4372-a567-0e02b2c3d479"
	uid2_ = "f47ac10b_58cc_4372_a567_0e02b2c3d479"
	hash  = "9d8b7c6a5f4e3d2c1b0a99887766fe55"
	hash2 = "00112233445566778899aabbccddeeff"
	id    = "1f2e3d4c5b6a79880716253443526170f1e2d3c4b5a697886f5e4d3c2b1a0f9e"
	id2   = "abcdef0123456789abcdef0123456789abcdef0123456789abcdef0123456789"

	sysB  = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uid_ + ".slice"
	sysE  = "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uid_ + ".slice"
	sysG  = "/kubepods.slice/kubepods-pod" + uid_ + ".slice"
	kindB = "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod" + uid_ + ".slice"
	deepB = "/a.slice/a-b_c.slice/a-b_c-kubepods.slice/a-b_c-kubepods-burstable.slice/a-b_c-kubepods-burstable-pod" + uid_ + ".slice"
	// A kubelet with --cgroup-root=/kubepods.
	twiceB = "/kubepods.slice/kubepods-kubepods.slice/kubepods-kubepods-burstable.slice/kubepods-kubepods-burstable-pod" + uid_ + ".slice"
	// A container in a pod on the machine.
	other = "/kubepods/besteffort/pod" + uid2 + "/" + id2
	nodeD = "/system.slice/docker-" + id2 + ".scope"
	ten   = "/a/b.slice/c.scope/d.service/e/f/g/h/i/j"
)

func pod(qos, runtime, id string) *event.Container {
	return &event.Container{PodUID: uid, QoS: qos, Runtime: runtime, ContainerID: id}
}

func static(qos, runtime, id string) *event.Container {
	return &event.Container{PodUID: hash, Static: true, QoS: qos, Runtime: runtime, ContainerID: id}
}

func bare(runtime, id string) *event.Container {
	return &event.Container{Runtime: runtime, ContainerID: id}
}

// shape is one path that is understood. Every byte of the path outside of free and below is
// structure: with any of them off, nothing may be proven but the pod, where it stands to the left.
type shape struct {
	name  string
	free  string // what stands to the left and may have any name
	path  string
	below string // what stands inside the container and may have any name
	want  *event.Container
	level event.LimitLevel // of free+path on a node whose root is the last of roots
}

func (s shape) full() string { return s.free + s.path + s.below }

// roots are those of the nodes that see the same: free, too, may be the node's container.
func (s shape) roots() []string {
	if s.free == "" || s.path[0] != '/' {
		return []string{"/"}
	}
	return []string{"/", s.free}
}

func shapes() []shape {
	const (
		con = event.LevelContainer
		lp  = event.LevelPod
		oth = event.LevelOther
	)
	return []shape{
		{"systemd, burstable, containerd", "", sysB + "/cri-containerd-" + id + ".scope", "", pod("burstable", "containerd", id), con},
		{"systemd, besteffort, containerd", "", sysE + "/cri-containerd-" + id + ".scope", "", pod("besteffort", "containerd", id), con},
		{"systemd, guaranteed, containerd", "", sysG + "/cri-containerd-" + id + ".scope", "", pod("guaranteed", "containerd", id), con},
		{"systemd, containerd with crun", "", sysB + "/cri-containerd-" + id + ".scope", "/container", pod("burstable", "containerd", id), con},
		{"systemd, CRI-O", "", sysB + "/crio-" + id + ".scope", "", pod("burstable", "cri-o", id), con},
		{"systemd, CRI-O with crun", "", sysG + "/crio-" + id + ".scope", "/container", pod("guaranteed", "cri-o", id), con},
		{"systemd, CRI-O, exec", "", sysG + "/crio-" + id + ".scope", "/container/exec", pod("guaranteed", "cri-o", id), con},
		{"systemd, CRI-O's monitor", "", sysE + "/crio-conmon-" + id + ".scope", "", pod("besteffort", "cri-o", ""), oth},
		{"systemd, cri-dockerd", "", sysE + "/docker-" + id + ".scope", "", pod("besteffort", "docker", id), con},
		{"systemd, the pod's own cgroup", "", sysB, "", pod("burstable", "", ""), lp},
		{"systemd, guaranteed, the pod's own cgroup", "", sysG, "", pod("guaranteed", "", ""), lp},
		{"systemd, Kata", "", sysB, "/kata_" + id, pod("burstable", "", ""), lp},
		{"systemd, gVisor", "", sysG + "/cri-containerd-" + id + ".scope", "/" + id2, pod("guaranteed", "containerd", id), con},
		{"systemd, static", "", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + hash + ".slice/cri-containerd-" + id + ".scope", "", static("burstable", "containerd", id), con},
		{"systemd, static, guaranteed", "", "/kubepods.slice/kubepods-pod" + hash + ".slice/crio-" + id + ".scope", "", static("guaranteed", "cri-o", id), con},
		{"systemd, ten levels below", "", sysB + "/cri-containerd-" + id + ".scope", ten, pod("burstable", "containerd", id), con},

		{"cgroupfs, burstable", "", "/kubepods/burstable/pod" + uid + "/" + id, "", pod("burstable", "", id), con},
		{"cgroupfs, besteffort", "", "/kubepods/besteffort/pod" + uid + "/" + id, "", pod("besteffort", "", id), con},
		{"cgroupfs, guaranteed", "", "/kubepods/pod" + uid + "/" + id, "", pod("guaranteed", "", id), con},
		{"cgroupfs, CRI-O", "", "/kubepods/burstable/pod" + uid + "/crio-" + id, "", pod("burstable", "cri-o", id), con},
		{"cgroupfs, CRI-O's monitor", "", "/kubepods/pod" + uid + "/crio-conmon-" + id, "", pod("guaranteed", "cri-o", ""), oth},
		{"cgroupfs, the pod's own cgroup", "", "/kubepods/besteffort/pod" + uid, "", pod("besteffort", "", ""), lp},
		{"cgroupfs, Kata", "", "/kubepods/pod" + uid, "/kata_" + id, pod("guaranteed", "", ""), lp},
		{"cgroupfs, Kata's overhead", "", "/kubepods/besteffort/pod" + uid, "/kata_overhead/" + id, pod("besteffort", "", ""), lp},
		{"cgroupfs, gVisor", "", "/kubepods/burstable/pod" + uid + "/" + id, "/" + id2, pod("burstable", "", id), con},
		{"cgroupfs, static", "", "/kubepods/burstable/pod" + hash + "/" + id, "", static("burstable", "", id), con},
		{"cgroupfs, static, the pod's own cgroup", "", "/kubepods/pod" + hash, "", static("guaranteed", "", ""), lp},
		{"cgroupfs, ten levels below", "", "/kubepods/besteffort/pod" + uid + "/" + id, ten, pod("besteffort", "", id), con},
		{"cgroupfs, below: another runtime's names", "", "/kubepods/pod" + uid + "/" + id, "/docker/" + id2 + "/crio-" + id2 + ".scope", pod("guaranteed", "", id), con},

		{"colon form", "/system.slice/containerd.service", "/kubepods-burstable-pod" + uid_ + ".slice:cri-containerd:" + id, "", pod("burstable", "containerd", id), con},
		{"colon form at the root", "", "/kubepods-besteffort-pod" + uid_ + ".slice:cri-containerd:" + id, "", pod("besteffort", "containerd", id), con},
		{"colon form, guaranteed", "/system.slice", "/kubepods-pod" + uid_ + ".slice:cri-containerd:" + id, "", pod("guaranteed", "containerd", id), con},
		{"colon form, static", "/system.slice", "/kubepods-burstable-pod" + hash + ".slice:cri-containerd:" + id, ten, static("burstable", "containerd", id), con},

		{"--cgroup-root, systemd", "", kindB + "/cri-containerd-" + id + ".scope", "", pod("burstable", "containerd", id), con},
		{"--cgroup-root of two levels, systemd", "", deepB + "/crio-" + id + ".scope", "", pod("burstable", "cri-o", id), con},
		{"--cgroup-root, systemd, guaranteed", "", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + uid_ + ".slice/cri-containerd-" + id + ".scope", "", pod("guaranteed", "containerd", id), con},
		{"--cgroup-root, cgroupfs", "/kubelet", "/kubepods/burstable/pod" + uid + "/" + id, "", pod("burstable", "", id), con},
		{"--cgroup-root=/kubepods, cgroupfs (Docker Desktop)", "/kubepods", "/kubepods/burstable/pod" + uid + "/" + id, "", pod("burstable", "", id), con},
		{"--cgroup-root=/kubepods, guaranteed", "/kubepods", "/kubepods/pod" + uid, "", pod("guaranteed", "", ""), lp},
		{"--cgroup-root=/kubepods, systemd", "", twiceB + "/cri-containerd-" + id + ".scope", "", pod("burstable", "containerd", id), con},
		{"--cgroup-root=/kubelet/kubepods, systemd", "", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-kubepods.slice/kubelet-kubepods-kubepods-pod" + uid_ + ".slice/crio-" + id + ".scope", "", pod("guaranteed", "cri-o", id), con},
		{"--cgroup-root=/kubepods, colon form", "/system.slice/containerd.service/kubepods", "-kubepods-burstable-pod" + uid_ + ".slice:cri-containerd:" + id, "", pod("burstable", "containerd", id), con},
		{"k3s", "/system.slice/k3s.service", "/kubepods/besteffort/pod" + uid + "/" + id, "", pod("besteffort", "", id), con},
		{"kind in docker, systemd", nodeD, kindB + "/cri-containerd-" + id + ".scope", "", pod("burstable", "containerd", id), con},
		{"kind in docker, cgroupfs", "/docker/" + id2 + "/kubelet", "/kubepods/pod" + uid + "/" + id, "", pod("guaranteed", "", id), con},
		{"kind in podman", "/machine.slice/libpod-" + id2 + ".scope/container", kindB + "/cri-containerd-" + id + ".scope", "", pod("burstable", "containerd", id), con},
		{"kind in kind", nodeD + "/docker/" + id2, kindB + "/cri-containerd-" + id + ".scope", "", pod("burstable", "containerd", id), con},
		{"minikube in docker", "/docker/" + id2, sysE + "/docker-" + id + ".scope", "", pod("besteffort", "docker", id), con},

		{"docker, cgroupfs", "", "/docker/" + id, "", bare("docker", id), con},
		{"docker, below", "", "/docker/" + id, ten, bare("docker", id), con},
		{"docker in docker: the outer one", "", "/docker/" + id, "/docker/" + id2, bare("docker", id), con},
		{"docker, systemd", "/system", ".slice/docker-" + id + ".scope", "", bare("docker", id), con},
		{"docker, systemd, a service in it", "/system", ".slice/docker-" + id + ".scope", "/system.slice/foo.service", bare("docker", id), con},
		{"podman", "/machine", ".slice/libpod-" + id + ".scope", "", bare("podman", id), con},
		{"podman with crun", "/machine", ".slice/libpod-" + id + ".scope", "/container", bare("podman", id), con},
		{"podman, rootless", "/user.slice/user-1000.slice/user@1000.service/user", ".slice/libpod-" + id + ".scope", "/container", bare("podman", id), con},
		{"podman's pod", "/machine.slice/machine-libpod_pod_" + id2, ".slice/libpod-" + id + ".scope", "", bare("podman", id), con},
	}
}

func TestParse(t *testing.T) {
	for _, s := range shapes() {
		t.Run(s.name, func(t *testing.T) {
			for _, root := range s.roots() {
				if diff := cmp.Diff(s.want, cgroup.Parse(root, s.full())); diff != "" {
					t.Errorf("Parse(%q, %q): -want +got\n%s", root, s.full(), diff)
				}
			}
		})
	}
}

// TestParseNearMiss changes, drops, adds and capitalises every byte of every shape's structure in turn.
func TestParseNearMiss(t *testing.T) {
	for _, s := range shapes() {
		t.Run(s.name, func(t *testing.T) {
			p := s.path
			// inPod is where the name of the container begins that stands in the pod's own cgroup.
			inPod := len(p) + 1
			if i := strings.LastIndexByte(p, '/') + 1; s.want.PodUID != "" && strings.Contains(p[i:], id) && !strings.Contains(p, ":") {
				inPod = i
			}
			miss := func(what string, i int, structure string) {
				path := s.free + structure + s.below
				var want *event.Container
				if i >= inPod && !strings.Contains(path, "\x00") {
					want = &event.Container{PodUID: s.want.PodUID, QoS: s.want.QoS, Static: s.want.Static}
				}
				for _, root := range s.roots() {
					if c := cgroup.Parse(root, path); !same(want, c) {
						t.Fatalf("%s at %d: Parse(%q, %q): -want +got\n%s", what, i, root, path, cmp.Diff(want, c))
					}
				}
			}
			for i := range len(p) {
				for _, c := range []string{"~", "g", "A", ".", ":", "\x00", "\xff"} {
					if c != p[i:i+1] {
						miss("changed to "+c, i, p[:i]+c+p[i+1:])
					}
				}
				if up := strings.ToUpper(p[i : i+1]); up != p[i:i+1] {
					miss("capital", i, p[:i]+up+p[i+1:])
				}
				for _, swap := range []string{"-_", "_-"} {
					if p[i] == swap[0] {
						miss("separator", i, p[:i]+swap[1:]+p[i+1:])
					}
				}
				miss("dropped", i, p[:i]+p[i+1:])
				for _, c := range []string{"0", "-", "_"} {
					miss("added "+c, i+1, p[:i+1]+c+p[i+1:])
				}
			}
		})
	}
}

func TestParseNothing(t *testing.T) {
	const plainID = "/kubepods/burstable/pod" + uid + "/" + id
	for _, tt := range []struct{ name, path string }{
		{"root", "/"},
		{"empty", ""},
		{"relative", plainID[1:]},
		{"truncated", "..." + plainID},
		{"truncated, systemd", "..." + sysB + "/crio-" + id + ".scope"},
		{"double slash", "/" + plainID},
		{"double slash inside", "/kubepods//burstable/pod" + uid + "/" + id},
		{"trailing slash", plainID + "/"},
		{"dot", "/." + plainID},
		{"dot dot", plainID + "/.."},
		{"dot dot inside", "/docker/../kubepods/pod" + uid},
		{"NUL", plainID + "/a\x00b"},
		{"newline", plainID + "/a\nb"},
		{"newline at the end", plainID + "\n"},
		{"overlong path", plainID + strings.Repeat("/abcdefg", 512)},
		{"overlong component", plainID + "/" + strings.Repeat("a", 256)},

		{"host service", "/system.slice/foo.service"},
		{"user session", "/user.slice/user-1000.slice/session-3.scope"},
		{"init", "/init.scope"},
		{"the kubelet itself", "/kubelet.slice/kubelet.service"},
		{"containerd itself", "/system.slice/containerd.service"},
		{"docker's parent", "/docker"},
		{"buildkit", "/docker/buildkit/" + id},
		{"podman's monitor", "/machine.slice/libpod-conmon-" + id + ".scope"},
		{"CRI-O's monitor in the system slice", "/system.slice/crio-conmon-" + id + ".scope"},
		{"a scope outside of a slice", "/docker-" + id + ".scope"},
		{"a service's cgroup named like a scope", "/system.slice/foo.service/docker-" + id + ".scope"},

		{"kubepods, systemd", "/kubepods.slice"},
		{"kubepods, cgroupfs", "/kubepods"},
		{"QoS class, systemd", "/kubepods.slice/kubepods-burstable.slice"},
		{"QoS class, cgroupfs", "/kubepods/besteffort"},
		{"container directly under a QoS class", "/kubepods/burstable/" + id},
		{"guaranteed has no directory", "/kubepods/guaranteed/pod" + uid + "/" + id},
		{"guaranteed has no slice", "/kubepods.slice/kubepods-guaranteed.slice/kubepods-guaranteed-pod" + uid_ + ".slice"},
		{"UUID without dashes is static, with some it is not", "/kubepods/pod0b9de1c4-6a3f4c579d217e5fa08c3b62"},
		{"UID with dashes in a slice", "/kubepods.slice/kubepods-pod" + uid + ".slice"},
		{"UID with underscores under cgroupfs", "/kubepods/pod" + uid_ + "/" + id},
		{"empty UID", "/kubepods/burstable/pod/" + id},

		{"QoS classes disagree", "/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod" + uid_ + ".slice/crio-" + id + ".scope"},
		{"guaranteed in burstable", "/kubepods.slice/kubepods-burstable.slice/kubepods-pod" + uid_ + ".slice/crio-" + id + ".scope"},
		{"burstable directly under kubepods", "/kubepods.slice/kubepods-burstable-pod" + uid_ + ".slice/crio-" + id + ".scope"},
		{"QoS class twice", "/kubepods/burstable/burstable/pod" + uid},
		{"pod slice at the root", "/kubepods-pod" + uid_ + ".slice/crio-" + id + ".scope"},
		{"drivers mixed", "/kubepods.slice/burstable/pod" + uid + "/" + id},
		{"drivers mixed the other way", "/kubepods/kubepods-burstable.slice/kubepods-burstable-pod" + uid_ + ".slice"},
		{"root's slice is missing", strings.TrimPrefix(kindB, "/kubelet.slice") + "/crio-" + id + ".scope"},
		{"root's slice is another", "/other.slice" + strings.TrimPrefix(kindB, "/kubelet.slice")},
		{"half of a root", strings.TrimPrefix(deepB, "/a.slice") + "/crio-" + id + ".scope"},
		{"root changes on the way", "/kubelet.slice/kubelet-kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uid_ + ".slice"},
		{"kubepods in another slice", "/system.slice" + sysB},
		{"empty element in a slice's name", "/a.slice/a-.slice/a--kubepods.slice/a--kubepods-pod" + uid_ + ".slice"},
		{"leading dash in a slice's name", "/-kubepods.slice/-kubepods-pod" + uid_ + ".slice"},
		{"kubepods in a longer name", "/my-kubepods-backup" + plainID},
		{"pod without kubepods", "/pod" + uid2 + plainID},

		{"colon form of another runtime", "/system.slice/kubepods-pod" + uid_ + ".slice:docker:" + id},
		{"colon form, unknown class", "/kubepods-gold-pod" + uid_ + ".slice:cri-containerd:" + id},
		{"colon form, a level too many", "/kubepods-burstable-burstable-pod" + uid_ + ".slice:cri-containerd:" + id},
		{"colon form, bad root", "/a--kubepods-pod" + uid_ + ".slice:cri-containerd:" + id},
		{"colon form twice", "/kubepods-pod" + uid_ + ".slice:cri-containerd:" + id + ".slice:cri-containerd:" + id},

		// What imitates a kubelet's tree outside of any container of a pod.
		{"fake left of a valid one", "/kubepods/burstable/podx/" + id2 + plainID},
		{"fake below docker", "/docker/" + id2 + "/kubepods/burstable/podx"},
		{"fake below docker, left of a valid one", "/docker/" + id2 + "/kubepods/burstable/podx" + plainID},
		{"fake below docker: pod without kubepods", "/docker/" + id2 + "/pod" + uid},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if c := cgroup.Parse("/", tt.path); c != nil {
				t.Errorf("Parse(/, %q) = %+v, want nil", tt.path, *c)
			}
		})
	}
}

// A pod is proven by its own cgroup, whatever stands in that.
func TestParsePod(t *testing.T) {
	for _, tt := range []struct {
		name, path string
		want       *event.Container
	}{
		{"invalid UTF-8 in the pod", "/kubepods/burstable/pod" + uid + "/\xc3\x28", pod("burstable", "", "")},
		{"unknown under the pod", "/kubepods/burstable/pod" + uid + "/foo", pod("burstable", "", "")},
		{"unknown under the pod, container below", "/kubepods/burstable/pod" + uid + "/foo/" + id, pod("burstable", "", "")},
		{"below CRI-O's monitor", sysB + "/crio-conmon-" + id + ".scope/foo", pod("burstable", "cri-o", "")},
		{"podman in a pod's slice", sysB + "/libpod-" + id + ".scope", pod("burstable", "", "")},
		{"plain ID under systemd", sysB + "/" + id, pod("burstable", "", "")},
		{"scope of no runtime", sysB + "/" + id + ".scope", pod("burstable", "", "")},
		{"scope under cgroupfs", "/kubepods/burstable/pod" + uid + "/crio-" + id + ".scope", pod("burstable", "", "")},
		{"containerd's prefix under cgroupfs", "/kubepods/burstable/pod" + uid + "/cri-containerd-" + id, pod("burstable", "", "")},
		{"short ID", "/kubepods/burstable/pod" + uid + "/" + id[:12], pod("burstable", "", "")},
		{"fake in the pod, beside the containers", "/kubepods/burstable/pod" + uid + "/kubepods/burstable/pod" + uid2 + "/" + id2, pod("burstable", "", "")},
		{"Kata with a scope", sysB + "/kata_" + id + ".scope/vcpus", pod("burstable", "", "")},
		{"another pod's slice in it", sysB + strings.ReplaceAll(sysB, uid_, uid2_), pod("burstable", "", "")},
		{"another pod in Kata's", "/kubepods/pod" + uid + "/kata_" + id + other, pod("guaranteed", "", "")},
		{"Kata in a kubepods in kubepods", "/kubepods/kubepods/besteffort/pod" + uid + "/kata_" + id, pod("besteffort", "", "")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, cgroup.Parse("/", tt.path)); diff != "" {
				t.Errorf("Parse(/, %q): -want +got\n%s", tt.path, diff)
			}
			if got := cgroup.Level("/", tt.path); got != event.LevelOther {
				t.Errorf("Level(/, %q) = %s, want other", tt.path, got)
			}
		})
	}
}

// imitations are names that a container may give to cgroups of its own.
func imitations() []string {
	all := []string{
		"/kubepods",
		"/kubepods/burstable",
		"/kubepods/burstable/podx/" + id2,
		"/kubepods/burstable/pod" + uid2 + "/x",
		"/burstable/pod" + uid2 + "/" + id2,
		"/kubepods-pod" + uid2_ + ".slice/crio-" + id2 + ".scope",
		"/x-kubepod-pod" + uid2_ + ".slice:cri-containerd:" + id2,
		"/podx-pod" + hash + ".slice",
		"/my-kubepods-backup",
		"/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod" + uid2_ + ".slice",
		"/\xc3\x28",
		"/kubepods/pod" + uid2 + "/\xff",
		other,
		other + "/kubepods/x",
		other + other,
	}
	others := strings.NewReplacer(uid, uid2, uid_, uid2_, hash, hash2, id, id2)
	for _, s := range shapes() {
		all = append(all, s.full(), others.Replace(s.full()))
	}
	return all
}

// TestParseBelow puts below every pod and every container of one whatever the container may make there: the trees
// of other pods, whole and cut off.
func TestParseBelow(t *testing.T) {
	for _, s := range shapes() {
		if s.want.PodUID == "" {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			for _, fake := range imitations() {
				for n := len(fake); n > 1; n -= 9 {
					if fake[n-1] == '/' {
						continue
					}
					path := s.full() + fake[:n]
					for _, root := range s.roots() {
						if got := cgroup.Parse(root, path); !same(s.want, got) {
							t.Fatalf("Parse(%q, %q): -want +got\n%s", root, path, cmp.Diff(s.want, got))
						}
						if got := cgroup.Level(root, path); got != event.LevelOther {
							t.Fatalf("Level(%q, %q) = %s, want other", root, path, got)
						}
					}
				}
			}
		})
	}
}

// TestParseRoot sees one path from every node on its way, and from where none is.
func TestParseRoot(t *testing.T) {
	kind := other + "/docker/" + id2 // a kind node in a pod, and in it Kubernetes in a pod
	mid := kind + kindB + "/cri-containerd-" + id + ".scope"
	path := mid + "/kubepods/pod" + hash + "/" + id2
	crunC := "/kubepods.slice/kubepods-pod" + uid2_ + ".slice/crio-" + id2 + ".scope/container"

	outer := &event.Container{PodUID: uid2, QoS: "besteffort", ContainerID: id2}
	middle := pod("burstable", "containerd", id)
	inner := &event.Container{PodUID: hash, Static: true, QoS: "guaranteed", ContainerID: id2}
	for _, tt := range []struct {
		name, root, path string
		want             *event.Container
	}{
		{"the machine", "/", path, outer},
		{"in the pod's container", other, path, middle},
		{"in the kind node", kind, path, middle},
		{"in the kind node, its pod's container", kind, mid, middle},
		{"in the kind node, a service of it", kind, kind + "/system.slice/foo.service", nil},
		{"in the kind node, a plain container of it", kind, kind + "/docker/" + id, bare("docker", id)},
		{"in the kind node's pod", mid, path, inner},
		{"crun's child of a container", crunC, crunC + sysB, pod("burstable", "", "")},
		{"crun's child, from the machine", "/", crunC + sysB, &event.Container{PodUID: uid2, QoS: "guaranteed", Runtime: "cri-o", ContainerID: id2}},
		{"a kind node in docker, from the machine", "/", nodeD + kindB, pod("burstable", "", "")},

		{"the node itself", kind, kind, nil},
		{"the victim's own cgroup", path, path, nil},
		{"another node", "/docker/" + id, path, nil},
		{"a sibling's longer name", nodeD, nodeD + "0" + kindB, nil},
		{"a sibling's shorter name", nodeD, strings.TrimSuffix(nodeD, "e") + kindB, nil},
		{"above the node", kind, other, nil},
		{"the node's name further right", "/docker/" + id2, path, nil},
		{"half a tree", "/kubepods/besteffort", other, nil},
		{"half a systemd tree", "/kubelet.slice", kindB, nil},
		{"no root", "", path, nil},
		{"root with a slash behind", kind + "/", path, nil},
		{"relative", kind[1:], path[1:], nil},
		{"truncated", "/", "..." + path, nil},
		{"truncated, on a node", kind, "..." + path, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, cgroup.Parse(tt.root, tt.path)); diff != "" {
				t.Errorf("Parse(%q, %q): -want +got\n%s", tt.root, tt.path, diff)
			}
		})
	}
}

// TestParseLongest holds the bounds against the longest path and name that the kernel can show.
func TestParseLongest(t *testing.T) {
	path := "/kubepods/pod" + uid + "/" + id
	path += "/" + strings.Repeat("b", 255)
	path += strings.Repeat("/c", (4095-len(path))/2)
	if len(path) < 4094 {
		t.Fatalf("path has %d bytes", len(path))
	}
	if diff := cmp.Diff(pod("guaranteed", "", id), cgroup.Parse("/", path)); diff != "" {
		t.Errorf("-want +got\n%s", diff)
	}
}

func TestLevel(t *testing.T) {
	const (
		cid  = "/cri-containerd-" + id + ".scope"
		fake = other + "/kubepods"
	)
	for _, tt := range []struct {
		root, path string
		want       event.LimitLevel
	}{
		{"/", "/", event.LevelNode},
		{"/", "/kubepods.slice", event.LevelKubepods},
		{"/", "/kubepods", event.LevelKubepods},
		{"/", "/kubepods/kubepods", event.LevelKubepods},
		{"/", "/kubepods/kubepods/burstable", event.LevelQoS},
		{"/", "/kubepods/kubepods/burstable/pod" + uid, event.LevelPod},
		{"/", "/kubepods/burstable/kubepods", event.LevelOther},
		{"/", "/kubepods.slice/kubepods-kubepods.slice", event.LevelKubepods},
		{"/", "/kubepods.slice/kubepods-kubepods.slice/kubepods-kubepods-besteffort.slice", event.LevelQoS},
		{"/", twiceB, event.LevelPod},
		{"/", "/kubepods/pod" + uid + "/kata_" + id, event.LevelOther},
		{"/", "/kubelet.slice/kubelet-kubepods.slice", event.LevelKubepods},
		{"/", "/system.slice/k3s.service/kubepods", event.LevelKubepods},
		{"/", "/kubepods.slice/kubepods-burstable.slice", event.LevelQoS},
		{"/", "/kubepods/besteffort", event.LevelQoS},
		{"/", sysB, event.LevelPod},
		{"/", sysG, event.LevelPod},
		{"/", "/kubepods/pod" + hash, event.LevelPod},
		{"/", sysB + cid, event.LevelContainer},
		{"/", sysB + "/crio-" + id + ".scope", event.LevelContainer},
		{"/", sysB + "/crio-" + id + ".scope/container", event.LevelContainer},
		{"/", sysB + "/crio-" + id + ".scope/container/container", event.LevelOther},
		{"/", sysB + "/crio-" + id + ".scope/other", event.LevelOther},
		{"/", sysB + "/crio-conmon-" + id + ".scope", event.LevelOther},
		{"/", sysB + cid + "/init.scope", event.LevelOther},
		{"/", "/kubepods/pod" + uid + "/" + id, event.LevelContainer},
		{"/", "/kubepods/pod" + uid + "/" + id + "/container", event.LevelOther}, // crun makes it under systemd only
		{"/", "/kubepods/pod" + uid + "/foo", event.LevelOther},
		{"/", "/kubepods/foo", event.LevelOther},
		{"/", "/kubepods.slice/foo.slice", event.LevelOther},
		{"/", "/kubepods-burstable-pod" + uid_ + ".slice:cri-containerd:" + id, event.LevelContainer},
		{"/", "/kubelet.slice", event.LevelOther},
		{"/", "/system.slice", event.LevelOther},
		{"/", "/system.slice/foo.service", event.LevelOther},
		{"/", "/docker", event.LevelOther},
		{"/", "/docker/" + id, event.LevelContainer},
		{"/", "/docker/" + id + "/x", event.LevelOther},
		{"/", "/machine.slice/libpod-" + id + ".scope/container", event.LevelContainer},

		// The same cgroups, seen from a kind node and from the machine that it runs on.
		{nodeD, nodeD, event.LevelNode},
		{nodeD, nodeD + "/kubelet.slice", event.LevelOther},
		{nodeD, nodeD + "/kubelet.slice/kubelet-kubepods.slice", event.LevelKubepods},
		{nodeD, nodeD + "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice", event.LevelQoS},
		{nodeD, nodeD + kindB, event.LevelPod},
		{nodeD, nodeD + kindB + cid, event.LevelContainer},
		{nodeD, nodeD + kindB + cid + "/x", event.LevelOther},
		{nodeD, nodeD + "0" + kindB, event.LevelOther},
		{nodeD, "/", event.LevelOther},
		{nodeD, "/system.slice", event.LevelOther},
		{nodeD, kindB, event.LevelOther},
		{"/", nodeD, event.LevelContainer},
		{"/", nodeD + "/kubelet.slice/kubelet-kubepods.slice", event.LevelOther},
		{"/", nodeD + kindB, event.LevelOther},
		{"/", nodeD + kindB + cid, event.LevelOther},

		// A child cgroup that a container calls kubepods is no node's kubepods, unless the
		// container is the node.
		{"/", fake, event.LevelOther},
		{"/", fake + "/burstable", event.LevelOther},
		{"/", fake + "/burstable/pod" + uid + "/" + id, event.LevelOther},
		{other, fake, event.LevelKubepods},
		{other, fake + "/burstable/pod" + uid + "/" + id, event.LevelContainer},

		// Roots and paths that are none.
		{"", "", event.LevelOther},
		{"", "/kubepods", event.LevelOther},
		{"kubepods", "kubepods", event.LevelOther},
		{"/docker/", "/docker/", event.LevelOther},
		{"/", "", event.LevelOther},
		{"/", ".../kubepods", event.LevelOther},
		{"/", "/kubepods/", event.LevelOther},
		{"/", "//kubepods", event.LevelOther},
		{"/x", "/x/../kubepods", event.LevelOther},
		{"/", "/kubepods/burstable\x00", event.LevelOther},
	} {
		if got := cgroup.Level(tt.root, tt.path); got != tt.want {
			t.Errorf("Level(%q, %q) = %s, want %s", tt.root, tt.path, got, tt.want)
		}
	}
}

// TestLevelOfShapes sees every shape from the node that is its own.
func TestLevelOfShapes(t *testing.T) {
	for _, s := range shapes() {
		root, path := s.roots()[len(s.roots())-1], s.free+s.path
		if got := cgroup.Level(root, path); got != s.level {
			t.Errorf("%s: Level(%q, %q) = %s, want %s", s.name, root, path, got, s.level)
		}
	}
}

func TestUnder(t *testing.T) {
	for _, tt := range []struct {
		root, path string
		want       bool
	}{
		{"/", "/", true},
		{"/", "/a", true},
		{"/a", "/a", true},
		{"/a", "/a/b", true},
		{"/a/b", "/a/b/c/d", true},
		{"/a", "/ab", false},
		{"/a", "/", false},
		{"/a/b", "/a", false},
		{"/a", "/b/a", false},
		{"/a", "a/b", false},
		{"/a", "", false},

		// All of a machine's cgroups lie under "/", however little of the path is known.
		{"/", "", true},
		{"/", ".../a/b", true},
		{"/a", ".../a/b", false},

		{"", "/a", false},
		{"", "", false},
		{"a", "a/b", false},
		{"/a/", "/a/", false},
		{"/a/", "/a/b", false},
	} {
		if got := cgroup.Under(tt.root, tt.path); got != tt.want {
			t.Errorf("Under(%q, %q) = %t, want %t", tt.root, tt.path, got, tt.want)
		}
	}
}

func BenchmarkParse(b *testing.B) {
	all := shapes()
	for _, name := range []string{"systemd, burstable, containerd", "cgroupfs, burstable", "kind in docker, systemd", "systemd, ten levels below", "docker, systemd"} {
		i := slices.IndexFunc(all, func(s shape) bool { return s.name == name })
		path := all[i].full()
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				cgroup.Parse("/", path)
			}
		})
	}
}
