/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef OOM_CGROUP_BPF_H
#define OOM_CGROUP_BPF_H

/* Cgroup paths, and whose limit it was: struct oom_cgroup and struct oom_limit. */

#include "maps.bpf.h"

#define NAME_LEN 256	   /* NAME_MAX and a NUL */
#define LEN_PENDING 0xffff /* of a path whose end is not reached yet */

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
 * put_path appends the path of nodes[role] to data. It also sets the path of every later role that is
 * the same cgroup or an ancestor of it.
 *
 * It is a global function and keeps its state in the map. So the verifier checks it once for each
 * role, and each iteration of the loop looks like the one before.
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
	if (max >= oom_no_limit)
		return oom_no_limit;
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
	__u64 least = oom_no_limit;

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

#endif /* OOM_CGROUP_BPF_H */
