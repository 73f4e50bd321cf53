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

// TracerRuns asks whether a tracer serves its metrics at addr. It takes at most 3 s.
func TracerRuns(ctx context.Context, addr string) bool {
	if addr == "" {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/metrics", nil)
	if err != nil {
		return false
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return false
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 1<<20))
	return err == nil && response.StatusCode == http.StatusOK && strings.Contains(string(body), TracerMetric+"{")
}

// Readiness asks the tracer at addr whether it is ready, and what it says of it.
func Readiness(ctx context.Context, addr string) (ready bool, said string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return false, "", err
	}
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return false, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, 4096))
	lines := strings.Split(strings.TrimSpace(string(body)), "\n")
	return response.StatusCode == http.StatusOK, strings.Join(lines, "; "), err
}
