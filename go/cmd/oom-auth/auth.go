package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/callout"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

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

// run answers until ctx ends, or the connection to NATS is closed permanently.
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
