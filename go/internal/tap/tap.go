// Package tap is the commands of oom-tap: they show what OOM Tracer publishes, and pause and set up marking.
package tap

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

// Cluster finds by a kubeconfig what oom-tap takes from its config.
type Cluster interface {
	// Connect returns the config of a release, and how to reach its NATS as one of the users of the chart: tap, operator or owner.
	Connect(ctx context.Context, user string) (config.Config, bus.Options, error)
	// Namespace is that of the kubeconfig's context, empty if it has none.
	Namespace() (string, error)
	// Names are those of all objects of a resource (pods, nodes or namespaces), of one namespace or, where that is empty, of all.
	Names(ctx context.Context, resource, namespace string) []string
}

// program is what its commands have in common.
type program struct {
	cli.Settings
	name    string  // that the user calls it by
	cluster Cluster // nil: the config says it all
}

// Command is the tree of commands, under the name that the user calls it by. With a cluster it needs no config, and has no commands
// for those who install.
func Command(name string, cluster Cluster) *cobra.Command {
	p := &program{name: name, cluster: cluster}
	root := tailCommand(p)
	root.Use = strings.ReplaceAll(name, " ", "-")
	root.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: name}
	root.Long = name + ` shows the OOM kills that OOM Tracer publishes on NATS. Without a command it is ` + name + ` tail.`
	root.Example = strings.ReplaceAll(`  oom-tap --since 24h --outcomes               what was killed and what was marked, then live
  oom-tap pod cart-0 -n shop                   what happened to one pod
  oom-tap top --since 24h                      which workloads are killed most
  oom-tap advise -A                            what to do about it
  oom-tap report --since 24h >report.html      all of it, for a post-mortem
  oom-tap pause --reason 'roll-out' --for 1h   stop all marking`, "oom-tap", name)
	p.AddFlags(root)
	cli.AddGroup(root, "Look", tailCommand(p), podCommand(p), topCommand(p), adviseCommand(p), reportCommand(p), nodesCommand(p), statusCommand(p))
	cli.AddGroup(root, "Act", pauseCommand(p), resumeCommand(p), restoreCommand(p))
	if cluster != nil {
		config := root.PersistentFlags().Lookup("config")
		config.DefValue, config.Usage = "", "connect as this config `file` of oom-tap says, without the cluster"
		return root
	}
	cli.AddGroup(root, "Set up", setupCommand(p), keysCommand())
	cli.AddGroup(root, "Test (for helm test)", awaitCommand(p), victimCommand())
	return root
}

// options are the flags of a command, its argument and the config.
type options struct {
	*program
	config config.Config
	user   string // of NATS, with a cluster; empty: tap

	// tail
	noFollow      bool
	scopes        []string
	node          string
	kills         bool
	outcomes      bool
	allNamespaces bool
	color         string
	count         int
	// pod, and tail --outcomes
	namespace string
	pod       string
	// await
	podUID  string
	outcome bool
	timeout time.Duration
	// pause
	reason   string
	duration time.Duration
	// restore
	empty bool
	// nodes
	failOn []string
	// top
	by string
	// advise
	workload string
	advice   bool // also of top -o wide
	// report
	from, until time.Time
	incident    string

	since  time.Duration
	output string
}

// ofPods tells whether only kills in pods are wanted.
func (o *options) ofPods() bool { return o.allNamespaces || o.namespace != "" || o.pod != "" }

// run makes the RunE of a command that needs NATS.
func (o *options) run(do func(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, _ []string) error {
		conn, create, err := o.connect(cmd)
		if err != nil {
			return err
		}
		defer conn.Close()
		err = do(cmd.Context(), conn, *o, cmd.OutOrStdout(), cmd.ErrOrStderr())
		if errors.Is(err, errEnough) {
			return nil
		}
		if errors.Is(err, jetstream.ErrStreamNotFound) || errors.Is(err, jetstream.ErrBucketNotFound) {
			return fmt.Errorf("%w: %s", err, create)
		}
		return err
	}
}

// connect connects as the config says, or else the cluster, and says how to create the streams.
func (o *options) connect(cmd *cobra.Command) (conn *bus.Conn, create string, err error) {
	options := bus.Options{}
	if o.cluster == nil || cmd.Flags().Changed("config") {
		o.config, err = o.Load("")
		create = "create it with: oom-tap setup --config " + o.Config
	} else {
		o.config, options, err = o.cluster.Connect(cmd.Context(), cmp.Or(o.user, "tap"))
		create = "the Job oom-tracer-setup of the release creates it: see its log"
	}
	if err != nil {
		return nil, "", err
	}
	// The log of the config is the daemons'.
	log, err := obs.NewLogger(cmd.ErrOrStderr(), config.Log{Level: cmp.Or(o.LogLevel, "warn"), Format: "text"})
	if err != nil {
		return nil, "", err
	}
	// await has a timeout, within which NATS may start.
	options.Name, options.Background = "oom-tap", o.podUID != ""
	conn, err = bus.Connect(cmd.Context(), o.config.NATS, options, log)
	return conn, create, err
}

const jsonUsage = "the `format`: text, or json: the stored bytes, one message a line"

func tailCommand(p *program) *cobra.Command {
	o := &options{program: p, color: "auto"}
	cmd := &cobra.Command{
		Use: "tail", Short: "Show kills and gaps as they happen",
		Long: "Show kills, and gaps in what is known of them, as they happen. With --outcomes: which pod was hit, and what became of it.",
		RunE: o.run(tail),
		PreRunE: func(*cobra.Command, []string) error {
			o.outcomes = o.outcomes || o.ofPods()
			if o.allNamespaces {
				o.namespace = ""
			}
			switch {
			case o.noFollow && o.since == 0:
				return errors.New("--no-follow shows what is stored: give its begin with --since")
			case o.count < 0:
				return fmt.Errorf("--count must not be negative, but is %d", o.count)
			}
			return nil
		},
	}
	flags := cmd.Flags()
	cli.Var(flags, &o.since, "since", "", "begin with what was stored this `duration` ago, such as 1h, then continue live", sinceOrNow)
	flags.BoolVar(&o.noFollow, "no-follow", false, "exit after what is stored now")
	var scopes []string
	for _, scope := range event.Scopes() {
		scopes = append(scopes, string(scope))
	}
	cli.Enums(cmd, &o.scopes, "scope", "only these `scopes`, separated by commas: "+strings.Join(scopes, ", "), scopes...)
	cli.Var(flags, &o.node, "node", "", "only this `node`", cli.Node)
	flags.BoolVar(&o.kills, "kills", false, "only kills: no tasks that were already exiting, no memory usage of other pods, no gaps, no evictions")
	flags.BoolVar(&o.outcomes, "outcomes", false, "each kill with its outcome, on one line, when that is known, or after 5s without;\nno tasks that were already exiting")
	cli.Var(flags, &o.namespace, "namespace", "n", "only pods of this `namespace`, with --outcomes", namespace)
	flags.BoolVarP(&o.allNamespaces, "all-namespaces", "A", false, "only pods, of all namespaces, with --outcomes")
	flags.StringVar(&o.pod, "pod", "", "only pods of this `name`, with --outcomes")
	cli.Output(cmd, &o.output, jsonUsage)
	cli.Enum(cmd, &o.color, "color", "", "`when` to use colors: auto, always or never", "auto", "always", "never")
	flags.IntVar(&o.count, "count", 0, "exit after `N` events; 0: no limit")
	o.complete(cmd)
	return cmd
}

func podCommand(p *program) *cobra.Command {
	o := &options{program: p, since: 7 * 24 * time.Hour, color: "auto"}
	cmd := &cobra.Command{
		Use: "pod NAME", Short: "Show all that happened to one pod",
		Long:        "Show all that happened to one pod: its kills, their outcomes, its evictions by the kubelet, and the gaps of its nodes.",
		Annotations: map[string]string{cli.ExitHelp(exitUnknown): "no kill in the pod is known, but there may have been some: kills without an outcome, or gaps"},
	}
	setNamespace := namespaceFlags(cmd, o, "the pod's `namespace`", "the pods of that name in all namespaces")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		o.pod = args[0]
		if err := setNamespace(); err != nil {
			return err
		}
		return o.run(pod)(cmd, args)
	}
	cli.Var(cmd.Flags(), &o.since, "since", "", "begin with what was stored this `duration` ago", cli.Duration)
	cli.Output(cmd, &o.output, jsonUsage)
	o.complete(cmd)
	return cmd
}

func topCommand(p *program) *cobra.Command {
	o := &options{program: p, since: 7 * 24 * time.Hour, by: "workload", count: 20}
	cmd := &cobra.Command{
		Use: "top", Short: "Show which workloads, pods, namespaces or nodes are killed most",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			switch {
			case o.allNamespaces:
				o.namespace = ""
			case o.cluster != nil && o.namespace == "" && (o.by == "workload" || o.by == "pod"):
				if o.namespace, err = o.cluster.Namespace(); err != nil {
					return err
				}
				if o.namespace != "" {
					fmt.Fprintf(cmd.ErrOrStderr(), "%s: only namespace %s, that of the kubeconfig's context (-A: all)\n", o.name, o.namespace)
				}
			}
			return o.run(top)(cmd, args)
		},
		PreRunE: func(*cobra.Command, []string) error {
			o.advice = o.output == "wide"
			switch {
			case o.count < 0:
				return fmt.Errorf("--count must not be negative, but is %d", o.count)
			case o.advice && o.by != "workload" && o.by != "pod":
				return fmt.Errorf("--output wide has advice for a workload or a pod, and not for a %s", o.by)
			}
			return nil
		},
	}
	flags := cmd.Flags()
	cli.Var(flags, &o.since, "since", "", "count what was stored up to this `duration` ago", cli.Duration)
	cli.Enum(cmd, &o.by, "by", "", "count by `kind`: workload, pod, namespace, node or image", "workload", "pod", "namespace", "node", "image")
	cli.Var(flags, &o.namespace, "namespace", "n", "only pods of this `namespace`", namespace)
	all := "all namespaces, and what is in no pod (default)"
	if p.cluster != nil {
		all = "all namespaces, and what is in no pod (default, unless the kubeconfig's context names a namespace)"
	}
	flags.BoolVarP(&o.allNamespaces, "all-namespaces", "A", false, all)
	cli.Var(flags, &o.node, "node", "", "only this `node`", cli.Node)
	flags.IntVar(&o.count, "count", o.count, "show the first `N`; 0: all")
	o.output = "text"
	cli.Enum(cmd, &o.output, "output", "o", "the `format`: text, wide: with what to do about it, or json: one object a line", "text", "wide", "json")
	o.complete(cmd)
	return cmd
}

func adviseCommand(p *program) *cobra.Command {
	o := &options{program: p, since: 7 * 24 * time.Hour, by: "workload", advice: true, output: "text"}
	cmd := &cobra.Command{
		Use: "advise", Short: "Show what to do about the workloads that were killed",
		Long: `Show what to do about the workloads that were killed, in one sentence each, with the figures that it rests on. It only reads.
With -o patch: a strategic-merge patch of each workload that one can help. Try it with kubectl patch --dry-run=server.`,
	}
	setNamespace := namespaceFlags(cmd, o, "the workloads of this `namespace`", "the workloads of all namespaces")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := setNamespace(); err != nil {
			return err
		}
		return o.run(advise)(cmd, args)
	}
	flags := cmd.Flags()
	cli.Var(flags, &o.since, "since", "", "of kills that were stored up to this `duration` ago", cli.Duration)
	flags.StringVar(&o.workload, "workload", "", "only this `workload`, such as Deployment/cart")
	cli.Var(flags, &o.node, "node", "", "only kills on this `node`", cli.Node)
	cli.Enum(cmd, &o.output, "output", "o", "the `format`: text, json: one object a line, or patch: a YAML document for each workload", "text", "json", "patch")
	o.complete(cmd)
	return cmd
}

func reportCommand(p *program) *cobra.Command {
	now := time.Now()
	o := &options{program: p, by: "workload", advice: true}
	cmd := &cobra.Command{
		Use: "report", Short: "Write one HTML file about the kills of a time, for a post-mortem", RunE: o.run(writeReport),
		Long: `Write one HTML file about the kills of a time to standard output, for a post-mortem: when which node and namespace had kills, where kills may
be missing, which workloads were killed most, and what happened in each incident. The file needs no network and runs no script.`,
		PreRunE: func(*cobra.Command, []string) error {
			if o.until.IsZero() {
				o.until = now
			}
			if o.from.IsZero() {
				o.from = o.until.Add(-24 * time.Hour)
			}
			if !o.from.Before(o.until) {
				return fmt.Errorf("--since is %s, and --until %s: it must be later", o.from.Format(time.RFC3339), o.until.Format(time.RFC3339))
			}
			return nil
		},
	}
	flags := cmd.Flags()
	cli.Var(flags, &o.from, "since", "", "begin at this `time`, such as 2026-11-28T02:00:00Z, or so long ago, such as 24h (default: 24h before --until)", moment(now))
	cli.Var(flags, &o.until, "until", "", "end at this `time`, or so long ago (default: now)", moment(now))
	cli.Var(flags, &o.namespace, "namespace", "n", "only kills in pods of this `namespace`", namespace)
	cli.Var(flags, &o.node, "node", "", "only kills on this `node`", cli.Node)
	flags.StringVar(&o.incident, "incident", "", "only the incident of the kill with this `ID`, with the 15 minutes before and after it, wherever the stream has it")
	for _, other := range []string{"since", "until", "namespace", "node"} {
		cmd.MarkFlagsMutuallyExclusive("incident", other)
	}
	o.complete(cmd)
	return cmd
}

// moment parses a time, or a duration before now.
func moment(now time.Time) func(string) (time.Time, error) {
	return func(s string) (time.Time, error) {
		if t, err := time.Parse(time.RFC3339, s); err == nil {
			return t, nil
		}
		if d, err := time.ParseDuration(s); err == nil && d > 0 {
			return now.Add(-d), nil
		}
		return time.Time{}, errors.New("must be a time such as 2026-11-28T02:00:00Z, or a duration such as 90s, 15m or 24h (a day is 24h)")
	}
}

func nodesCommand(p *program) *cobra.Command {
	o := &options{program: p}
	cmd := &cobra.Command{
		Use: "nodes", Short: "Show which nodes are watched, which are quiet, which have gaps", RunE: o.run(nodes),
		Annotations: map[string]string{cli.ExitHelp(cli.ExitFailure): "failed, or --fail-on found something"},
	}
	cli.Output(cmd, &o.output, jsonUsage)
	cli.Enums(cmd, &o.failOn, "fail-on", "exit with status 1 if a node is `quiet` (not watched, or no node is known) or has a gap:\nquiet, gap or quiet,gap", "quiet", "gap")
	cli.Var(cmd.Flags(), &o.since, "since", "", "only gaps that were published up to this `duration` ago (default: all in the stream)", cli.Duration)
	return cmd
}

func statusCommand(p *program) *cobra.Command {
	o := &options{program: p}
	cmd := &cobra.Command{Use: "status", Short: "Show whether pods are marked, and what is left of the budgets", RunE: o.run(status)}
	cli.Output(cmd, &o.output, "the `format`: text or json")
	return cmd
}

func pauseCommand(p *program) *cobra.Command {
	o := &options{program: p, user: "operator"}
	cmd := &cobra.Command{Use: "pause", Short: "Stop all marking, by every replica, at once", RunE: o.run(pause)}
	cli.Var(cmd.Flags(), &o.reason, "reason", "", "why, in a `sentence`; the outcome of every kill shows it", func(s string) (string, error) {
		if strings.TrimSpace(s) == "" || len(s) > maxReason {
			return "", fmt.Errorf("must have 1..%d bytes", maxReason)
		}
		return s, nil
	})
	cli.Required(cmd, "reason")
	cli.Var(cmd.Flags(), &o.duration, "for", "", "resume marking after this `duration`", cli.Duration)
	return cmd
}

func resumeCommand(p *program) *cobra.Command {
	o := &options{program: p, user: "operator"}
	return &cobra.Command{Use: "resume", Short: "Resume marking", RunE: o.run(resume)}
}

func restoreCommand(p *program) *cobra.Command {
	o := &options{program: p, user: "owner"}
	cmd := &cobra.Command{Use: "restore", Short: "Replace an invalid state of budgets and pause by its newest valid revision", RunE: o.run(restore)}
	cmd.Flags().BoolVar(&o.empty, "empty", false, "if no revision is valid: start with no pause and no budget used")
	return cmd
}

func setupCommand(p *program) *cobra.Command {
	o := &options{program: p}
	return &cobra.Command{
		Use: "setup", Short: "Create or update the streams and the bucket on the NATS of the config",
		RunE: o.run(func(ctx context.Context, conn *bus.Conn, o options, stdout, _ io.Writer) error {
			if err := bus.EnsureStreams(ctx, conn, o.config.NATS.Stream); err != nil {
				return err
			}
			fmt.Fprintf(stdout, "streams %s and %s and bucket %s are as the config says\n", event.StreamName, event.NodesStreamName, bus.BucketName)
			return nil
		}),
	}
}

func keysCommand() *cobra.Command {
	return &cobra.Command{
		Use: "keys DIR NODE...", Short: "Create an nkey for each node that has none in a directory",
		Long:              "Create an nkey for each node that has none in the directory DIR, and print the public keys for the chart.",
		ValidArgsFunction: cli.Files,
		PreRunE: func(_ *cobra.Command, args []string) error {
			for _, node := range args[1:] {
				if _, err := cli.Node(node); err != nil {
					return err
				}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error { return keys(args[0], args[1:], cmd.OutOrStdout()) },
	}
}

func awaitCommand(p *program) *cobra.Command {
	o := &options{program: p, since: 10 * time.Minute, timeout: 2 * time.Minute}
	cmd := &cobra.Command{
		Use: "await", Short: "Wait until a kill of the pod with --pod-uid is published", RunE: o.run(await),
		Annotations: map[string]string{cli.ExitHelp(cli.ExitFailure): "failed, or the kill (with --outcome, its outcome) was not published in time"},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.podUID, "pod-uid", "", "the `UID` of the pod, metadata.uid")
	cli.Required(cmd, "pod-uid")
	flags.BoolVar(&o.outcome, "outcome", false, "wait for the outcome of the kill, too")
	cli.Var(flags, &o.since, "since", "", "a kill that was published up to this `duration` ago counts", cli.Duration)
	cli.Var(flags, &o.timeout, "timeout", "", "wait for this `duration` at most", cli.Duration)
	return cmd
}

func victimCommand() *cobra.Command {
	return &cobra.Command{
		Use: "victim FILE", Short: "Use up the memory limit of this container, unless FILE exists",
		ValidArgsFunction: cli.Files,
		RunE:              func(cmd *cobra.Command, args []string) error { return victim(args[0], cmd.OutOrStdout()) },
	}
}

// sinceOrNow parses a duration, where 0s stands for now.
func sinceOrNow(s string) (time.Duration, error) {
	if d, err := time.ParseDuration(s); err == nil && d == 0 {
		return 0, nil
	}
	return cli.Duration(s)
}

// namespace parses the name of a namespace.
func namespace(s string) (string, error) {
	if len(validation.IsDNS1123Label(s)) > 0 {
		return "", errors.New("must be the name of a namespace: lower-case letters, digits and '-'")
	}
	return s, nil
}

// namespaceFlags adds the flags that name a namespace as those of kubectl do. The function that it returns sets o.namespace by them:
// it is empty for all namespaces.
func namespaceFlags(cmd *cobra.Command, o *options, one, all string) func() error {
	var kubeconfig, context string
	flags := cmd.Flags()
	cli.Var(flags, &o.namespace, "namespace", "n", one+" (default: that of the kubeconfig's context)", namespace)
	flags.BoolVarP(&o.allNamespaces, "all-namespaces", "A", false, all)
	if o.cluster == nil { // which has more of these
		flags.StringVar(&context, "context", "", "the kubeconfig's `context` (default: its current one)")
		flags.StringVar(&kubeconfig, "kubeconfig", "", "the kubeconfig `file` (default: KUBECONFIG, ~/.kube/config)")
		cli.File(flags, "kubeconfig")
	}
	return func() (err error) {
		switch {
		case o.allNamespaces:
			o.namespace = ""
		case o.namespace == "" && o.cluster != nil:
			o.namespace, err = o.cluster.Namespace()
			o.namespace = cmp.Or(o.namespace, "default")
		case o.namespace == "":
			o.namespace, err = kubeNamespace(kubeconfig, context)
		}
		return err
	}
}

// complete completes the flags that name a node, a namespace or a pod, and the argument that does, where there is a cluster to ask.
func (o *options) complete(cmd *cobra.Command) {
	if o.cluster == nil {
		return
	}
	names := func(resource string) cobra.CompletionFunc {
		return func(cmd *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			of := o.namespace
			if of == "" && !o.allNamespaces {
				of, _ = o.cluster.Namespace() // without it: of all
				of = cmp.Or(of, "default")
			}
			return o.cluster.Names(cmd.Context(), resource, of), cobra.ShellCompDirectiveNoFileComp
		}
	}
	for flag, resource := range map[string]string{"node": "nodes", "namespace": "namespaces", "pod": "pods"} {
		if cmd.Flags().Lookup(flag) != nil {
			cli.Complete(cmd, flag, names(resource))
		}
	}
	if cmd.Name() == "pod" {
		pods := names("pods")
		cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return pods(cmd, args, toComplete)
		}
	}
}

// kubeNamespace is the namespace that kubectl would use.
func kubeNamespace(kubeconfig, context string) (string, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.WarnIfAllMissing = false
	rules.ExplicitPath = kubeconfig
	namespace, _, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context}).Namespace()
	switch {
	case err == nil:
		return namespace, nil
	case clientcmd.IsEmptyConfig(err):
		return "default", nil
	}
	return "", fmt.Errorf("read the namespace of the kubeconfig's context: %w (--namespace names one)", err)
}
