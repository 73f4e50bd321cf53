package obs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// NewRegistry returns a registry of its own, with the Go runtime's metrics, the process's, and
// oom_tracer_build_info. program is the binary's name.
func NewRegistry(program string) *prometheus.Registry { return newRegistry(program, Version()) }

func newRegistry(program string, b Build) *prometheus.Registry {
	reg := prometheus.NewRegistry()
	reg.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name:        "oom_tracer_build_info",
			Help:        "Version, revision and Go version of this program; always 1.",
			ConstLabels: prometheus.Labels{"program": program, "version": b.Version, "revision": b.Revision, "goversion": b.Go},
		}, func() float64 { return 1 }),
	)
	return reg
}

// KernelOOMKills is the kernel's own count of the processes that its OOM killer has killed since
// boot, of whatever scope. procRoot is /proc, or where the host's is mounted.
//
// It is the line oom_kill of /proc/vmstat: __oom_kill_process in mm/oom_kill.c counts the event once
// for each process, and mm/vmstat.c prints it since Linux 4.13 where CONFIG_VM_EVENT_COUNTERS is set.
// It counts the whole kernel, also where that carries several nodes (kind, k3d), and not the tasks
// that were dying anyway. It fails where the line is missing or is no number.
func KernelOOMKills(procRoot string) (uint64, error) {
	path := filepath.Join(procRoot, "vmstat")
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, fmt.Errorf("read kernel OOM kills: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, "oom_kill "); ok {
			n, err := strconv.ParseUint(strings.TrimSuffix(value, "\n"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read kernel OOM kills: %s: oom_kill: %w", path, err)
			}
			return n, nil
		}
	}
	return 0, fmt.Errorf("read kernel OOM kills: %s: %w", path, errNoCounter)
}

var errNoCounter = errors.New("has no line oom_kill (Linux before 4.13, or without CONFIG_VM_EVENT_COUNTERS)")

// oomKills is the collector of NewOOMKillCollector; the string is procRoot.
type oomKills string

var oomKillsDesc = prometheus.NewDesc("oom_tracer_kernel_oom_kills_total",
	"Number of processes that the kernel's OOM killer has killed since boot (oom_kill in /proc/vmstat).", nil, nil)

// NewOOMKillCollector returns the metric oom_tracer_kernel_oom_kills_total, read by KernelOOMKills at
// each scrape. When it cannot be read it is absent and the scrape counts an error: 0 would say that
// nothing was killed.
func NewOOMKillCollector(procRoot string) prometheus.Collector { return oomKills(procRoot) }

// Describe implements prometheus.Collector.
func (o oomKills) Describe(ch chan<- *prometheus.Desc) { ch <- oomKillsDesc }

// Collect implements prometheus.Collector.
func (o oomKills) Collect(ch chan<- prometheus.Metric) {
	n, err := KernelOOMKills(string(o))
	if err != nil {
		ch <- prometheus.NewInvalidMetric(oomKillsDesc, err)
		return
	}
	ch <- prometheus.MustNewConstMetric(oomKillsDesc, prometheus.CounterValue, float64(n))
}
