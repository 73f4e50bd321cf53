package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

// Settings are the flags of all programs.
type Settings struct {
	Config   string
	LogLevel string
}

// AddFlags adds the flags to all commands of a program.
func (s *Settings) AddFlags(root *cobra.Command) {
	flags := root.PersistentFlags()
	flags.StringVar(&s.Config, "config", "/etc/oom-tracer/config.yaml", "the config `file`")
	must(root.MarkPersistentFlagFilename("config", "yaml", "yml"))
	levels := []string{"debug", "info", "warn", "error"}
	Var(flags, &s.LogLevel, "log-level", "", "the `level` of the log: debug, info, warn or error (default: log.level in the config;\nwarn for commands that people run)", oneOf(levels))
	must(root.RegisterFlagCompletionFunc("log-level", cobra.FixedCompletions(levels, cobra.ShellCompDirectiveNoFileComp)))
}

// Load reads the config. Its log level is --log-level, else level where that is not empty.
func (s *Settings) Load(level string) (config.Config, error) {
	cfg, err := config.Load(s.Config)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w (--config names another file)", err)
	}
	if s.LogLevel != "" {
		level = s.LogLevel
	}
	if level != "" {
		cfg.Log.Level = level
	}
	return cfg, err
}

// Run calls run with the config and its logger. With a log in JSON the error of run goes there: no other line may
// stand on standard error.
func (s *Settings) Run(cmd *cobra.Command, level string, run func(ctx context.Context, cfg config.Config, log *slog.Logger) error) error {
	cfg, err := s.Load(level)
	if err != nil {
		return err
	}
	log, err := obs.NewLogger(cmd.ErrOrStderr(), cfg.Log)
	if err != nil {
		return err
	}
	if err = run(cmd.Context(), cfg, log); err != nil && cfg.Log.Format == "json" {
		return exitError{err, ExitFailure, log}
	}
	return err
}

// Var adds a flag whose value parse reads or refuses. What it points to is the default.
func Var[T any](flags *pflag.FlagSet, to *T, name, short, usage string, parse func(string) (T, error)) {
	flags.VarP(value[T]{to, parse}, name, short, usage)
}

type value[T any] struct {
	to    *T
	parse func(string) (T, error)
}

func (v value[T]) Set(s string) (err error) {
	*v.to, err = v.parse(s)
	return err
}

func (v value[T]) String() string {
	if v.to == nil || reflect.ValueOf(v.to).Elem().IsZero() {
		return ""
	}
	return fmt.Sprint(*v.to)
}

func (v value[T]) Type() string { return "value" }

// Enum adds a flag that is one of some words.
func Enum(cmd *cobra.Command, to *string, name, short, usage string, words ...string) {
	Var(cmd.Flags(), to, name, short, usage, oneOf(words))
	must(cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)))
}

// Enums adds a flag that is one or more of some words, with commas between them. It may be given several times.
func Enums(cmd *cobra.Command, to *[]string, name, usage string, words ...string) {
	one := oneOf(words)
	Var(cmd.Flags(), to, name, "", usage, func(s string) ([]string, error) {
		all := *to
		for word := range strings.SplitSeq(s, ",") {
			word = strings.TrimSpace(word)
			if _, err := one(word); err != nil {
				return nil, fmt.Errorf("%q %w", word, err)
			}
			all = append(all, word)
		}
		return all, nil
	})
	must(cmd.RegisterFlagCompletionFunc(name, cobra.FixedCompletions(words, cobra.ShellCompDirectiveNoFileComp)))
}

func oneOf(words []string) func(string) (string, error) {
	return func(s string) (string, error) {
		if slices.Contains(words, s) {
			return s, nil
		}
		return "", fmt.Errorf("must be one of %s", strings.Join(words, ", "))
	}
}

// Output adds --output, which is text unless it is given.
func Output(cmd *cobra.Command, to *string, usage string) {
	*to = "text"
	Enum(cmd, to, "output", "o", usage, "text", "json")
}

// Duration parses a positive duration.
func Duration(s string) (time.Duration, error) {
	if d, err := time.ParseDuration(s); err == nil && d > 0 {
		return d, nil
	}
	return 0, errors.New("must be a duration such as 90s, 15m or 24h (a day is 24h)")
}

// Node parses the name of a node.
func Node(s string) (string, error) {
	_, err := event.NodeToken(s)
	return s, err
}

// Complete completes the value of a flag.
func Complete(cmd *cobra.Command, flag string, completion cobra.CompletionFunc) {
	must(cmd.RegisterFlagCompletionFunc(flag, completion))
}

// File completes the value of a flag with the names of files.
func File(flags *pflag.FlagSet, name string) { must(cobra.MarkFlagFilename(flags, name)) }

// Files completes arguments that are files.
func Files(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return nil, cobra.ShellCompDirectiveDefault
}

// Required has cobra refuse a command line without a flag.
func Required(cmd *cobra.Command, flag string) { must(cmd.MarkFlagRequired(flag)) }

// must panics where the program itself names a flag that it has not.
func must(err error) {
	if err != nil {
		panic(err)
	}
}
