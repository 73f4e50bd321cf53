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
// It streams the pods where the server can (WatchList, KEP-3157; from Kubernetes 1.34 on), and lists them by pages
// where it cannot. client-go's reflector does the same, but holds every page of a list until the last one has come:
// 150,000 whole pods are more than a gigabyte. It also lists anew after every watch that a proxy or a server in
// trouble ends with a 5xx. Here each pod is reduced when it comes, and only a version that the server no longer
// keeps leads to another list.
type Watcher struct {
	client *Client
	store  *Store
	terms  Terms
	log    *slog.Logger

	// Of Run alone.
	version string              // to watch from; empty: all pods are to be read first
	next    string              // the continue token of a list that is not complete
	uids    map[string]struct{} // what that list has had so far; nil where the store was empty

	mu      sync.Mutex
	errors  uint64
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

// Errors is how many attempts to list or watch have failed.
func (w *Watcher) Errors() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.errors
}

// Run lists and watches until ctx ends, whatever the server answers.
func (w *Watcher) Run(ctx context.Context) {
	failures := 0
	for {
		err := w.follow(ctx)
		if w.version == "" && (apierrors.IsInvalid(unwrapStatus(err)) || apierrors.IsBadRequest(unwrapStatus(err))) {
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
	if w.failing = err; err != nil {
		w.errors++
	}
	w.mu.Unlock()
	switch {
	case err != nil && (before == nil || before.Error() != err.Error()):
		w.log.Warn("pods cannot be followed, will go on trying", "error", err)
	case err == nil && before != nil:
		w.log.Info("pods are followed", "pods", w.store.Len())
	}
}

// list brings the store to the state of one version, page by page. After an error the next call goes on with the page
// that failed, unless the server no longer keeps that version.
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

// begin begins with the first pod of all.
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

// listed notes that the store has all pods of a version. What it had before, and was not listed, is gone.
func (w *Watcher) listed(version string) {
	if w.uids != nil {
		w.store.Retain(w.uids)
	}
	w.version, w.uids = version, nil
	w.once.Do(func() { close(w.synced) })
}

// follow keeps the store up to date until the watch ends. Where no version is known the server first streams all pods.
func (w *Watcher) follow(ctx context.Context) error {
	lasts := watchTime + rand.N(watchTime)
	ctx, cancel := context.WithTimeout(ctx, lasts+listTimeout) // for a server that does not end it
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
			return fmt.Errorf("watch pods: %T came where a pod was due", e.Object)
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
		case pod.Annotations[metav1.InitialEventsAnnotationKey] == "true": // of a bookmark
			w.listed(pod.ResourceVersion)
			w.note(nil)
		}
	}
	switch {
	case w.version == "":
		return errors.New("watch pods: the API server ended the stream before all pods had come")
	case time.Since(began) < time.Second:
		return errors.New("watch pods: the API server ends the watch at once")
	}
	return nil
}

// expired tells whether the server no longer keeps the version that was asked for.
func expired(err error) bool {
	return apierrors.IsResourceExpired(unwrapStatus(err)) || apierrors.IsGone(unwrapStatus(err))
}
