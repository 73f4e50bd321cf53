// Command oom-tracer is the node agent: it publishes every kill of the kernel's OOM killer to NATS.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"github.com/oom-tracer/oom-tracer/go/internal/agent"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/doctor"
)

func main() { cli.Main(commandLine()) }

// commandLine is the tree of commands.
func commandLine() *cobra.Command {
	s := &cli.Settings{}
	nodeFlag := ""
	node := func(cfg config.Config) (string, error) {
		return config.NodeName(nodeFlag, os.Getenv, cfg.Node, os.Hostname)
	}
	// onNode makes the RunE of a command that needs the config, the node's name and a log.
	onNode := func(level string, do func(ctx context.Context, cfg config.Config, node string, stdout io.Writer, log *slog.Logger) error) func(*cobra.Command, []string) error {
		return func(cmd *cobra.Command, _ []string) error {
			return s.Run(cmd, level, func(ctx context.Context, cfg config.Config, log *slog.Logger) error {
				name, err := node(cfg)
				if err != nil {
					return err
				}
				return do(ctx, cfg, name, cmd.OutOrStdout(), log)
			})
		}
	}

	root := &cobra.Command{
		Use:  "oom-tracer",
		Long: "oom-tracer publishes every kill of this machine's OOM killer to NATS. Without a command it is oom-tracer run.",
		RunE: onNode("", agent.Run),
	}
	s.AddFlags(root)
	cli.Var(root.PersistentFlags(), &nodeFlag, "node-name", "", "this node's `name` (default: NODE_NAME, node.name in the config, the host's name)", cli.Node)

	runCommand := &cobra.Command{Use: "run", Short: "Trace until SIGTERM or SIGINT", RunE: root.RunE}

	force := false
	unloadCommand := &cobra.Command{
		Use: "unload", Short: "End the recording that continues while no tracer runs",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := s.Load("")
			if err != nil {
				return err
			}
			return agent.Unload(cmd.Context(), cfg.Kernel.PinDir, force, cmd.OutOrStdout())
		},
	}
	unloadCommand.Flags().BoolVar(&force, "force", false, "also discard records that are not published yet, or that this version cannot read")

	selftestCommand := &cobra.Command{Use: "selftest", Short: "Cause one contained OOM kill and check the event", RunE: onNode("warn", agent.Selftest)}

	output, btf := "", ""
	doctorCommand := &cobra.Command{
		Use: "doctor", Short: "Show what this kernel and this process can do",
		Long: `Show what this kernel and this process can do. With --btf: whether the program fits the kernel with these types,
or each of the kernels in a directory; nothing of this machine and no config is read.`,
		Annotations: map[string]string{cli.ExitHelp(cli.ExitFailure): "failed, or tracing cannot work"},
	}
	cli.Output(doctorCommand, &output, "the `format`: text or json")
	doctorCommand.Flags().StringVar(&btf, "btf", "", "the kernel's BTF in a `file`, raw or in an ELF file, or a directory of such files")
	cli.File(doctorCommand.Flags(), "btf")
	doctorCommand.RunE = func(cmd *cobra.Command, args []string) error {
		if btf != "" {
			return doctor.RunBTF(btf, output, cmd.OutOrStdout())
		}
		return onNode("", func(ctx context.Context, cfg config.Config, node string, stdout io.Writer, _ *slog.Logger) error {
			return doctor.Run(ctx, cfg, node, output, stdout)
		})(cmd, args)
	}

	configCommand := &cobra.Command{Use: "config", Short: "Check the config"}
	configCommand.AddCommand(&cobra.Command{
		Use: "check", Short: "Read the config and show what is wrong with it",
		Annotations: map[string]string{cli.ExitHelp(cli.ExitFailure): "the config is wrong"},
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := s.Load("")
			if err != nil {
				return err
			}
			name, err := node(cfg)
			if err == nil {
				fmt.Fprintf(cmd.OutOrStdout(), "%s: ok (node %s)\n", s.Config, name)
			}
			return err
		},
	})

	cli.AddGroup(root, "Trace", runCommand, unloadCommand)
	cli.AddGroup(root, "Check", selftestCommand, doctorCommand, configCommand)
	root.AddCommand(&cobra.Command{
		Use: agent.VictimCommand + " MIB", Short: "The victim of selftest", Hidden: true,
		RunE: func(_ *cobra.Command, args []string) error { return agent.Victim(args[0]) },
	})
	return root
}
