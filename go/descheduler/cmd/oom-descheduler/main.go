// Command oom-descheduler is the descheduler of Kubernetes (sigs.k8s.io/descheduler), with all that is in it and
// the plugin RemoveAnnotated.
package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"github.com/spf13/cobra"
	"k8s.io/component-base/cli"
	"sigs.k8s.io/descheduler/cmd/descheduler/app"
	"sigs.k8s.io/descheduler/pkg/framework/pluginregistry"
	"sigs.k8s.io/descheduler/pkg/framework/plugins/defaultevictor"

	"github.com/oom-tracer/oom-tracer/go/descheduler/removeannotated"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

func main() { os.Exit(cli.Run(newCommand(os.Stdout))) }

func newCommand(out io.Writer) *cobra.Command {
	cmd := app.NewDeschedulerCommand(out)
	cmd.Use = "oom-descheduler"
	cmd.Short = "The descheduler, with RemoveAnnotated"
	cmd.Long = "oom-descheduler evicts pods that may be bound to less desired nodes: the descheduler of Kubernetes, and\n" +
		"beside its own plugins RemoveAnnotated, which evicts the pods that oom-annotator marked."
	cmd.Version = fmt.Sprintf("%s, descheduler %s", obs.Version(), deschedulerVersion())
	cmd.SetVersionTemplate("{{.Use}} {{.Version}}\n")
	cmd.AddCommand(app.NewVersionCommand())

	setUp := cmd.PreRunE
	cmd.PreRunE = func(cmd *cobra.Command, args []string) error {
		if err := setUp(cmd, args); err != nil {
			return err
		}
		// setUp creates the registry, so register after it.
		reasons := &removeannotated.Reasons{}
		if evictor, ok := pluginregistry.PluginRegistry[defaultevictor.PluginName]; ok {
			evictor.PluginBuilder = reasons.Wrap(evictor.PluginBuilder)
			pluginregistry.PluginRegistry[defaultevictor.PluginName] = evictor
		}
		pluginregistry.Register(removeannotated.PluginName, removeannotated.Builder(reasons),
			&removeannotated.RemoveAnnotated{}, &removeannotated.RemoveAnnotatedArgs{},
			removeannotated.ValidateRemoveAnnotatedArgs, removeannotated.SetDefaultsRemoveAnnotatedArgs,
			pluginregistry.PluginRegistry)
		return nil
	}
	return cmd
}

// deschedulerVersion is the version of the module that this was built with.
func deschedulerVersion() string {
	info, ok := debug.ReadBuildInfo()
	if ok {
		for _, module := range info.Deps {
			if module.Path == "sigs.k8s.io/descheduler" {
				return module.Version
			}
		}
	}
	return "unknown"
}
