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
#include "maps.bpf.h"
#include "memory.bpf.h"
#include "cgroup.bpf.h"
#include "context.bpf.h"
#include "journal.bpf.h"

/* The bodies of the hooks, which fentry and kprobe share. */

static __always_inline int save_control(struct oom_control *oc)
{
	struct cause *c = get_cause();

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
	return MISSED(101) ? 0 : save_control(oc);
}

static __always_inline int enter_oom_kill_process(struct oom_control *oc)
{
	return MISSED(102) ? 0 : save_control(oc);
}

static __always_inline int enter___oom_kill_process(struct task_struct *victim)
{
	struct cause *c = get_cause();
	struct oom_state *st = get_state();

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
	struct cause *c = get_cause();

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

static __always_inline void read_victim(struct oom_event *e, struct task_struct *task)
{
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	struct pid *pid = BPF_CORE_READ(leader, thread_pid);
	unsigned int level = BPF_CORE_READ(pid, level);
	struct upid *upid;

	e->victim.tid = BPF_CORE_READ(task, pid);
	e->victim.tgid = BPF_CORE_READ(task, tgid);
	e->victim.uid = BPF_CORE_READ(task, real_cred, uid.val);
	e->victim.oom_score_adj = BPF_CORE_READ(task, signal, oom_score_adj);
	e->victim.start_boottime_ns = BPF_CORE_READ(leader, start_boottime);
	BPF_CORE_READ_STR_INTO(&e->victim.comm, task, comm);
	upid = element_of((void *)pid + bpf_core_field_offset(struct pid, numbers), level, struct upid);
	e->victim.ns_tgid = BPF_CORE_READ(upid, nr);
	e->flags |= OOM_F_VICTIM;
	read_memory(e, task);
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

/* begin_record clears the whole header, so that nothing of an earlier record can stand in this one. */
static __always_inline struct oom_event *begin_record(struct scratch *s, struct oom_state *st)
{
	struct oom_event *e = &s->event;

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
	return e;
}

/* find_victim returns the marked task. Where the tracepoint hands over its tid alone, it may be NULL.
 */
static __always_inline struct task_struct *find_victim(__u64 *ctx, struct oom_event *e, struct cause *c)
{
	struct task_struct *current = (void *)bpf_get_current_task(), *marking;

	if (mark_victim_hands_task())
		return (void *)ctx[0];
	/* Copied, or CO-RE would take struct cause for one of the kernel's. */
	marking = c->marking;
	c->marking = NULL;
	e->victim.tid = ctx[0];
	/* mark_oom_victim() has just been entered for it, where that is hooked. */
	if (marking && BPF_CORE_READ(marking, pid) == e->victim.tid)
		return marking;
	/* Without a task only a victim that is the trigger, or its leader, can be read. */
	if (e->victim.tid == e->trigger.tid)
		return current;
	if (e->victim.tid == e->trigger.tgid)
		return BPF_CORE_READ(current, group_leader);
	return NULL;
}

/* read_cgroups finds the cgroups of the record and the limit. It returns whether the kill is one of a
 * group. */
static __always_inline bool read_cgroups(struct scratch *s, struct cause *c, struct task_struct *victim)
{
	struct task_struct *current = (void *)bpf_get_current_task();
	struct mem_cgroup *trigger_memcg = memcg_of(current), *victim_memcg = NULL, *owner = NULL;
	bool trigger_v2 = false, victim_v2 = false;
	struct oom_event *e = &s->event;

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
	if (victim)
		victim_memcg = memcg_of(victim);
	if (victim_memcg) {
		victim_v2 = on_unified(victim, victim_memcg);
		s->nodes[OOM_CG_VICTIM] = BPF_CORE_READ(cgroup_of(victim, victim_memcg), kn);
		if (victim_v2)
			s->nodes[OOM_CG_VICTIM_MEMCG] = BPF_CORE_READ(victim_memcg, css.cgroup, kn);
	}
	if (victim_v2) {
		e->cgroup[OOM_CG_VICTIM].flags |= OOM_CG_F_V2;
		e->cgroup[OOM_CG_VICTIM_MEMCG].flags |= OOM_CG_F_V2;
	}
	if (trigger_v2) {
		e->cgroup[OOM_CG_LIMIT].flags |= OOM_CG_F_V2;
		e->cgroup[OOM_CG_TRIGGER].flags |= OOM_CG_F_V2;
	}
	return victim_v2 && kills_group((__u64)victim_memcg, (__u64)owner);
}

SEC("tp_btf/mark_victim")
int oom_mark_victim(__u64 *ctx)
{
	struct cause *c = get_cause();
	struct oom_state *st = get_state();
	struct task_struct *victim;
	struct oom_stats *stats;
	bool member, group;
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

	e = begin_record(s, st);
	victim = find_victim(ctx, e, c);
	if (victim)
		read_victim(e, victim);
	if (recorded_before(e, &st->last_mark))
		return 0;
	stats->seen++;
	if (c->killing_again && c->killing_tgid == e->victim.tgid) {
		/* It is marked after all: the kill hit another of its threads. */
		st->killed_again--;
		c->killing_again = 0;
	}

	member = read_context(ctx, s, c, victim, stats);
	group = read_cgroups(s, c, victim);
	if (!group)
		c->stage = CAUSE_NONE; /* nobody follows */
	if (e->outcome == OOM_OUTCOME_KILLED && e->scope != OOM_SCOPE_UNKNOWN)
		bind_incident(e, st, member, group);
	else if (group && e->outcome != OOM_OUTCOME_EXITING)
		st->groups++; /* the kernel may have counted it twice all the same */
	for (__u32 role = 0; role < OOM_CG_ROLES; role++)
		put_path(role);
	put_fault(e);

	size = OOM_HEADER_SIZE + s->used;
	/* The verifier must see the bound on the register that the helper gets. */
	barrier_var(size);
	if (size > sizeof(*e))
		size = sizeof(*e);
	e->size = size;
	put_journal(e, st, size);
	count(e, st, c->kill_hooked);
	notify(ctx, e->seq, stats);
	return 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
