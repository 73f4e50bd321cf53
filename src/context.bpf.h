/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef OOM_CONTEXT_BPF_H
#define OOM_CONTEXT_BPF_H

/* Why a task was marked: what the hooks saw, or the stack. */

#include "maps.bpf.h"
#include "memory.bpf.h"

/*
 * What the hooks saw of the current OOM kill. All hooks run under oom_lock, so one struct is enough.
 *
 * It may be left over from an earlier call: a hook can be missed, and no hook runs when
 * out_of_memory() returns without a mark. So it is checked again at the mark:
 *
 * - the oom_control lies on the kernel stack, above the mark;
 * - its contents are those that the hook saw;
 * - the task that it has chosen is the task that is marked now.
 *
 * An earlier call that ended without a mark passes none of this. It had chosen nobody, or a task
 * without memory, or a task that was marked already; such a task is not marked again. If this call has
 * its oom_control at the same address as an earlier one, then this call's is read, which is right.
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
	__u32 kill_hooked;   /* __oom_kill_process() was entered for the mark under way */
	__u64 killing_start_boottime_ns;
	struct task_struct *marking; /* mark_oom_victim() was entered for it */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct cause);
} oom_cause SEC(".maps");

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

/* stack_frames returns, as bits, the known functions on the stack, up to the one that decides. */
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

static __always_inline struct cause *get_cause(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&oom_cause, &zero);
}

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
 * that do not kill are known by the absence of __oom_kill_process(). Where that has no address of its
 * own, the loader writes oom_kill_process(), which is one of the two and calls it: it proves neither. A
 * member of a group is only marked when it is killed.
 */
static __always_inline __u8 outcome_of(bool killing, __u32 frames)
{
	if (killing || has(frames, OOM_FRAME_KILL) || has(frames, OOM_FRAME_GROUP))
		return OOM_OUTCOME_KILLED;
	if (has(frames, OOM_FRAME_KILL_PROCESS))
		return OOM_OUTCOME_UNKNOWN;
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
 * read_context takes scope, outcome and allocation from the hooks if what they saw explains this mark,
 * else from the stack. It returns whether the mark follows another one in the same group. ctx lies on
 * the stack.
 *
 * The hooks alone explain a kill if __oom_kill_process() was entered for the chosen task, and nobody
 * was marked for this call before. Then the stack is not read. In all other cases it is: for a member
 * of a group, for a task that is exiting, and for a kill whose hook was missed.
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

	c->kill_hooked = killing;
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

#endif /* OOM_CONTEXT_BPF_H */
