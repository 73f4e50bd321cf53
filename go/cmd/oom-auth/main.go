// Command oom-auth tells NATS servers which node a tracer may publish for, by the token that it shows.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"k8s.io/klog/v2"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/callout"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

const usage = `oom-auth answers NATS servers that ask about a client with a token (auth callout): the client may publish for the node
that the token's pod runs on.

Usage:
  oom-auth [flags]                 answer until SIGTERM or SIGINT; all replicas share the questions
  oom-auth issuer SECRET CONFIG    write the public keys that belong to the secret in the file SECRET into the file
                                   CONFIG, which the server's auth_callout block includes
  oom-auth reload PIDFILE DIR...   have the nats-server of PIDFILE read its configuration again when a file in a DIR changed:
                                   it does not see by itself that certificates were renewed

Exit status: 0 done; 1 failed; 2 the command line is wrong.

Flags:
`

const name = "oom-auth"

func main() { cli.Main(name, dispatch) }

func dispatch(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	if len(args) > 0 && args[0] == "issuer" {
		if len(args) != 3 {
			return cli.Usagef("issuer needs two files")
		}
		return issuer(args[1], args[2])
	}
	if len(args) > 0 && args[0] == "reload" {
		if len(args) < 3 {
			return cli.Usagef("reload needs a file and a directory")
		}
		return reload(ctx, args[1], args[2:], 10*time.Second, slog.New(slog.NewTextHandler(stderr, nil)))
	}
	flags := flag.NewFlagSet(name, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // what is wrong is said once, by cli.Run
	configPath := flags.String("config", "/etc/oom-tracer/config.yaml", "the config `file`")
	kubeconfig := flags.String("kubeconfig", "", "the kubeconfig `file` (default: auth.kubeconfig in the config, the service account of the pod)")
	version := flags.Bool("version", false, "print the version and end")
	switch err := flags.Parse(args); {
	case errors.Is(err, flag.ErrHelp):
		fmt.Fprint(stdout, usage)
		flags.SetOutput(stdout)
		flags.PrintDefaults()
		return nil
	case err != nil:
		return cli.Usagef("%w", err)
	case flags.NArg() > 0:
		return cli.Usagef("unexpected argument %q", flags.Arg(0))
	}
	if *version {
		fmt.Fprintf(stdout, "oom-auth %s\n", obs.Version())
		return nil
	}
	cfg, err := config.Load(*configPath)
	if err != nil {
		return err
	}
	if *kubeconfig != "" {
		if cfg.Auth.Kubeconfig, err = filepath.Abs(*kubeconfig); err != nil {
			return fmt.Errorf("--kubeconfig: %w", err)
		}
	}
	if cfg.NATS.URL == "" || cfg.Auth.IssuerFile == "" {
		return fmt.Errorf("%s: needs nats.url and auth.issuer_file", *configPath)
	}
	log, err := obs.NewLogger(stderr, cfg.Log)
	if err != nil {
		return err
	}
	klog.SetSlogLogger(log) // client-go's
	return cli.Logged(log, run(ctx, cfg, log))
}

// readKeys makes the keys that belong to the secret in a file.
func readKeys(file string) (*callout.Keys, error) {
	secret, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("read the issuer's secret: %w", err)
	}
	keys, err := callout.DeriveKeys(strings.TrimRight(string(secret), "\r\n"))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return keys, nil
}

func issuer(secretFile, configFile string) error {
	keys, err := readKeys(secretFile)
	if err != nil {
		return err
	}
	if err := os.WriteFile(configFile, []byte(keys.Config()), 0o644); err != nil { // nothing in it is secret
		return fmt.Errorf("write the issuer's public keys: %w", err)
	}
	return nil
}

// run answers until ctx ends, or NATS' connection is closed for good.
func run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	keys, err := readKeys(cfg.Auth.IssuerFile)
	if err != nil {
		return err
	}
	api, err := pods.Config(cfg.Auth.Kubeconfig)
	if err != nil {
		return err
	}
	reviewer, err := callout.NewTokenReviewer(api, cfg.Auth.ServiceAccount, cfg.Auth.Audience, name+"/"+obs.Version().Version)
	if err != nil {
		return err
	}
	conn, err := bus.Connect(ctx, cfg.NATS, bus.Options{Name: name, Background: true}, log)
	if err != nil {
		return err
	}
	defer conn.Close()
	service := callout.New(keys, reviewer, log)
	registry := obs.NewRegistry(name)
	registry.MustRegister(service)
	server, err := obs.Listen(cfg.Auth.Listen, registry, obs.Checks{Ready: map[string]obs.Check{
		"nats": func(context.Context) error {
			if !conn.Connected() {
				return bus.ErrDisconnected
			}
			return nil
		},
		"reviews": func(context.Context) error { return service.Failing() },
	}}, log)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var rest sync.WaitGroup
	rest.Go(func() {
		if err := server.Serve(ctx); err != nil {
			cancel(err)
		}
	})
	rest.Go(func() {
		select {
		case <-conn.Closed():
			cancel(fmt.Errorf("nats connection: %w", bus.ErrClosed))
		case <-ctx.Done():
		}
	})
	log.Info("answering nats servers", "version", obs.Version().Version, "issuer", keys.Issuer, "service_account", cfg.Auth.ServiceAccount, "audience", cfg.Auth.Audience)
	err = service.Serve(ctx, conn.NATS())
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = errors.Join(err, cause)
	}
	cancel(nil)
	rest.Wait()
	log.Info("stopped")
	return err
}
