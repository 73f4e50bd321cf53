/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef OOM_EVENT_H
#define OOM_EVENT_H

/*
 * The ABI between the BPF program and its reader: one record per task that the OOM killer marks.
 *
 * Rules: fixed-width types, explicit padding, no pointers, native byte order. What a field means
 * when nothing proved it is decided by flags, never by its value. The reader checks this layout
 * against the BTF of the object that it loads, so a change needs no second place but go/internal/wire.
 *
 * Plain C: included by the BPF program (types from vmlinux.h) and by the tools that write golden
 * records (types from linux/types.h).
 */

#define OOM_ABI_VERSION 1

#define OOM_COMM_LEN 16

/* The names of all paths of one record together, in bytes. */
#define OOM_DATA_MAX 3712

/* struct oom_event.flags: which groups of fields were read. */
#define OOM_F_VICTIM (1U << 0) /* everything in victim; else only victim.tid */
#define OOM_F_MEMORY (1U << 1) /* memory */
#define OOM_F_EXACT (1U << 2)  /* memory.rss holds exact sums, not the batched counters */
#define OOM_F_LIMIT (1U << 3)  /* limit, and cgroup[OOM_CG_LIMIT] */
#define OOM_F_LIMIT_INFERRED (1U << 4)
#define OOM_F_INCIDENT (1U << 5) /* incident */
#define OOM_F_GROUP (1U << 6)	 /* memory.oom.group: the whole cgroup was to die */
#define OOM_F_ALLOC (1U << 7)	 /* alloc */

/* struct oom_cgroup.flags */
#define OOM_CG_F_PRESENT (1U << 0)
#define OOM_CG_F_V2 (1U << 1)
#define OOM_CG_F_TRUNCATED (1U << 2) /* the levels nearest to the root are missing */

enum oom_tier {
	OOM_TIER_NONE = 0,
	OOM_TIER_STACK = 1,
	OOM_TIER_KPROBE = 2,
	OOM_TIER_FENTRY = 3,
};

/* How a reader that waits learns of a record: by a sample of eight bytes, the record's seq. */
enum oom_notify {
	OOM_NOTIFY_POLL = 0, /* not at all: it looks at oom_state.head */
	OOM_NOTIFY_PERF = 1,
	OOM_NOTIFY_RINGBUF = 2,
};

enum oom_scope {
	OOM_SCOPE_UNKNOWN = 0,
	OOM_SCOPE_GLOBAL = 1,
	OOM_SCOPE_CGROUP = 2,
	OOM_SCOPE_CPUSET = 3,
	OOM_SCOPE_MEMPOLICY = 4,
	OOM_SCOPE_SYSRQ = 5,
};

enum oom_outcome {
	OOM_OUTCOME_UNKNOWN = 0,
	OOM_OUTCOME_KILLED = 1,
	OOM_OUTCOME_EXITING = 2,
};

/* The roles that a cgroup can have in a record: indices of struct oom_event.cgroup. */
enum oom_cgroup_role {
	OOM_CG_VICTIM = 0,	 /* v2: the leaf; v1: the memory controller's */
	OOM_CG_VICTIM_MEMCG = 1, /* v2: where the memory controller ends above the leaf */
	OOM_CG_LIMIT = 2,	 /* the owner of the limit */
	OOM_CG_TRIGGER = 3,	 /* as OOM_CG_VICTIM, of the allocating task */
	OOM_CG_ROLES = 4,
};

/* Order of the four counters: enum of include/linux/mm_types_task.h, MM_FILEPAGES and so on. */
enum oom_rss {
	OOM_RSS_FILE = 0,
	OOM_RSS_ANON = 1,
	OOM_RSS_SWAP = 2,
	OOM_RSS_SHMEM = 3,
	OOM_RSS_COUNTERS = 4,
};

struct oom_victim {
	__u32 tgid;
	__u32 tid;
	__u32 ns_tgid;		 /* in the victim's own PID namespace */
	__u32 uid;		 /* real UID in the initial user namespace */
	__u64 start_boottime_ns; /* of the thread group's leader */
	char comm[OOM_COMM_LEN];
	__s16 oom_score_adj;
	__u8 pad[6];
};

struct oom_trigger {
	__u32 tgid;
	__u32 tid;
	char comm[OOM_COMM_LEN];
};

struct oom_memory {
	__u64 total_vm;			 /* pages */
	__u64 rss[OOM_RSS_COUNTERS];	 /* pages: the best figures there are */
	__u64 batched[OOM_RSS_COUNTERS]; /* pages: what the kernel's own get_mm_counter() says */
	__u64 pgtables;			 /* bytes */
};

/*
 * In pages of the kernel. A max of PAGE_COUNTER_MAX or more is no limit: LONG_MAX / PAGE_SIZE
 * (include/linux/page_counter.h).
 */
struct oom_limit {
	__u64 max;
	__u64 usage;
	__u64 swap_max; /* v2: swap; v1: memory and swap */
	__u64 swap_usage;
};

/* The allocation that could not be served: struct oom_control. */
struct oom_alloc {
	__u64 total_pages;
	__u32 gfp_mask;
	__s32 order; /* -1: SysRq */
};

struct oom_incident {
	__u64 boottime_ns; /* of the incident's first record: its name */
	__u32 index;
	__u32 pad;
};

/*
 * A path: the names from the leaf to the root's child, each ended by a NUL, at data[off..off+len).
 * An ancestor of another path shares its bytes. The root has no names (len 0).
 */
struct oom_cgroup {
	__u64 id; /* kernfs node ID */
	__u16 off;
	__u16 len;
	__u32 flags;
};

struct oom_event {
	__u16 abi_version;
	__u16 header_size; /* offset of data */
	__u32 size;	   /* bytes of this record that are used: header_size and the names */
	__u64 seq;	   /* counts the records since struct oom_state was made, from 1 */
	__u64 boottime_ns;
	__u32 flags;
	__u8 tier;    /* enum oom_tier */
	__u8 scope;   /* enum oom_scope */
	__u8 outcome; /* enum oom_outcome */
	__u8 pad;
	struct oom_victim victim;
	struct oom_trigger trigger;
	struct oom_memory memory;
	struct oom_limit limit;
	struct oom_alloc alloc;
	struct oom_incident incident;
	struct oom_cgroup cgroup[OOM_CG_ROLES];
	char data[OOM_DATA_MAX];
};

#define OOM_HEADER_SIZE (sizeof(struct oom_event) - OOM_DATA_MAX)

_Static_assert(sizeof(struct oom_victim) == 48, "oom_victim");
_Static_assert(sizeof(struct oom_trigger) == 24, "oom_trigger");
_Static_assert(sizeof(struct oom_memory) == 80, "oom_memory");
_Static_assert(sizeof(struct oom_limit) == 32, "oom_limit");
_Static_assert(sizeof(struct oom_alloc) == 16, "oom_alloc");
_Static_assert(sizeof(struct oom_incident) == 16, "oom_incident");
_Static_assert(sizeof(struct oom_cgroup) == 16, "oom_cgroup");
_Static_assert(OOM_HEADER_SIZE == 312, "oom_event header");
_Static_assert(sizeof(struct oom_event) == 4024, "oom_event");

/*
 * The journal is a ring of segments, filled in order: segment n is element n % elements. The records of
 * a segment follow each other, each at a multiple of 8, and their seqs have no hole. Before a segment
 * is reused, current names it. So a reader copies a record and then reads current: if current has not
 * reached that segment again, the copy is whole.
 */
#define OOM_SEGMENT_DATA (32 * 1024 - 32)

struct oom_segment {
	__u64 number;	 /* from 0 */
	__u64 first_seq; /* of its first record; 0: it has none */
	__u64 current;	 /* of element 0 alone: the number of the segment that is written to */
	__u64 used;	 /* bytes of data */
	char data[OOM_SEGMENT_DATA];
};

_Static_assert(sizeof(struct oom_segment) == 32 * 1024, "oom_segment");

/*
 * What one load of the program has counted, per CPU. Each record stands in the journal, whatever became
 * of its notification.
 */
struct oom_stats {
	__u64 seen;    /* marks */
	__u64 sent;    /* notifications: only a reader that waits gets one */
	__u64 refused; /* notifications: the buffer was full, or had no reader on that CPU */
	__u64 unwound; /* marks that were explained with the help of the kernel stack */
};

_Static_assert(sizeof(struct oom_stats) == 32, "oom_stats");

/*
 * The state that is kept, while it is pinned, when programs and their readers are replaced: one per
 * node. The journal beside it is an array of struct oom_segment.
 *
 * The program writes it, under oom_lock, except for the fields of the reader. A record is whole before
 * head names it.
 *
 * The first part never changes, so every version can see what another one left unread. What follows is
 * of OOM_STATE_VERSION. In a record, abi_version, header_size, size and seq never change.
 */
#define OOM_STATE_MAGIC 0x4f4f4d54U /* "OOMT" */
#define OOM_STATE_VERSION 1

/* The first mark that a program records after a takeover may be the last one of the earlier program. */
struct oom_last_mark {
	__u64 generation;
	__u64 thread; /* pid_tgid of the trigger */
	__u64 start_boottime_ns;
	__u32 tid; /* of the victim */
	__u32 pad;
};

struct oom_state {
	__u32 magic; /* these two: written by the reader that made it */
	__u32 version;
	__u64 generation; /* the program that speaks; written by the reader. 0: none */
	__u64 head;	  /* seq of the last record */
	__u64 acked;	  /* all up to it need not be kept; written by the reader */

	/* What became of the marks, to hold against the kernel's own count of kills. */
	__u64 killed;
	__u64 exiting;
	__u64 unknown;	    /* a kill, or a mark without one */
	__u64 groups;	    /* incidents of memory.oom.group */
	__u64 killed_again; /* kills of a task that was marked before: counted by the kernel, no mark */
	__u64 unhooked; /* kills that __oom_kill_process()'s hook did not see: killed_again may lack one
			 */

	/* Written by the reader. */
	__u64 kernel_base;	 /* what the kernel had counted when all these were 0 */
	__u64 epoch_boottime_ns; /* when this state was made; seq counts from here */
	__u64 lost;		 /* records that were reported as lost */

	__u64 last_kill_boottime_ns;

	/* The incident under way. */
	__u64 incident_boottime_ns;
	__u64 incident_thread; /* pid_tgid of the trigger that it is bound to */
	__u32 incident_index;

	__u32 handed; /* low half of the seq up to which a reader was handed records; written by it */
	struct oom_last_mark last_mark;
};

_Static_assert(sizeof(struct oom_last_mark) == 32, "oom_last_mark");
_Static_assert(sizeof(struct oom_state) == 168, "oom_state");

/*
 * The stack tier: what the functions on the kernel stack prove. The loader finds their address
 * ranges in kallsyms and writes them before the program is loaded.
 */
#define OOM_SYMBOLS_MAX 32

enum oom_frame {
	OOM_FRAME_KILL = 0,	    /* __oom_kill_process: a real kill */
	OOM_FRAME_KILL_PROCESS = 1, /* oom_kill_process, where that is inlined into it */
	OOM_FRAME_GROUP = 2,	    /* oom_kill_memcg_member: memory.oom.group */
	OOM_FRAME_OOM = 3,	    /* out_of_memory */
	OOM_FRAME_MEMCG = 4,	    /* mem_cgroup_out_of_memory */
	OOM_FRAME_SYSRQ = 5,	    /* moom_callback */
	OOM_FRAME_PAGE_ALLOC = 6,   /* the page allocator, or a page fault without memory */
	OOM_FRAME_KSWAPD = 7,	    /* kswapd: the lru_gen's min_ttl_ms cannot be kept */
	OOM_FRAMES = 8,
};

struct oom_symbol {
	__u64 start;
	__u64 end;
	__u32 frame; /* enum oom_frame */
	__u32 pad;
};

_Static_assert(sizeof(struct oom_symbol) == 24, "oom_symbol");

#endif /* OOM_EVENT_H */
