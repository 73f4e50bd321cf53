/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef OOM_MEMORY_BPF_H
#define OOM_MEMORY_BPF_H

/* The victim's memory: struct oom_memory. */

#include "maps.bpf.h"

#define MAX_CPUS 1024

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
	void *rss_stat =
		(void *)task_mm + bpf_core_field_offset(struct mm_struct___since_v62, rss_stat);
	__s64 sum[OOM_RSS_COUNTERS];
	__u64 counters[OOM_RSS_COUNTERS];
	struct bpf_array *array;
	__u64 base = 0;
	bool adjacent = true;
	__u32 zero = 0;

	for (int i = 0; i < OOM_RSS_COUNTERS; i++) {
		struct percpu_counter *counter = element_of(rss_stat, i, struct percpu_counter);

		sum[i] = BPF_CORE_READ(counter, count);
		counters[i] = (__u64)BPF_CORE_READ(counter, counters);
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
		void *count = (void *)mm +
			      bpf_core_field_offset(struct mm_struct___before_v62, rss_stat.count);

		for (int i = 0; i < OOM_RSS_COUNTERS; i++) {
			__s64 n = BPF_CORE_READ(element_of(count, i, atomic_long_t), counter);

			e->memory.batched[i] = positive(n);
			e->memory.rss[i] = positive(n);
		}
	}
	e->flags |= OOM_F_MEMORY;
}

#endif /* OOM_MEMORY_BPF_H */
