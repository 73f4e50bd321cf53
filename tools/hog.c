/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * A bounded memory hog for tests: it allocates until it is killed or its bound is reached.
 *
 *   hog COUNT MIB [plain|threaded|shared|bind1|hold]
 *   hog COUNT MIB mixed FILE
 *
 * It waits for a byte on standard input (the caller moves it into its cgroup meanwhile), then runs
 * COUNT children, one after the other, each of which touches MIB MiB, and prints one line per child:
 * the PID and how it ended. With "threaded" a child's leader exits and another thread allocates.
 * With "shared" a child has a twin that shares its memory and is another process (CLONE_VM). With
 * "bind1" its memory may only come from NUMA node 1 (MPOL_BIND). With "mixed" it first maps all of FILE
 * and 8 MiB of shared memory and touches them, and becomes user 1234: every figure that the kernel
 * tells of it is then another one. With COUNT 0 it allocates itself, and with "hold" then says so and
 * stays. It ends by itself after 300 s.
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

static const size_t page = 4096;
static size_t bytes;
static int hold;
static const char *file; /* of "mixed" */

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
		puts("holding");
		fflush(stdout);
		pause();
	}
	_exit(SURVIVED);
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
	if (strcmp(mode, "shared") == 0 &&
	    clone(twin, stack + sizeof(stack), CLONE_VM | SIGCHLD, NULL) < 0) {
		perror("hog: clone");
		_exit(1);
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
	static const char *const modes[] = {"plain", "threaded", "shared", "bind1", "hold", "mixed"};

	for (size_t i = 0; i < sizeof(modes) / sizeof(*modes); i++)
		if (strcmp(mode, modes[i]) == 0)
			return 1;
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 3 ? argv[3] : "plain";
	long count, mib;
	char go;

	if (argc < 3 || argc > 5 || (argc == 5) != (strcmp(mode, "mixed") == 0) || !known(mode)) {
		fprintf(stderr, "usage: hog COUNT MIB [plain|threaded|shared|bind1|hold|mixed FILE]\n");
		return 2;
	}
	count = strtol(argv[1], NULL, 10);
	mib = strtol(argv[2], NULL, 10);
	if (count < 0 || count > 100000 || mib < 1 || mib > 4096) {
		fprintf(stderr, "hog: COUNT is 0..100000 and MIB 1..4096\n");
		return 2;
	}
	bytes = (size_t)mib << 20;
	hold = strcmp(mode, "hold") == 0;
	file = argc == 5 ? argv[4] : NULL;
	alarm(300);
	if (read(0, &go, 1) != 1)
		return 1;
	if (count == 0)
		allocate(NULL);
	for (long i = 0; i < count; i++) {
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
