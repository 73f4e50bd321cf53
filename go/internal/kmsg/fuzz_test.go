package kmsg

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A task may be called anything. No message is more than one kill, and a kill names the process that its message does.
func FuzzParse(f *testing.F) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(text))
	}
	f.Add("a invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0\n" +
		"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),oom_memcg=/a,task_memcg=/a,task=a,pid=7,uid=0\n" +
		"Memory cgroup out of memory: Killed process 7 (a) total-vm:1kB, anon-rss:1kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:1kB oom_score_adj:0\n")
	f.Fuzz(func(t *testing.T, text string) {
		messages := strings.Split(text, "\n")
		kills := Parse(messages)
		if len(kills) > strings.Count(text, ": Killed process ") {
			t.Errorf("%d kills", len(kills))
		}
		for _, k := range kills {
			if k.PID < 0 || !strings.Contains(text, "("+k.Comm+")") {
				t.Errorf("%+v", k)
			}
		}
	})
}
