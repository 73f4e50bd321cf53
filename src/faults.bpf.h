/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
#ifndef FAULTS_BPF_H
#define FAULTS_BPF_H

/*
 * One wrong field at a time, for the tests that must find it. Without OOM_FAULTS, the tests' own build
 * switch, there is nothing of this in the program. The loader of a test build writes oom_fault.
 */
#ifdef OOM_FAULTS

const volatile __u32 oom_fault;

/* A hook that is missed half of the time, and all of them, each for itself. */
#define MISSED(number) ((oom_fault == (number) || oom_fault == 104) && bpf_get_prandom_u32() & 1)

static __always_inline void put_fault(struct oom_event *e)
{
	__u64 file = e->memory.rss[OOM_RSS_FILE];

	switch (oom_fault) {
	case 1:
		e->victim.tgid++;
		break;
	case 2:
		e->victim.tid++;
		break;
	case 3:
		e->victim.start_boottime_ns += 10000000;
		break;
	case 4:
		e->victim.comm[0]++;
		break;
	case 5:
		e->victim.uid++;
		break;
	case 6:
		e->victim.oom_score_adj--;
		break;
	case 7:
		e->cgroup[OOM_CG_VICTIM].id++;
		break;
	case 8:
		e->data[0]++; /* the victim's cgroup's name */
		break;
	case 9:
		e->scope = e->scope == OOM_SCOPE_GLOBAL ? OOM_SCOPE_CGROUP : OOM_SCOPE_GLOBAL;
		break;
	case 10:
		e->outcome = OOM_OUTCOME_EXITING;
		break;
	case 11:
		e->memory.total_vm++;
		break;
	case 12:
		e->memory.rss[OOM_RSS_ANON] += 256;
		break;
	case 13:
		e->memory.rss[OOM_RSS_FILE] += 256;
		break;
	case 14:
		e->memory.rss[OOM_RSS_SHMEM] += 256;
		break;
	case 15:
		e->memory.pgtables += 4096;
		break;
	case 16:
		e->limit.max++;
		break;
	case 17:
		e->cgroup[OOM_CG_LIMIT].id++;
		break;
	case 18:
		e->alloc.gfp_mask ^= 1;
		break;
	case 19:
		e->alloc.order++;
		break;
	case 20:
		e->trigger.tgid++;
		break;
	case 21:
		e->trigger.comm[0]++;
		break;
	case 22:
		e->memory.rss[OOM_RSS_FILE] = e->memory.rss[OOM_RSS_SHMEM];
		e->memory.rss[OOM_RSS_SHMEM] = file;
		break;
	case 23:
		e->cgroup[OOM_CG_LIMIT].off = e->cgroup[OOM_CG_VICTIM].off;
		e->cgroup[OOM_CG_LIMIT].len = e->cgroup[OOM_CG_VICTIM].len;
		break;
	case 24:
		e->victim.uid = 0;
		break;
	case 25:
		e->victim.oom_score_adj = 0;
		break;
	case 26:
		e->trigger.tid++;
		break;
	}
}

#else

#define MISSED(number) false
#define put_fault(e)

#endif /* OOM_FAULTS */

#endif /* FAULTS_BPF_H */
