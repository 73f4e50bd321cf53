// Command kubectl-oom is oom-tap as a plugin of kubectl: it finds NATS and the password by the kubeconfig, and forwards a port.
package main

import (
	"cmp"
	"context"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	_ "k8s.io/client-go/plugin/pkg/client/auth" // the ways to log in that kubectl has
	"k8s.io/client-go/tools/clientcmd"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/tap"
)

func main() { cli.Main(command()) }

func command() *cobra.Command {
	c := &cluster{rules: clientcmd.NewDefaultClientConfigLoadingRules(), overrides: &clientcmd.ConfigOverrides{}}
	c.rules.WarnIfAllMissing = false
	root := tap.Command("kubectl oom", c)
	flags := root.PersistentFlags()
	flags.StringVar(&c.rules.ExplicitPath, "kubeconfig", "", "the kubeconfig `file` (default: KUBECONFIG, ~/.kube/config)")
	cli.File(flags, "kubeconfig")
	flags.StringVar(&c.release, "release", "", "the `namespace` of the release, where the cluster has several (default: the only one)")
	cli.Complete(root, "release", names(func(ctx context.Context) []string { return c.Names(ctx, "namespaces", "") }))

	// All that kubectl has, but for the namespace, which the commands add that have one. The help shows the usual ones.
	kubectl := pflag.NewFlagSet("", pflag.ContinueOnError)
	overrides := clientcmd.RecommendedConfigOverrideFlags("")
	overrides.ContextOverrideFlags.Namespace.LongName = ""
	clientcmd.BindOverrideFlags(c.overrides, kubectl, overrides)
	usage := map[string]string{
		"context":  "the kubeconfig's `context` (default: its current one)",
		"as":       "the `user` to impersonate",
		"as-group": "a `group` to impersonate; may be given several times",
	}
	kubectl.VisitAll(func(f *pflag.Flag) {
		f.Usage, f.Hidden = cmp.Or(usage[f.Name], f.Usage), usage[f.Name] == ""
		flags.AddFlag(f)
	})
	cli.Complete(root, "context", names(func(context.Context) []string { return c.contexts() }))
	return root
}

// names completes with what find finds.
func names(find func(context.Context) []string) cobra.CompletionFunc {
	return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		return find(cmd.Context()), cobra.ShellCompDirectiveNoFileComp
	}
}
