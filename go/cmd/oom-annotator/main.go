// Command oom-annotator marks the pods that the kernel's OOM killer hit, as the policy of the config has it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"

	"k8s.io/klog/v2"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

const usage = `oom-annotator marks the pods that OOM kills hit, and says on NATS what became of each kill.

Usage:
  oom-annotator [flags]           work until it is told to end; any number of them share the work
  oom-annotator explain [flags]   show what the config would have done about the kills that the stream holds,
                                  and why, on the pods as they are now; nothing is marked

Exit status: 0 done; 1 failed; 2 the command line is wrong.

Flags%s:
`

func main() { cli.Main("oom-annotator", dispatch) }

func dispatch(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	command := ""
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = args[0], args[1:]
	}
	flags := flag.NewFlagSet("oom-annotator", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what is wrong is said once, by cli.Run
	configPath := flags.String("config", "/etc/oom-tracer/config.yaml", "the config `file`")
	kubeconfig := flags.String("kubeconfig", "", "the kubeconfig `file` (default: annotator.kubeconfig in the config, the service account of the pod)")
	logLevel := flags.String("log-level", "", "the log's `level`: debug, info, warn or error (default: log.level in the config)")
	version := flags.Bool("version", false, "print the version and end")
	of, t := "", trialOptions{}
	switch command {
	case "":
	case "explain":
		of = " of explain"
		t.flags(flags)
	default:
		return cli.Usagef("unknown command %q", command)
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(stdout, usage, of)
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		return nil
	case err != nil:
		return cli.Usagef("%w", err)
	case flags.NArg() > 0:
		return cli.Usagef("unexpected argument %q", flags.Arg(0))
	}
	if err := t.check(); err != nil {
		return cli.Usagef("%w", err)
	}
	// Held against the rules for the config's own keys.
	held := config.Default()
	if *logLevel != "" {
		held.Log.Level = *logLevel
		if err := held.Validate(); err != nil {
			return cli.Usagef("--log-level: %w", err)
		}
	}
	if *version {
		fmt.Fprintf(stdout, "oom-annotator %s\n", obs.Version())
		return nil
	}

	cfg, err := config.Load(*configPath)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w (--config names another file)", err)
	}
	if err != nil {
		return err
	}
	if *logLevel != "" {
		cfg.Log.Level = *logLevel
	}
	if *kubeconfig != "" {
		if cfg.Annotator.Kubeconfig, err = filepath.Abs(*kubeconfig); err != nil {
			return fmt.Errorf("--kubeconfig: %w", err)
		}
	}
	if command == "explain" && *logLevel == "" {
		cfg.Log.Level = "warn" // not the daemon's
	}
	log, err := obs.NewLogger(stderr, cfg.Log)
	if err != nil {
		return err
	}
	klog.SetSlogLogger(log) // client-go's
	if os.Getenv("GOGC") == "" {
		// Most of the memory is pods that stay. To let garbage grow to as much again would buy nothing.
		debug.SetGCPercent(50)
	}
	if command == "explain" {
		return explain(ctx, cfg, t, log, stdout, stderr)
	}
	return cli.Logged(log, run(ctx, cfg, log))
}
