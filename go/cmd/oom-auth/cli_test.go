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
	for file, data := range map[string]string{"secret": "0123456789abcdef0123456789abcdef", "empty.yaml": ""} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		args           string
		status         int
		stdout, stderr string
	}{
		{"--help", 0, "\n  issuer      Write the public keys ", ""},
		{"--help", 0, "\n  reload      Reload the server ", ""},
		{"--help", 0, "\nExit status:\n  0  done\n  1  failed\n  2  the command line is wrong\n", ""},
		{"reload --help", 0, "\n  oom-auth reload PIDFILE DIR... [flags]\n", ""},
		{"--version", 0, "oom-auth ", ""},
		{"__complete re", 0, "reload\t", "ShellCompDirectiveNoFileComp"},
		{"isuer", 2, "", "oom-auth: unknown command \"isuer\": did you mean issuer?; see oom-auth --help\n"},
		{"issuer secret", 2, "", "oom-auth: issuer needs CONFIG; see oom-auth issuer --help\n"},
		{"issuer secret a b", 2, "", `unexpected argument "b"`},
		{"reload pid", 2, "", "reload needs DIR..."},
		{"reload pid nowhere", 1, "", "nowhere: no files"},
		{"--kubconfig x", 2, "", "did you mean --kubeconfig?"},
		{"--config nowhere", 1, "", "(--config names another file)\n"},
		{"--config empty.yaml", 1, "", "oom-auth: empty.yaml: needs nats.url and auth.issuer_file\n"},
		{"issuer secret issuer.conf", 0, "", ""},
	} {
		var stdout, stderr bytes.Buffer
		status := cli.Run(t.Context(), commandLine(), strings.Fields(tt.args), &stdout, &stderr)
		if status != tt.status || !strings.Contains(stdout.String(), tt.stdout) || !strings.Contains(stderr.String(), tt.stderr) ||
			(tt.stderr == "") != (stderr.Len() == 0) || (tt.stdout == "") != (stdout.Len() == 0) {
			t.Errorf("%s: status %d\nstdout: %s\nstderr: %s", tt.args, status, &stdout, &stderr)
		}
	}
	if conf, err := os.ReadFile("issuer.conf"); err != nil || !strings.Contains(string(conf), "issuer") {
		t.Errorf("%s: %v", conf, err)
	}
}
