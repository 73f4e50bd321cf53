// Package cli is the command line of every program: a tree of cobra commands, its help, signals, the last
// message and the exit status.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

// Exit statuses.
const (
	ExitFailure = 1
	ExitUsage   = 2
)

// Main runs a program and exits. SIGINT and SIGTERM end its context; a second one ends the process at once.
func Main(root *cobra.Command) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	// A reader of standard output that goes away is an error of the write, and does not end the process.
	signal.Ignore(syscall.SIGPIPE)
	os.Exit(Run(ctx, root, os.Args[1:], os.Stdout, os.Stderr))
}

// Run runs the command that args name, reports its error on stderr and returns the exit status. An error that
// comes before the RunE of the command is one of the command line. A tree of commands runs once.
func Run(ctx context.Context, root *cobra.Command, args []string, stdout, stderr io.Writer) int {
	root.SetArgs(append([]string{}, args...)) // nil would stand for os.Args
	root.SetOut(stdout)
	root.SetErr(stderr)
	running := prepare(root)
	cmd, err := root.ExecuteContextC(ctx)
	name := root.DisplayName()
	switch {
	case err == nil, errors.Is(err, errVersion):
		return 0
	case !*running:
		fmt.Fprintf(stderr, "%s: %v; see %s --help\n", name, err, cmd.CommandPath())
		return ExitUsage
	}
	exit, ok := errors.AsType[exitError](err)
	if !ok {
		exit.status = ExitFailure
	}
	if exit.log != nil {
		exit.log.Error("program failed", "program", name, "error", err)
	} else {
		// A wrong config has a line for each fault.
		fmt.Fprintf(stderr, "%s: %s\n", name, strings.ReplaceAll(err.Error(), "\n", "\n"+name+": "))
	}
	return exit.status
}

// errVersion ends a program that was only asked for its version.
var errVersion = errors.New("version printed")

// prepare adds what all programs have in common. The result is true once a RunE was called.
func prepare(root *cobra.Command) *bool {
	running := new(bool)
	root.SilenceErrors, root.SilenceUsage = true, true
	root.PersistentFlags().Bool("version", false, "print the version and exit")
	root.SetFlagErrorFunc(suggestFlag)
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.InitDefaultCompletionCmd()
	help := root.HelpFunc()
	root.SetHelpFunc(func(cmd *cobra.Command, args []string) {
		help(cmd, args)
		fmt.Fprint(cmd.OutOrStdout(), exitStatuses(cmd))
	})
	walk(root, func(cmd *cobra.Command) {
		check := cmd.Args
		if check == nil || cmd.HasSubCommands() {
			check = positional
		}
		cmd.Args = func(cmd *cobra.Command, args []string) error {
			if version, err := cmd.Flags().GetBool("version"); err == nil && version {
				fmt.Fprintf(cmd.OutOrStdout(), "%s %s\n", root.Name(), obs.Version())
				return errVersion
			}
			return check(cmd, args)
		}
		run := cmd.RunE
		switch {
		case run != nil:
			cmd.RunE = func(cmd *cobra.Command, args []string) error {
				*running = true
				return run(cmd, args)
			}
		case cmd.Run == nil: // cobra would print the help, and call that a success
			cmd.RunE = func(cmd *cobra.Command, _ []string) error {
				return fmt.Errorf("%s needs a command: %s", cmd.Name(), strings.Join(names(cmd), ", "))
			}
		}
	})
	return running
}

func walk(cmd *cobra.Command, visit func(*cobra.Command)) {
	visit(cmd)
	for _, c := range cmd.Commands() {
		walk(c, visit)
	}
}

// positional checks the arguments by the command's Use: it has one word for each, and the last may end in "...".
func positional(cmd *cobra.Command, args []string) error {
	want := strings.Fields(cmd.Use)[1:]
	switch {
	case len(args) < len(want):
		return fmt.Errorf("%s needs %s", cmd.Name(), strings.Join(want[len(args):], " "))
	case len(args) == len(want), strings.HasSuffix(cmd.Use, "..."):
		return nil
	case cmd.HasAvailableSubCommands():
		return fmt.Errorf("unknown command %q%s", args[0], didYouMean("", args[0], names(cmd)))
	}
	return fmt.Errorf("unexpected argument %q", args[len(want)])
}

func names(cmd *cobra.Command) []string {
	var all []string
	for _, c := range cmd.Commands() {
		if c.IsAvailableCommand() {
			all = append(all, c.Name())
		}
	}
	return all
}

// suggestFlag adds the flag that was probably meant.
func suggestFlag(cmd *cobra.Command, err error) error {
	unknown, ok := errors.AsType[*pflag.NotExistError](err)
	if !ok {
		return err
	}
	name := unknown.GetSpecifiedName()
	if short := unknown.GetSpecifiedShortnames(); short != "" {
		name, _, _ = strings.Cut(short, "=") // -config
	}
	var known []string
	cmd.Flags().VisitAll(func(f *pflag.Flag) { known = append(known, f.Name) })
	return fmt.Errorf("%w%s", err, didYouMean("--", name, known))
}

func didYouMean(prefix, name string, known []string) string {
	if nearest := config.Nearest(name, known); nearest != "" {
		return ": did you mean " + prefix + nearest + "?"
	}
	return ""
}

// ExitHelp is the key in a command's Annotations of what an exit status means, for its help.
func ExitHelp(status int) string { return fmt.Sprint("exit status ", status) }

func exitStatuses(cmd *cobra.Command) string {
	help := "\nExit status:\n"
	for status, meaning := range []string{"done", "failed", "the command line is wrong", ""} {
		if own, ok := cmd.Annotations[ExitHelp(status)]; ok {
			meaning = own
		}
		if meaning != "" {
			help += fmt.Sprintf("  %d  %s\n", status, meaning)
		}
	}
	return help
}

// AddGroup adds commands under a title of the help.
func AddGroup(root *cobra.Command, title string, cmds ...*cobra.Command) {
	root.AddGroup(&cobra.Group{ID: title, Title: title + ":"})
	for _, cmd := range cmds {
		cmd.GroupID = title
		root.AddCommand(cmd)
	}
}

// exitError ends the program with a status, or by a line in a log.
type exitError struct {
	error
	status int
	log    *slog.Logger // nil: the error goes to stderr
}

// Unwrap returns the error itself.
func (e exitError) Unwrap() error { return e.error }

// Status makes an error that ends the program with status.
func Status(status int, err error) error { return exitError{err, status, nil} }
