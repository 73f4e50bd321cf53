package cgroup_test

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroup"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// This file writes paths as kubelets and runtimes do, from descriptions that are drawn at random, and
// holds what the parser reads against the description. Nothing here takes a path apart with the
// parser's own means.

// dice draws from bytes, so that a fuzzer steers every choice. An exhausted die shows zeros.
type dice struct {
	data  []byte
	drawn uint64
}

func (d *dice) roll(n int) int {
	d.drawn++
	if len(d.data) == 0 {
		return 0
	}
	b := d.data[0]
	d.data = d.data[1:]
	return int(b) % n
}

func pick[T any](d *dice, of ...T) T { return of[d.roll(len(of))] }

// hex draws n digits, at most 64, from one byte; no two draws of one die are alike.
func (d *dice) hex(n int) string {
	sum := sha256.Sum256([]byte(fmt.Sprint(d.roll(256), d.drawn)))
	return hex.EncodeToString(sum[:])[:n]
}

func (d *dice) uuid() string {
	return d.hex(8) + "-" + d.hex(4) + "-" + d.hex(4) + "-" + d.hex(4) + "-" + d.hex(12)
}

// cluster describes one pod on one kubelet, and what of it a path shows.
type cluster struct {
	driver     string   // systemd, cgroupfs or colon
	cgroupRoot []string // the kubelet's --cgroup-root
	qos        string
	uid        string
	static     bool
	who        string // container, sandbox, monitor or pod: who lives in the cgroup
	runtime    string // containerd, cri-o or docker; of a sandbox the name of its cgroup
	id         string
	crun       bool // the container's processes are in crun's child of the scope
}

func drawCluster(d *dice, container bool) cluster {
	c := cluster{
		driver: pick(d, "systemd", "cgroupfs", "colon"),
		qos:    pick(d, "burstable", "besteffort", "guaranteed"),
		static: d.roll(4) == 1,
		who:    pick(d, "container", "container", "pod", "monitor", "sandbox"),
		id:     d.hex(64),
	}
	for range pick(d, 0, 0, 1, 2) {
		c.cgroupRoot = append(c.cgroupRoot, pick(d, "kubelet", "a", "x.y", "my-root", "burstable", "kubepod"))
	}
	for range pick(d, 0, 0, 0, 1, 2) { // Docker Desktop's has the name of what is in it
		c.cgroupRoot = append(c.cgroupRoot, "kubepods")
	}
	c.uid = d.uuid()
	if c.static {
		c.uid = d.hex(32)
	}
	if container || c.driver == "colon" {
		c.who = "container"
	}
	switch {
	case c.who == "monitor":
		c.runtime = "cri-o"
	case c.who == "sandbox": // Kata's, gVisor's, and of runtimes that nobody has heard of
		c.runtime = pick(d, "kata_"+c.id, "kata_overhead", "kata_"+c.id+".scope", "runsc-"+c.id+".scope", "libpod-"+c.id+".scope", c.id[:12], "sandbox", "x.slice", "\xc3\x28")
	case c.driver == "colon":
		c.runtime = "containerd"
	default:
		c.runtime = pick(d, "containerd", "cri-o", "docker")
	}
	c.crun = c.driver == "systemd" && d.roll(2) == 1
	return c
}

// names is the pod's kubelet name (CgroupName), --cgroup-root included.
func (c cluster) names() []string {
	n := append([]string{}, c.cgroupRoot...)
	n = append(n, "kubepods")
	if c.qos != "guaranteed" {
		n = append(n, c.qos)
	}
	return append(n, "pod"+c.uid)
}

// write returns the path's components and, beside each, whose cgroup it is.
func (c cluster) write() (parts []string, levels []event.LimitLevel) {
	add := func(part string, l event.LimitLevel) {
		parts, levels = append(parts, part), append(levels, l)
	}
	names := c.names()
	level := func(i int) event.LimitLevel {
		switch i -= len(c.cgroupRoot); {
		case names[i+len(c.cgroupRoot)] == "kubepods":
			return event.LevelKubepods
		case i < 0:
			return event.LevelOther
		case names[i+len(c.cgroupRoot)] == c.qos:
			return event.LevelQoS
		}
		return event.LevelPod
	}

	// The systemd driver escapes every name and joins them: CgroupName.ToSystemd().
	var units []string
	for i, n := range names {
		n = strings.ReplaceAll(n, "-", "_")
		if i > 0 {
			n = units[i-1] + "-" + n
		}
		units = append(units, n)
	}
	switch c.driver {
	case "colon":
		add(units[len(units)-1]+".slice:cri-containerd:"+c.id, event.LevelContainer)
		return parts, levels
	case "systemd":
		for i, u := range units {
			add(u+".slice", level(i))
		}
	case "cgroupfs":
		for i, n := range names {
			add(n, level(i))
		}
	}

	prefix := map[string]string{"containerd": "cri-containerd-", "cri-o": "crio-", "docker": "docker-"}[c.runtime]
	switch c.who + " " + c.driver {
	case "container systemd":
		add(prefix+c.id+".scope", event.LevelContainer)
		if c.crun {
			add("container", event.LevelContainer)
		}
	case "container cgroupfs":
		if c.runtime != "cri-o" {
			prefix = ""
		}
		add(prefix+c.id, event.LevelContainer)
	case "sandbox systemd", "sandbox cgroupfs":
		add(c.runtime, event.LevelOther)
	case "monitor systemd":
		add("crio-conmon-"+c.id+".scope", event.LevelOther)
	case "monitor cgroupfs":
		add("crio-conmon-"+c.id, event.LevelOther)
	}
	return parts, levels
}

func (c cluster) want() *event.Container {
	w := &event.Container{PodUID: c.uid, QoS: c.qos, Static: c.static}
	switch c.who {
	case "container":
		w.ContainerID = c.id
		if c.driver != "cgroupfs" || c.runtime == "cri-o" { // a plain ID is anybody's
			w.Runtime = c.runtime
		}
	case "monitor":
		w.Runtime = "cri-o"
	}
	return w
}

// proof is what a cgroup proves to a node.
type proof struct {
	level     event.LimitLevel
	container *event.Container
}

// node is one of those on a path's way.
type node struct {
	root string
	tree map[string]proof // of this node's own cgroups, from kubepods on
	want *event.Container // of the cgroup that ends the tree, and of everything below
}

// generated is a path and what is true of it.
type generated struct {
	path  string
	nodes []node           // the machine, or the container around all, is the first
	box   *event.Container // the plain container that the first node is
}

func generate(d *dice) generated {
	var parts []string
	var g generated
	at := func() string { return "/" + strings.Join(parts, "/") }

	// What a machine puts around it.
	around := func() []string {
		return pick(d,
			nil,
			[]string{"docker", d.hex(64)},
			[]string{"system.slice", "docker-" + d.hex(64) + ".scope"},
			[]string{"machine.slice", "libpod-" + d.hex(64) + ".scope", "container"},
		)
	}
	parts = append(parts, around()...)
	switch len(parts) {
	case 2:
		g.box = bare("docker", idIn(parts[1]))
	case 3:
		g.box = bare("podman", idIn(parts[1]))
	}

	if d.roll(12) == 1 { // no Kubernetes
		n := node{root: "/", want: g.box, tree: map[string]proof{}}
		if g.box == nil {
			parts = pick(d, []string{"init.scope"}, []string{"system.slice", "foo.service"}, []string{"user.slice", "user-0.slice", "session-1.scope"})
		} else {
			for i := 2; i <= len(parts); i++ {
				n.tree["/"+strings.Join(parts[:i], "/")] = proof{event.LevelContainer, g.box}
			}
			parts = append(parts, below(d, 12)...)
		}
		return generated{path: at(), nodes: []node{n}}
	}

	for pods := pick(d, 0, 0, 0, 1, 2); pods >= 0; pods-- { // pods around the pod
		n := node{root: at(), tree: map[string]proof{}}
		c := drawCluster(d, pods > 0)
		if c.driver != "systemd" { // for systemd the node's root is the slices' root
			parts = append(parts, pick(d, nil, []string{"system.slice", "k3s.service"}, []string{"kubelet"}, []string{"lxc.payload.x", "init.scope"})...)
		}
		n.want = c.want()
		inner, levels := c.write()
		for i, l := range levels {
			parts = append(parts, inner[i])
			p := proof{level: l}
			switch {
			case i < len(levels)-1 && l == event.LevelOther: // of --cgroup-root
				continue
			case l == event.LevelContainer || i == len(levels)-1:
				p.container = n.want
			case l == event.LevelPod:
				p.container = &event.Container{PodUID: c.uid, QoS: c.qos, Static: c.static}
			}
			n.tree[at()] = p
		}
		g.nodes = append(g.nodes, n)

		if c.who != "pod" {
			if pods == 0 {
				parts = append(parts, below(d, 12)...)
			}
			parts = append(parts, hostile(d)...)
			parts = append(parts, below(d, 2)...)
		}
		if pods > 0 {
			parts = append(parts, around()...)
		}
	}
	g.path = at()
	return g
}

var hexID = regexp.MustCompile(`[0-9a-f]{64}`)

func idIn(name string) string { return hexID.FindString(name) }

// below makes up to max levels as a container may make them. None of them imitates a kubelet's tree, and
// the first is not the child that crun makes.
func below(d *dice, max int) []string {
	var parts []string
	for range min(max, pick(d, 0, 0, 1, 2, 3, 10, 12)) {
		name := pick(d,
			"init.scope", "app", "container", "exec", "burstable", "besteffort", "guaranteed", "pod", "pods",
			"kubelet.slice", "kubepod", "docker", "%s", "pod-%s", "Größe 8", "a:b", "-", "...", "\xff",
			"docker-%s.scope", "crio-%s", "cri-containerd-%s.scope", "libpod-%s.scope", "crio-conmon-%s.scope",
			"user@1000.service", "x.slice", "x-y.slice", ".slice", ".scope",
		)
		if len(parts) == 0 && name == "container" {
			name = "contained"
		}
		parts = append(parts, strings.Replace(name, "%s", d.hex(64), 1))
	}
	return parts
}

// hostile makes the levels of a container that wants to be taken for another pod's, or for nobody's.
func hostile(d *dice) []string {
	neighbour, _ := drawCluster(d, false).write()
	cut := d.roll(len(neighbour) + 1)
	return pick(d,
		nil, nil, nil,
		neighbour,
		neighbour[1:],
		neighbour[:cut],
		append(slices.Clone(neighbour[:cut]), "pod"+d.uuid()),
		[]string{"kubepods", "burstable", "podx", d.hex(64)},
		[]string{"kubepods", "pod" + d.uuid(), "\xc3\x28"},
		[]string{"my-kubepods-backup"},
		[]string{"kubepods.slice"},
	)
}

func same(a, b *event.Container) bool { return a == b || a != nil && b != nil && *a == *b }

func checkGenerated(t *testing.T, data []byte) generated {
	t.Helper()
	g := generate(&dice{data: data})
	if len(g.path) >= 4096 {
		t.Fatalf("the kernel does not show %q whole", g.path)
	}
	var paths []string // all on the way
	for i := range g.path {
		if i > 0 && g.path[i] == '/' {
			paths = append(paths, g.path[:i])
		}
	}
	paths = append(paths, g.path)

	check := func(root, path string, level event.LimitLevel, c *event.Container) {
		t.Helper()
		if got := cgroup.Parse(root, path); !same(c, got) {
			t.Errorf("Parse(%q, %q): -want +got\n%s", root, path, cmp.Diff(c, got))
		}
		if got := cgroup.Level(root, path); got != level {
			t.Errorf("Level(%q, %q) = %s, want %s", root, path, got, level)
		}
	}
	for i, n := range g.nodes {
		checkSound(t, n.root, g.path)
		started, ended := false, false
		for _, path := range paths {
			want, ok := n.tree[path]
			started, ended = started || ok, started && !ok
			inside := n.root == "/" || strings.HasPrefix(path, n.root+"/")
			switch {
			case ended:
				want = proof{event.LevelOther, n.want}
			case path == n.root:
				want.level = event.LevelNode
			case !started:
				want.level = event.LevelOther
			}
			check(n.root, path, want.level, want.container)
			if i == 0 && g.box != nil && inside {
				if !started {
					want.container = g.box
				}
				check("/", path, event.LevelOther, want.container)
			}
			if cgroup.Under(n.root, path) != (inside || path == n.root) || path != g.path && cgroup.Under(g.path, path) {
				t.Errorf("Under is wrong about %q, %q and %q", n.root, path, g.path)
			}
		}
	}
	return g
}

// podIn finds what stands in a path in the place of a pod's UID, without regard to anything else.
var podIn = regexp.MustCompile(`pod([0-9a-f]{32}|[0-9a-f]{8}([-_])[0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})(?:$|/|\.slice(?:$|[/:]))`)

var qosIn = regexp.MustCompile(`burstable|besteffort`)

// isPath reports whether the kernel could have written path.
func isPath(path string) bool {
	if path == "/" {
		return true
	}
	for _, bad := range []string{"//", "/./", "/../", "\x00", "\n"} {
		if strings.Contains(path+"/", bad) {
			return false
		}
	}
	for _, name := range strings.Split(path, "/") {
		if len(name) > 255 {
			return false
		}
	}
	return strings.HasPrefix(path, "/") && len(path) < 4096
}

// checkSound holds whatever is said of a path, however malformed, against the path's letters.
func checkSound(t *testing.T, root, path string) {
	t.Helper()
	c := cgroup.Parse(root, path)
	level := cgroup.Level(root, path)
	if root != "/" { // what stands left of a node's root is not there
		inside, ok := strings.CutPrefix(path, root)
		wantC, wantLevel := cgroup.Parse("/", inside), cgroup.Level("/", inside)
		switch {
		case path == root:
			wantC, wantLevel = nil, event.LevelNode
		case !ok || !isPath(root) || !isPath(path) || inside[0] != '/':
			wantC, wantLevel = nil, event.LevelOther
		}
		if !same(wantC, c) || isPath(root) && wantLevel != level {
			t.Fatalf("Parse, Level of %q on %q = %+v, %s; want %+v, %s", path, root, c, level, wantC, wantLevel)
		}
		if ok && isPath(inside) {
			checkSound(t, "/", inside)
		}
		return
	}
	if !isPath(path) {
		if c != nil || level != event.LevelOther {
			t.Fatalf("%q is no path, yet Parse = %+v, Level = %s", path, c, level)
		}
		return
	}

	var pods [][]int
	if c != nil {
		pods = podIn.FindAllStringSubmatchIndex(path, -1)
	}
	switch {
	case c == nil:
	case c.PodUID == "":
		if c.ContainerID == "" || c.QoS != "" || c.Static {
			t.Fatalf("Parse(%q) = %+v: neither a pod nor a container", path, *c)
		}
		if len(pods) > 0 || strings.Contains(path, "kubepods") {
			t.Fatalf("Parse(%q) = %+v, yet there is a pod in it", path, *c)
		}
		if !strings.Contains(path, c.ContainerID) {
			t.Fatalf("Parse(%q) = %+v: that container is not in it", path, *c)
		}
	default:
		if len(pods) == 0 {
			t.Fatalf("Parse(%q) = %+v: no pod is in it", path, *c)
		}
		first := pods[0]
		written := path[first[2]:first[3]]
		if strings.ReplaceAll(written, "_", "-") != c.PodUID {
			t.Fatalf("Parse(%q) = %+v, the leftmost pod is %s", path, *c, written)
		}
		if c.Static != (len(written) == 32) {
			t.Fatalf("Parse(%q) = %+v: static is wrong", path, *c)
		}
		// The container is named right behind the pod, and what is below it makes no difference.
		next, inside, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(path[first[3]:], ".slice"), "/"), "/")
		if c.ContainerID != "" && (len(c.ContainerID) != 64 || idIn(next) != c.ContainerID) {
			t.Fatalf("Parse(%q) = %+v: that container is not in it", path, *c)
		}
		if own := strings.TrimSuffix(path, "/"+inside); !same(c, cgroup.Parse("/", own)) {
			t.Fatalf("Parse(%q) = %+v, yet Parse(%q) = %+v", path, *c, own, cgroup.Parse("/", own))
		}
		for _, fake := range []string{other, "/kubepods/x", "/kubepods.slice", "/x/pod" + uid, "/\xff"} {
			deeper := path + fake
			if len(deeper) >= 4096 {
				continue
			}
			if got := cgroup.Parse("/", deeper); !same(c, got) {
				t.Fatalf("Parse(%q): -want +got\n%s", deeper, cmp.Diff(c, got))
			}
			if l := cgroup.Level("/", deeper); l != event.LevelOther {
				t.Fatalf("Level(/, %q) = %s", deeper, l)
			}
		}
		if !strings.Contains(path[:first[0]], "kubepods") {
			t.Fatalf("Parse(%q) = %+v, without kubepods", path, *c)
		}
		want := "guaranteed"
		if between := qosIn.FindString(path[strings.LastIndex(path[:first[0]], "kubepods"):first[2]]); between != "" {
			want = between
		}
		if c.QoS != want {
			t.Fatalf("Parse(%q) = %+v: the class is %s", path, *c, want)
		}
	}

	// What is below a pod or a container is its; what is below anything else is nobody's.
	if deeper := path + "/x"; len(deeper) < 4096 && path != "/" {
		if got := cgroup.Parse("/", deeper); !same(c, got) {
			t.Fatalf("Parse(%q): -want +got\n%s", deeper, cmp.Diff(c, got))
		}
		if l := cgroup.Level("/", deeper); l != event.LevelOther && c != nil {
			t.Fatalf("Level(/, %q) = %s", deeper, l)
		}
	}
	// Level, where it is sure, and Parse are of one mind.
	ok := true
	switch level {
	case event.LevelNode:
		ok = path == "/"
	case event.LevelKubepods, event.LevelQoS:
		ok = c == nil
	case event.LevelPod:
		ok = c != nil && c.PodUID != "" && c.ContainerID == ""
	case event.LevelContainer:
		ok = c != nil && c.ContainerID != ""
	}
	if !ok {
		t.Fatalf("Level(/, %q) = %s, yet Parse = %+v", path, level, c)
	}
}

// mutate changes, adds or drops the byte at a place.
func mutate(path string, kind, at int, b byte) string {
	at %= len(path)
	switch kind % 3 {
	case 0:
		return path[:at] + string([]byte{b}) + path[at+1:]
	case 1:
		return path[:at] + string([]byte{b}) + path[at:]
	}
	return path[:at] + path[at+1:]
}

func randomBytes(r *rand.Rand) []byte {
	data := make([]byte, 400)
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	return data
}

// TestGenerated draws descriptions and compares; see FuzzGenerated. It also sees to it that the draw
// reaches every kind of answer.
func TestGenerated(t *testing.T) {
	oomtest.Slow(t)
	r := rand.New(rand.NewPCG(1, 2))
	seen := map[string]int{}
	const n = 5_000
	for range n {
		data := randomBytes(r)
		g := checkGenerated(t, data)
		if t.Failed() {
			t.Fatalf("dice %x", data)
		}
		for _, n := range g.nodes {
			if c := n.want; c == nil {
				seen["nothing"]++
			} else {
				seen["runtime "+c.Runtime]++
				seen["class "+c.QoS]++
				seen[fmt.Sprintf("static %t", c.Static)]++
				seen[fmt.Sprintf("container %t, pod %t", c.ContainerID != "", c.PodUID != "")]++
			}
			for _, p := range n.tree {
				seen["level "+string(p.level)]++
			}
			for what, s := range map[string]string{"kubepods twice": "kubepods/kubepods/", "sandbox": "/kata_", "colon": ":cri-containerd:"} {
				if strings.Contains(g.path, s) {
					seen[what]++
				}
			}
		}
		seen[fmt.Sprintf("boxed %t", g.box != nil)]++
		seen[fmt.Sprintf("nodes %d", len(g.nodes))]++
		if first := g.nodes[0]; first.want != nil && first.want.PodUID != "" {
			pods := podIn.FindAllStringSubmatch(g.path, -1)
			seen[fmt.Sprintf("imitated %t", len(pods) > len(g.nodes))]++
		}
		seen[fmt.Sprintf("UTF-8 %t", utf8.ValidString(g.path))]++
	}
	for _, want := range []string{
		"nothing", "runtime ", "runtime containerd", "runtime cri-o", "runtime docker", "runtime podman",
		"class ", "class burstable", "class besteffort", "class guaranteed", "static true", "static false",
		"container true, pod true", "container false, pod true", "container true, pod false", "boxed true", "boxed false",
		"nodes 1", "nodes 2", "nodes 3", "UTF-8 true", "UTF-8 false", "imitated true",
		"kubepods twice", "sandbox", "colon", "level kubepods", "level qos", "level pod", "level container", "level other",
	} {
		if seen[want] < n/500 {
			t.Errorf("%q was drawn %d times", want, seen[want])
		}
	}
}

// TestMutated changes generated paths by one byte each. Whatever is still said must stand there.
func TestMutated(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	for range 10_000 {
		g := generate(&dice{data: randomBytes(r)})
		b := byte(r.Uint32())
		if r.IntN(2) == 0 {
			b = pickByte(r)
		}
		checkSound(t, g.nodes[r.IntN(len(g.nodes))].root, mutate(g.path, r.IntN(3), r.IntN(len(g.path)), b))
	}
}

// pickByte favours the bytes that mean something in a path.
func pickByte(r *rand.Rand) byte { const s = "/-_.:0af~pods"; return s[r.IntN(len(s))] }

func FuzzGenerated(f *testing.F) {
	r := rand.New(rand.NewPCG(5, 6))
	f.Add([]byte(nil))
	for range 30 {
		f.Add(randomBytes(r))
	}
	f.Fuzz(func(t *testing.T, data []byte) { checkGenerated(t, data) })
}

func FuzzParse(f *testing.F) {
	for _, s := range shapes() {
		f.Add(s.roots()[len(s.roots())-1], s.full())
	}
	f.Add("/", "/")
	f.Add("/", other+"/kubepods/burstable/podx/"+id)
	f.Add(other, other+sysB+"/\xff")
	f.Fuzz(checkSound)
}

func FuzzMutated(f *testing.F) {
	r := rand.New(rand.NewPCG(7, 8))
	for range 30 {
		f.Add(randomBytes(r), uint(r.IntN(3)), uint(r.IntN(300)), pickByte(r))
	}
	f.Fuzz(func(t *testing.T, data []byte, kind, at uint, b byte) {
		g := generate(&dice{data: data})
		path := mutate(g.path, int(kind%3), int(at%4096), b)
		for _, n := range g.nodes {
			checkSound(t, n.root, path)
		}
	})
}
