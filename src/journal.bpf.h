/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef OOM_JOURNAL_BPF_H
#define OOM_JOURNAL_BPF_H

/* The journal, struct oom_state and the notification of the reader. */

#include "maps.bpf.h"

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
	__type(value, struct oom_segment);
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

static __always_inline struct oom_state *get_state(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&oom_state, &zero);
}

/* recorded_before recognises a mark that two programs see, when one takes over from the other. */
static __always_inline bool recorded_before(struct oom_event *e, struct oom_last_mark *last)
{
	return last->generation != oom_generation && last->tid == e->victim.tid &&
	       last->thread == bpf_get_current_pid_tgid() &&
	       last->start_boottime_ns == e->victim.start_boottime_ns;
}

static __always_inline void count(struct oom_event *e, struct oom_state *st, bool kill_hooked)
{
	switch (e->outcome) {
	case OOM_OUTCOME_KILLED:
		st->killed++;
		st->unhooked += !kill_hooked;
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
 * put_journal writes the record behind the last one. head names it only now that it is whole.
 *
 * The barriers are for the compiler alone. BPF has none for the CPU that every supported kernel knows:
 * what -mcpu=v2 offers, an addition without a result, orders nothing on arm64, and the atomics that do
 * came with v5.12. So on a weakly ordered CPU what is written here may become visible in any order, and
 * the protocol with the reader (go/internal/loader/journal.go) rests on these:
 *
 * - One kill comes before the next for everybody who sees anything of the next: mark_oom_victim() is
 *   called under oom_lock, which is released and acquired in between, on whatever CPUs.
 * - A notification is seen after its record, and so after all records before it:
 *   perf_output_put_handle() and bpf_ringbuf_commit() have a barrier before what the reader loads.
 * - head may be seen before its record. A reader that goes by head has every CPU execute a barrier
 *   (membarrier(2)) between the two. Without that call it waits for a moment.
 * - Before a segment is written over, current has named the one before it, in an earlier kill. From
 *   then on the reader rejects what it has copied out of the old one. Whoever loads anything of the
 *   new one, and current after that, finds such a current.
 * - first_seq and number of a segment that is begun may be seen in either order. Its first record is
 *   then not visible for certain, so nobody looks for it there.
 */
static __always_inline void put_journal(struct oom_event *e, struct oom_state *st, __u32 size)
{
	struct oom_segment *first, *segment;
	__u32 element = 0;
	__u64 used;

	first = bpf_map_lookup_elem(&oom_journal, &element);
	if (!first)
		return;
	element = first->current & (oom_segments - 1);
	segment = bpf_map_lookup_elem(&oom_journal, &element);
	if (!segment)
		return;
	used = segment->used;
	if (used > OOM_SEGMENT_DATA - sizeof(*e)) { /* the next record might not fit */
		__u64 number = first->current + 1;

		element = number & (oom_segments - 1);
		segment = bpf_map_lookup_elem(&oom_journal, &element);
		if (!segment)
			return;
		*(volatile __u64 *)&first->current = number;
		barrier();
		*(volatile __u64 *)&segment->first_seq = e->seq;
		*(volatile __u64 *)&segment->number = number;
		used = 0;
	} else if (!used) {
		segment->first_seq = e->seq;
	}
	barrier();
	bpf_probe_read_kernel(&segment->data[used], size, e);
	segment->used = used + ((size + 7) & ~7U);
	st->last_mark.generation = oom_generation;
	st->last_mark.thread = bpf_get_current_pid_tgid();
	st->last_mark.start_boottime_ns = e->victim.start_boottime_ns;
	st->last_mark.tid = e->victim.tid;
	barrier();
	*(volatile __u64 *)&st->head = e->seq;
}

/*
 * notify wakes the reader with the seq of the record, if it waits. A reader that is awake looks at head
 * before it waits again. A notification that is refused costs time, but no record.
 *
 * The reader sets waiting and then reads head, the program writes head and then reads waiting. Any
 * CPU, x86 too, may do the last two the other way round, so the reader looks once more after a moment
 * (visibleTime). Should that be too short, the record is read at the next look: that costs time only.
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

#endif /* OOM_JOURNAL_BPF_H */
