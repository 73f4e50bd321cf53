// Command oom-tracer is the node agent: it reports every kill of the kernel's OOM killer to NATS.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"strings"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

const usage = `oom-tracer reports every kill of this machine's OOM killer to NATS.

Usage:
  oom-tracer [run] [flags]                       trace until it is told to end
  oom-tracer selftest [flags]                    cause one contained OOM kill and see it come back
  oom-tracer doctor [--output text|json] [flags] what this kernel and this process can do
  oom-tracer doctor --btf file [--output text|json]
                                                 whether the program fits the kernel with these types,
                                                 or each of those in a directory
  oom-tracer config check [flags]                read the config, say what is wrong with it
  oom-tracer unload [--force] [flags]            end the recording that goes on while no tracer runs

Exit status: 0 done; 1 failed (doctor: tracing cannot work; config check: the config is wrong);
2 the command line is wrong.

Flags:
`

func main() { cli.Main("oom-tracer", dispatch) }

// options are the flags.
type options struct {
	configPath string
	nodeName   string
	logLevel   string
	output     string // doctor only
	btf        string // doctor only
	force      bool   // unload only
	version    bool
}

func dispatch(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	command := "run"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = args[0], args[1:]
	}
	// "config" has one command of its own; "config --help" is a question all the same.
	if command == "config" && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = command+" "+args[0], args[1:]
	}
	switch command {
	case "run", "selftest", "doctor", "config", "config check", "unload":
	case hogCommand:
		return hog(args)
	default:
		return cli.Usagef("unknown command %q", command)
	}

	o, flags, err := parseFlags(command, args)
	if errors.Is(err, flag.ErrHelp) {
		fmt.Fprint(stdout, usage)
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		return nil
	}
	if err != nil {
		return err
	}
	if o.version {
		fmt.Fprintf(stdout, "oom-tracer %s\n", obs.Version())
		return nil
	}
	if command == "config" {
		return cli.Usagef("config needs a command: config check")
	}

	if o.btf != "" {
		return doctorBTF(o.btf, o.output, stdout)
	}

	cfg, err := loadConfig(o)
	if err != nil {
		return err
	}
	if command == "unload" {
		return unload(ctx, cfg.Kernel.PinDir, o.force, stdout)
	}
	node, err := config.NodeName(o.nodeName, os.Getenv, cfg.Node, os.Hostname)
	if err != nil {
		return err
	}
	if command == "config check" {
		fmt.Fprintf(stdout, "%s: ok (node %s)\n", o.configPath, node)
		return nil
	}
	if command == "selftest" && o.logLevel == "" {
		cfg.Log.Level = "warn" // its own lines are what is to be read
	}
	log, err := obs.NewLogger(stderr, cfg.Log)
	if err != nil {
		return err
	}
	switch command {
	case "selftest":
		err = selftest(ctx, cfg, node, stdout, log)
	case "doctor":
		err = doctor(ctx, cfg, node, o.output, stdout)
	default:
		err = run(ctx, cfg, node, stdout, log)
	}
	return cli.Logged(log, err)
}

// parseFlags reads what stands behind the command, and checks what needs no config to be checked. Its
// error is of cli.Usagef or flag.ErrHelp.
func parseFlags(command string, args []string) (o options, flags *flag.FlagSet, err error) {
	flags = flag.NewFlagSet("oom-tracer", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // its error comes back, and is printed once
	flags.StringVar(&o.configPath, "config", "/etc/oom-tracer/config.yaml", "the config `file`")
	flags.StringVar(&o.nodeName, "node-name", "", "this node's `name` (default: NODE_NAME, node.name in the config, the host's name)")
	flags.StringVar(&o.logLevel, "log-level", "", "the log's `level`: debug, info, warn or error (default: log.level in the config; warn for selftest)")
	flags.BoolVar(&o.version, "version", false, "print the version and end")
	if command == "doctor" {
		flags.StringVar(&o.output, "output", "text", "the `format`: text or json")
		flags.StringVar(&o.btf, "btf", "", "the kernel's BTF in a `file`, raw or in an ELF file, or a directory of such: look at that, and not at this machine and its config")
	}
	if command == "unload" {
		flags.BoolVar(&o.force, "force", false, "also discard records that are not published yet, or that this version cannot read")
	}
	err = flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return o, flags, err
	case err != nil:
		return o, flags, cli.Usagef("%v", err)
	case flags.NArg() > 0:
		return o, flags, cli.Usagef("unexpected argument %q", flags.Arg(0))
	case command == "doctor" && o.output != "text" && o.output != "json":
		return o, flags, cli.Usagef("--output: must be text or json, not %q", o.output)
	}
	if o.logLevel != "" {
		// Held against the rule for the config's own key.
		cfg := config.Default()
		cfg.Log.Level = o.logLevel
		if err := cfg.Validate(); err != nil {
			return o, flags, cli.Usagef("--log-level: %v", err)
		}
	}
	if o.nodeName != "" {
		if _, err := event.NodeToken(o.nodeName); err != nil {
			return o, flags, cli.Usagef("--node-name: %v", err)
		}
	}
	return o, flags, nil
}

// loadConfig reads the config and what goes before it.
func loadConfig(o options) (config.Config, error) {
	cfg, err := config.Load(o.configPath)
	if errors.Is(err, fs.ErrNotExist) {
		return config.Config{}, fmt.Errorf("%w (--config names another file)", err)
	}
	if err != nil {
		return config.Config{}, err
	}
	if o.logLevel != "" {
		cfg.Log.Level = o.logLevel
	}
	return cfg, nil
}

// run traces until ctx ends.
func run(ctx context.Context, cfg config.Config, node string, stdout io.Writer, log *slog.Logger) error {
	protect(log)
	t, err := start(ctx, cfg, node, stdout, log)
	if err != nil && ctx.Err() != nil {
		// Told to end while it waited for something: that is no failure.
		log.Info("stopped before it had begun", "while", err)
		return nil
	}
	if err != nil {
		return err
	}
	return t.run(ctx)
}

// unload ends the recording that goes on in the kernel.
func unload(ctx context.Context, dir string, force bool, stdout io.Writer) error {
	if dir == "" {
		fmt.Fprintln(stdout, "nothing is pinned: kernel.pin_dir is empty")
		return nil
	}
	unpublished, err := loader.Unload(ctx, dir, force)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, loader.ErrNoBPFFS):
		fmt.Fprintf(stdout, "nothing is pinned in %s\n", dir)
		return nil
	case err != nil:
		return fmt.Errorf("unload: %w", err)
	case unpublished > 0:
		fmt.Fprintf(stdout, "unloaded; %d records that were not published are gone\n", unpublished)
	default:
		fmt.Fprintln(stdout, "unloaded: nothing records kills now")
	}
	return nil
}
