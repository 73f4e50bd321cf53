package cli

import (
	"log/slog"
	"os"
	"strconv"
	"strings"
)

// OOMScoreAdj keeps the OOM killer away from the process that reports it: only what is at -1000 comes
// later. The price is that its memory is never had back by a kill, so should it ever leak, others die first.
const OOMScoreAdj = -998

// Protect lowers this process's oom_score_adj. It needs CAP_SYS_RESOURCE. Without it, a warning is logged.
func Protect(log *slog.Logger) {
	const file = "/proc/self/oom_score_adj"
	if data, err := os.ReadFile(file); err == nil {
		if n, err := strconv.Atoi(strings.TrimSpace(string(data))); err == nil && n <= OOMScoreAdj {
			return
		}
	}
	if err := os.WriteFile(file, []byte(strconv.Itoa(OOMScoreAdj)), 0); err != nil {
		log.Warn("cannot lower oom_score_adj: the oom killer may kill the tracer", "error", err)
	}
}
