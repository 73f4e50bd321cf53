package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
)

func TestCommandLine(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for file, data := range map[string]string{
		"empty.yaml":    "",
		"template.yaml": "notify: {webhook: {url: 'http://x', template: '{{.Nothing}}'}}",
		"file.yaml":     "notify: {slack: {url_file: /nowhere}, alertmanager: {url: 'http://x', token_file: /none}}",
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args           string
		status         int
		stdout, stderr string
	}{
		{"--help", 0, "\nExit status:\n  0  done\n", ""},
		{"--version", 0, "oom-notify ", ""},
		{"now", 2, "", `oom-notify: unexpected argument "now"`},
		{"--config nowhere", 1, "", "(--config names another file)\n"},
		{"--config empty.yaml", 1, "", "oom-notify: notify: no receiver: set notify.slack.url_file, notify.alertmanager.url or notify.webhook.url\n"},
		{"--config template.yaml", 1, "", "oom-notify: notify.webhook.template: template: "},
		{"--config file.yaml", 1, "", "oom-notify: read notify.slack.url_file: open /nowhere: no such file or directory\n" +
			"oom-notify: read notify.alertmanager.token_file: open /none: no such file or directory\n"},
	} {
		var stdout, stderr bytes.Buffer
		status := cli.Run(t.Context(), commandLine(), strings.Fields(tt.args), &stdout, &stderr)
		if status != tt.status || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) ||
			(tt.stderr == "") != (stderr.Len() == 0) || (tt.stdout == "") != (stdout.Len() == 0) {
			t.Errorf("%s: status %d\nstdout: %s\nstderr: %s", tt.args, status, &stdout, &stderr)
		}
	}
}
