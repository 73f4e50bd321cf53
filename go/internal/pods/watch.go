package pods

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	// pageSize bounds what is decoded at a time when all pods are listed: some 10 MB.
	pageSize = 250
	// watchTime is how long one watch lasts, and up to twice that. A server that went away without a word
	// is noticed sooner, by the pings of HTTP/2.
	watchTime  = 5 * time.Minute
	backoffMin = 200 * time.Millisecond
	backoffMax = 10 * time.Second
)

// asStatus finds the API server's own answer in an error.
func asStatus(err error, status *apierrors.APIStatus) bool { return errors.As(err, status) }

// Watcher keeps a Store like the cluster.
//
// client-go's reflector would do the same, but holds every page of its first list until the last one has
// come: 150,000 whole pods are more than a gigabyte. Here each page is reduced when it is there.
type Watcher struct {
	client *Client
	store  *Store
	terms  Terms
	log    *slog.Logger

	mu      sync.Mutex
	failing error
	synced  chan struct{}
	once    sync.Once
}

// NewWatcher makes a watcher. Nothing is asked of the server before Run.
func NewWatcher(c *Client, s *Store, t Terms, log *slog.Logger) *Watcher {
	return &Watcher{client: c, store: s, terms: t, log: log, failing: errors.New("pods are not listed yet"), synced: make(chan struct{})}
}

// Synced is closed when all pods were listed once.
func (w *Watcher) Synced() <-chan struct{} { return w.synced }

// Failing is why the store may not be like the cluster now, and nil when it follows it.
func (w *Watcher) Failing() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failing
}

// Run lists and watches until ctx ends, whatever the server answers.
func (w *Watcher) Run(ctx context.Context) {
	version, failures := "", 0
	for {
		err := w.step(ctx, &version)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			failures = 0
			continue
		}
		failures++
		w.note(err)
		d := backoffMax
		if failures < 10 {
			d = min(backoffMin<<(failures-1), backoffMax)
		}
		if after, ok := apierrors.SuggestsClientDelay(unwrapStatus(err)); ok {
			d = max(d, min(time.Duration(after)*time.Second, backoffMax))
		}
		select {
		case <-time.After(d/2 + rand.N(d/2)):
		case <-ctx.Done():
			return
		}
	}
}

// unwrapStatus is the API server's own error within err, else err.
func unwrapStatus(err error) error {
	var status apierrors.APIStatus
	if asStatus(err, &status) {
		if e, ok := status.(error); ok {
			return e
		}
	}
	return err
}

// note says once why the cluster cannot be followed, and when it can be again.
func (w *Watcher) note(err error) {
	w.mu.Lock()
	before := w.failing
	w.failing = err
	w.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		w.log.Warn("pods cannot be followed, will go on trying", "error", err)
	case err == nil && before != nil:
		w.log.Info("pods are followed", "pods", w.store.Len())
	}
}

// step lists, where there is no version to go on from, and watches. It returns nil when a watch ended as it
// should.
func (w *Watcher) step(ctx context.Context, version *string) error {
	if *version == "" {
		v, err := w.list(ctx)
		if err != nil {
			return err
		}
		*version = v
		w.once.Do(func() { close(w.synced) })
	}
	err := w.follow(ctx, version)
	if apierrors.IsResourceExpired(unwrapStatus(err)) || apierrors.IsGone(unwrapStatus(err)) {
		*version = "" // the next step lists
	}
	return err
}

// list brings the store to the state of one version.
func (w *Watcher) list(ctx context.Context) (version string, err error) {
	for next, uids := "", map[string]struct{}{}; ; {
		page, err := w.client.list(ctx, next, pageSize)
		if err != nil {
			// A list that takes longer than the server keeps its version begins again with the next step.
			return "", err
		}
		for i := range page.Items {
			p := w.terms.Read(&page.Items[i])
			w.store.Set(p)
			uids[p.UID] = struct{}{}
		}
		if next = page.Continue; next == "" {
			w.store.Retain(uids)
			return page.ResourceVersion, nil
		}
	}
}

// follow watches from a version on and keeps it up to date.
func (w *Watcher) follow(ctx context.Context, version *string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	began := time.Now()
	stream, err := w.client.watch(ctx, *version, watchTime+rand.N(watchTime))
	if err != nil {
		return err
	}
	defer stream.Stop()
	w.note(nil)
	for e := range stream.ResultChan() {
		switch pod, ok := e.Object.(*corev1.Pod); {
		case e.Type == watch.Error:
			return fmt.Errorf("watch pods: %w", apierrors.FromObject(e.Object))
		case !ok:
			return fmt.Errorf("watch pods: %T came where a pod was due", e.Object)
		default:
			switch e.Type {
			case watch.Added, watch.Modified:
				w.store.Set(w.terms.Read(pod))
			case watch.Deleted:
				w.store.Delete(w.terms.Read(pod))
			}
			*version = pod.ResourceVersion
		}
	}
	if time.Since(began) < time.Second {
		return errors.New("watch pods: the API server ends the watch at once")
	}
	return nil
}
