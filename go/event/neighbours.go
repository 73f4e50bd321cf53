package event

import "time"

// Neighbours says what the memory was used for, a moment after a kill: that of the cgroup whose limit was reached, or
// of the node, and how much each pod of the node used where no single pod's limit was the cause. There is at most one
// for an incident, and none in the seconds after another one of the same cgroup.
//
// All figures were read after the kill. The victim's memory may be freed by then, and a cgroup that was killed as a
// whole may be removed. What could not be read is absent.
type Neighbours struct {
	Schema string `json:"schema"`
	// ID is NeighboursID(Incident); it is also the JetStream message ID.
	ID string `json:"id"`
	// Incident is Event.Incident's ID, Kill is Event.ID, of the kill for which the figures were read.
	Incident string `json:"incident"`
	Kill     string `json:"kill"`
	// Time is when the reading of the pods began or, without pods, that of the breakdown. ReadNS is how long all of it
	// took, in nanoseconds.
	Time   time.Time `json:"time"`
	ReadNS uint64    `json:"read_ns"`
	Node   Node      `json:"node"`
	// Scope and Level are those of the kill.
	Scope Scope      `json:"scope"`
	Level LimitLevel `json:"level,omitempty"`
	// Breakdown is absent where nothing of it could be read, and where it was read moments before.
	Breakdown *Breakdown `json:"breakdown,omitempty"`
	// Pods are those that held most, the largest first, out of PodsSeen, about a second after the kill. Both are absent
	// where the limit of one pod, or of something in it, was the cause, and where the pods could not be read.
	Pods     []PodMemory `json:"pods,omitzero"`
	PodsSeen *uint32     `json:"pods_seen,omitempty"`
	// Incomplete means that there was no time for every pod, or that some could not be read.
	Incomplete bool `json:"incomplete,omitempty"`
}

// PodMemory is the memory of a pod's cgroup, in bytes. What the kernel does not say is absent.
type PodMemory struct {
	// PodUID and Static are as in Container.
	PodUID string `json:"pod_uid"`
	Static bool   `json:"static,omitempty"`
	// Victim means that a process in this pod was killed in the incident.
	Victim bool   `json:"victim,omitempty"`
	QoS    string `json:"qos,omitempty"`
	// Usage is memory.current, or memory.usage_in_bytes of version 1. It includes the page cache.
	Usage uint64 `json:"usage"`
	// WorkingSet is Usage without inactive_file of memory.stat, which the kernel could have had for the
	// asking: what the kubelet ranks and evicts by.
	WorkingSet *uint64 `json:"working_set,omitempty"`
	// Max is the limit (memory.max, memory.limit_in_bytes); absent: unlimited.
	Max *uint64 `json:"max,omitempty"`
	// Low and Min are what is protected from reclaim (memory.low, memory.min); version 2 only.
	Low *uint64 `json:"low,omitempty"`
	Min *uint64 `json:"min,omitempty"`
	// Swap is memory.swap.current, or what memory.memsw.usage_in_bytes has above Usage.
	Swap *uint64 `json:"swap,omitempty"`
}

// Source is the file of the kernel that a breakdown was read from.
type Source string

// The sources.
const (
	SourceStat    Source = "memory.stat" // of the cgroup; Limit.Cgroup has its version
	SourceMeminfo Source = "meminfo"     // /proc/meminfo, of the node
)

// Breakdown says what the memory of the cgroup whose limit was reached, or of the node, was used for, in bytes. It was
// read from the kernel's files after the kill. What the kernel does not show is absent. The kinds do not add up to
// Usage: File includes Shmem, there are others, and the kernel updates memory.stat in batches, some seconds late at most.
type Breakdown struct {
	Source Source `json:"source"`
	// Limit is that of the event: as it was at the kill. Absent for the node.
	Limit *Limit `json:"limit,omitempty"`
	// AfterNS is the time from the kill to the reading, in nanoseconds.
	AfterNS uint64 `json:"after_ns"`
	// Gone means that the cgroup was removed before all of it was read.
	Gone bool `json:"gone,omitempty"`
	// Total is MemTotal of the node. Absent for a cgroup: Limit has its limit.
	Total *uint64 `json:"total,omitempty"`
	// Usage is memory.current, or memory.usage_in_bytes of version 1; of the node MemTotal without MemFree.
	Usage *uint64 `json:"usage,omitempty"`
	// Anon is anon, total_rss of version 1, or AnonPages of the node.
	Anon *uint64 `json:"anon,omitempty"`
	// File is the page cache, with Shmem: file, total_cache, or Cached + Buffers + SwapCached.
	File *uint64 `json:"file,omitempty"`
	// Shmem is tmpfs (an emptyDir in memory, /dev/shm) and shared memory: shmem, total_shmem, or Shmem.
	Shmem *uint64 `json:"shmem,omitempty"`
	// Slab is slab, or Slab of the node, and SlabUnreclaimable the part of it that the kernel cannot free:
	// slab_unreclaimable, or SUnreclaim. Version 1 shows neither, nor the next three.
	Slab              *uint64 `json:"slab,omitempty"`
	SlabUnreclaimable *uint64 `json:"slab_unreclaimable,omitempty"`
	// KernelStack is kernel_stack, or KernelStack of the node.
	KernelStack *uint64 `json:"kernel_stack,omitempty"`
	// PageTables is pagetables (Linux 5.13), or PageTables of the node.
	PageTables *uint64 `json:"page_tables,omitempty"`
	// Sock is sock: network buffers. The node does not show it.
	Sock *uint64 `json:"sock,omitempty"`
	// Swap is memory.swap.current, total_swap, or SwapTotal without SwapFree.
	Swap *uint64 `json:"swap,omitempty"`
	// Zswap is the memory that compressed swap takes: zswap, or Zswap of the node (Linux 5.19).
	Zswap *uint64 `json:"zswap,omitempty"`
	// Events is memory.events of the cgroup, version 2 only.
	Events *MemoryEvents `json:"events,omitempty"`
	// Pressure is memory.pressure of the cgroup, version 2 only; NodePressure is /proc/pressure/memory.
	Pressure     *Pressure `json:"pressure,omitempty"`
	NodePressure *Pressure `json:"node_pressure,omitempty"`
	// Processes are the largest at most ten of ProcessesSeen, the largest first: those in the cgroup and below it, or
	// all of the node. Absent where the tracer does not see the processes of the node: it is in a PID namespace.
	Processes     []Process `json:"processes,omitempty"`
	ProcessesSeen *uint32   `json:"processes_seen,omitempty"`
	// Incomplete means that there was no time for every process, or that there are too many.
	Incomplete bool `json:"incomplete,omitempty"`
}

// MemoryEvents counts the events of a cgroup and of those below it since it was made: memory.events
// (Documentation/admin-guide/cgroup-v2.rst).
type MemoryEvents struct {
	Low          *uint64 `json:"low,omitempty"`
	High         *uint64 `json:"high,omitempty"`
	Max          *uint64 `json:"max,omitempty"`
	OOM          *uint64 `json:"oom,omitempty"`
	OOMKill      *uint64 `json:"oom_kill,omitempty"`
	OOMGroupKill *uint64 `json:"oom_group_kill,omitempty"`
}

// Pressure is the pressure stall information of memory (Documentation/accounting/psi.rst).
type Pressure struct {
	Some *Stall `json:"some,omitempty"` // some tasks waited for memory
	Full *Stall `json:"full,omitempty"` // all tasks that had work to do waited
}

// Stall is the share of time in percent over the last 10, 60 and 300 seconds.
type Stall struct {
	Avg10  float64 `json:"avg10"`
	Avg60  float64 `json:"avg60"`
	Avg300 float64 `json:"avg300"`
}

// Process is a process as it was at the reading.
type Process struct {
	// PID is in the initial PID namespace.
	PID uint32 `json:"pid"`
	// Comm is as in Victim.
	Comm string `json:"comm,omitempty"`
	// RSS is in bytes, from /proc/PID/statm: the kernel's batched counters.
	RSS         uint64 `json:"rss"`
	OOMScoreAdj *int16 `json:"oom_score_adj,omitempty"`
	// Victim means that the process was killed in the incident, as far as that was known then, and was still exiting.
	Victim bool `json:"victim,omitempty"`
}

// NeighboursID is the ID of the Neighbours of an incident.
func NeighboursID(incident string) string { return incident + "/neighbours" }

// Subject is the NATS subject under which they are published: oom.v1.neighbours.<scope>.<node>.
func (n *Neighbours) Subject() (string, error) {
	return Subject(KindNeighbours, string(n.Scope), n.Node.Name)
}

// ParseNeighbours reads one, as Parse reads an event.
func ParseNeighbours(data []byte) (Neighbours, error) {
	var n Neighbours
	if err := parse("neighbours", data, &n, &n.Schema); err != nil {
		return Neighbours{}, err
	}
	if err := missing("neighbours", []field{
		{"id", n.ID == ""},
		{"incident", n.Incident == ""},
		{"time", n.Time.IsZero()},
		{"node.name", n.Node.Name == ""},
	}); err != nil {
		return Neighbours{}, err
	}
	return n, nil
}
