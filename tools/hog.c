/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * A bounded memory hog for tests: it allocates until it is killed or its bound is reached.
 *
 *   hog COUNT MIB [plain|threaded|shared|bind1|hold]
 *   hog COUNT MIB mixed FILE
 *   hog COUNT 1 alternate CGROUP CGROUP
 *
 * It waits for a byte on standard input (the caller moves it into its cgroup meanwhile), then runs
 * COUNT children, one after the other, each of which touches MIB MiB, and prints one line per child:
 * the PID and how it ended. With "threaded" a child's leader exits and another thread allocates.
 * With "shared" a child has a twin that shares its memory and is another process (CLONE_VM), and tells
 * its PID. With "bind1" its memory may only come from NUMA node 1 (MPOL_BIND). With "mixed" it first
 * maps all of FILE and 8 MiB of shared memory and touches them, and becomes user 1234: every figure
 * that the kernel tells of it is then another one. With "alternate" it goes between two cgroups of
 * version 2 that have limits, and runs them out of memory: see there. With COUNT 0 it allocates itself,
 * and with "hold" then says so and stays. It ends by itself after 300 s.
 *
 * Where the environment's HOG_CGROUP names a cgroup's directory, each child enters it by itself, and
 * the parent stays outside: in a cgroup that is full of a child's pages on their way back it would be
 * the only one to kill.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/mempolicy.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	SURVIVED = 3,
	SHARED = 8 << 20, /* bytes */
	UID = 1234,
};

static size_t page;
static size_t bytes;
static int hold;	 /* where to say so */
static const char *file; /* of "mixed" */

/* put writes to a file, whole or not at all. */
static void put(const char *dir, const char *name, const char *text)
{
	char path[4096];
	int fd;

	snprintf(path, sizeof(path), "%s/%s", dir, name);
	fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, text, strlen(text)) < 0) {
		perror(path);
		_exit(1);
	}
	close(fd);
}

/* enter moves this process into a cgroup, and returns its limit. */
static size_t enter(const char *dir)
{
	size_t limit = 0;
	char path[4096];
	FILE *f;

	put(dir, "cgroup.procs", "0");
	snprintf(path, sizeof(path), "%s/memory.max", dir);
	f = fopen(path, "r");
	if (!f || fscanf(f, "%zu", &limit) != 1) {
		perror(path);
		_exit(1);
	}
	fclose(f);
	return limit;
}

/*
 * fill writes size bytes into pipes, whose pages are asked for in another way than those of a page
 * fault, and frees them again. It returns whether there was room.
 */
static int fill(size_t size)
{
	enum {
		PIPE = 1 << 20
	};
	static const char zeros[65536];
	int fds[256][2], pipes = 0, room = 1;

	for (size_t i = 0; i < size && room; i += sizeof(zeros)) {
		if (i % PIPE == 0) {
			if (pipes == 256 || pipe(fds[pipes]) ||
			    fcntl(fds[pipes][1], F_SETPIPE_SZ, PIPE) < 0) {
				perror("hog: pipe");
				_exit(1);
			}
			pipes++;
		}
		room = write(fds[pipes - 1][1], zeros, sizeof(zeros)) == sizeof(zeros);
	}
	while (pipes--) {
		close(fds[pipes][0]);
		close(fds[pipes][1]);
	}
	return room;
}

/* touch does the same by page faults. They do not fail. */
static void touch(size_t size)
{
	char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		       -1, 0);

	if (p == MAP_FAILED) {
		perror("hog: mmap");
		_exit(1);
	}
	for (size_t i = 0; i < size; i += page)
		p[i] = 1;
	munmap(p, size);
}

/* in_vain runs a cgroup, in which nobody can be killed, out of memory. */
static void in_vain(const char *dir)
{
	if (fill(2 * enter(dir))) {
		fprintf(stderr, "hog: there is no end to %s\n", dir);
		_exit(1);
	}
}

/* mix gives this process file and shared pages, and a user of its own. */
static void mix(void)
{
	int fd = open(file, O_RDONLY);
	volatile char *shared, *mapped;
	struct stat st;

	if (fd < 0 || fstat(fd, &st)) {
		perror("hog: FILE");
		_exit(1);
	}
	mapped = mmap(NULL, st.st_size, PROT_READ, MAP_SHARED, fd, 0);
	shared = mmap(NULL, SHARED, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (mapped == MAP_FAILED || shared == MAP_FAILED) {
		perror("hog: mmap");
		_exit(1);
	}
	for (off_t i = 0; i < st.st_size; i += page)
		(void)mapped[i];
	for (size_t i = 0; i < SHARED; i += page)
		shared[i] = 1;
	if (setuid(UID)) {
		perror("hog: setuid");
		_exit(1);
	}
}

static void *allocate(void *unused)
{
	char *p;

	(void)unused;
	if (file)
		mix();
	p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
		 0);
	if (p == MAP_FAILED) {
		perror("hog: mmap");
		_exit(1);
	}
	for (size_t i = 0; i < bytes; i += page)
		p[i] = 1;
	while (hold) {
		if (write(hold, "holding\n", 8) != 8)
			_exit(1);
		pause();
	}
	_exit(SURVIVED);
}

/*
 * alternate runs the first cgroup out of memory, where nobody can be killed, and then the second, where
 * that costs a child its life; this thread, at -1000, survives. Every third pair of rounds a child does
 * both, and is its own victim.
 */
static void alternate(const char *first, const char *second, int kind)
{
	int ready[2];
	size_t limit;
	char byte;

	if (kind != 2)
		in_vain(first);
	limit = enter(second);
	if (pipe(ready)) {
		perror("hog: pipe");
		_exit(1);
	}
	switch (fork()) {
	case -1:
		perror("hog: fork");
		_exit(1);
	case 0:
		prctl(PR_SET_PDEATHSIG, 9);
		if (kind == 2) {
			in_vain(first);
			enter(second);
			put("/proc/self", "oom_score_adj", "0");
			touch(2 * limit);
			_exit(SURVIVED);
		}
		put("/proc/self", "oom_score_adj", "0");
		bytes = limit / 2;
		hold = ready[1];
		allocate(NULL);
	}
	close(ready[1]);
	if (read(ready[0], &byte, 1) == 1) {
		if (kind == 0)
			touch(limit / 4 * 3);
		else
			fill(limit / 4 * 3);
	}
	close(ready[0]);
	wait(NULL);
	usleep(550000); /* the console tells why of ten kills in five seconds (oom_kill_process()) */
}

static void *name_and_allocate(void *unused)
{
	prctl(PR_SET_NAME, "hog-thread");
	usleep(20000); /* until the leader is a zombie */
	return allocate(unused);
}

static int twin(void *unused)
{
	(void)unused;
	while (pause())
		;
	return 0;
}

static void child(const char *mode)
{
	static char stack[65536];
	pthread_t thread;

	prctl(PR_SET_PDEATHSIG, 9);
	if (getenv("HOG_CGROUP"))
		put(getenv("HOG_CGROUP"), "cgroup.procs", "0");
	if (strcmp(mode, "shared") == 0) {
		int pid = clone(twin, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL);

		if (pid < 0) {
			perror("hog: clone");
			_exit(1);
		}
		printf("twin %d\n", pid);
		fflush(stdout);
	}
	if (strcmp(mode, "bind1") == 0) {
		const unsigned long node1 = 2;

		if (syscall(SYS_set_mempolicy, MPOL_BIND, &node1, 8 * sizeof(node1))) {
			perror("hog: set_mempolicy");
			_exit(1);
		}
	}
	if (strcmp(mode, "threaded") == 0) {
		if (pthread_create(&thread, NULL, name_and_allocate, NULL)) {
			fprintf(stderr, "hog: cannot make a thread\n");
			_exit(1);
		}
		syscall(SYS_exit, 0); /* this thread only */
	}
	allocate(NULL);
}

static int known(const char *mode)
{
	static const char *const modes[] = {"plain", "threaded", "shared",   "bind1",
					    "hold",  "mixed",	 "alternate"};

	for (size_t i = 0; i < sizeof(modes) / sizeof(*modes); i++)
		if (strcmp(mode, modes[i]) == 0)
			return 1;
	return 0;
}

/* paths is how many of them a mode wants. */
static int paths(const char *mode)
{
	if (strcmp(mode, "alternate") == 0)
		return 2;
	return strcmp(mode, "mixed") == 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 3 ? argv[3] : "plain";
	long count, mib;
	char go;

	if (argc < 3 || (argc > 3 && argc != 4 + paths(mode)) || !known(mode)) {
		fprintf(stderr, "usage: hog COUNT MIB [plain|threaded|shared|bind1|hold|mixed FILE|"
				"alternate CGROUP CGROUP]\n");
		return 2;
	}
	count = strtol(argv[1], NULL, 10);
	mib = strtol(argv[2], NULL, 10);
	if (count < 0 || count > 100000 || mib < 1 || mib > 4096) {
		fprintf(stderr, "hog: COUNT is 0..100000 and MIB 1..4096\n");
		return 2;
	}
	page = sysconf(_SC_PAGESIZE);
	bytes = (size_t)mib << 20;
	hold = strcmp(mode, "hold") == 0 ? STDOUT_FILENO : 0;
	file = paths(mode) == 1 ? argv[4] : NULL;
	alarm(300);
	if (read(0, &go, 1) != 1)
		return 1;
	if (count == 0)
		allocate(NULL);
	for (long i = 0; i < count && paths(mode) == 2; i++)
		alternate(argv[4 + i % 2], argv[5 - i % 2], i / 2 % 3);
	for (long i = 0; i < count && paths(mode) < 2; i++) {
		int status;
		pid_t pid = fork();

		if (pid < 0) {
			perror("hog: fork");
			return 1;
		}
		if (pid == 0)
			child(mode);
		while (waitpid(pid, &status, 0) < 0)
			if (errno != EINTR)
				return 1;
		if (WIFSIGNALED(status))
			printf("%d signal %d\n", pid, WTERMSIG(status));
		else
			printf("%d exit %d\n", pid, WEXITSTATUS(status));
		fflush(stdout);
	}
	return 0;
}
