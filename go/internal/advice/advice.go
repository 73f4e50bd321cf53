// Package advice turns the kills of a workload into one sentence that says what to do, and a patch where one can help.
//
// Rule of the package: an advice rests on what the kernel said, and the sentence has the figures. Where they do not suffice,
// it is silent and says why. It reads nothing and knows no cluster: limits and requests are known only as far as a kill shows
// them.
package advice

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// Rule names the pattern that the kills of a workload show.
type Rule string

// The rules. Own limit: that of the container or of its pod.
const (
	// None: the kills show no pattern, or too little is known of them.
	None Rule = "none"
	// Leak: the own limit was raised and filled again, later; or it is filled each time after about the same time; or, without
	// a limit, the workload held more at each kill.
	Leak Rule = "leak"
	// LimitTooSmall: the own limit is reached again and again, within minutes.
	LimitTooSmall Rule = "limit_too_small"
	// Spike: the own limit sufficed for hours, and at other times for minutes.
	Spike Rule = "spike"
	// ChildProcess: a process was killed and its container lived on.
	ChildProcess Rule = "child_process"
	// SharedMemory: memory that the victim shares (tmpfs) filled half of the own limit.
	SharedMemory Rule = "shared_memory"
	// NotTheVictim: the victims held less than half of the own limit that they died for.
	NotTheVictim Rule = "not_the_victim"
	// NoLimit: the node ran out, and the pod has neither a limit nor a request.
	NoLimit Rule = "no_limit"
	// NoRequest: the node ran out, and the container has no memory request.
	NoRequest Rule = "no_request"
	// RequestTooSmall: the node ran out, and the container held more than its request.
	RequestTooSmall Rule = "request_too_small"
	// Neighbours: the node ran out, and the container held less than its request.
	Neighbours Rule = "neighbours"
	// NodeTooSmall: the node ran out, and the container held more than half of it.
	NodeTooSmall Rule = "node_too_small"
)

// Advice is what to do about the kills of one workload.
type Advice struct {
	Rule Rule `json:"rule"`
	// Clause is the advice in a few words, Sentence the whole of it, with its figures.
	Clause   string `json:"clause"`
	Sentence string `json:"sentence"`
	// Patch is absent where none can help, or the workload takes none.
	Patch *Patch `json:"patch,omitempty"`
}

const (
	// maxIncidents is how many incidents of a workload are kept: the last.
	maxIncidents = 16
	// maxBytes bounds what is taken for a size: who may publish events may publish any.
	maxBytes = 1 << 50
	// soon is within which a limit that is filled is too small for the work itself, and no matter of growth.
	soon = 10 * time.Minute
	// livedOn is how much later a second kill proves that the container outlived the first: a container that is about to end
	// can be hit again within moments.
	livedOn = 10 * time.Second
	// VPA's recommender takes this for the need of a container after an OOM kill: OOMBumpUpRatio and OOMMinBumpUp,
	// RecordOOM in vertical-pod-autoscaler/pkg/recommender/model/container.go.
	bumpRatio = 1.2
	bumpMin   = 100 << 20
)

// History is what is known of the kills of one workload. Its zero value knows none.
type History struct {
	incidents []incident // in the order of Add
}

// incident is the part of one incident that hit the workload.
type incident struct {
	id                string
	kill              string // the first one's ID
	time              time.Time
	pod               event.PodRef
	name, containerID string // of the container
	qos               string
	cause             cause
	limit             uint64 // what was reached, in bytes; 0: not known
	level             event.LimitLevel
	inferred          bool
	capacity          uint64 // of the node, or a lower bound of it, in bytes; 0: not known
	exact             bool   // capacity is no lower bound
	adj               *int16
	age               time.Duration // of the victim; 0: not known
	comm              string
	nspid             uint32 // if the victim was not the first process of its container
	group             bool
	processes         int
	held, shmem       uint64 // by all processes that were killed, in bytes
	unlimited         bool   // not every container of the pod has a limit
	others            string // what the other pods then used
}

// cause is what ran out.
type cause int

const (
	unclear cause = iota
	ownLimit
	node // or all pods together
)

// causeOf tells what ran out. An owner of a limit that is only inferred counts where the limit was full.
func causeOf(e *event.Event) cause {
	l := e.Limit
	switch {
	case e.Scope == event.ScopeGlobal:
		return node
	case e.Scope != event.ScopeCgroup || l == nil || l.Max == nil || *l.Max >= maxBytes, l.Inferred && (l.Usage == nil || *l.Usage < *l.Max/100*99):
		return unclear
	case l.Level == event.LevelContainer || l.Level == event.LevelPod:
		return ownLimit
	case l.Level == event.LevelKubepods, l.Level == event.LevelQoS:
		return node
	}
	return unclear
}

// capacityOf is the memory of the node in bytes, and whether that is exact; 0: not known.
//
// For a global kill the kernel hands over the pages of memory and swap (constrained_alloc in mm/oom_kill.c), but not their
// size: a figure that is no multiple of 16 KiB proves pages of 4 KiB, for all systems have 4, 16 or 64. With swap in use the
// memory is not known. For a kill of all pods together it is at least their limit.
func capacityOf(e *event.Event) (bytes uint64, exact bool) {
	m := e.Victim.Memory
	switch {
	case e.Scope == event.ScopeCgroup && e.Limit.Level == event.LevelKubepods:
		return *e.Limit.Max, false
	case e.Scope != event.ScopeGlobal || e.Alloc == nil || e.Alloc.TotalPages >= maxBytes/4096 || m == nil || m.Swap > 0 || (m.TotalVM|m.AnonRSS|m.FileRSS|m.ShmemRSS|m.PgTables)%(16<<10) == 0:
		return 0, false
	}
	return e.Alloc.TotalPages * 4096, true
}

// child is the victim's process ID in its container if it is not the container's first process; 0 if it is, or nobody knows.
// A process that sees the node's processes has the same ID in and outside.
func child(e *event.Event) uint32 {
	if e.Container == nil || e.Container.ContainerID == "" || e.Victim.NSPID <= 1 || e.Victim.NSPID == e.Victim.PID {
		return 0
	}
	return e.Victim.NSPID
}

// Clause is what one kill alone shows, in a few words; empty: nothing. The kubelet gives a container without a memory request
// the oom_score_adj 999 (GetContainerOOMScoreAdjust in pkg/kubelet/qos/policy.go; a request of less than 0.1% of the node has
// it too).
func Clause(e *event.Event) string {
	if e.Container == nil || e.Outcome != event.OutcomeKilled {
		return ""
	}
	switch group := e.Incident != nil && e.Incident.Group; {
	case causeOf(e) == node && e.Container.QoS == "besteffort":
		return "it has no memory request and no limit"
	case causeOf(e) == node && e.Container.QoS == "burstable" && e.Victim.OOMScoreAdj != nil && *e.Victim.OOMScoreAdj == 999:
		return "it has no memory request"
	case causeOf(e) == ownLimit && !group && child(e) != 0:
		return "a child process, the container may live on"
	}
	return ""
}

// Add adds a kill and its outcome. Kills that are not proven, and kills without a pod, show nothing.
func (h *History) Add(e *event.Event, o *event.Outcome) {
	if e.Outcome != event.OutcomeKilled || o == nil || o.Pod == nil || e.Container == nil {
		return
	}
	i := incident{
		id: e.ID, kill: e.ID, time: e.Time, pod: *o.Pod, name: o.Container, containerID: e.Container.ContainerID, qos: e.Container.QoS,
		cause: causeOf(e), adj: e.Victim.OOMScoreAdj, comm: e.Victim.Comm, nspid: child(e), processes: 1,
	}
	if n := e.Incident; n != nil {
		i.id, i.group = n.ID, n.Group
	}
	if i.cause != unclear && e.Limit != nil && e.Limit.Max != nil {
		i.limit, i.level, i.inferred = *e.Limit.Max, e.Limit.Level, e.Limit.Inferred
	}
	if i.cause == node {
		i.capacity, i.exact = capacityOf(e)
	}
	if start := e.Victim.StartBoottimeNS; start > 0 && e.BoottimeNS > start {
		i.age = time.Duration(e.BoottimeNS - start)
	}
	if m := e.Victim.Memory; m != nil {
		i.shmem = min(m.ShmemRSS, maxBytes)
		i.held = min(m.AnonRSS, maxBytes) + min(m.FileRSS, maxBytes) + i.shmem + min(m.PgTables, maxBytes)
	}
	for j := range h.incidents {
		if known := &h.incidents[j]; known.id == i.id && known.containerID == i.containerID && known.pod.UID == i.pod.UID {
			known.processes++
			known.held += i.held
			known.shmem = max(known.shmem, i.shmem) // they may share it
			known.age = max(known.age, i.age)
			return
		}
	}
	if h.incidents = append(h.incidents, i); len(h.incidents) > maxIncidents {
		h.incidents = slices.Delete(h.incidents, 0, 1)
	}
}

// AddNeighbours adds what the other pods used after a kill: an outcome of StageNeighbours.
func (h *History) AddNeighbours(o *event.Outcome) {
	for j := range h.incidents {
		if h.incidents[j].kill == o.Kill {
			h.incidents[j].others = o.Detail
		}
	}
}

// AddPods adds what the pods of the node held a moment after an incident: whether the pod has a limit.
func (h *History) AddPods(n *event.Neighbours) {
	for j := range h.incidents {
		for k := range n.Pods {
			if p := &n.Pods[k]; h.incidents[j].id == n.Incident && h.incidents[j].pod.UID == p.PodUID {
				h.incidents[j].unlimited = p.Max == nil
			}
		}
	}
}

// Advice is the advice for the container that was killed most, about what ran out most often; of equals, about the last.
func (h *History) Advice() Advice {
	all := slices.Clone(h.incidents)
	slices.SortStableFunc(all, func(a, b incident) int { return a.time.Compare(b.time) })
	all = slices.DeleteFunc(all, func(i incident) bool { return i.cause == unclear })
	if len(all) == 0 {
		return none("what ran out of memory is not proven, or its kills are of a kind that no setting of the workload prevents")
	}
	all = most(all, func(i incident) any { return i.name })
	all = most(all, func(i incident) any { return i.cause })
	if all[0].cause == ownLimit {
		return own(all)
	}
	return ofNode(all)
}

// most keeps those that have the most frequent key; of equals, the key of the last.
func most(all []incident, key func(incident) any) []incident {
	counts := map[any]int{}
	for _, i := range all {
		counts[key(i)]++
	}
	best := key(all[len(all)-1])
	for _, i := range slices.Backward(all) {
		if counts[key(i)] > counts[best] {
			best = key(i)
		}
	}
	return slices.DeleteFunc(all, func(i incident) bool { return key(i) != best })
}

// mostly tells whether something is true of more than half.
func mostly(all []incident, is func(incident) bool) bool {
	n := 0
	for _, i := range all {
		if is(i) {
			n++
		}
	}
	return 2*n > len(all)
}

func none(why string) Advice {
	return Advice{Rule: None, Clause: "-", Sentence: "no advice: " + why}
}

// own is about kills for the container's own limit.
func own(all []incident) Advice {
	last := &all[len(all)-1]
	where := "container " + text.Printable(cmp.Or(last.name, "?"))
	// A kill later in the same container proves that it outlived an earlier one. Silent where the whole container is killed
	// (memory.oom.group, as the kubelet sets on cgroup v2), and where each kill ended its container.
	if c := outlived(all); c != nil {
		return Advice{ChildProcess, "a child process dies, the container lives on", fmt.Sprintf(
			"%s lived on when its process %s (PID %d in the container) was killed at the limit of %s, so Kubernetes shows no restart: run fewer or smaller processes, or raise the limit",
			where, text.Printable(cmp.Or(c.comm, "?")), c.nspid, text.Size(c.limit)), nil}
	}
	known := mostly(all, func(i incident) bool { return i.held > 0 })
	switch {
	// tmpfs, shared memory and memory of memfd_create belong to the cgroup and outlive the process (cgroup-v2.rst: shmem).
	case known && mostly(all, func(i incident) bool { return i.shmem >= i.limit/2 }):
		return Advice{SharedMemory, "tmpfs or shared memory fills the limit", fmt.Sprintf(
			"%s has %s of shared memory (tmpfs, /dev/shm, an emptyDir in memory) in the limit of %s, and a killed process does not give that back: set the sizeLimit of the emptyDir, or write less there",
			where, text.Size(last.shmem), text.Size(last.limit)), nil}
	// The kernel gives back clean page cache before it kills, so it is the last suspect.
	case known && mostly(all, func(i incident) bool { return i.held < i.limit/2 }):
		rest := "other processes, tmpfs, kernel memory (sockets, slab) or page cache"
		who := "the process that was killed"
		if last.group {
			rest, who = "tmpfs, kernel memory (sockets, slab) or page cache", fmt.Sprintf("all %d processes together", last.processes)
		}
		if last.level == event.LevelPod {
			rest = "another container of the pod, " + rest
		}
		return Advice{NotTheVictim, "something else than the victim fills the limit", fmt.Sprintf(
			"in %s %s held only %s of the limit of %s; the rest is %s: see memory.stat in its cgroup before you raise the limit",
			where, who, text.Size(last.held), text.Size(last.limit), rest), nil}
	}
	// At the limit that is in force. Kills at the ones before are evidence of growth only.
	same := all
	for k, i := range all {
		if i.limit != last.limit {
			same = all[k+1:]
		}
	}
	if a, ok := growth(all, same, where); ok {
		return a
	}
	limit := fmt.Sprintf("its own limit of %s", text.Size(last.limit))
	if last.inferred {
		limit += " (inferred)"
	}
	low, high := ages(same)
	switch {
	case len(same) < 2:
		return none(fmt.Sprintf("%s has reached %s once, and one kill shows no pattern", where, limit))
	case low == 0:
		return none(fmt.Sprintf("%s has reached %s %d times, and how long it had run is not known", where, limit, len(same)))
	}
	more, changes := raised(last, known)
	switch {
	case high < soon:
		return Advice{LimitTooSmall, "raise the limit to " + more, fmt.Sprintf(
			"%s has reached %s %d times, %s after its start: raise the limit to %s (20%% or 100 MiB more, as VPA does after an OOM kill), and look again",
			where, limit, len(same), between(low, high), more), patch(last, changes)}
	case high >= time.Hour && high >= 4*low:
		return Advice{Spike, "spikes: bound the work, or raise the limit to " + more, fmt.Sprintf(
			"%s has reached %s %d times, after %s of work: its need comes in spikes. Bound what it does at once (requests, batch size), or raise the limit to %s (20%% or 100 MiB more, as VPA does)",
			where, limit, len(same), between(low, high), more), patch(last, changes)}
	}
	return none(fmt.Sprintf("%s has reached %s %d times, after %s, and that shows no pattern yet", where, limit, len(same), between(low, high)))
}

// outlived is a kill that its container outlived.
func outlived(all []incident) *incident {
	for j := range all {
		for k := range all[j+1:] {
			a, b := &all[j], &all[j+1+k]
			if a.nspid != 0 && !a.group && a.containerID == b.containerID && b.time.Sub(a.time) >= livedOn {
				return a
			}
		}
	}
	return nil
}

// growth is about memory that grows until the limit is reached, whatever that is; same are the kills at the limit that is in force.
// Silent where the limit is reached within minutes (that is need, not growth), where a higher limit was not filled later than
// the one before, and where the times differ.
func growth(all, same []incident, where string) (Advice, bool) {
	const advice = "do not just raise the limit, that only delays the next kill. Find the leak, or bound the cache or heap"
	last := &all[len(all)-1]
	if len(same) < len(all) {
		before := &all[len(all)-len(same)-1]
		if last.limit >= before.limit+before.limit/4 && before.age >= soon && last.age >= before.age+before.age/10 {
			return Advice{Leak, "leak: do not just raise the limit", fmt.Sprintf(
				"%s filled its own limit of %s after %s, and then one of %s, too, after %s. Memory that grows like this is a leak or a cache without a bound: %s",
				where, text.Size(before.limit), span(before.age), text.Size(last.limit), span(last.age), advice), nil}, true
		}
	}
	if len(same) >= 3 {
		if low, high := ages(same[len(same)-3:]); low >= soon && high <= 2*low {
			return Advice{Leak, "leak: do not just raise the limit", fmt.Sprintf(
				"%s fills its own limit of %s each time, %s after its start (last 3 kills). That is a leak, a cache without a bound, or a job at a fixed time: %s",
				where, text.Size(last.limit), between(low, high), advice), nil}, true
		}
	}
	return Advice{}, false
}

// raised is a higher limit, and the changes that set it. There are none where the limit of the pod was reached and the
// container may have a much lower one.
func raised(last *incident, known bool) (string, *resources) {
	more := quantity(bump(last.limit))
	changes := &resources{Limits: &memory{more}}
	if last.qos == "guaranteed" {
		changes.Requests = &memory{more} // or it is Guaranteed no more
	}
	if last.level == event.LevelPod && (!known || last.held < last.limit/10*8) {
		changes = nil
	}
	return more, changes
}

// ofNode is about kills because the node, or all pods together, ran out of memory.
func ofNode(all []incident) Advice {
	last := &all[len(all)-1]
	where := "container " + text.Printable(cmp.Or(last.name, "?"))
	var held uint64 // at most
	for _, i := range all {
		held = max(held, i.held)
	}
	if held == 0 {
		return none(fmt.Sprintf("the node ran out of memory, and what %s held is not known", where))
	}
	need := quantity(held)
	request := &resources{Requests: &memory{need}}
	limited, others := "", ""
	if last.unlimited {
		limited = ". Its pod has no memory limit either, so it can take what the node has: set one for each container"
	}
	if last.others != "" {
		others = "; " + text.Printable(last.others)
	}
	low, high := last.request()
	switch {
	// Memory that is larger at each kill. Silent below three kills, or with steps below 10%.
	case grows(all):
		return Advice{Leak, "leak: it held more at each kill", fmt.Sprintf(
			"%s held %s, and at its last kill %s, more at each of %d kills for which the node ran out of memory: find the leak, and set a limit, so that it stops at its own expense",
			where, text.Size(all[0].held), text.Size(last.held), len(all)), nil}
	// Silent where the memory of the node is not known (capacityOf).
	case mostly(all, func(i incident) bool { return i.exact && i.held >= i.capacity/2 }):
		a := Advice{NodeTooSmall, "needs a larger node: request " + need, fmt.Sprintf(
			"%s held %s of the node's %s: it needs a larger node. Request %s, so that the scheduler finds one",
			where, text.Size(last.held), text.Size(last.capacity), need), patch(last, request)}
		if low >= held {
			a.Sentence, a.Patch, a.Clause = strings.TrimSuffix(a.Sentence, ". Request "+need+", so that the scheduler finds one"), nil, "needs a larger node"
		}
		return a
	// BestEffort: no container of the pod has a request or a limit (GetPodQOS in pkg/apis/core/v1/helper/qos). The kubelet gives
	// it the oom_score_adj 1000.
	case last.qos == "besteffort":
		limit := quantity(bump(held))
		return Advice{NoLimit, "no request and no limit: request " + need + ", limit " + limit, fmt.Sprintf(
			"%s has no memory request and no limit, so the kernel kills it first when the node runs out of memory, %s: request at least %s (the most that a victim held) and limit it to %s",
			where, times(len(all)), need, limit), patch(last, &resources{Requests: &memory{need}, Limits: &memory{limit}})}
	// Guaranteed: its limit is its request, and it did not reach it.
	case last.qos == "guaranteed":
		return Advice{Neighbours, "victim of its neighbours", fmt.Sprintf(
			"%s is a victim of its neighbours: its pod is Guaranteed and held no more than it had requested when the node ran out of memory (%s)%s. Give those requests and limits, or reserve more for the system",
			where, times(len(all)), others), nil}
	// See Clause. 1000 in a Burstable pod is the work of the process itself, and shows no request.
	case last.qos == "burstable" && last.adj != nil && *last.adj == 999:
		return Advice{NoRequest, "no request: request " + need, fmt.Sprintf(
			"%s has no memory request (or one below 0.1%% of the node), so it is among the first to be killed when the node runs out of memory, %s: request at least %s, the most that a victim held%s",
			where, times(len(all)), need, limited), patch(last, request)}
	case low > 0 && held < low:
		return Advice{Neighbours, "victim of its neighbours", fmt.Sprintf(
			"%s is a victim of its neighbours: it held %s and requests at least %s, by its oom_score_adj of %d, when the node ran out of memory (%s)%s. Give those requests and limits, or reserve more for the system",
			where, text.Size(held), text.Size(low), *last.adj, times(len(all)), others), nil}
	case high > 0 && last.held > high:
		return Advice{RequestTooSmall, "request " + need, fmt.Sprintf(
			"%s held %s and requests at most %s, by its oom_score_adj of %d, when the node ran out of memory (%s): request %s, so that the scheduler counts what it uses%s",
			where, text.Size(last.held), text.Size(high), *last.adj, times(len(all)), need, limited), patch(last, request)}
	// memory.max of the pod's cgroup, which the kubelet sets if every container has a limit (ResourceConfigForPod in
	// pkg/kubelet/cm/helpers_linux.go).
	case last.unlimited:
		limit := quantity(bump(held))
		return Advice{NoLimit, "no limit: limit " + limit, fmt.Sprintf(
			"the pod of %s has no memory limit, and held %s when the node ran out of memory (%s): set a limit for each container, for this one %s if it has none",
			where, text.Size(last.held), times(len(all)), limit), nil}
	}
	return none(fmt.Sprintf("the node ran out of memory, and whether %s held more than its request is not known", where))
}

// grows tells whether a workload held more at each of at least three kills.
func grows(all []incident) bool {
	for j := 1; j < len(all); j++ {
		if all[j-1].held == 0 || all[j].held < all[j-1].held+all[j-1].held/10 {
			return false
		}
	}
	return len(all) >= 3
}

// request bounds the memory request of a Burstable container: its oom_score_adj is 1000 minus the request in thousandths of
// the node's memory (GetContainerOOMScoreAdjust in pkg/kubelet/qos/policy.go), from 3 to 999. A bound that is not known is 0.
// A process may raise its oom_score_adj, which makes the request seem smaller: only low is proven then.
func (i *incident) request() (low, high uint64) {
	if i.qos != "burstable" || i.adj == nil || *i.adj <= 3 || *i.adj >= 999 || i.capacity == 0 {
		return 0, 0
	}
	low = uint64(1000-*i.adj) * (i.capacity / 1000)
	if i.exact {
		high = uint64(1001-*i.adj) * (i.capacity/1000 + 1)
	}
	return low, high
}

// ages are the shortest and the longest life of the victims; 0 and 0 if one is not known.
func ages(all []incident) (low, high time.Duration) {
	for n, i := range all {
		if i.age == 0 {
			return 0, 0
		}
		if n == 0 || i.age < low {
			low = i.age
		}
		high = max(high, i.age)
	}
	return low, high
}

func bump(n uint64) uint64 { return max(uint64(float64(n)*bumpRatio), n+bumpMin) }

// quantity is a number of bytes for Kubernetes, rounded up to 16 MiB, from 1 GiB on to 128 MiB.
func quantity(n uint64) string {
	step := uint64(16)
	if n >= 1<<30 {
		step = 128
	}
	mib := (n + 1<<20 - 1) >> 20
	return fmt.Sprintf("%dMi", (mib+step-1)/step*step)
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return fmt.Sprintf("%d times", n)
}

// between is a range of time spans.
func between(low, high time.Duration) string {
	if a, b := span(low), span(high); a != b {
		return a + " to " + b
	}
	return span(low)
}

func span(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%d s", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%d min", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%d h", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
