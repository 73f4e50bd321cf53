/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef OOM_MAPS_BPF_H
#define OOM_MAPS_BPF_H

/* What the loader sets, and the room that all share. */

/* Levels of a cgroup path, and ancestors of a memory cgroup, that are looked at. */
#define MAX_DEPTH 64
#define MAX_FRAMES 48

/* Written by the loader before the program is loaded. */
const volatile __u32 oom_tier;
const volatile __u32 oom_notify;	  /* enum oom_notify */
const volatile __u32 oom_nr_cpus;	  /* possible CPUs */
const volatile __u32 oom_one_memory_node; /* no cpuset or mempolicy can bind on such a machine */
const volatile __u64 oom_generation;	  /* of this load: it speaks while the state says the same */
const volatile __u64 oom_no_limit;	  /* PAGE_COUNTER_MAX, which depends on the page size */
const volatile __u32 oom_segments;	  /* of the journal, a power of two */
const volatile __u32 oom_symbol_count;
const volatile struct oom_symbol oom_symbols[OOM_SYMBOLS_MAX];

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

#endif /* OOM_MAPS_BPF_H */
