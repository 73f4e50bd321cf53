package obs

import (
	"context"
	"io"
	"net/http"
	"strings"
	"time"
)

// TracerMetric tells a tracer's metrics from any other program's.
const TracerMetric = "oom_tracer_tier_info"

// probeTime bounds a question to a tracer.
const probeTime = 3 * time.Second

// TracerRuns asks whether a tracer serves its metrics at addr. It takes at most 3 s.
func TracerRuns(ctx context.Context, addr string) bool {
	if addr == "" {
		return false
	}
	ok, body, err := fetch(ctx, "http://"+addr+"/metrics", 1<<20)
	return err == nil && ok && strings.Contains(body, TracerMetric+"{")
}

// Readiness asks the tracer at addr whether it is ready, and what it says of it.
func Readiness(ctx context.Context, addr string) (ready bool, said string, err error) {
	ready, said, err = fetch(ctx, "http://"+addr+"/readyz", 4096)
	return ready, strings.ReplaceAll(strings.TrimSpace(said), "\n", "; "), err
}

// fetch reads up to limit bytes of a page, and reports whether its status is OK.
func fetch(ctx context.Context, url string, limit int64) (ok bool, body string, err error) {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false, "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return false, "", err
	}
	defer response.Body.Close()
	text, err := io.ReadAll(io.LimitReader(response.Body, limit))
	return response.StatusCode == http.StatusOK, string(text), err
}
