package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
)

var update = flag.Bool("update", false, "write the files in testdata/script anew")

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"oom-tracer": main})
}

// TestScript runs testdata/script with the real program. Beyond testscript's own, the commands are
//
//	status N program...   run, and expect this exit status
//	wrong WORDS args...   run oom-tracer, and expect that it calls the command line wrong with these words,
//	                      in one line, and does nothing else
func TestScript(t *testing.T) {
	shipped, err := filepath.Abs("../../../config.yaml")
	if err != nil {
		t.Fatal(err)
	}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			env.Setenv("SHIPPED", shipped)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"status": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(expectStatus(ts.Exec(args[1], args[2:]...), args[0]))
			},
			"wrong": func(ts *testscript.TestScript, _ bool, args []string) {
				ts.Check(expectStatus(ts.Exec("oom-tracer", args[1:]...), "2"))
				if out := ts.ReadFile("stdout"); out != "" {
					ts.Fatalf("it printed %q", out)
				}
				got, found := strings.CutPrefix(ts.ReadFile("stderr"), "oom-tracer: "+args[0]+"; see oom-tracer ")
				if !found || !strings.HasSuffix(got, "--help\n") || strings.Count(got, "\n") != 1 {
					ts.Fatalf("stderr is %q, want %q", ts.ReadFile("stderr"), args[0])
				}
			},
		},
	})
}

// expectStatus holds what running a program came to against an exit status.
func expectStatus(err error, want string) error {
	got := 0
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got = exit.ExitCode()
	} else if err != nil {
		return err
	}
	if fmt.Sprint(got) != want {
		return fmt.Errorf("exit status %d, want %s", got, want)
	}
	return nil
}

// main's part alone: nothing else of the process is touched by an error.
func TestRealMain(t *testing.T) {
	for _, tt := range []struct {
		args []string
		code int
	}{
		{[]string{"--version"}, 0},
		{[]string{"--help"}, 0},
		{[]string{"config", "check", "--config", "/nowhere"}, cli.ExitFailure},
		{[]string{"nonsense"}, cli.ExitUsage},
	} {
		if code := cli.Run(t.Context(), commandLine(), tt.args, io.Discard, io.Discard); code != tt.code {
			t.Errorf("%v: %d, want %d", tt.args, code, tt.code)
		}
	}
}
