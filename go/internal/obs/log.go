// Package obs is what every binary of OOM Tracer shows of itself: its log, its version, its metrics,
// its health.
//
// Rule of the package: what cannot be known is absent, and says so; it is never shown as 0 or as
// healthy. The package holds no state but the two strings that the linker sets.
package obs

import (
	"fmt"
	"io"
	"log/slog"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// NewLogger returns a logger that writes one message a line to w.
//
// It fails on a level or a format that config.Parse refuses too.
func NewLogger(w io.Writer, cfg config.Log) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(cfg.Level)); err != nil {
		return nil, fmt.Errorf("set log level: %w", err)
	}
	opts := &slog.HandlerOptions{Level: level}
	switch cfg.Format {
	case "text":
		return slog.New(slog.NewTextHandler(w, opts)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, opts)), nil
	default:
		return nil, fmt.Errorf("set log format: %q is neither text nor json", cfg.Format)
	}
}
