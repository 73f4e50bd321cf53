/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/*
 * The program of the pods on test-node's node.
 *
 *   pod            waits for SIGTERM; also what the sandbox of each pod runs
 *   pod MIB [N]    starts N children that wait, takes MIB MiB of memory, and ends
 *
 * As process 1 it reaps what is left to it.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

static void end(int signal)
{
	(void)signal;
	_exit(0);
}

static __attribute__((noreturn)) void wait_for_end(void)
{
	struct sigaction on_term = {.sa_handler = end}, on_child = {.sa_handler = SIG_IGN};

	sigaction(SIGTERM, &on_term, NULL);
	sigaction(SIGINT, &on_term, NULL);
	sigaction(SIGCHLD, &on_child, NULL);
	for (;;)
		pause();
}

int main(int argc, char **argv)
{
	long mib = argc > 1 ? strtol(argv[1], NULL, 10) : 0;
	long children = argc > 2 ? strtol(argv[2], NULL, 10) : 0;
	char *p;

	if (argc == 1)
		wait_for_end();
	if (argc > 3 || mib < 1 || mib > 65536 || children < 0 || children > 100) {
		fprintf(stderr, "usage: pod [MIB [N]]: 1..65536 MiB, 0..100 children\n");
		return 2;
	}
	alarm(300);
	for (long i = 0; i < children; i++) {
		switch (fork()) {
		case -1:
			perror("pod: fork");
			return 1;
		case 0:
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			wait_for_end();
		}
	}
	p = mmap(NULL, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
		 -1, 0);
	if (p == MAP_FAILED) {
		perror("pod: mmap");
		return 1;
	}
	/* Fast, or an emulated node's kubelet evicts the pod before the kernel kills. It need not
	 * succeed. */
	madvise(p, mib << 20, MADV_HUGEPAGE);
	for (long i = 0; i < mib << 20; i += sysconf(_SC_PAGESIZE))
		p[i] = 1;
	return 0;
}
