// Command oom-tap shows what OOM Tracer publishes, and pauses and sets up marking. As kubectl-oom it is a plugin of kubectl.
package main

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/tap"
)

func main() {
	name := "oom-tap"
	if strings.HasPrefix(filepath.Base(os.Args[0]), "kubectl-") {
		name = "kubectl oom"
	}
	cli.Main(tap.Command(name))
}
