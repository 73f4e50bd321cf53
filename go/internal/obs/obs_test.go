package obs

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"io/fs"
	"log/slog"
	"os"
	"reflect"
	"regexp"
	"runtime"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

var update = flag.Bool("update", false, "write the golden files anew")

func TestLogger(t *testing.T) {
	var out bytes.Buffer
	log, err := NewLogger(&out, config.Log{Level: "warn", Format: "text"})
	if err != nil {
		t.Fatal(err)
	}
	log.Info("unseen")
	log.Warn("seen", "node", "a b")
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, `level=WARN msg=seen node="a b"`) {
		t.Errorf("text: %q", got)
	}

	out.Reset()
	log, err = NewLogger(&out, config.Log{Level: "debug", Format: "json"})
	if err != nil {
		t.Fatal(err)
	}
	log.Debug("seen", "n", 1)
	var line struct {
		Level, Msg string
		N          int
	}
	if err := json.Unmarshal(out.Bytes(), &line); err != nil || line.Level != "DEBUG" || line.Msg != "seen" || line.N != 1 {
		t.Errorf("json: %q, %v", out.String(), err)
	}

	if log, err = NewLogger(&out, config.Default().Log); err != nil || log.Enabled(t.Context(), slog.LevelDebug) || !log.Enabled(t.Context(), slog.LevelInfo) {
		t.Errorf("the default is not level info: %v", err)
	}
	for _, bad := range []config.Log{{Level: "loud", Format: "text"}, {Level: "", Format: "text"}, {Level: "info", Format: "xml"}, {Level: "info"}} {
		if _, err := NewLogger(&out, bad); err == nil || !strings.HasPrefix(err.Error(), "set log ") {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestBuild(t *testing.T) {
	info := func(version string, kv ...string) *debug.BuildInfo {
		i := &debug.BuildInfo{Main: debug.Module{Version: version}}
		for j := 0; j < len(kv); j += 2 {
			i.Settings = append(i.Settings, debug.BuildSetting{Key: kv[j], Value: kv[j+1]})
		}
		return i
	}
	for _, tt := range []struct {
		name, version, revision string
		info                    *debug.BuildInfo
		wantVersion, wantRev    string
	}{
		{"linker", "v1.2.3", "abc", info("(devel)", "vcs.revision", "def"), "v1.2.3", "abc"},
		{"go install", "", "", info("v1.2.3"), "v1.2.3", "unknown"},
		{"buildvcs", "", "", info("v0.0.0-2026-def+dirty", "vcs.revision", "def", "vcs.modified", "true"), "v0.0.0-2026-def+dirty", "def-dirty"},
		{"clean buildvcs", "", "", info("(devel)", "vcs.revision", "def", "vcs.modified", "false"), "(devel)", "def"},
		{"dirty says nothing of the linker's", "v1", "abc", info("", "vcs.modified", "true"), "v1", "abc"},
		{"nothing", "", "", nil, "unknown", "unknown"},
	} {
		if got, want := build(tt.version, tt.revision, tt.info), (Build{tt.wantVersion, tt.wantRev, runtime.Version()}); got != want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, want)
		}
	}
	if got, want := (Build{"v1", "abc", "go1.26"}).String(), "v1 (revision abc, go1.26 "+runtime.GOOS+"/"+runtime.GOARCH+")"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
}

// The Makefile's -X names these; the linker passes over a variable that does not exist.
func TestLinkerVariables(t *testing.T) {
	if got, want := reflect.TypeFor[Build]().PkgPath(), "github.com/oom-tracer/oom-tracer/go/internal/obs"; got != want {
		t.Errorf("package path %s, want %s", got, want)
	}
	var _, _ *string = &version, &revision
}

func TestKernelOOMKills(t *testing.T) {
	if got, err := KernelOOMKills("testdata/proc"); err != nil || got != 42 {
		t.Errorf("%d, %v, want 42", got, err)
	}
	for root, want := range map[string]string{
		"testdata/proc-old":   "testdata/proc-old/vmstat: has no line oom_kill (Linux before 4.13",
		"testdata/proc-empty": "testdata/proc-empty/vmstat: has no line oom_kill",
		"testdata/proc-bad":   `testdata/proc-bad/vmstat: oom_kill: strconv.ParseUint: parsing "-1"`,
		"testdata/none":       "open testdata/none/vmstat: no such file",
	} {
		got, err := KernelOOMKills(root)
		if err == nil || got != 0 || !strings.HasPrefix(err.Error(), "read kernel OOM kills: "+want) {
			t.Errorf("%s: %d, %v, want error %q", root, got, err, want)
		}
	}
	if _, err := KernelOOMKills("testdata/none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the cause is not wrapped: %v", err)
	}
	if _, err := KernelOOMKills("/proc"); err != nil {
		t.Errorf("this machine: %v", err)
	}
}

// others are the lines of metrics that the libraries define, and change at will.
var others = regexp.MustCompile(`(?m)^(# (HELP|TYPE) )?(go|process)_.*\n`)

func TestExpositionGolden(t *testing.T) {
	reg := newRegistry("oom-test", Build{Version: "v1.2.3", Revision: "0123abc", Go: "go1.26"})
	reg.MustRegister(NewOOMKillCollector("testdata/proc"))
	url := serve(t, reg, Checks{})
	status, body := get(t, url+"/metrics")
	if status != 200 {
		t.Fatalf("status %d: %s", status, body)
	}
	got := others.ReplaceAllString(body, "")
	for _, part := range []string{"\ngo_goroutines ", "\nprocess_open_fds ", "\nprocess_resident_memory_bytes "} {
		if !strings.Contains(body, part) {
			t.Errorf("no metric %s", part)
		}
	}
	const golden = "testdata/metrics.golden"
	if *update {
		if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("exposition (-golden +got; -update writes it):\n%s", diff)
	}
	problems, err := testutil.GatherAndLint(reg)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("lint: %s: %s", p.Metric, p.Text)
	}
}

// A counter that cannot be read is absent, counted, logged, and hides nothing else.
func TestUnreadableCounterIsAbsent(t *testing.T) {
	reg := NewRegistry("oom-test")
	reg.MustRegister(NewOOMKillCollector("testdata/proc-old"))
	var log oomtest.Output
	url := serveLogging(t, reg, Checks{}, slog.New(slog.NewTextHandler(&log, nil)))
	for range 2 { // an error is in the count from the next scrape on
		status, body := get(t, url+"/metrics")
		if status != 200 || strings.Contains(body, "kernel_oom_kills") || !strings.Contains(body, `oom_tracer_build_info{`) {
			t.Errorf("status %d: %s", status, others.ReplaceAllString(body, ""))
		}
	}
	if _, body := get(t, url+"/metrics"); !strings.Contains(body, `promhttp_metric_handler_errors_total{cause="gathering"} 2`) {
		t.Errorf("errors are not counted: %s", others.ReplaceAllString(body, ""))
	}
	if got := log.String(); !strings.Contains(got, `level=WARN msg="scrape is incomplete"`) || !strings.Contains(got, "has no line oom_kill") {
		t.Errorf("log: %s", got)
	}
}
