// Command oom-notify sends messages about OOM kills and gaps to the receivers of the config.
package main

import (
	"github.com/spf13/cobra"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/notify"
)

func main() { cli.Main(commandLine()) }

func commandLine() *cobra.Command {
	s := &cli.Settings{}
	root := &cobra.Command{
		Use: notify.Name,
		Long: `oom-notify sends messages about OOM kills, and about gaps in their record, to Slack, Alertmanager or a webhook. It runs
until SIGTERM or SIGINT.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.Run(cmd, "", notify.Run) },
	}
	s.AddFlags(root)
	return root
}
