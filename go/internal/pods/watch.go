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
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
)

const (
	// pageSize is the number of pods in a page of a list, some 10 MB.
	pageSize = 250
	// A watch lasts between watchTime and twice that. HTTP/2 pings notice a server that is gone sooner.
	watchTime  = 5 * time.Minute
	backoffMin = 200 * time.Millisecond
	backoffMax = 10 * time.Second
)

// Watcher keeps a Store in sync with the cluster.
//
// It streams the pods if the server can (WatchList, KEP-3157; from Kubernetes 1.34 on), else it lists them by pages.
// client-go's Reflector does the same, but holds every page of a list until the last one: 150,000 whole pods are more
// than a gigabyte. It also lists again after every watch that ends with a 5xx. Here each pod is reduced at once, and
// only a resourceVersion that the server no longer keeps leads to another list.
type Watcher struct {
	client *Client
	store  *Store
	terms  Terms
	log    *slog.Logger

	// Used by Run only.
	version string              // to watch from; empty: read all pods first
	next    string              // the continue token of a list that is not complete
	uids    map[string]struct{} // in that list so far; nil if the store was empty

	mu      sync.Mutex
	errors  uint64
	failing error
	synced  chan struct{}
	once    sync.Once
}

// NewWatcher makes a watcher. Nothing is requested from the server before Run.
func NewWatcher(c *Client, s *Store, t Terms, log *slog.Logger) *Watcher {
	return &Watcher{client: c, store: s, terms: t, log: log, failing: errors.New("pods are not listed yet"), synced: make(chan struct{})}
}

// Synced is closed after all pods were listed once.
func (w *Watcher) Synced() <-chan struct{} { return w.synced }

// Failing returns why the store may be out of date, and nil if it is not.
func (w *Watcher) Failing() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.failing
}

// Errors is the number of failed attempts to list or watch.
func (w *Watcher) Errors() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.errors
}

// Run lists and watches until ctx ends. It tries again after every error.
func (w *Watcher) Run(ctx context.Context) {
	failures := 0
	for {
		err := w.follow(ctx)
		if w.version == "" && (apierrors.IsInvalid(err) || apierrors.IsBadRequest(err)) {
			err = w.list(ctx) // no WatchList on this server
		}
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
		if after, ok := apierrors.SuggestsClientDelay(err); ok {
			d = max(d, min(time.Duration(after)*time.Second, backoffMax))
		}
		select {
		case <-time.After(d/2 + rand.N(d/2)):
		case <-ctx.Done():
			return
		}
	}
}

// note logs once why the pods cannot be watched, and when they can be again.
func (w *Watcher) note(err error) {
	w.mu.Lock()
	before := w.failing
	if w.failing = err; err != nil {
		w.errors++
	}
	w.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		w.log.Warn("could not watch the pods, will try again", "error", err)
	case err == nil && before != nil:
		w.log.Info("watching pods", "pods", w.store.Len())
	}
}

// list lists all pods of one resourceVersion, page by page. After an error the next call continues with the page that failed,
// unless the server no longer keeps that version.
func (w *Watcher) list(ctx context.Context) error {
	for {
		page, err := w.client.list(ctx, w.next, pageSize)
		if expired(err) {
			w.next = ""
		}
		if err != nil {
			return err
		}
		if w.next == "" {
			w.begin()
		}
		for i := range page.Items {
			w.set(w.terms.Read(&page.Items[i]))
		}
		if w.next = page.Continue; w.next == "" {
			w.listed(page.ResourceVersion)
			return nil
		}
	}
}

// begin prepares for a complete list.
func (w *Watcher) begin() {
	if w.next, w.uids = "", nil; w.store.Len() > 0 {
		w.uids = map[string]struct{}{}
	}
}

func (w *Watcher) set(p *Pod) {
	w.store.Set(p)
	if w.uids != nil {
		w.uids[p.UID] = struct{}{}
	}
}

// listed completes a list. Pods in the store that were not listed are gone.
func (w *Watcher) listed(version string) {
	if w.uids != nil {
		w.store.Retain(w.uids)
	}
	w.version, w.uids = version, nil
	w.once.Do(func() { close(w.synced) })
}

// follow updates the store until the watch ends. Without a resourceVersion the server streams all pods first.
func (w *Watcher) follow(ctx context.Context) error {
	lasts := watchTime + rand.N(watchTime)
	ctx, cancel := context.WithTimeout(ctx, lasts+listTimeout) // in case the server does not end the watch
	defer cancel()
	began := time.Now()
	stream, err := w.client.watch(ctx, w.version, lasts)
	if expired(err) {
		w.version = ""
	}
	if err != nil {
		return err
	}
	defer stream.Stop()
	if w.version == "" {
		w.begin()
	} else {
		w.note(nil)
	}
	for e := range stream.ResultChan() {
		pod, ok := e.Object.(*corev1.Pod)
		switch {
		case e.Type == watch.Error:
			err := apierrors.FromObject(e.Object)
			if expired(err) {
				w.version = ""
			}
			return fmt.Errorf("watch pods: %w", err)
		case !ok:
			return fmt.Errorf("watch pods: received %T instead of a pod", e.Object)
		case e.Type == watch.Added, e.Type == watch.Modified:
			w.set(w.terms.Read(pod))
		case e.Type == watch.Deleted:
			p := w.terms.Read(pod)
			w.store.Delete(p)
			delete(w.uids, p.UID)
		}
		switch {
		case w.version != "":
			w.version = pod.ResourceVersion
		case pod.Annotations[metav1.InitialEventsAnnotationKey] == "true": // a bookmark
			w.listed(pod.ResourceVersion)
			w.note(nil)
		}
	}
	switch {
	case w.version == "":
		return errors.New("watch pods: the API server ended the stream before it had sent all pods")
	case time.Since(began) < time.Second:
		return errors.New("watch pods: the API server ends the watch at once")
	}
	return nil
}

// expired reports whether the server no longer keeps the requested version.
func expired(err error) bool {
	return apierrors.IsResourceExpired(err) || apierrors.IsGone(err)
}
