// Command oom-auth answers NATS servers which node a tracer may publish for, by the token that it shows.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

const name = "oom-auth"

func main() { cli.Main(commandLine()) }

func commandLine() *cobra.Command {
	s := &cli.Settings{}
	kubeconfig := ""
	root := &cobra.Command{
		Use: name,
		Long: `oom-auth answers NATS servers that ask about a client with a token (auth callout): the client may publish for the
node that the token's pod runs on. Without a command it answers until SIGTERM or SIGINT. All replicas share the questions.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return s.Run(cmd, "", func(ctx context.Context, cfg config.Config, log *slog.Logger) error {
				if kubeconfig != "" {
					cfg.Auth.Kubeconfig = kubeconfig
				}
				if cfg.NATS.URL == "" || cfg.Auth.IssuerFile == "" {
					return fmt.Errorf("%s: needs nats.url and auth.issuer_file", s.Config)
				}
				klog.SetSlogLogger(log) // client-go's
				return run(ctx, cfg, log)
			})
		},
	}
	s.AddFlags(root)
	cli.Var(root.Flags(), &kubeconfig, "kubeconfig", "", "the kubeconfig `file` (default: auth.kubeconfig in the config, the service account of the pod)", filepath.Abs)
	cli.File(root.Flags(), "kubeconfig")
	cli.AddGroup(root, "Beside the NATS server",
		&cobra.Command{
			Use: "issuer SECRET CONFIG", Short: "Write the public keys of a secret into a config of the server",
			Long:              "Write the public keys that belong to the secret in the file SECRET into the file CONFIG, which the server's auth_callout block includes.",
			ValidArgsFunction: cli.Files,
			RunE:              func(_ *cobra.Command, args []string) error { return issuer(args[0], args[1]) },
		},
		&cobra.Command{
			Use: "reload PIDFILE DIR...", Short: "Reload the server when a file changes",
			Long: `Have the nats-server of PIDFILE read its configuration again when a file in a DIR changed: it does not notice by itself that
certificates were renewed.`,
			ValidArgsFunction: cli.Files,
			RunE: func(cmd *cobra.Command, args []string) error {
				return reload(cmd.Context(), args[0], args[1:], 10*time.Second, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
			},
		})
	return root
}
