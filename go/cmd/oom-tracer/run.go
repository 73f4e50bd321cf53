package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
)

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
