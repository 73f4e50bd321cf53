// Command oom-tap shows what OOM Tracer publishes: live, and from what the stream holds.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const usage = `oom-tap shows the OOM kills that OOM Tracer publishes on NATS.

Usage:
  oom-tap [tail] [flags]   show kills, and gaps in what is known of them, as they happen;
                           with --outcomes, which pod was hit and what became of it
  oom-tap pod NAME [flags]
                           tell the whole story of one pod
  oom-tap nodes [flags]    show which nodes are watched, which have gone quiet, which have gaps
  oom-tap status [flags]   show whether pods are marked, and what is left of the budgets
  oom-tap pause [flags]    stop all marking, by every replica, at once
  oom-tap resume [flags]   end the pause
  oom-tap restore [flags]  replace a state of budgets and pause that is refused by its newest valid revision
  oom-tap setup [flags]    make or update streams and bucket on the NATS of the config
  oom-tap keys DIR NODE... make an nkey for each node that has none in DIR, print the public ones for the chart
  oom-tap await [flags]    wait for a kill of the pod with --pod-uid to be published
  oom-tap victim FILE      use up the memory limit of this container, unless FILE exists: the victim of helm test

Installed as kubectl-oom it is also: kubectl oom pod NAME

Exit status: 0 done; 1 failed, or what await waits for did not come in time; 2 the command line is wrong;
3 no kill in the pod is known, but there may have been some: kills without an outcome, or gaps.

Flags of %s:
`

func main() { cli.Main("oom-tap", dispatch) }

// options are the flags.
type options struct {
	configPath string
	version    bool

	// Of tail alone.
	since    time.Duration
	noFollow bool
	scopes   []string
	node     string
	kills    bool
	outcomes bool
	// Of outcomes and pod alone.
	namespace string
	pod       string
	// Of await alone.
	podUID  string
	outcome bool
	timeout time.Duration
	// Of pause alone.
	reason   string
	duration time.Duration
	// Of restore alone.
	empty bool
	// Of nodes alone.
	failOn []string

	output string
	color  string
	count  int
}

// tailFlags registers the flags of tail.
func (o *options) tailFlags(flags *flag.FlagSet) {
	flags.Func("since", "begin with what was stored this `duration` ago, such as 1h, and go on live", func(s string) (err error) {
		// The flag package would only speak of a parse error, and a day is what people try first.
		if o.since, err = time.ParseDuration(s); err != nil || o.since < 0 {
			return errors.New("must be a duration such as 90s, 15m or 24h (a day is 24h)")
		}
		return nil
	})
	flags.BoolVar(&o.noFollow, "no-follow", false, "end with what is stored now, instead of going on live")
	flags.Func("scope", "only these `scopes`, separated by commas: "+scopeList(), func(s string) error {
		for scope := range strings.SplitSeq(s, ",") {
			scope = strings.TrimSpace(scope)
			if !slices.Contains(event.Scopes(), event.Scope(scope)) {
				return fmt.Errorf("%q is none of %s", scope, scopeList())
			}
			o.scopes = append(o.scopes, scope)
		}
		return nil
	})
	flags.StringVar(&o.node, "node", "", "only this `node`")
	flags.BoolVar(&o.kills, "kills", false, "kills alone: leave out tasks that were already exiting, what the other pods held, and gaps")
	flags.BoolVar(&o.outcomes, "outcomes", false, "kills with what oom-annotator made of them, one line each, once that is known, or after 5s without; tasks that were already exiting are left out")
	flags.StringVar(&o.namespace, "namespace", "", "with --outcomes, which this implies: only pods of this `namespace`")
	flags.StringVar(&o.pod, "pod", "", "likewise: only pods of this `name`")
	o.outputFlag(flags)
	flags.StringVar(&o.color, "color", "auto", "auto, always or never")
	flags.IntVar(&o.count, "count", 0, "end after `N` events; 0 sets no bound")
}

// durationFlag registers a flag that is a positive duration.
func durationFlag(flags *flag.FlagSet, to *time.Duration, name, usage string) {
	flags.Func(name, usage, func(s string) (err error) {
		if *to, err = time.ParseDuration(s); err != nil || *to <= 0 {
			return errors.New("must be a duration such as 90s, 15m or 24h (a day is 24h)")
		}
		return nil
	})
}

func (o *options) outputFlag(flags *flag.FlagSet) {
	flags.StringVar(&o.output, "output", "text", "text, or json: the stored bytes, one message a line")
}

// check returns what is wrong with the flags.
func (o *options) check() error {
	switch {
	case o.noFollow && o.since == 0:
		return errors.New("--no-follow shows what is stored: say with --since from when on")
	case o.count < 0:
		return fmt.Errorf("--count must not be negative, but is %d", o.count)
	case o.output != "text" && o.output != "json":
		return fmt.Errorf("--output must be text or json, not %q", o.output)
	case o.color != "auto" && o.color != "always" && o.color != "never":
		return fmt.Errorf("--color must be auto, always or never, not %q", o.color)
	}
	if o.node != "" {
		if _, err := event.NodeToken(o.node); err != nil {
			return fmt.Errorf("--node: %w", err)
		}
	}
	return nil
}

func dispatch(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	command := "tail"
	if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
		command, args = args[0], args[1:]
	}
	switch command {
	case "keys":
		return keys(args, stdout)
	case "victim":
		return victim(args, stdout)
	}
	o := options{output: "text", color: "auto"}
	flags := flag.NewFlagSet("oom-tap", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what is wrong is said once, by cli.Run
	flags.StringVar(&o.configPath, "config", "/etc/oom-tracer/config.yaml", "the config `file`: where NATS is")
	flags.BoolVar(&o.version, "version", false, "print the version and end")
	switch command {
	case "tail":
		o.tailFlags(flags)
	case "nodes":
		o.outputFlag(flags)
		o.failOnFlag(flags)
	case "status":
		o.outputFlag(flags)
	case "pod":
		o.since = 168 * time.Hour
		durationFlag(flags, &o.since, "since", "begin with what was stored this `duration` ago (default 168h)")
		for _, name := range []string{"namespace", "n"} {
			flags.StringVar(&o.namespace, name, o.namespace, "the pod's `namespace` (default: that of the kubeconfig's context)")
		}
		o.outputFlag(flags)
		// As kubectl has it the name may stand first.
		if len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			o.pod, args = args[0], args[1:]
		}
	case "await":
		o.since, o.timeout = 10*time.Minute, 2*time.Minute
		flags.StringVar(&o.podUID, "pod-uid", "", "the `UID` of the pod, metadata.uid")
		flags.BoolVar(&o.outcome, "outcome", false, "wait for what oom-annotator made of the kill, too")
		durationFlag(flags, &o.since, "since", "a kill that was published up to this `duration` ago counts (default 10m)")
		durationFlag(flags, &o.timeout, "timeout", "wait for this `duration` at most (default 2m)")
	case "pause":
		flags.StringVar(&o.reason, "reason", "", "why, in a `sentence`; every kill's outcome shows it")
		durationFlag(flags, &o.duration, "for", "go on by itself after this `duration`")
	case "restore":
		flags.BoolVar(&o.empty, "empty", false, "where no revision is valid: begin with no pause and no budget used")
	case "resume", "setup":
	default:
		return cli.Usagef("unknown command %q", command)
	}
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprintf(stdout, usage, command)
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		return nil
	case err != nil:
		return cli.Usagef("%w", err)
	}
	rest := flags.Args()
	if command == "pod" && o.pod == "" && len(rest) > 0 {
		o.pod, rest = rest[0], rest[1:]
	}
	if len(rest) > 0 {
		return cli.Usagef("unexpected argument %q", rest[0])
	}
	if err := o.check(); err != nil {
		return cli.Usagef("%w", err)
	}
	switch {
	case o.version:
	case command == "pod" && o.pod == "":
		return cli.Usagef("pod needs the pod's name")
	case command == "await" && o.podUID == "":
		return cli.Usagef("await needs --pod-uid")
	case command == "pause" && strings.TrimSpace(o.reason) == "":
		return cli.Usagef("pause needs --reason: who is paged meanwhile will ask")
	case len(o.reason) > maxReason:
		return cli.Usagef("--reason must have at most %d bytes", maxReason)
	}
	if command == "pod" && o.namespace == "" {
		var err error
		if o.namespace, err = kubeNamespace(); err != nil {
			return err
		}
	}
	o.outcomes = o.outcomes || o.namespace != "" || o.pod != ""
	if o.version {
		fmt.Fprintf(stdout, "oom-tap %s\n", obs.Version())
		return nil
	}

	cfg, err := config.Load(o.configPath)
	if err != nil {
		return err
	}
	// Not cfg.Log, which is the daemon's: here only what disturbs the tail is of interest.
	log, err := obs.NewLogger(stderr, config.Log{Level: "warn", Format: "text"})
	if err != nil {
		return err
	}
	// await bounds its own time, in which NATS may come.
	conn, err := bus.Connect(ctx, cfg.NATS, bus.Options{Name: "oom-tap", Background: command == "await"}, log)
	if err != nil {
		return err
	}
	defer conn.Close()
	if command == "setup" {
		if err := bus.EnsureStreams(ctx, conn, cfg.NATS.Stream); err != nil {
			return err
		}
		fmt.Fprintf(stdout, "streams %s and %s and bucket %s are as the config says\n", event.StreamName, event.NodesStreamName, bus.BucketName)
		return nil
	}
	switch command {
	case "nodes":
		return nodes(ctx, conn, o, stdout, stderr)
	case "await":
		return await(ctx, conn, o, stdout, stderr)
	case "pod":
		return pod(ctx, conn, o, stdout, stderr)
	case "pause", "resume", "status", "restore":
		return brake(ctx, conn, command, cfg, o, stdout)
	}
	return tail(ctx, conn, o, stdout, stderr)
}

// kubeNamespace is the namespace that kubectl would use.
func kubeNamespace() (string, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.WarnIfAllMissing = false
	namespace, _, err := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, nil).Namespace()
	switch {
	case err == nil:
		return namespace, nil
	case clientcmd.IsEmptyConfig(err):
		return "default", nil
	}
	return "", fmt.Errorf("read the namespace of the kubeconfig's context: %w (--namespace names one)", err)
}

func scopeList() string {
	var names []string
	for _, s := range event.Scopes() {
		names = append(names, string(s))
	}
	return strings.Join(names, ", ")
}

// subjects are the patterns that the options select. They do not overlap.
func subjects(o options) ([]string, error) {
	kinds := []event.Kind{event.KindKill}
	if !o.kills && !o.outcomes {
		kinds = append(kinds, event.KindExiting)
	}
	if !o.kills {
		kinds = append(kinds, event.KindNeighbours)
	}
	scopes := o.scopes
	if len(scopes) == 0 {
		scopes = []string{""}
	}
	var patterns []string
	for _, kind := range kinds {
		for _, scope := range scopes {
			pattern, err := event.Filter(kind, scope, o.node)
			if err != nil {
				return nil, err
			}
			patterns = append(patterns, pattern)
		}
	}
	if !o.kills {
		// Whatever is selected: what is missing may be just that.
		pattern, err := event.Filter(event.KindGap, "", o.node)
		if err != nil {
			return nil, err
		}
		patterns = append(patterns, pattern)
	}
	if o.outcomes {
		pattern, err := event.Filter(event.KindOutcome, "", o.node)
		if err != nil {
			return nil, err
		}
		patterns = append(patterns, pattern)
	}
	slices.Sort(patterns)
	return slices.Compact(patterns), nil
}

// tail prints events until --count is reached, ctx ends or, with --no-follow, what was stored is shown.
// Only in the last case is it an error when ctx ends first.
func tail(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	patterns, err := subjects(o)
	if err != nil {
		return err
	}
	tailOptions := bus.TailOptions{Subjects: patterns, Follow: !o.noFollow}
	if o.since > 0 {
		tailOptions.Since = time.Now().Add(-o.since)
	}
	terminal := isTerminal(stdout)
	plain := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
	table := text.Table{Color: o.color == "always" || o.color == "auto" && terminal && !plain}
	if o.outcomes {
		err := outcomes(ctx, conn, o, tailOptions, &table, stdout, stderr)
		if errors.Is(err, errEnough) {
			return nil
		}
		return missingStream(err, o)
	}
	seen := newRecent(10000)
	shown := 0
	err = bus.Tail(ctx, conn, tailOptions, func(m bus.Stored) error {
		shownAs, id, err := parse(m, &table)
		if err != nil {
			skip(stderr, m, err)
			return nil
		}
		// The stream drops doubles within its window only.
		if !seen.add(id) {
			return nil
		}
		line := []byte(shownAs)
		if o.output == "json" {
			line = rendered(m.Data, terminal)
		} else if shownAs == "" {
			return nil
		}
		switch _, err := fmt.Fprintf(stdout, "%s\n", line); {
		case errors.Is(err, syscall.EPIPE):
			return errEnough
		case err != nil:
			return fmt.Errorf("write: %w", err)
		}
		if shown++; shown == o.count {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return missingStream(err, o)
}

// missingStream says what to do about a stream that is not there; other errors stay as they are.
func missingStream(err error, o options) error {
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("%w: make it with: oom-tap setup --config %s", err, o.configPath)
	}
	return err
}

// errEnough ends the tail: --count is reached, or whoever read our output (head, grep -m) has gone.
var errEnough = errors.New("enough")

// parse reads a message, as a line of the table; an empty one where there is nothing to say to people. Its node is the one that the server let the publisher speak
// for, which is in the subject: one node's tracer must not report kills of another.
func parse(m bus.Stored, table *text.Table) (line, id string, err error) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return "", "", err
	}
	if kind == event.KindGap {
		g, err := event.ParseGap(m.Data)
		if err == nil {
			err = sameNode(g.Node.Name, node)
		}
		if err != nil {
			return "", "", err
		}
		if !g.Missing() {
			return "", g.ID, nil
		}
		return table.GapLine(&g), g.ID, nil
	}
	if kind == event.KindNeighbours {
		n, err := event.ParseNeighbours(m.Data)
		if err == nil {
			err = sameNode(n.Node.Name, node)
		}
		if err != nil {
			return "", "", err
		}
		return table.NeighboursLine(&n), n.ID, nil
	}
	e, err := event.Parse(m.Data)
	if err == nil {
		err = sameNode(e.Node.Name, node)
	}
	if err != nil {
		return "", "", err
	}
	return table.Line(&e), e.ID, nil
}

func sameNode(payload, subject string) error {
	if payload != subject {
		return fmt.Errorf("node.name is %q, the subject's node %q", payload, subject)
	}
	return nil
}

// skip says that a message is not one of ours.
func skip(stderr io.Writer, m bus.Stored, err error) {
	fmt.Fprintf(stderr, "oom-tap: message %d on %s is skipped: %s\n", m.Seq, text.Printable(m.Subject), text.Printable(err.Error()))
}

// rendered is a stored message as one line of JSON.
func rendered(data []byte, terminal bool) []byte {
	if terminal {
		return text.JSON(data)
	}
	return oneLine(data)
}

// oneLine is the stored bytes, unless somebody else published JSON of several lines.
func oneLine(data []byte) []byte {
	var compact bytes.Buffer
	if !bytes.ContainsAny(data, "\r\n") || json.Compact(&compact, data) != nil {
		return data
	}
	return compact.Bytes()
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// recent remembers the last so many IDs.
type recent struct {
	ids   map[string]struct{}
	order []string
	next  int
}

func newRecent(size int) *recent {
	return &recent{ids: make(map[string]struct{}, size), order: make([]string, size)}
}

// add reports whether id is new.
func (r *recent) add(id string) bool {
	if _, ok := r.ids[id]; ok {
		return false
	}
	delete(r.ids, r.order[r.next])
	r.order[r.next] = id
	r.ids[id] = struct{}{}
	r.next = (r.next + 1) % len(r.order)
	return true
}
