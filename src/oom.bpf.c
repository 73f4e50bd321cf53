// SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause
/*
 * Records every task that the kernel's OOM killer marks, global or cgroup, in a journal that its reader
 * maps, and notifies the reader.
 *
 * One source of truth: the mark_victim tracepoint in mark_oom_victim() (mm/oom_kill.c). It fires once
 * per victim and under oom_lock, so the program never runs twice at a time: seq, the incident and the
 * scratch record need no other protection.
 *
 * The tracepoint says who, and not why. The why is context: from hooks on the functions that lead here
 * (tiers fentry and kprobe), else from the kernel stack (tier stack), else it is left unknown (tier
 * none). Nothing is ever guessed: what is not proved is not flagged.
 */
#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

#include "core_fixes.bpf.h"
#include "oom_event.h"
#include "faults.bpf.h"

/* Levels of a cgroup path, and ancestors of a memory cgroup, that are looked at. */
#define MAX_DEPTH 64
#define MAX_CPUS 1024
#define NAME_LEN 256 /* NAME_MAX and a NUL */
#define MAX_FRAMES 48
#define LEN_PENDING 0xffff /* of a path whose end is not reached yet */

/* Written by the loader before the program is loaded. */
const volatile __u32 oom_tier;
const volatile __u32 oom_notify;	  /* enum oom_notify */
const volatile __u32 oom_nr_cpus;	  /* possible CPUs */
const volatile __u32 oom_one_memory_node; /* no cpuset or mempolicy can bind on such a machine */
const volatile __u64 oom_generation;	  /* of this load: it speaks while the state says the same */
const volatile __u32 oom_journal_slots;	  /* a power of two */
const volatile __u32 oom_symbol_count;
const volatile struct oom_symbol oom_symbols[OOM_SYMBOLS_MAX];

/* The ways to notify: the reader makes the one that it uses, the other one does not exist. */
struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
} oom_perf SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 0); /* its size, a power of two and a multiple of the page */
} oom_ringbuf SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct oom_stats);
} oom_stats SEC(".maps");

/* The records, and how far they have come. The reader maps both, and needs no system call to look. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1); /* set by the loader */
	__type(key, __u32);
	__type(value, struct oom_event);
} oom_journal SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct oom_state);
} oom_state SEC(".maps");

/* Set by the reader before it waits: the next record is to be notified. In memory that the reader maps.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u32);
} oom_waiting SEC(".maps");

/* The room that the stack does not have. */
struct scratch {
	struct oom_event event;
	struct kernfs_node *nodes[OOM_CG_ROLES]; /* whose paths the record wants */
	__u32 used;				 /* bytes of event.data */
	__u32 pad;
	__u64 frames[MAX_FRAMES];
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct scratch);
} oom_scratch SEC(".maps");

/*
 * What the hooks saw of the OOM kill that is under way. All of them run under oom_lock, so one is
 * enough.
 *
 * A hook can be missed, and no hook tells when out_of_memory() returns without a mark, so what stands
 * here may be of an earlier call. It is not believed but looked at again at the mark: the oom_control
 * lies on the kernel stack, above the mark, says what it said to the hook, and the task that it has
 * chosen is the one that is marked now. An earlier call that ended without a mark had chosen nobody, or
 * one that had no memory left or was marked already, and such a one is not marked again. (Should the
 * caller of this call have its oom_control at the very place where that of an earlier call was, then it
 * is this call's that is read, and it is right.)
 */
enum cause_stage {
	CAUSE_NONE = 0,	 /* none, or used up */
	CAUSE_SEEN = 1,	 /* out_of_memory() or oom_kill_process() was entered */
	CAUSE_SPENT = 2, /* the chosen one was marked; only members of its group may follow */
};

struct cause {
	__u64 thread; /* pid_tgid */
	struct oom_control *oc;
	struct zonelist *zonelist; /* of oc, as what follows */
	struct mem_cgroup *memcg;
	struct task_struct *chosen; /* once it was marked */
	__u32 gfp_mask;
	__s32 order;
	__u32 stage;	     /* enum cause_stage */
	__u32 killing_tgid;  /* __oom_kill_process() was entered for it */
	__u32 killing_again; /* and it was marked before, and this was counted */
	__u32 saw_kill;	     /* what the mark under way was explained by */
	__u64 killing_start_boottime_ns;
	struct task_struct *marking; /* mark_oom_victim() was entered for it */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cause);
} oom_cause SEC(".maps");

/* Never written. Its addresses tell where each CPU's part of a percpu allocation lies. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} oom_percpu SEC(".maps");

/* launder turns a pointer that the verifier knows into a plain number. */
static __always_inline __u64 launder(const void *ptr)
{
	__u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), &ptr);
	return number;
}

static __always_inline __u64 positive(__s64 n)
{
	return n > 0 ? n : 0;
}

/*
 * read_percpu_rss does what get_mm_counter() and get_mm_counter_sum() do: the batched counts, and to
 * them what each CPU has not folded in yet. The kernel's own __per_cpu_offset is no ksym without
 * CONFIG_KALLSYMS_ALL, so the offset of a CPU is taken from a percpu map of our own.
 */
static __always_inline void read_percpu_rss(struct oom_event *e, struct mm_struct *task_mm)
{
	struct mm_struct___since_v62 *mm = (void *)task_mm;
	__s64 sum[OOM_RSS_COUNTERS];
	__u64 counters[OOM_RSS_COUNTERS];
	struct bpf_array *array;
	__u64 base = 0;
	bool adjacent = true;
	__u32 zero = 0;

	for (int i = 0; i < OOM_RSS_COUNTERS; i++) {
		sum[i] = BPF_CORE_READ(mm, rss_stat[i].count);
		counters[i] = (__u64)BPF_CORE_READ(mm, rss_stat[i].counters);
		e->memory.batched[i] = positive(sum[i]);
		e->memory.rss[i] = positive(sum[i]);
		/* percpu_counter_init_many() allocates them as one block. */
		if (counters[i] != counters[0] + i * sizeof(__s32))
			adjacent = false;
	}
	if (!has_lookup_percpu_elem() || !adjacent || oom_nr_cpus > MAX_CPUS)
		return;

	array = (void *)launder(&oom_percpu);
	if (bpf_core_read(&base, sizeof(base), &array->pptrs[0]) || !base)
		return;
	for (__u32 cpu = 0; cpu < MAX_CPUS && cpu < oom_nr_cpus; cpu++) {
		void *probe = bpf_map_lookup_percpu_elem(&oom_percpu, &zero, cpu);
		__s32 part[OOM_RSS_COUNTERS];

		if (!probe)
			return;
		if (bpf_probe_read_kernel(part, sizeof(part),
					  (void *)(counters[0] + launder(probe) - base)))
			return;
		for (int i = 0; i < OOM_RSS_COUNTERS; i++)
			sum[i] += part[i];
	}
	for (int i = 0; i < OOM_RSS_COUNTERS; i++)
		e->memory.rss[i] = positive(sum[i]);
	e->flags |= OOM_F_EXACT;
}

static __always_inline void read_memory(struct oom_event *e, struct task_struct *task)
{
	struct mm_struct *mm = BPF_CORE_READ(task, mm);

	if (!mm)
		return;
	e->memory.total_vm = BPF_CORE_READ(mm, total_vm);
	e->memory.pgtables = BPF_CORE_READ(mm, pgtables_bytes.counter);
	if (rss_is_percpu()) {
		read_percpu_rss(e, mm);
	} else {
		struct mm_struct___before_v62 *old = (void *)mm;

		for (int i = 0; i < OOM_RSS_COUNTERS; i++) {
			__s64 n = BPF_CORE_READ(old, rss_stat.count[i].counter);

			e->memory.batched[i] = positive(n);
			e->memory.rss[i] = positive(n);
		}
	}
	e->flags |= OOM_F_MEMORY;
}

static __always_inline void read_victim(struct oom_event *e, struct task_struct *task)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct pid *pid = BPF_CORE_READ(leader, thread_pid);
	unsigned int level = BPF_CORE_READ(pid, level);
	struct upid upid = {};

	e->victim.tid = BPF_CORE_READ(task, pid);
	e->victim.tgid = BPF_CORE_READ(task, tgid);
	e->victim.uid = BPF_CORE_READ(task, real_cred, uid.val);
	e->victim.oom_score_adj = BPF_CORE_READ(task, signal, oom_score_adj);
	e->victim.start_boottime_ns = BPF_CORE_READ(leader, start_boottime);
	BPF_CORE_READ_STR_INTO(&e->victim.comm, task, comm);
	bpf_core_read(&upid, sizeof(upid), &pid->numbers[level]);
	e->victim.ns_tgid = upid.nr;
	e->flags |= OOM_F_VICTIM;
	read_memory(e, task);
}

static __always_inline struct mem_cgroup *memcg_of(struct task_struct *task)
{
	int id = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
	struct css_set *cset = BPF_CORE_READ(task, cgroups);
	struct cgroup_subsys_state *css = NULL;

	bpf_core_read(&css, sizeof(css), &cset->subsys[id]);
	if (!css)
		return NULL;
	return (void *)css - bpf_core_field_offset(struct mem_cgroup, css);
}

/* The memory cgroup that the charge goes to next: not every parent is charged on v1. */
static __always_inline struct mem_cgroup *charged_parent(struct mem_cgroup *memcg)
{
	struct page_counter *parent = BPF_CORE_READ(memcg, memory.parent);

	if (!parent)
		return NULL;
	return (void *)parent - bpf_core_field_offset(struct mem_cgroup, memory);
}

static __always_inline bool on_unified(struct task_struct *task, struct mem_cgroup *memcg)
{
	return BPF_CORE_READ(memcg, css.cgroup, root) == BPF_CORE_READ(task, cgroups, dfl_cgrp, root);
}

static __always_inline struct cgroup *cgroup_of(struct task_struct *task, struct mem_cgroup *memcg)
{
	if (on_unified(task, memcg))
		return BPF_CORE_READ(task, cgroups, dfl_cgrp);
	return BPF_CORE_READ(memcg, css.cgroup);
}

/*
 * put_path writes the path of nodes[role] behind what data holds already, and with it the path of
 * every later role that turns out to be the same cgroup or an ancestor of it.
 *
 * A global function, and all that it knows kept in the map: the verifier then looks at it once for
 * every role, and each turn of the loop looks like the one before.
 */
__noinline int put_path(__u32 role)
{
	struct kernfs_node *kn;
	bool whole = false;
	struct scratch *s;
	__u32 zero = 0;

	s = bpf_map_lookup_elem(&oom_scratch, &zero);
	if (!s)
		return 0;
	role &= OOM_CG_ROLES - 1; /* a bound that the verifier sees */
	kn = s->nodes[role];
	if (!kn || s->event.cgroup[role].flags & OOM_CG_F_PRESENT)
		return 0;
	for (int level = 0; level < MAX_DEPTH; level++) {
		struct kernfs_node *parent = kernfs_parent_of(kn);
		__u32 off = s->used;
		long n;

		for (__u32 r = 0; r < OOM_CG_ROLES; r++) {
			struct oom_cgroup *cg = &s->event.cgroup[r];

			if (s->nodes[r] != kn || cg->flags & OOM_CG_F_PRESENT)
				continue;
			cg->flags |= OOM_CG_F_PRESENT;
			cg->off = off;
			cg->len = LEN_PENDING;
			cg->id = BPF_CORE_READ(kn, id);
		}
		if (!parent) {
			whole = true;
			break;
		}
		if (off > OOM_DATA_MAX - NAME_LEN)
			break;
		n = bpf_probe_read_kernel_str(&s->event.data[off], NAME_LEN, BPF_CORE_READ(kn, name));
		if (n <= 0)
			break;
		s->used = off + n;
		kn = parent;
	}
	for (__u32 r = 0; r < OOM_CG_ROLES; r++) {
		struct oom_cgroup *cg = &s->event.cgroup[r];

		if (cg->len != LEN_PENDING)
			continue;
		cg->len = s->used - cg->off;
		if (!whole)
			cg->flags |= OOM_CG_F_TRUNCATED;
	}
	return 0;
}

static __always_inline __u64 headroom(__u64 max, __u64 usage)
{
	if (max >= OOM_NO_LIMIT)
		return OOM_NO_LIMIT;
	return max > usage ? max - usage : 0;
}

/*
 * infer_limit finds the ancestor of the trigger's memory cgroup with the least headroom: a failed
 * charge (try_charge_memcg(), mm/memcontrol.c) stops at the lowest counter that is full. It is an
 * inference: a remote charge goes elsewhere. (A function of its own, as those below, and with numbers
 * for pointers, so that the verifier looks at its loop once.)
 */
__noinline __u64 infer_limit(__u64 trigger_memcg, __u32 unified)
{
	struct mem_cgroup *memcg = (void *)trigger_memcg, *owner = NULL;
	__u64 least = OOM_NO_LIMIT;

	for (int level = 0; level < MAX_DEPTH && memcg; level++) {
		__u64 room = headroom(BPF_CORE_READ(memcg, memory.max),
				      BPF_CORE_READ(memcg, memory.usage.counter));

		if (!unified) {
			__u64 swap = headroom(BPF_CORE_READ(memcg, memsw.max),
					      BPF_CORE_READ(memcg, memsw.usage.counter));

			if (swap < room)
				room = swap;
		}
		if (room < least) {
			least = room;
			owner = memcg;
		}
		memcg = charged_parent(memcg);
	}
	return (__u64)owner;
}

/*
 * kills_group does what mem_cgroup_get_oom_group() does: is any cgroup from the victim's up to the
 * one that is out of memory to die as a whole? Without one (a global kill) the walk ends at the root.
 */
__noinline __u32 kills_group(__u64 victim_memcg, __u64 domain)
{
	struct mem_cgroup *memcg = (void *)victim_memcg;

	for (int level = 0; level < MAX_DEPTH && memcg; level++) {
		if (BPF_CORE_READ(memcg, oom_group))
			return true;
		if ((__u64)memcg == domain)
			break;
		memcg = charged_parent(memcg);
	}
	return false;
}

/*
 * frame_of says which of the known functions an address lies in, OOM_FRAMES if in none. A function
 * of its own, so that the verifier looks at it once and not for each frame.
 */
__noinline __u32 frame_of(__u64 address)
{
	for (__u32 i = 0; i < OOM_SYMBOLS_MAX && i < oom_symbol_count; i++) {
		if (address >= oom_symbols[i].start && address < oom_symbols[i].end)
			return oom_symbols[i].frame;
	}
	return OOM_FRAMES;
}

/* stack_frames tells as a set of bits which known functions led here, up to the one that decides. */
static __always_inline __u32 stack_frames(void *ctx, struct scratch *s)
{
	const __u32 deciding = 1U << OOM_FRAME_MEMCG | 1U << OOM_FRAME_SYSRQ |
			       1U << OOM_FRAME_PAGE_ALLOC | 1U << OOM_FRAME_KSWAPD;
	long bytes = bpf_get_stack(ctx, s->frames, sizeof(s->frames), 0);
	__u32 seen = 0;

	for (int i = 0; i < MAX_FRAMES && i * (long)sizeof(__u64) < bytes; i++) {
		/* Beside out_of_memory() nothing above it can decide: it is what they all call. */
		seen |= 1U << (frame_of(s->frames[i]) & 31);
		if (seen & 1U << OOM_FRAME_OOM && seen & deciding)
			break;
	}
	return seen;
}

static __always_inline bool has(__u32 frames, enum oom_frame frame)
{
	return frames & 1U << frame;
}

static __always_inline struct cause *the_cause(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&oom_cause, &zero);
}

static __always_inline struct oom_state *the_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&oom_state, &zero);
}

/* The bodies of the hooks, which fentry and kprobe share. */

static __always_inline int see(struct oom_control *oc)
{
	struct cause *c = the_cause();

	if (!c)
		return 0;
	c->thread = bpf_get_current_pid_tgid();
	c->oc = oc;
	c->zonelist = BPF_CORE_READ(oc, zonelist);
	c->memcg = BPF_CORE_READ(oc, memcg);
	c->gfp_mask = BPF_CORE_READ(oc, gfp_mask);
	c->order = BPF_CORE_READ(oc, order);
	c->stage = CAUSE_SEEN;
	c->killing_tgid = 0;
	return 0;
}

/* Either of the two is enough. */
static __always_inline int enter_out_of_memory(struct oom_control *oc)
{
	return MISSED(101) ? 0 : see(oc);
}

static __always_inline int enter_oom_kill_process(struct oom_control *oc)
{
	return MISSED(102) ? 0 : see(oc);
}

static __always_inline int enter___oom_kill_process(struct task_struct *victim)
{
	struct cause *c = the_cause();
	struct oom_state *st = the_state();

	if (!c || !st || MISSED(103))
		return 0;
	c->killing_tgid = BPF_CORE_READ(victim, tgid);
	c->killing_start_boottime_ns = BPF_CORE_READ(victim, group_leader, start_boottime);
	/*
	 * tsk_is_oom_victim(): it was marked before, and no mark follows, as a rule: then this is the
	 * only trace. find_lock_task_mm() gives up on one that has no mm left.
	 */
	c->killing_again = st->generation == oom_generation && BPF_CORE_READ(victim, signal, oom_mm) &&
			   BPF_CORE_READ(victim, signal, live.counter);
	if (c->killing_again)
		st->killed_again++;
	return 0;
}

/* Only needed where the tracepoint hands over no task. */
static __always_inline int enter_mark_oom_victim(struct task_struct *task)
{
	struct cause *c = the_cause();

	if (c)
		c->marking = task;
	return 0;
}

#define HOOK(function, type)                                                                           \
	SEC("fentry/" #function)                                                                       \
	int BPF_PROG(fentry_##function, type *arg)                                                     \
	{                                                                                              \
		return enter_##function(arg);                                                          \
	}                                                                                              \
	SEC("kprobe/" #function)                                                                       \
	int BPF_KPROBE(kprobe_##function, type *arg)                                                   \
	{                                                                                              \
		return enter_##function(arg);                                                          \
	}

HOOK(out_of_memory, struct oom_control)
HOOK(oom_kill_process, struct oom_control)
HOOK(__oom_kill_process, struct task_struct)
HOOK(mark_oom_victim, struct task_struct)

/* scope_of is oom_constraint with the two that stand beside it (is_memcg_oom(), is_sysrq_oom()). */
static __always_inline __u8 scope_of(struct cause *c, enum oom_constraint constraint)
{
	if (c->memcg)
		return OOM_SCOPE_CGROUP;
	if (c->order == -1)
		return OOM_SCOPE_SYSRQ;
	switch (constraint) {
	case CONSTRAINT_NONE:
		return OOM_SCOPE_GLOBAL;
	case CONSTRAINT_CPUSET:
		return OOM_SCOPE_CPUSET;
	case CONSTRAINT_MEMORY_POLICY:
		return OOM_SCOPE_MEMPOLICY;
	default:
		return OOM_SCOPE_UNKNOWN;
	}
}

/*
 * outcome_of tells a kill from the mark of a task that is exiting anyway. That a hook did not run
 * proves nothing: only the stack proves that nobody was killed. There both callers of mark_oom_victim()
 * that do not kill are told by the absence of __oom_kill_process(). (The loader writes symbols only
 * where that function has an address of its own.)
 */
static __always_inline __u8 outcome_of(bool killing, __u32 frames)
{
	if (killing || has(frames, OOM_FRAME_KILL))
		return OOM_OUTCOME_KILLED;
	return has(frames, OOM_FRAME_OOM) ? OOM_OUTCOME_EXITING : OOM_OUTCOME_UNKNOWN;
}

/* read_stack takes scope and outcome from the functions on the stack, and returns whether it could. */
static __always_inline bool read_stack(struct oom_event *e, __u32 frames)
{
	if (!has(frames, OOM_FRAME_OOM))
		return false;
	if (has(frames, OOM_FRAME_MEMCG))
		e->scope = OOM_SCOPE_CGROUP;
	else if (has(frames, OOM_FRAME_SYSRQ))
		e->scope = OOM_SCOPE_SYSRQ;
	/* It hands over no zonelist, and constrained_alloc() then binds to nothing. */
	else if (has(frames, OOM_FRAME_KSWAPD))
		e->scope = OOM_SCOPE_GLOBAL;
	/* Here constrained_alloc()'s answer is not on the stack. */
	else if (has(frames, OOM_FRAME_PAGE_ALLOC) && oom_one_memory_node)
		e->scope = OOM_SCOPE_GLOBAL;
	e->outcome = outcome_of(false, frames);
	return true;
}

/*
 * read_context takes scope, outcome and allocation from the hooks, if what they saw explains this mark,
 * else from the stack. It returns whether the mark follows another in the same group. ctx lies on the
 * stack.
 *
 * The stack is not read for a kill that the hooks explain alone: __oom_kill_process() was entered for
 * the one that is chosen, and nobody was marked for this call before. All others need it, to tell a
 * member of a group, a task that is exiting, and the kill whose hook was missed.
 */
static __always_inline bool read_context(void *ctx, struct scratch *s, struct cause *c,
					 struct task_struct *victim, struct oom_stats *stats)
{
	struct oom_event *e = &s->event;
	bool killing = c->killing_tgid && c->killing_tgid == e->victim.tgid &&
		       c->killing_start_boottime_ns == e->victim.start_boottime_ns;
	__u32 stage = c->stage;
	/* Copied, or CO-RE would take struct cause for one of the kernel's. */
	struct oom_control *oc = c->oc;
	struct task_struct *chosen = NULL;
	bool same_call, first, member;
	__u32 frames = 0;

	c->saw_kill = killing;
	/* What does not explain this mark explains no other. */
	c->stage = CAUSE_NONE;
	c->killing_tgid = 0;
	if (oom_tier == OOM_TIER_NONE)
		return false;
	same_call = oom_tier >= OOM_TIER_KPROBE && stage != CAUSE_NONE &&
		    c->thread == bpf_get_current_pid_tgid() && victim && (__u64)oc > launder(ctx) &&
		    BPF_CORE_READ(oc, zonelist) == c->zonelist &&
		    BPF_CORE_READ(oc, memcg) == c->memcg &&
		    BPF_CORE_READ(oc, gfp_mask) == c->gfp_mask && BPF_CORE_READ(oc, order) == c->order;
	if (same_call)
		chosen = BPF_CORE_READ(oc, chosen);
	/* oom_kill_process() marks a thread of the chosen one first, then the members of its group. */
	first = same_call && BPF_CORE_READ(chosen, signal) == BPF_CORE_READ(victim, signal);
	if (!first || !killing || stage != CAUSE_SEEN) {
		frames = stack_frames(ctx, s);
		stats->unwound++;
	}
	member = has(frames, OOM_FRAME_GROUP);
	if (same_call && !first && stage == CAUSE_SPENT && chosen == c->chosen &&
	    (has(frames, OOM_FRAME_OOM) ? has(frames, OOM_FRAME_GROUP) : killing))
		member = true;
	else if (!first) {
		if (read_stack(e, frames))
			e->tier = OOM_TIER_STACK;
		return member;
	}
	e->tier = oom_tier;
	c->chosen = chosen;
	c->stage = CAUSE_SPENT;
	e->scope = scope_of(c, BPF_CORE_READ(oc, constraint));
	e->outcome = outcome_of(killing, frames);
	e->alloc.gfp_mask = c->gfp_mask;
	e->alloc.order = c->order;
	e->alloc.total_pages = BPF_CORE_READ(oc, totalpages);
	e->flags |= OOM_F_ALLOC;
	return member;
}

static __always_inline void read_limit(struct oom_event *e, struct mem_cgroup *owner)
{
	if (!owner)
		return;
	e->limit.max = BPF_CORE_READ(owner, memory.max);
	e->limit.usage = BPF_CORE_READ(owner, memory.usage.counter);
	e->limit.swap_max = BPF_CORE_READ(owner, memsw.max);
	e->limit.swap_usage = BPF_CORE_READ(owner, memsw.usage.counter);
	e->flags |= OOM_F_LIMIT;
}

/*
 * bind_incident gives the victims of one decision one name. The members of a group follow their first
 * victim in the same thread, with oom_lock held throughout.
 */
static __always_inline void bind_incident(struct oom_event *e, struct oom_state *st, bool member,
					  bool group)
{
	__u64 thread = bpf_get_current_pid_tgid();

	if (member && st->incident_thread == thread) {
		st->incident_index++;
		group = true;
	} else {
		st->incident_boottime_ns = e->boottime_ns;
		st->incident_thread = thread;
		st->incident_index = 0;
		st->groups += group;
	}
	e->incident.boottime_ns = st->incident_boottime_ns;
	e->incident.index = st->incident_index;
	e->flags |= OOM_F_INCIDENT;
	if (group)
		e->flags |= OOM_F_GROUP;
}

/* told_before knows the mark that two programs see, when they change between the one and the other. */
static __always_inline bool told_before(struct oom_event *e, struct oom_told *told)
{
	return told->generation != oom_generation && told->tid == e->victim.tid &&
	       told->thread == bpf_get_current_pid_tgid() &&
	       told->start_boottime_ns == e->victim.start_boottime_ns;
}

static __always_inline void count(struct oom_event *e, struct oom_state *st, bool saw_kill)
{
	switch (e->outcome) {
	case OOM_OUTCOME_KILLED:
		st->killed++;
		st->unhooked += !saw_kill;
		break;
	case OOM_OUTCOME_EXITING:
		st->exiting++;
		break;
	default:
		st->unknown++;
	}
	if (e->outcome != OOM_OUTCOME_EXITING)
		st->last_kill_boottime_ns = e->boottime_ns;
}

/*
 * put_journal writes the record into its slot. head names it only now that it is whole.
 *
 * The barrier is for the compiler alone: BPF has none for the CPU that every supported kernel knows. On
 * a weakly ordered CPU the reader may see head, and not yet the record, until the kernel's next
 * barrier. Both ways to notify have one before the reader can see the notification:
 * perf_output_put_handle() and bpf_ringbuf_commit(). A reader that goes by head has to wait for a
 * moment before it reads the slot. When a slot is written again, this head has long been visible:
 * oom_lock was released and taken in between.
 */
static __always_inline void put_journal(struct oom_event *e, struct oom_state *st, __u32 size)
{
	__u32 slot = e->seq & (oom_journal_slots - 1);
	struct oom_event *kept = bpf_map_lookup_elem(&oom_journal, &slot);

	if (kept)
		bpf_probe_read_kernel(kept, size, e);
	st->told.generation = oom_generation;
	st->told.thread = bpf_get_current_pid_tgid();
	st->told.start_boottime_ns = e->victim.start_boottime_ns;
	st->told.tid = e->victim.tid;
	barrier();
	*(volatile __u64 *)&st->head = e->seq;
}

/*
 * notify wakes the reader with the seq of the record, if it waits. A reader that is awake looks at head
 * before it waits again. A notification that is refused costs time, no record.
 *
 * The reader sets waiting and then reads head, the program writes head and then reads waiting. A CPU
 * may do the last two the other way round, so the reader looks once more when a moment has passed (see
 * visibleTime).
 */
static __always_inline void notify(void *ctx, __u64 seq, struct oom_stats *stats)
{
	__u32 zero = 0, *waiting = bpf_map_lookup_elem(&oom_waiting, &zero);
	long refused;

	if (!waiting || !*(volatile __u32 *)waiting)
		return;
	/* First, or it could undo what the reader sets when it waits again. */
	*(volatile __u32 *)waiting = 0;
	switch (oom_notify) {
	case OOM_NOTIFY_PERF:
		refused = bpf_perf_event_output(ctx, &oom_perf, BPF_F_CURRENT_CPU, &seq, sizeof(seq));
		break;
	case OOM_NOTIFY_RINGBUF:
		refused = bpf_ringbuf_output(&oom_ringbuf, &seq, sizeof(seq), 0);
		break;
	default:
		return;
	}
	if (refused) {
		*(volatile __u32 *)waiting = 1;
		stats->refused++;
	} else {
		stats->sent++;
	}
}

SEC("tp_btf/mark_victim")
int oom_mark_victim(__u64 *ctx)
{
	struct task_struct *current = (void *)bpf_get_current_task();
	struct mem_cgroup *victim_memcg = NULL, *trigger_memcg, *owner = NULL;
	struct task_struct *victim = NULL;
	bool victim_v2 = false, trigger_v2 = false, member, group;
	struct cause *c = the_cause();
	struct oom_state *st = the_state();
	struct oom_stats *stats;
	struct oom_event *e;
	struct scratch *s;
	__u32 zero = 0;
	__u64 size;

	s = bpf_map_lookup_elem(&oom_scratch, &zero);
	stats = bpf_map_lookup_elem(&oom_stats, &zero);
	if (!s || !stats || !c || !st)
		return 0;
	if (*(volatile __u64 *)&st->generation != oom_generation) {
		c->stage = CAUSE_NONE;
		return 0;
	}
	e = &s->event;
	/* The whole header, so that nothing of an earlier record can stand in this one. */
	__builtin_memset(e, 0, OOM_HEADER_SIZE);
	__builtin_memset(s->nodes, 0, sizeof(s->nodes));
	s->used = 0;
	e->abi_version = OOM_ABI_VERSION;
	e->header_size = OOM_HEADER_SIZE;
	e->seq = st->head + 1;
	e->boottime_ns = bpf_ktime_get_boot_ns();

	e->trigger.tgid = bpf_get_current_pid_tgid() >> 32;
	e->trigger.tid = bpf_get_current_pid_tgid();
	bpf_get_current_comm(&e->trigger.comm, sizeof(e->trigger.comm));

	if (mark_victim_hands_task()) {
		victim = (void *)ctx[0];
	} else {
		/* Copied, or CO-RE would take struct cause for one of the kernel's. */
		struct task_struct *marking = c->marking;

		e->victim.tid = ctx[0];
		/* mark_oom_victim() has just been entered for it, where that is hooked. */
		if (marking && BPF_CORE_READ(marking, pid) == e->victim.tid)
			victim = marking;
		/* Without a task only a victim that is the trigger, or its leader, can be read. */
		else if (e->victim.tid == e->trigger.tid)
			victim = current;
		else if (e->victim.tid == e->trigger.tgid)
			victim = BPF_CORE_READ(current, group_leader);
		c->marking = NULL;
	}
	if (victim) {
		read_victim(e, victim);
		victim_memcg = memcg_of(victim);
	}
	if (told_before(e, &st->told))
		return 0;
	stats->seen++;
	if (c->killing_again && c->killing_tgid == e->victim.tgid) {
		/* It has a mark of its own after all: the kill hit another of its threads. */
		st->killed_again--;
		c->killing_again = 0;
	}

	member = read_context(ctx, s, c, victim, stats);

	trigger_memcg = memcg_of(current);
	if (trigger_memcg) {
		trigger_v2 = on_unified(current, trigger_memcg);
		s->nodes[OOM_CG_TRIGGER] = BPF_CORE_READ(cgroup_of(current, trigger_memcg), kn);
		if (e->scope == OOM_SCOPE_CGROUP) {
			if (e->tier >= OOM_TIER_KPROBE) {
				owner = c->memcg;
			} else {
				owner = (void *)infer_limit((__u64)trigger_memcg, trigger_v2);
				e->flags |= OOM_F_LIMIT_INFERRED;
			}
			read_limit(e, owner);
			if (owner)
				s->nodes[OOM_CG_LIMIT] = BPF_CORE_READ(owner, css.cgroup, kn);
		}
	}
	if (victim_memcg) {
		victim_v2 = on_unified(victim, victim_memcg);
		s->nodes[OOM_CG_VICTIM] = BPF_CORE_READ(cgroup_of(victim, victim_memcg), kn);
		if (victim_v2)
			s->nodes[OOM_CG_VICTIM_MEMCG] = BPF_CORE_READ(victim_memcg, css.cgroup, kn);
	}
	group = victim_v2 && kills_group((__u64)victim_memcg, (__u64)owner);
	if (!group)
		c->stage = CAUSE_NONE; /* nobody follows */
	if (e->outcome == OOM_OUTCOME_KILLED && e->scope != OOM_SCOPE_UNKNOWN)
		bind_incident(e, st, member, group);

	for (__u32 role = 0; role < OOM_CG_ROLES; role++)
		put_path(role);
	if (victim_v2) {
		e->cgroup[OOM_CG_VICTIM].flags |= OOM_CG_F_V2;
		e->cgroup[OOM_CG_VICTIM_MEMCG].flags |= OOM_CG_F_V2;
	}
	if (trigger_v2) {
		e->cgroup[OOM_CG_LIMIT].flags |= OOM_CG_F_V2;
		e->cgroup[OOM_CG_TRIGGER].flags |= OOM_CG_F_V2;
	}

	put_fault(e);
	size = OOM_HEADER_SIZE + s->used;
	/* The verifier must see the bound on the register that the helper gets. */
	barrier_var(size);
	if (size > sizeof(*e))
		size = sizeof(*e);
	e->size = size;
	put_journal(e, st, size);
	count(e, st, c->saw_kill);
	notify(ctx, e->seq, stats);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
