/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * Writes golden records for go/internal/wire: each as the bytes that the kernel program would send
 * (NAME.bin), and what they mean, in words (NAME.txt). Written by C from the header itself, so that
 * a Go struct that drifted from it cannot agree with itself.
 *
 *   goldens DIRECTORY
 */
#include <linux/types.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../src/oom_event.h"

static struct oom_event e;
static unsigned int used;

static void begin(void)
{
	memset(&e, 0, sizeof(e));
	e.abi_version = OOM_ABI_VERSION;
	e.header_size = OOM_HEADER_SIZE;
	used = 0;
}

/* Appends a name to the data and returns where it begins. */
static unsigned int name(const char *s)
{
	unsigned int at = used;

	memcpy(e.data + used, s, strlen(s) + 1);
	used += strlen(s) + 1;
	return at;
}

static void cgroup(enum oom_cgroup_role role, __u64 id, unsigned int off, __u32 flags)
{
	e.cgroup[role].id = id;
	e.cgroup[role].off = off;
	e.cgroup[role].len = used - off;
	e.cgroup[role].flags = OOM_CG_F_PRESENT | flags;
}

static void say_cgroup(FILE *f, const char *role, int i, const char *path)
{
	const struct oom_cgroup *c = &e.cgroup[i];

	if (c->flags & OOM_CG_F_PRESENT)
		fprintf(f, "%s: id %llu v%d truncated %d path %s\n", role, (unsigned long long)c->id,
			c->flags & OOM_CG_F_V2 ? 2 : 1, !!(c->flags & OOM_CG_F_TRUNCATED), path);
	else
		fprintf(f, "%s: absent\n", role);
}

static void write_out(const char *dir, const char *golden, const char *tier, const char *scope,
		      const char *outcome, const char *paths[OOM_CG_ROLES])
{
	static const char *const roles[OOM_CG_ROLES] = {"victim", "victim_memcg", "limit", "trigger"};
	char file[4096];
	FILE *f;

	e.size = OOM_HEADER_SIZE + used;
	snprintf(file, sizeof(file), "%s/%s.bin", dir, golden);
	f = fopen(file, "w");
	if (!f || fwrite(&e, e.size, 1, f) != 1 || fclose(f)) {
		perror(file);
		exit(1);
	}
	snprintf(file, sizeof(file), "%s/%s.txt", dir, golden);
	f = fopen(file, "w");
	if (!f) {
		perror(file);
		exit(1);
	}
	fprintf(f, "seq %llu boottime %llu tier %s scope %s outcome %s\n", (unsigned long long)e.seq,
		(unsigned long long)e.boottime_ns, tier, scope, outcome);
	fprintf(f, "victim %u/%u ns %u uid %u start %llu comm %s adj %d\n", e.victim.tgid, e.victim.tid,
		e.victim.ns_tgid, e.victim.uid, (unsigned long long)e.victim.start_boottime_ns,
		e.victim.comm, e.victim.oom_score_adj);
	fprintf(f, "trigger %u/%u comm %s\n", e.trigger.tgid, e.trigger.tid, e.trigger.comm);
	fprintf(f, "memory total_vm %llu pgtables %llu\n", (unsigned long long)e.memory.total_vm,
		(unsigned long long)e.memory.pgtables);
	fprintf(f, "rss file %llu anon %llu swap %llu shmem %llu\n",
		(unsigned long long)e.memory.rss[OOM_RSS_FILE],
		(unsigned long long)e.memory.rss[OOM_RSS_ANON],
		(unsigned long long)e.memory.rss[OOM_RSS_SWAP],
		(unsigned long long)e.memory.rss[OOM_RSS_SHMEM]);
	fprintf(f, "batched file %llu anon %llu swap %llu shmem %llu\n",
		(unsigned long long)e.memory.batched[OOM_RSS_FILE],
		(unsigned long long)e.memory.batched[OOM_RSS_ANON],
		(unsigned long long)e.memory.batched[OOM_RSS_SWAP],
		(unsigned long long)e.memory.batched[OOM_RSS_SHMEM]);
	fprintf(f, "limit max %llu usage %llu swap_max %llu swap_usage %llu\n",
		(unsigned long long)e.limit.max, (unsigned long long)e.limit.usage,
		(unsigned long long)e.limit.swap_max, (unsigned long long)e.limit.swap_usage);
	fprintf(f, "alloc gfp_mask %u order %d total_pages %llu\n", e.alloc.gfp_mask, e.alloc.order,
		(unsigned long long)e.alloc.total_pages);
	fprintf(f, "incident %llu index %u\n", (unsigned long long)e.incident.boottime_ns,
		e.incident.index);
	fprintf(f,
		"flags victim %d memory %d exact %d limit %d inferred %d incident %d group %d alloc "
		"%d\n",
		!!(e.flags & OOM_F_VICTIM), !!(e.flags & OOM_F_MEMORY), !!(e.flags & OOM_F_EXACT),
		!!(e.flags & OOM_F_LIMIT), !!(e.flags & OOM_F_LIMIT_INFERRED),
		!!(e.flags & OOM_F_INCIDENT), !!(e.flags & OOM_F_GROUP), !!(e.flags & OOM_F_ALLOC));
	for (int i = 0; i < OOM_CG_ROLES; i++)
		say_cgroup(f, roles[i], i, paths[i]);
	if (fclose(f)) {
		perror(file);
		exit(1);
	}
}

/* Every field has a value of its own, so that two that were swapped are seen. */
static void full(const char *dir)
{
	const char *pod = "kubepods-burstable-pod0f1e2d3c_4b5a_6978_8796_a5b4c3d2e1f0.slice";
	const char *scope = "cri-containerd-"
			    "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.scope";
	unsigned int leaf, container;
	const char *paths[OOM_CG_ROLES] = {
		"/kubepods.slice/kubepods-burstable.slice/"
		"kubepods-burstable-pod0f1e2d3c_4b5a_6978_8796_a5b4c3d2e1f0.slice/"
		"cri-containerd-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.scope/"
		"app",
		"/kubepods.slice/kubepods-burstable.slice/"
		"kubepods-burstable-pod0f1e2d3c_4b5a_6978_8796_a5b4c3d2e1f0.slice/"
		"cri-containerd-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.scope",
		"/kubepods.slice/kubepods-burstable.slice/"
		"kubepods-burstable-pod0f1e2d3c_4b5a_6978_8796_a5b4c3d2e1f0.slice/"
		"cri-containerd-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef.scope",
		"/system.slice/neighbour.service",
	};

	begin();
	e.seq = 71;
	e.boottime_ns = 1234567890123ULL;
	e.flags = OOM_F_VICTIM | OOM_F_MEMORY | OOM_F_EXACT | OOM_F_LIMIT | OOM_F_LIMIT_INFERRED |
		  OOM_F_INCIDENT | OOM_F_GROUP | OOM_F_ALLOC;
	e.tier = OOM_TIER_FENTRY;
	e.scope = OOM_SCOPE_CGROUP;
	e.outcome = OOM_OUTCOME_KILLED;
	e.victim.tgid = 4001;
	e.victim.tid = 4002;
	e.victim.ns_tgid = 7;
	e.victim.uid = 65534;
	e.victim.start_boottime_ns = 987654321012ULL;
	strcpy(e.victim.comm, "fifteen-letters");
	e.victim.oom_score_adj = -998;
	e.trigger.tgid = 5001;
	e.trigger.tid = 5002;
	strcpy(e.trigger.comm, "asker");
	e.memory.total_vm = 100001;
	e.memory.rss[OOM_RSS_FILE] = 201;
	e.memory.rss[OOM_RSS_ANON] = 202;
	e.memory.rss[OOM_RSS_SWAP] = 203;
	e.memory.rss[OOM_RSS_SHMEM] = 204;
	e.memory.batched[OOM_RSS_FILE] = 301;
	e.memory.batched[OOM_RSS_ANON] = 302;
	e.memory.batched[OOM_RSS_SWAP] = 303;
	e.memory.batched[OOM_RSS_SHMEM] = 304;
	e.memory.pgtables = 409600;
	e.limit.max = 501;
	e.limit.usage = 502;
	e.limit.swap_max = 503;
	e.limit.swap_usage = 504;
	e.alloc.gfp_mask = 10;
	e.alloc.order = -1;
	e.alloc.total_pages = 801;
	e.incident.boottime_ns = 1234567880000ULL;
	e.incident.index = 6;
	leaf = name("app");
	container = name(scope);
	name(pod);
	name("kubepods-burstable.slice");
	name("kubepods.slice");
	cgroup(OOM_CG_VICTIM, 601, leaf, OOM_CG_F_V2);
	cgroup(OOM_CG_VICTIM_MEMCG, 602, container, OOM_CG_F_V2);
	cgroup(OOM_CG_LIMIT, 602, container, OOM_CG_F_V2);
	leaf = name("neighbour.service");
	name("system.slice");
	cgroup(OOM_CG_TRIGGER, 604, leaf, OOM_CG_F_V2);
	write_out(dir, "full", "fentry", "cgroup", "killed", paths);
}

/* Nothing but a thread ID: an old kernel without context. */
static void bare(const char *dir)
{
	const char *paths[OOM_CG_ROLES] = {0};

	begin();
	e.seq = 1;
	e.boottime_ns = 42;
	e.victim.tid = 4002;
	e.trigger.tgid = 5001;
	e.trigger.tid = 5002;
	strcpy(e.trigger.comm, "asker");
	write_out(dir, "bare", "none", "unknown", "unknown", paths);
}

/* A global kill on cgroup v1, the trigger in the root, the victim's path cut off. */
static void truncated(const char *dir)
{
	const char *paths[OOM_CG_ROLES] = {".../b/a", 0, 0, "/"};
	unsigned int leaf;

	begin();
	e.seq = 18446744073709551615ULL;
	e.boottime_ns = 43;
	e.flags = OOM_F_VICTIM | OOM_F_MEMORY;
	e.tier = OOM_TIER_STACK;
	e.scope = OOM_SCOPE_GLOBAL;
	e.outcome = OOM_OUTCOME_EXITING;
	e.victim.tgid = e.victim.tid = 4001;
	e.victim.start_boottime_ns = 9;
	strcpy(e.victim.comm, "v");
	e.victim.oom_score_adj = 1000;
	e.memory.batched[OOM_RSS_ANON] = e.memory.rss[OOM_RSS_ANON] = 5;
	e.limit.max = 0x7fffffffffffffffULL / 4096; /* PAGE_COUNTER_MAX with pages of 4 KiB */
	leaf = name("a");
	name("b");
	cgroup(OOM_CG_VICTIM, 701, leaf, OOM_CG_F_TRUNCATED);
	cgroup(OOM_CG_TRIGGER, 1, used, 0);
	write_out(dir, "truncated", "stack", "global", "already_exiting", paths);
}

int main(int argc, char **argv)
{
	if (argc != 2) {
		fprintf(stderr, "usage: goldens DIRECTORY\n");
		return 2;
	}
	full(argv[1]);
	bare(argv[1]);
	truncated(argv[1]);
	return 0;
}
