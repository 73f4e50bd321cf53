// Command oom-tap shows what OOM Tracer publishes, and pauses and sets up marking.
package main

import (
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/tap"
)

func main() { cli.Main(tap.Command("oom-tap", nil)) }
