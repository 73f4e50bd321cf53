// Command oom-annotator marks the pods that the kernel's OOM killer hit, as the policy of the config says.
package main

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

func main() { cli.Main(commandLine()) }

func commandLine() *cobra.Command {
	s := &cli.Settings{}
	kubeconfig := ""
	start := func(cmd *cobra.Command, level string, run func(ctx context.Context, cfg config.Config, log *slog.Logger) error) error {
		return s.Run(cmd, level, func(ctx context.Context, cfg config.Config, log *slog.Logger) error {
			if kubeconfig != "" {
				cfg.Annotator.Kubeconfig = kubeconfig
			}
			klog.SetSlogLogger(log) // client-go's
			if os.Getenv("GOGC") == "" {
				// Most of the memory is pods that stay. To let garbage grow to the same size again has no use.
				debug.SetGCPercent(50)
			}
			return run(ctx, cfg, log)
		})
	}
	root := &cobra.Command{
		Use: name,
		Long: `oom-annotator marks the pods that OOM kills hit, and publishes on NATS the outcome of each kill. Without a command it runs
until SIGTERM or SIGINT. All replicas share the work.`,
		RunE: func(cmd *cobra.Command, _ []string) error { return start(cmd, "", run) },
	}
	s.AddFlags(root)
	cli.Var(root.PersistentFlags(), &kubeconfig, "kubeconfig", "", "the kubeconfig `file` (default: annotator.kubeconfig in the config, the service account of the pod)", filepath.Abs)
	cli.File(root.PersistentFlags(), "kubeconfig")

	o := trialOptions{since: 24 * time.Hour}
	explainCommand := &cobra.Command{
		Use: "explain", Short: "Show what the config would do about the kills in the stream, and why",
		Long: `Show what the config would have done about the kills that the stream holds, and why, on the pods as they are now.
Nothing is marked.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return start(cmd, "warn", func(ctx context.Context, cfg config.Config, log *slog.Logger) error {
				return explain(ctx, cfg, o, log, cmd.OutOrStdout(), cmd.ErrOrStderr())
			})
		},
	}
	flags := explainCommand.Flags()
	cli.Var(flags, &o.since, "since", "", "begin with what was stored this `duration` ago", cli.Duration)
	cli.Var(flags, &o.node, "node", "", "only kills of this `node`; the budgets then know no other node", cli.Node)
	cli.Output(explainCommand, &o.output, "the `format`: text, or json: an object for each kill with kill, would and was")
	cli.AddGroup(root, "Try", explainCommand)
	return root
}
