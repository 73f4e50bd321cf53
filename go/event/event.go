// Package event is the public contract of OOM Tracer: what is published on NATS, under which
// subjects and with which ids. It uses the standard library only, and the mirror of its
// encoding/json/v2, so that any Go consumer can import it.
//
// Rule of the package: what is not known is absent, never zero. A field that is a pointer, or
// that is marked omitempty, is left out of the JSON when nothing proved it. Within schema v1
// fields are added and never changed or removed.
package event

import (
	"errors"
	"strconv"
	"time"
)

// Schema names the version of the JSON that this package writes and reads.
const Schema = "oom-tracer/v1"

// Scope says which bound was exceeded, in the kernel's terms (enum oom_constraint in
// include/linux/oom.h, is_memcg_oom() and is_sysrq_oom() in mm/oom_kill.c).
type Scope string

// The scopes. ScopeUnknown means that nothing proved another one.
const (
	ScopeGlobal    Scope = "global"    // the node ran out: CONSTRAINT_NONE
	ScopeCgroup    Scope = "cgroup"    // a memory cgroup's limit: CONSTRAINT_MEMCG
	ScopeCpuset    Scope = "cpuset"    // the NUMA nodes of a cpuset: CONSTRAINT_CPUSET
	ScopeMempolicy Scope = "mempolicy" // the NUMA nodes of a memory policy: CONSTRAINT_MEMORY_POLICY
	ScopeSysrq     Scope = "sysrq"     // somebody asked for it: SysRq-f, oom_control.order == -1
	ScopeUnknown   Scope = "unknown"
)

// Scopes lists every scope, in the order of the documentation.
func Scopes() []Scope {
	return []Scope{ScopeGlobal, ScopeCgroup, ScopeCpuset, ScopeMempolicy, ScopeSysrq, ScopeUnknown}
}

// KillOutcome says what became of the victim that the kernel marked.
type KillOutcome string

// The outcomes. The kernel also marks tasks that were dying anyway, to let them use the memory
// reserves (task_will_free_mem() in mm/oom_kill.c): that is OutcomeExiting, and no kill.
const (
	OutcomeKilled  KillOutcome = "killed"
	OutcomeExiting KillOutcome = "already_exiting"
	OutcomeUnknown KillOutcome = "unknown"
)

// Event is one process that the kernel's OOM killer chose.
type Event struct {
	Schema string `json:"schema"`
	// ID names the kill. The same kill has the same ID on every path and after every restart;
	// see VictimID. It is also the JetStream message ID.
	ID string `json:"id"`
	// Seq counts the records of one epoch (Node.Epoch), from 1. A number that comes in no event is in a
	// gap; with several nodes on one kernel (node.cgroup_root) it may also be another node's.
	Seq uint64 `json:"seq"`
	// Time is the wall clock at the kill: BoottimeNS converted once, when the record was first
	// read, and never again.
	Time time.Time `json:"time"`
	// BoottimeNS is CLOCK_BOOTTIME at the kill, in nanoseconds.
	BoottimeNS uint64      `json:"boottime_ns"`
	Node       Node        `json:"node"`
	Scope      Scope       `json:"scope"`
	Outcome    KillOutcome `json:"outcome"`
	Victim     Victim      `json:"victim"`
	Trigger    *Trigger    `json:"trigger,omitempty"`
	Limit      *Limit      `json:"limit,omitempty"`
	Alloc      *Alloc      `json:"alloc,omitempty"`
	Incident   *Incident   `json:"incident,omitempty"`
	Container  *Container  `json:"container,omitempty"`
}

// Node is where it happened and how much the tracer there can prove.
type Node struct {
	// Name is a DNS-1123 subdomain: the Kubernetes node's name where there is one.
	Name string `json:"name"`
	// BootID is /proc/sys/kernel/random/boot_id.
	BootID string `json:"boot_id"`
	// Kernel is the release, as uname -r prints it.
	Kernel string `json:"kernel"`
	// Tier is where the context (scope, outcome, limit) comes from: fentry, kprobe, stack or none.
	Tier string `json:"tier"`
	// Epoch is CLOCK_BOOTTIME in nanoseconds when the kernel program began to record: Seq counts from
	// there, over as many tracers as the program stays pinned for.
	Epoch uint64 `json:"epoch,omitempty"`
}

// Victim is the process that was chosen, read from the task that the tracepoint hands over.
type Victim struct {
	// PID is the process ID (the kernel's tgid) in the initial PID namespace. Absent only on
	// kernels whose tracepoint hands over no task.
	PID uint32 `json:"pid,omitempty"`
	// TID is the marked thread's ID. It differs from PID when the leader had already exited.
	TID uint32 `json:"tid,omitempty"`
	// NSPID is the process ID in the victim's own PID namespace.
	NSPID uint32 `json:"ns_pid,omitempty"`
	// Comm is the marked thread's name: at most 15 bytes (TASK_COMM_LEN), bytes that are not UTF-8
	// replaced.
	Comm string `json:"comm,omitempty"`
	// UID is the real user ID in the initial user namespace.
	UID *uint32 `json:"uid,omitempty"`
	// OOMScoreAdj is -1000..1000.
	OOMScoreAdj *int16 `json:"oom_score_adj,omitempty"`
	// StartBoottimeNS is CLOCK_BOOTTIME at the start of the thread group's leader, in nanoseconds.
	StartBoottimeNS uint64 `json:"start_boottime_ns,omitempty"`
	// Cgroup is the victim's cgroup where the memory controller lives: on the unified hierarchy
	// (version 2) the leaf it is a member of, on version 1 its memory cgroup.
	Cgroup *Cgroup `json:"cgroup,omitempty"`
	// Memcg is the memory cgroup that is charged, where it is an ancestor of Cgroup because
	// the memory controller is not enabled all the way down. Absent when it is Cgroup itself.
	Memcg  *Cgroup `json:"memcg,omitempty"`
	Memory *Memory `json:"memory,omitempty"`
}

// Cgroup names a control group by its path from the root of its hierarchy, as the initial cgroup
// namespace sees it.
type Cgroup struct {
	// Path begins with a slash. When Truncated is set, the levels nearest to the root are
	// missing and Path begins with ".../".
	Path string `json:"path"`
	// ID is the kernfs node's ID: what bpf_get_current_cgroup_id() and the inode number show.
	ID uint64 `json:"id"`
	// Version is 1 or 2.
	Version   int  `json:"version"`
	Truncated bool `json:"truncated,omitempty"`
}

// Memory is what the victim held when it was chosen, in bytes.
type Memory struct {
	TotalVM  uint64 `json:"total_vm"`
	AnonRSS  uint64 `json:"anon_rss"`
	FileRSS  uint64 `json:"file_rss"`
	ShmemRSS uint64 `json:"shmem_rss"`
	Swap     uint64 `json:"swap"`
	PgTables uint64 `json:"pgtables"`
	// Approximate means that the RSS and swap figures are the kernel's batched counters, which
	// lag behind by up to max(32, 2 x CPUs) pages per CPU; otherwise they are exact sums.
	Approximate bool `json:"approximate"`
	// Batched holds the same counters as the kernel's own console line prints them before
	// Linux 7. Absent when Approximate is set, for then they are the figures above.
	Batched *Batched `json:"batched,omitempty"`
}

// Batched holds the fast, lagging counters (percpu_counter_read_positive()), in bytes.
type Batched struct {
	AnonRSS  uint64 `json:"anon_rss"`
	FileRSS  uint64 `json:"file_rss"`
	ShmemRSS uint64 `json:"shmem_rss"`
	Swap     uint64 `json:"swap"`
}

// Trigger is the task whose allocation could not be served. It need not be the victim.
type Trigger struct {
	PID    uint32  `json:"pid"`
	TID    uint32  `json:"tid"`
	Comm   string  `json:"comm"`
	Cgroup *Cgroup `json:"cgroup,omitempty"`
}

// LimitLevel says where in the tree the exceeded limit stands, which decides whether moving the
// pod elsewhere can help.
type LimitLevel string

// The levels.
const (
	LevelNode      LimitLevel = "node"
	LevelKubepods  LimitLevel = "kubepods"
	LevelQoS       LimitLevel = "qos"
	LevelPod       LimitLevel = "pod"
	LevelContainer LimitLevel = "container"
	LevelOther     LimitLevel = "other"
)

// LimitLevels lists every level, from the root downwards.
func LimitLevels() []LimitLevel {
	return []LimitLevel{LevelNode, LevelKubepods, LevelQoS, LevelPod, LevelContainer, LevelOther}
}

// Limit is the bound that was exceeded and its fill, in bytes. Sizes that have no bound are absent.
type Limit struct {
	// Cgroup owns the limit; absent at level node.
	Cgroup *Cgroup    `json:"cgroup,omitempty"`
	Level  LimitLevel `json:"level"`
	Max    *uint64    `json:"max,omitempty"`
	Usage  *uint64    `json:"usage,omitempty"`
	// SwapMax and SwapUsage count swap alone on version 2, and memory plus swap on version 1
	// (struct mem_cgroup: swap and memsw are one union).
	SwapMax   *uint64 `json:"swap_max,omitempty"`
	SwapUsage *uint64 `json:"swap_usage,omitempty"`
	// Inferred means that the owner is the ancestor of the trigger with the least headroom, and
	// not what the kernel named. Nothing should be evicted on its word.
	Inferred bool `json:"inferred"`
}

// Alloc is the allocation that could not be served.
type Alloc struct {
	GFPMask  string   `json:"gfp_mask"` // hexadecimal, as on the kernel's console
	GFPFlags []string `json:"gfp_flags,omitempty"`
	Order    int      `json:"order"`
	// TotalPages is what the OOM killer reckoned the victim's share against, in pages.
	TotalPages uint64 `json:"total_pages,omitempty"`
}

// Incident binds the processes that one decision of the OOM killer took together
// (memory.oom.group).
type Incident struct {
	ID string `json:"id"`
	// Group is set when the whole cgroup was to die.
	Group bool `json:"group"`
	// Index counts the incident's records from 0.
	Index uint32 `json:"index"`
}

// BeyondPod tells whether a kill's cause is not the limit of one pod, or of something in it: the node, or several
// pods together, ran out of memory. What is not known is not.
func (e *Event) BeyondPod() bool {
	if e.Scope != ScopeCgroup {
		return e.Scope != ScopeUnknown
	}
	return e.Limit != nil && (e.Limit.Level == LevelNode || e.Limit.Level == LevelKubepods || e.Limit.Level == LevelQoS)
}

// Container is what the victim's cgroup path says of Kubernetes and its runtime. A path that is not
// fully understood yields none.
type Container struct {
	// PodUID is the pod's UID in its canonical form. For a static pod it is the 32 hexadecimal
	// digits of kubernetes.io/config.hash, and Static is set.
	PodUID string `json:"pod_uid,omitempty"`
	// ContainerID is 64 hexadecimal digits; absent when the victim sat in the pod's own cgroup.
	ContainerID string `json:"container_id,omitempty"`
	// Runtime is containerd, cri-o, docker or podman where the path says so.
	Runtime string `json:"runtime,omitempty"`
	// QoS is guaranteed, burstable or besteffort.
	QoS    string `json:"qos,omitempty"`
	Static bool   `json:"static,omitempty"`
}

// VictimID is the ID of a kill: the boot, the process and when its leader started name it for ever,
// without regard to who read the record or how often.
func VictimID(bootID string, tgid uint32, startBoottimeNS uint64) string {
	return bootID + "-" + strconv.FormatUint(uint64(tgid), 10) + "-" + strconv.FormatUint(startBoottimeNS, 10)
}

// MsgID is the Nats-Msg-Id of the event: its ID, and behind it the thread where that is not the leader of its process. A
// process can be killed again before it is gone, and the kernel then marks another of its threads: one kill by its ID, and
// two events, each with a Seq of its own.
func (e *Event) MsgID() string {
	if e.Victim.TID == e.Victim.PID || e.Victim.PID == 0 || e.Kind() == KindExiting {
		return e.ID
	}
	return e.ID + "-" + strconv.FormatUint(uint64(e.Victim.TID), 10)
}

// ExitingID is the ID of a mark without a kill. Several threads of one process can be marked while
// it exits, each once (TIF_MEMDIE), so the thread is part of the name.
func ExitingID(victimID string, tid uint32) string {
	return victimID + "-exit-" + strconv.FormatUint(uint64(tid), 10)
}

// UnreadableID is the ID where the kernel handed over a thread ID and no task: the moment of the
// mark takes the place of the process's start.
func UnreadableID(bootID string, tid uint32, boottimeNS uint64) string {
	return bootID + "-tid-" + strconv.FormatUint(uint64(tid), 10) + "-" + strconv.FormatUint(boottimeNS, 10)
}

// IncidentID names an incident by the moment of its first record.
func IncidentID(bootID string, boottimeNS uint64) string {
	return bootID + "-incident-" + strconv.FormatUint(boottimeNS, 10)
}

// Kind is the kind of message that the event is published as: a mark without a kill is not a kill.
// Where the outcome is not known the event counts as a kill, because a missed kill is worse than a
// mark too many.
func (e *Event) Kind() Kind {
	if e.Outcome == OutcomeExiting {
		return KindExiting
	}
	return KindKill
}

// Subject is the NATS subject under which the event is published.
//
// It fails when the node's name is not a DNS-1123 subdomain or the scope not a plain word.
func (e *Event) Subject() (string, error) {
	return Subject(e.Kind(), string(e.Scope), e.Node.Name)
}

// ErrSchema is wrapped by Parse's error when the message is of another version of the schema.
var ErrSchema = errors.New("unknown schema")

// Parse reads one event. Fields and values that it does not know are no error, for v1 may grow; a
// message of another version, or without what names a kill, is refused, with an error that names the
// field.
func Parse(data []byte) (Event, error) {
	var e Event
	if err := parse("event", data, &e, &e.Schema); err != nil {
		return Event{}, err
	}
	if err := missing("event", []field{
		{"id", e.ID == ""},
		{"seq", e.Seq == 0},
		{"time", e.Time.IsZero()},
		{"node.name", e.Node.Name == ""},
		{"scope", e.Scope == ""},
		{"outcome", e.Outcome == ""},
		{"victim.tid", e.Victim.TID == 0},
	}); err != nil {
		return Event{}, err
	}
	return e, nil
}
