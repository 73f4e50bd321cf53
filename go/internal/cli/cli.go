// Package cli is the outermost part of every program: signals, the last message, the exit status.
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
)

// Exit statuses.
const (
	ExitFailure = 1
	ExitUsage   = 2
)

// Program does the work, until ctx ends.
type Program func(ctx context.Context, args []string, stdout, stderr io.Writer) error

// Main runs a program and exits. SIGINT and SIGTERM end its context; a second one ends the process at once.
func Main(name string, program Program) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	// A reader of standard output that goes away is an error of the write, and does not end the process.
	signal.Ignore(syscall.SIGPIPE)
	os.Exit(Run(ctx, name, program, os.Args[1:], os.Stdout, os.Stderr))
}

// Run runs a program, reports its error on stderr and returns the exit status.
func Run(ctx context.Context, name string, program Program, args []string, stdout, stderr io.Writer) int {
	err := program(ctx, args, stdout, stderr)
	if err == nil {
		return 0
	}
	if wrong, ok := errors.AsType[usageError](err); ok {
		fmt.Fprintf(stderr, "%s: %v; see %s --help\n", name, wrong, name)
		return ExitUsage
	}
	if logged, ok := errors.AsType[loggedError](err); ok {
		logged.log.Error(name+" failed", "error", logged.error)
	} else {
		// A config that is wrong has a line for each fault.
		fmt.Fprintf(stderr, "%s: %s\n", name, strings.ReplaceAll(err.Error(), "\n", "\n"+name+": "))
	}
	if other, ok := errors.AsType[statusError](err); ok {
		return other.status
	}
	return ExitFailure
}

// statusError ends the program with a status of its own.
type statusError struct {
	error
	status int
}

// Unwrap returns the error itself.
func (e statusError) Unwrap() error { return e.error }

// Status makes an error that ends the program with status.
func Status(status int, err error) error { return statusError{err, status} }

// usageError means that the command line is wrong.
type usageError struct{ error }

// Usagef makes an error about the command line.
func Usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// loggedError goes to the log.
type loggedError struct {
	error
	log *slog.Logger
}

// Unwrap returns the error itself.
func (e loggedError) Unwrap() error { return e.error }

// Logged has Run write an error to the log, for a log in JSON, where no other line may stand.
func Logged(log *slog.Logger, err error) error {
	if _, ok := log.Handler().(*slog.JSONHandler); !ok || err == nil {
		return err
	}
	return loggedError{err, log}
}
