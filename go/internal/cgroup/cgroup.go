// Package cgroup reads from a cgroup's path what it proves about Kubernetes and the container
// runtime. It does no I/O.
//
// Rule of the package: no wrong pod. Every component from the node's root down to the container that
// looks like a part of a kubelet's tree must be one that a kubelet or a runtime makes at that very
// place; otherwise the path names no pod at all. What lies below a pod's cgroup is the pod's, whatever
// it is called: a runtime that is not known made it (the container is then not known either), or a
// container, under whatever names it liked.
//
// What a path cannot say: a pod's sandbox (the pause container) has the same shape as the pod's
// containers, so that ContainerID may be a sandbox's.
package cgroup

import (
	"slices"
	"strings"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// The values of event.Container.QoS and event.Container.Runtime.
const (
	guaranteed = "guaranteed"
	burstable  = "burstable"
	bestEffort = "besteffort"

	containerd = "containerd"
	crio       = "cri-o"
	docker     = "docker"
	podman     = "podman"
)

// kubepods is the kubelet's root cgroup for pods, below its --cgroup-root
// (defaultNodeAllocatableCgroupName in pkg/kubelet/cm/node_container_manager_linux.go).
const kubepods = "kubepods"

// Parse says which pod and container a cgroup path belongs to on a node whose own root is `root` ("/"
// normally; the node container's cgroup under kind). nil when the path proves neither.
//
// Where trees are nested the leftmost pod below root is named. It cannot be forged from inside a pod's
// container: one that may make cgroups in its own part of the tree may give them a neighbour's names,
// or broken ones, but all of them lie below its own. It is also the pod that the node's API server
// knows: of Kubernetes in a pod, that is the outer one.
//
// A container of plain docker or podman on the way does not count: it may be a kind node, seen from
// the machine that it runs on.
//
// No path tells that somebody imitated a pod outside of any: a plain container, a user's session, or
// a privileged pod that sees the machine's whole tree (containerd gives it no cgroup namespace, see
// buildLinuxSpec() in its CRI plugin) and may make and enter cgroups anywhere.
func Parse(root, path string) *event.Container {
	parts, kube := below(root, path)
	if kube == len(parts) {
		c, _ := plain(parts)
		return c
	}
	if p, ok := walk(parts, kube); ok && p.container.PodUID != "" {
		return &p.container
	}
	return nil
}

// Level says whose limit a cgroup path is, as seen on a node whose own root is `root`.
//
// Unlike in Parse, what lies in a container of plain docker or podman counts for nothing either: its
// kubepods is no limit of this node, unless the container is the node.
func Level(root, path string) event.LimitLevel {
	if path == root && Under(root, path) {
		return event.LevelNode
	}
	parts, kube := below(root, path)
	if c, end := plain(parts[:kube]); c != nil {
		if end == len(parts) {
			return event.LevelContainer
		}
		return event.LevelOther
	}
	if kube < len(parts) {
		if p, ok := walk(parts, kube); ok && p.end == len(parts) {
			return p.level
		}
	}
	return event.LevelOther
}

// below returns the components of path below root, none when it does not lie there, and which of them
// is the first that looksKube, len(parts) when none does.
func below(root, path string) (parts []string, kube int) {
	if !Under(root, path) {
		return nil, 0
	}
	parts = split(path)
	if parts != nil && root != "/" {
		parts = parts[strings.Count(root, "/"):]
	}
	if kube = slices.IndexFunc(parts, looksKube); kube < 0 {
		kube = len(parts)
	}
	return parts, kube
}

// Under reports whether path is root or lies below it (path-component wise).
//
// Every path lies under "/", also one that could not be read whole (".../") or at all: a kill must
// not be dropped for that. Under any other root such a path proves nothing.
func Under(root, path string) bool {
	if root == "/" {
		return true
	}
	if !strings.HasPrefix(root, "/") || strings.HasSuffix(root, "/") {
		return false
	}
	rest, ok := strings.CutPrefix(path, root)
	return ok && (rest == "" || rest[0] == '/')
}

// split returns a path's components, or nil where it is no whole path as the kernel writes it.
func split(path string) []string {
	const (
		pathMax = 4096 // PATH_MAX, with the NUL: the buffer of proc_cgroup_show() in kernel/cgroup/cgroup.c
		nameMax = 255  // NAME_MAX
	)
	// cgroup_mkdir() refuses a newline, but no other byte: a name need not be UTF-8. A truncated path
	// begins with ".../".
	if len(path) >= pathMax || !strings.HasPrefix(path, "/") || strings.ContainsAny(path, "\x00\n") {
		return nil
	}
	parts := strings.Split(path[1:], "/")
	for _, c := range parts {
		if c == "" || c == "." || c == ".." || len(c) > nameMax {
			return nil
		}
	}
	return parts
}

// looksKube reports whether a component claims to be part of a kubelet's tree. Names are free to choose,
// so that what makes this claim and is not fully understood proves nothing.
func looksKube(c string) bool {
	if strings.Contains(c, kubepods) {
		return true
	}
	for {
		i := strings.Index(c, "pod")
		if i < 0 {
			return false
		}
		c = c[i:]
		for _, n := range [...]int{len("pod") + 32, len("pod") + 36} {
			if n > len(c) {
				break
			}
			_, _, dashed := podUID(c[:n], '-')
			_, _, escaped := podUID(c[:n], '_')
			if dashed || escaped {
				return true
			}
		}
		c = c[len("pod"):]
	}
}

// place is what a kubelet's tree says of a path.
type place struct {
	container event.Container
	level     event.LimitLevel // of the cgroup parts[:end]
	end       int              // what follows lies inside the container
}

// walk follows the kubelet's tree whose root is parts[at] down to the container's cgroup, or as far
// as the path goes. It fails at the first component that does not belong there.
//
// The tree is [kubepods/...]kubepods[/burstable|/besteffort]/pod<uid>/<container>, guaranteed pods standing
// directly under kubepods: qosContainerManagerImpl.Start() in
// pkg/kubelet/cm/qos_container_manager_linux.go and podContainerManagerImpl.GetPodContainerName()
// in pkg/kubelet/cm/pod_container_manager_linux.go.
func walk(parts []string, at int) (place, bool) {
	if c, ok := colonForm(parts[at]); ok {
		return place{container: c, level: event.LevelContainer, end: at + 1}, true
	}
	tree, ok := treeAt(parts, at)
	if !ok {
		return place{}, false
	}
	p := place{level: event.LevelKubepods, end: at + 1}
	if p.end == len(parts) {
		return p, true
	}

	name := tree.child(parts[p.end])
	// The kubelet's --cgroup-root has the same name (Docker Desktop: /kubepods/kubepods/burstable/...).
	for name == kubepods {
		p.end++
		if p.end == len(parts) {
			return p, true
		}
		name = tree.child(parts[p.end])
	}
	p.container.QoS = guaranteed
	if name == burstable || name == bestEffort {
		p.container.QoS, p.level = name, event.LevelQoS
		p.end++
		if p.end == len(parts) {
			return p, true
		}
		name = tree.child(parts[p.end])
	}

	p.container.PodUID, p.container.Static, ok = podUID(name, tree.separator())
	if !ok {
		return place{}, false
	}
	p.level = event.LevelPod
	p.end++
	if p.end == len(parts) {
		return p, true
	}

	id, runtime, monitor := containerName(parts[p.end], tree.systemd())
	p.end++
	switch {
	case monitor:
		// conmon_cgroup = "pod" in crio.conf: the monitor's memory is charged to the pod, and no
		// container of it was hit.
		p.container.Runtime, p.level = runtime, event.LevelOther
	case id != "":
		p.container.ContainerID, p.container.Runtime = id, runtime
		p.level = event.LevelContainer
		if tree.systemd() {
			p.end = skipSubgroup(parts, p.end)
		}
	default:
		// The pod's own cgroup proves the pod, but nothing says who made this one in it: Kata's sandbox
		// (kata_<id>, kata_overhead), another runtime.
		p.level = event.LevelOther
	}
	return p, true
}

// tree is a place in a kubelet's tree, in the spelling of its cgroup driver: the slice's name
// without its suffix under systemd, empty under cgroupfs.
type tree struct{ slice string }

func (t *tree) systemd() bool { return t.slice != "" }

// separator is what stands between the groups of a UID. In a slice's name a dash would open another
// level, so that the kubelet writes an underscore (escapeSystemdCgroupName() in
// pkg/kubelet/cm/cgroup_manager_linux.go).
func (t *tree) separator() byte {
	if t.systemd() {
		return '_'
	}
	return '-'
}

// child descends by one component and returns the kubelet's name for it, empty when there is none:
// under systemd a slice's name carries those of all its parents (CgroupName.ToSystemd()).
func (t *tree) child(c string) string {
	if !t.systemd() {
		return c
	}
	unit, isSlice := strings.CutSuffix(c, ".slice")
	name, below := strings.CutPrefix(unit, t.slice)
	name, dash := strings.CutPrefix(name, "-")
	if !isSlice || !below || !dash {
		return ""
	}
	t.slice = unit
	return name
}

// treeAt recognises the root of a kubelet's tree. Under cgroupfs anything may stand to its left. Under
// systemd --cgroup-root is part of its name, and the slices to its left must spell that out
// (ExpandSlice() in libcontainer/cgroups/systemd/common.go of runc): a-b-kubepods.slice is found in
// a.slice/a-b.slice. To the left of those is the root of that systemd, which is no slice itself.
func treeAt(parts []string, at int) (tree, bool) {
	if parts[at] == kubepods {
		return tree{}, true
	}
	unit, isSlice := strings.CutSuffix(parts[at], ".slice")
	root, isKubepods := strings.CutSuffix(unit, kubepods)
	if !isSlice || !isKubepods || !isRootPrefix(root) {
		return tree{}, false
	}
	for root != "" {
		root = root[:len(root)-1] // the dash
		at--
		if at < 0 || !isSliceOf(parts[at], root) {
			return tree{}, false
		}
		root = root[:strings.LastIndexByte(root, '-')+1]
	}
	if at > 0 && strings.HasSuffix(parts[at-1], ".slice") {
		return tree{}, false
	}
	return tree{slice: unit}, true
}

// isRootPrefix reports whether s, which stands before "kubepods" in a slice's name, is empty or names
// the levels of a --cgroup-root, each followed by a dash.
func isRootPrefix(s string) bool {
	return s == "" || s[0] != '-' && s[len(s)-1] == '-' && !strings.Contains(s, "--") && !strings.Contains(s, kubepods)
}

func isSliceOf(c, unit string) bool {
	name, ok := strings.CutSuffix(c, ".slice")
	return ok && name == unit
}

// colonForm reads kubepods-burstable-pod<uid>.slice:cri-containerd:<id>. getCgroupsPath() in
// containerd's CRI plugin makes it, for a kubelet on the systemd driver; a runtime that is not told
// to use systemd takes it for the name of a cgroup, relative to its own, so that it may stand
// anywhere (/system.slice/containerd.service/..., or under "/").
func colonForm(c string) (event.Container, bool) {
	unit, id, ok := strings.Cut(c, ".slice:cri-containerd:")
	root, rest, isKube := strings.Cut(unit, kubepods+"-")
	if !ok || !isKube || !isRootPrefix(root) || !isHex(id, 64) {
		return event.Container{}, false
	}
	for { // a --cgroup-root of that name; see walk
		inner, same := strings.CutPrefix(rest, kubepods+"-")
		if !same {
			break
		}
		rest = inner
	}
	qos, name, ok := strings.Cut(rest, "-")
	switch {
	case !ok:
		qos, name = guaranteed, rest
	case qos != burstable && qos != bestEffort:
		return event.Container{}, false
	}
	uid, static, ok := podUID(name, '_')
	return event.Container{PodUID: uid, ContainerID: id, Runtime: containerd, QoS: qos, Static: static}, ok
}

// podUID reads pod<uid> (GetPodCgroupNameSuffix() in pkg/kubelet/cm).
//
// The API server's UIDs have five groups. A pod from a file or URL gets 32 digits, an MD5
// (applyDefaults() in pkg/kubelet/config/common.go) - unless its manifest names a UID: that is the
// pod's then, and where it has five groups (OpenShift's installer set such ones for kubelets before
// 1.23) the path does not tell that the pod is static. Any other UID is not understood.
func podUID(c string, sep byte) (uid string, static, ok bool) {
	s, ok := strings.CutPrefix(c, "pod")
	if !ok {
		return "", false, false
	}
	if isHex(s, 32) {
		return s, true, true
	}
	if len(s) != 36 {
		return "", false, false
	}
	for i := range len(s) {
		switch i {
		case 8, 13, 18, 23:
			ok = ok && s[i] == sep
		default:
			ok = ok && isHexDigit(s[i])
		}
	}
	if !ok {
		return "", false, false
	}
	return strings.ReplaceAll(s, "_", "-"), false, true
}

// containerName reads the cgroup that a runtime makes in a pod's. monitor: it is the one of CRI-O's
// conmon, which watches over the container id and is not in it.
func containerName(c string, systemd bool) (id, runtime string, monitor bool) {
	if systemd {
		var isScope bool
		if c, isScope = strings.CutSuffix(c, ".scope"); !isScope {
			return "", "", false
		}
	} else if isHex(c, 64) { // containerd and dockerd: <parent>/<id>, which does not say whose it is
		return c, "", false
	}
	prefix, id := cutID(c)
	switch {
	case prefix == "crio-": // containerCgroupPath() in internal/config/cgmgr of CRI-O
		return id, crio, false
	case prefix == "crio-conmon-": // MoveConmonToCgroup(), there too
		return id, crio, true
	case prefix == "cri-containerd-" && systemd: // getCgroupsPath() in containerd's CRI plugin
		return id, containerd, false
	case prefix == "docker-" && systemd: // WithCgroups() in daemon/oci_linux.go of moby; cri-dockerd
		return id, docker, false
	}
	return "", "", false
}

// plain finds the container of a path without Kubernetes, and where its own cgroup ends. The leftmost
// one counts: what stands to its right was made inside of it.
func plain(parts []string) (c *event.Container, end int) {
	for i := 1; i < len(parts); i++ {
		parent := parts[i-1]
		// WithCgroups() in daemon/oci_linux.go of moby: the default parent under cgroupfs.
		if i == 1 && parent == "docker" && isHex(parts[i], 64) {
			return &event.Container{ContainerID: parts[i], Runtime: docker}, i + 1
		}
		unit, isScope := strings.CutSuffix(parts[i], ".scope")
		if !isScope || !strings.HasSuffix(parent, ".slice") { // systemd keeps scopes in slices
			continue
		}
		switch prefix, id := cutID(unit); prefix {
		case "docker-":
			return &event.Container{ContainerID: id, Runtime: docker}, skipSubgroup(parts, i+1)
		case "libpod-": // Container.CGroupPath() in libpod/container.go of podman; not libpod-conmon-
			return &event.Container{ContainerID: id, Runtime: podman}, skipSubgroup(parts, i+1)
		}
	}
	return nil, 0
}

// skipSubgroup returns the end of a container's own cgroup when its scope ends at end: crun puts the
// container's processes, and its limits, into a child of the scope named "container", for the scope
// is systemd's (find_systemd_subgroup() in src/libcrun/cgroup-systemd.c).
func skipSubgroup(parts []string, end int) int {
	if end < len(parts) && parts[end] == "container" {
		return end + 1
	}
	return end
}

// cutID splits a name that ends in a container's ID; both are empty when it does not.
func cutID(s string) (prefix, id string) {
	if i := len(s) - 64; i >= 0 && isHex(s[i:], 64) {
		return s[:i], s[i:]
	}
	return "", ""
}

// isHex reports whether s is n lower-case hexadecimal digits.
func isHex(s string, n int) bool {
	if len(s) != n {
		return false
	}
	for i := range n {
		if !isHexDigit(s[i]) {
			return false
		}
	}
	return true
}

func isHexDigit(c byte) bool { return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' }
