package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/oom-tracer/oom-tracer/go/internal/loader"
)

// Unload ends the recording that continues in the kernel.
func Unload(ctx context.Context, dir string, force bool, stdout io.Writer) error {
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
