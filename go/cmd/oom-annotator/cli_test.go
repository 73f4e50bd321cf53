package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
)

// TestCommandLine: help and completion are printed; what is wrong is named in one line, and nothing is started.
func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	bad, good, asJSON := filepath.Join(dir, "bad.yaml"), filepath.Join(dir, "good.yaml"), filepath.Join(dir, "json.yaml")
	for file, data := range map[string]string{bad: "policy:\n  annotation: -a\n  scope: []\n", good: "annotator:\n  listen: \"\"\n",
		asJSON: "log:\n  format: json\nannotator:\n  listen: \"\"\n"} {
		if err := os.WriteFile(file, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("KUBERNETES_SERVICE_HOST", "")
	for _, tt := range []struct {
		args           string
		status         int
		stdout, stderr string
	}{
		{"--help", 0, "Usage:\n  oom-annotator [flags]\n", ""},
		{"--help", 0, "\n  explain     Show what ", ""},
		{"--help", 0, "\nExit status:\n  0  done\n  1  failed\n  2  the command line is wrong\n", ""},
		{"--version", 0, "oom-annotator ", ""},
		{"--frobnicate", 2, "", "oom-annotator: unknown flag: --frobnicate; see oom-annotator --help\n"},
		{"run", 2, "", `unknown command "run"`},
		{"explan", 2, "", `unknown command "explan": did you mean explain?; see oom-annotator --help`},
		{"explain --help", 0, "\n  oom-annotator explain [flags]\n", ""},
		{"explain --help", 0, "\nExit status:\n", ""},
		{"__complete explain -o ", 0, "text\njson\n:4\n", "ShellCompDirectiveNoFileComp"},
		{"completion zsh", 0, "#compdef oom-annotator", ""},
		{"explain --since 1d", 2, "", "must be a duration such as 90s, 15m or 24h (a day is 24h); see oom-annotator explain --help\n"},
		{"explain --since 0s", 2, "", "must be a duration"},
		{"explain --output yaml", 2, "", `invalid argument "yaml" for "-o, --output" flag: must be one of text, json`},
		{"explain --node Node", 2, "", `invalid argument "Node" for "--node" flag: node name`},
		{"explain again", 2, "", `unexpected argument "again"`},
		{"--since 1h", 2, "", "unknown flag: --since"},
		{"--node-name x", 2, "", "unknown flag: --node-name"},
		{"--log-level loud", 2, "", "must be one of debug, info, warn, error"},
		{"--config /nowhere/config.yaml", 1, "", "no such file or directory (--config names another file)\n"},
		{"--config " + bad, 1, "", "policy.annotation: must be key=value, a key or empty"},
		{"--config " + bad, 1, "", "\noom-annotator: " + bad + ":3: policy.scope: unknown key: did you mean scopes?\n"},
		{"--config " + good, 1, "", "(outside of a cluster, a kubeconfig file is needed)\n"},
		{"--config " + asJSON, 1, "", `"msg":"program failed","program":"oom-annotator","error":"`},
		{"--config " + good + " --kubeconfig /nowhere", 1, "", "read kubeconfig /nowhere: "},
	} {
		var stdout, stderr bytes.Buffer
		status := cli.Run(t.Context(), commandLine(), strings.Split(tt.args, " "), &stdout, &stderr)
		if status != tt.status || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) ||
			(tt.stderr == "") != (stderr.Len() == 0) || (tt.stdout == "") != (stdout.Len() == 0) {
			t.Errorf("%s: status %d\nstdout: %s\nstderr: %s", tt.args, status, &stdout, &stderr)
		}
	}
}
