package cli_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

func TestRun(t *testing.T) {
	failure := errors.New("first\nsecond")
	for _, tt := range []struct {
		name   string
		format string
		err    error
		status int
		stderr string // "": one line of JSON
	}{
		{"done", "json", nil, 0, "-"},
		{"usage", "json", cli.Usagef("unknown command %q", "x"), cli.ExitUsage, "prog: unknown command \"x\"; see prog --help\n"},
		{"text", "text", failure, cli.ExitFailure, "prog: first\nprog: second\n"},
		{"json", "json", failure, cli.ExitFailure, ""},
	} {
		var stderr bytes.Buffer
		status := cli.Run(t.Context(), "prog", func(_ context.Context, _ []string, _, stderr io.Writer) error {
			log, err := obs.NewLogger(stderr, config.Log{Level: "error", Format: tt.format})
			if err != nil {
				t.Fatal(err)
			}
			return cli.Logged(log, tt.err)
		}, nil, io.Discard, &stderr)
		var line struct{ Level, Msg, Error string }
		switch err := json.Unmarshal(stderr.Bytes(), &line); {
		case status != tt.status:
			t.Errorf("%s: status %d", tt.name, status)
		case tt.stderr == "-" && stderr.Len() > 0:
			t.Errorf("%s: %q", tt.name, &stderr)
		case tt.stderr == "" && (err != nil || line.Level != "ERROR" || line.Msg != "prog failed" || line.Error != failure.Error()):
			t.Errorf("%s: %q: %v", tt.name, &stderr, err)
		case tt.stderr != "" && tt.stderr != "-" && stderr.String() != tt.stderr:
			t.Errorf("%s: %q", tt.name, &stderr)
		}
	}
}
