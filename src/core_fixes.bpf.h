/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef CORE_FIXES_BPF_H
#define CORE_FIXES_BPF_H

/*
 * Every difference between kernels that the program meets: one inline helper each, with the kernel
 * commit above it. The choice is always made from the running kernel's BTF, never from a version.
 *
 * Where a kernel has one of two types, they are named T___since_X and T___before_X. The program asks
 * for the first with bpf_core_field_exists(), and reads the second if that is absent. doctor --btf
 * (go/internal/loader/match.go) knows by these names what a kernel may lack.
 */

#include "vmlinux.h"
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_helpers.h>

/*
 * element_of points to element i of an array of kernel structs. Where the index is a variable, CO-RE
 * relocates the array and not the step: the compiler takes that from vmlinux.h. But the size of a
 * struct depends on the kernel's configuration. percpu_counter, for one, is larger with
 * DEBUG_SPINLOCK and smaller without HOTPLUG_CPU.
 */
#define element_of(array, i, type) ((type *)((void *)(array) + (__u64)(i)*bpf_core_type_size(type)))

/*
 * mark_victim hands over the task since commit 72ba14deb40a ("mm: update mark_victim tracepoints
 * fields", v6.9, backported to stable kernels); before, only the thread's ID. The commit added uid to
 * the trace event and changed the prototype in one step.
 */
struct trace_event_raw_mark_victim___with_task {
	uid_t uid;
} __attribute__((preserve_access_index));

static __always_inline bool mark_victim_hands_task(void)
{
	return bpf_core_field_exists(((struct trace_event_raw_mark_victim___with_task *)0)->uid);
}

/*
 * kernfs_node.parent became __parent in commit 633488947ef6 ("kernfs: Use RCU to access
 * kernfs_node::parent.", v6.15).
 */
struct kernfs_node___since_v615 {
	struct kernfs_node *__parent;
} __attribute__((preserve_access_index));

struct kernfs_node___before_v615 {
	struct kernfs_node *parent;
} __attribute__((preserve_access_index));

static __always_inline struct kernfs_node *kernfs_parent_of(struct kernfs_node *kn)
{
	struct kernfs_node___since_v615 *now = (void *)kn;
	struct kernfs_node___before_v615 *old = (void *)kn;

	if (bpf_core_field_exists(now->__parent))
		return BPF_CORE_READ(now, __parent);
	return BPF_CORE_READ(old, parent);
}

/*
 * mm_struct.rss_stat became four percpu counters in commit f1a7941243c1 ("mm: convert mm's rss stats
 * into percpu_counter", v6.2); before, it was a struct of four atomics.
 */
struct mm_rss_stat___before_v62 {
	atomic_long_t count[4];
} __attribute__((preserve_access_index));

struct mm_struct___before_v62 {
	struct mm_rss_stat___before_v62 rss_stat;
} __attribute__((preserve_access_index));

struct mm_struct___since_v62 {
	struct percpu_counter rss_stat[4];
} __attribute__((preserve_access_index));

static __always_inline bool rss_is_percpu(void)
{
	return bpf_core_field_exists(((struct mm_struct___since_v62 *)0)->rss_stat);
}

/*
 * bpf_map_lookup_percpu_elem() came with commit 07343110b293 ("bpf: add bpf_map_lookup_percpu_elem
 * for percpu map", v5.19), later than the first kernels that this program runs on, whose vmlinux.h
 * lacks the name.
 */
enum bpf_func_id___since_v519 {
	BPF_FUNC_map_lookup_percpu_elem___since_v519 = 195,
};

static __always_inline bool has_lookup_percpu_elem(void)
{
	return bpf_core_enum_value_exists(enum bpf_func_id___since_v519,
					  BPF_FUNC_map_lookup_percpu_elem___since_v519);
}

#endif /* CORE_FIXES_BPF_H */
