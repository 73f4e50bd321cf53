package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// program is a tree of commands. What its commands do is an error of their own.
func program(failure error) *cobra.Command {
	s := &cli.Settings{}
	start := func(level string) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			return s.Run(cmd, level, func(_ context.Context, _ config.Config, log *slog.Logger) error {
				log.Info("started")
				return failure
			})
		}
	}
	root := &cobra.Command{Use: "prog", RunE: start("")}
	s.AddFlags(root)
	check := &cobra.Command{Use: "check A B...", Annotations: map[string]string{cli.ExitHelp(3): "not known"}, RunE: start("error")}
	var since time.Duration
	var words []string
	cli.Var(check.Flags(), &since, "since", "", "a `duration`", cli.Duration)
	cli.Enums(check, &words, "words", "some `words`", "red", "green")
	cli.AddGroup(root, "Look", check, &cobra.Command{Use: "fail", RunE: func(*cobra.Command, []string) error { return cli.Status(3, failure) }})
	return root
}

func TestRun(t *testing.T) {
	failure := errors.New("first\nsecond")
	dir := t.TempDir()
	for _, format := range []string{"text", "json"} {
		if err := os.WriteFile(filepath.Join(dir, format), []byte("log:\n  format: "+format+"\n  level: warn\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	for _, tt := range []struct {
		args   string
		err    error
		status int
		stderr string // "": one line of JSON
	}{
		{"--config json", nil, 0, "-"},
		{"--config text", failure, 1, "prog: first\nprog: second\n"},
		{"--config json", failure, 1, ""},
		{"fail", failure, 3, "prog: first\nprog: second\n"},
		{"--config none", nil, 1, "prog: read config: open none: no such file or directory (--config names another file)\n"},
		{"x", failure, 2, "prog: unknown command \"x\"; see prog --help\n"},
		{"chekc", failure, 2, "prog: unknown command \"chekc\": did you mean check?; see prog --help\n"},
		{"fail x", failure, 2, "prog: unexpected argument \"x\"; see prog fail --help\n"},
		{"check", failure, 2, "prog: check needs A B...; see prog check --help\n"},
		{"check a", failure, 2, "prog: check needs B...; see prog check --help\n"},
		{"check a b c --config text", failure, 1, "prog: first\nprog: second\n"},
		{"check a b --sinse 1h", failure, 2, "prog: unknown flag: --sinse: did you mean --since?; see prog check --help\n"},
		{"check a b -since 1h", failure, 2, "prog: unknown shorthand flag: 's' in -since: did you mean --since?; see prog check --help\n"},
		{"check a b --since 0s", failure, 2, "prog: invalid argument \"0s\" for \"--since\" flag: must be a duration such as 90s, 15m or 24h (a day is 24h); see prog check --help\n"},
		{"check a b --words red,blue", failure, 2, "prog: invalid argument \"red,blue\" for \"--words\" flag: \"blue\" must be one of red, green; see prog check --help\n"},
	} {
		var stdout, stderr bytes.Buffer
		status := cli.Run(t.Context(), program(tt.err), strings.Fields(tt.args), &stdout, &stderr)
		var line struct{ Level, Msg, Error string }
		switch err := json.Unmarshal(stderr.Bytes(), &line); {
		case status != tt.status || stdout.Len() > 0:
			t.Errorf("%s: status %d, %q", tt.args, status, &stdout)
		case tt.stderr == "-" && stderr.Len() > 0:
			t.Errorf("%s: %q", tt.args, &stderr)
		case tt.stderr == "" && (err != nil || line.Level != "ERROR" || line.Msg != "program failed" || line.Error != failure.Error()):
			t.Errorf("%s: %q: %v", tt.args, &stderr, err)
		case tt.stderr != "" && tt.stderr != "-" && stderr.String() != tt.stderr:
			t.Errorf("%s: %q", tt.args, &stderr)
		}
	}
}

// --log-level goes before the level of the command, and that before the one of the config.
func TestLogLevel(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte("log:\n  level: info\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, logs := range map[string]bool{"": true, "--log-level error": false, "check a b": false, "check a b --log-level info": true} {
		var stdout, stderr bytes.Buffer
		if status := cli.Run(t.Context(), program(nil), append(strings.Fields(args), "--config", file), &stdout, &stderr); status != 0 || strings.Contains(stderr.String(), "started") != logs {
			t.Errorf("%q: status %d, %q", args, status, &stderr)
		}
	}
}

// Help ends with the exit statuses, and --version goes before all arguments that are missing.
func TestHelp(t *testing.T) {
	for args, want := range map[string]string{
		"--help":          "\nLook:\n  check       \n  fail        \n",
		"check --help":    "\nExit status:\n  0  done\n  1  failed\n  2  the command line is wrong\n  3  not known\n",
		"check --version": "prog ",
	} {
		var stdout, stderr bytes.Buffer
		if status := cli.Run(t.Context(), program(nil), strings.Fields(args), &stdout, &stderr); status != 0 || stderr.Len() > 0 || !strings.Contains(stdout.String(), want) {
			t.Errorf("%q: status %d, %q, %q", args, status, &stdout, &stderr)
		}
	}
}
