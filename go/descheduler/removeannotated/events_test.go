package removeannotated

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/go-logr/logr"
	"github.com/go-logr/logr/funcr"
	v1 "k8s.io/api/core/v1"
	eventsv1 "k8s.io/api/events/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"
	"k8s.io/klog/v2"

	frameworktypes "sigs.k8s.io/descheduler/pkg/framework/types"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// The passing of time and what a server forgets.
func TestEventWriter(t *testing.T) {
	client := fake.NewClientset()
	now := time.Unix(1000, 0)
	s := eventWriter{instance: "host-1", now: func() time.Time { return now }, pods: map[types.UID]*lastEvent{}}
	web := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: strings.Repeat("w-", 126) + "w", UID: "1"}}
	cart := &v1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "cart", UID: "2"}}
	write := func(pod *v1.Pod, why string) {
		t.Helper()
		if err := s.write(t.Context(), client, pod, why); err != nil {
			t.Fatal(err)
		}
		now = now.Add(time.Minute)
	}
	// count is how many Events there are, and how many requests it took.
	count := func(events, writes int) []eventsv1.Event {
		t.Helper()
		n := len(client.Actions())
		list, err := client.EventsV1().Events("shop").List(t.Context(), metav1.ListOptions{})
		if err != nil || len(list.Items) != events || n != writes {
			t.Errorf("%d events, %d writes, %v; want %d, %d", len(list.Items), n, err, events, writes)
		}
		client.ClearActions()
		return list.Items
	}
	write(web, strings.Repeat("é", 1000))
	write(cart, "a budget")
	for _, e := range count(2, 2) {
		if len(validation.IsDNS1123Subdomain(e.Name)) > 0 || !utf8.ValidString(e.Note) || len(e.Note) > maxNote || !strings.HasPrefix(e.Note, "marked pod stays: ") || e.Regarding.UID != "1" && e.Regarding.UID != "2" {
			t.Errorf("event %+v", e)
		}
	}
	s.endCycle()
	// The same for long is one Event, which is kept from being forgotten. Another reason is another one.
	for range 12 {
		write(cart, "a budget")
	}
	if e := count(2, 1)[0]; e.Series == nil || e.Series.Count != 11 {
		t.Errorf("series %+v", e.Series)
	}
	write(cart, "a filter")
	write(cart, "a budget")
	count(4, 2)
	// The server has forgotten it.
	now = now.Add(time.Hour)
	if err := client.Tracker().Delete(eventsv1.SchemeGroupVersion.WithResource("events"), "shop", s.pods["2"].name); err != nil {
		t.Fatal(err)
	}
	write(cart, "a budget")
	count(4, 2)
	// A pod without a call in a cycle is removed after it, and no other pod is.
	s.endCycle()
	if s.pods["1"] != nil || s.pods["2"] == nil {
		t.Errorf("remembered %v", s.pods)
	}
	s.endCycle()
	if len(s.pods) != 0 {
		t.Errorf("remembered %v", s.pods)
	}
	client.PrependReactor("create", "events", func(clienttesting.Action) (bool, runtime.Object, error) {
		return true, nil, errors.New("no")
	})
	if err := s.write(t.Context(), client, cart, "a budget"); err == nil || s.pods["2"] != nil {
		t.Errorf("error %v, remembered %v", err, s.pods)
	}
}

// A real server takes both: the Event, and that it goes on.
func TestEventWriterServer(t *testing.T) {
	c := kubetest.Start(t)
	c.Namespace("shop")
	pod := c.Pod("shop", "web", "node-1")
	now := time.Now()
	s := eventWriter{instance: "host-1", now: func() time.Time { return now }, pods: map[types.UID]*lastEvent{}}
	for range 3 {
		if err := s.write(t.Context(), c.Client, pod, "a budget"); err != nil {
			t.Fatal(err)
		}
		now = now.Add(refresh)
	}
	list, err := c.Client.EventsV1().Events("shop").List(t.Context(), metav1.ListOptions{FieldSelector: "reason=EvictionFailed"})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%d events, %v", len(list.Items), err)
	}
	e := list.Items[0]
	if e.Note != "marked pod stays: a budget" || e.Regarding.UID != pod.UID || e.Series == nil || e.Series.Count != 3 ||
		!e.Series.LastObservedTime.Equal(&metav1.MicroTime{Time: now.Add(-refresh).Truncate(time.Microsecond)}) {
		t.Errorf("event %+v", e)
	}
}

type talker struct{ logger klog.Logger }

func (talker) Name() string { return "talker" }

// What a filter logs is captured at any verbosity, and the log does not show more than before.
func TestReasons(t *testing.T) {
	var shown []string
	sink := funcr.New(func(_, args string) { shown = append(shown, args) }, funcr.Options{Verbosity: 1}).GetSink()
	reasons := &Reasons{}
	build := reasons.Wrap(func(ctx context.Context, args runtime.Object, handle frameworktypes.Handle) (frameworktypes.Plugin, error) {
		return talker{klog.FromContext(ctx).WithValues("plugin", "talker").WithName("x")}, nil
	})
	plugin, err := build(klog.NewContext(t.Context(), logr.New(sink)), nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	logger := plugin.(talker).logger
	for _, test := range []struct {
		filter func() bool
		ok     bool
		why    string
	}{
		{func() bool { return false }, false, ""},
		{func() bool {
			logger.V(4).Info("Pod fails the following checks", "pod", "web", "checks", "[it is a mirror pod, it is static]")
			return false
		}, false, "it is a mirror pod, it is static"},
		{func() bool { logger.Info("pod does not fit", "pod", "web"); return false }, false, "pod does not fit"},
		{func() bool { logger.Error(errors.New("no index"), "unable to list"); return false }, false, "unable to list: no index"},
		{func() bool { logger.Info("all is well"); return true }, true, ""},
		{func() bool { return false }, false, ""}, // an earlier message is not its reason
	} {
		if why, ok := reasons.capture(test.filter); why != test.why || ok != test.ok {
			t.Errorf("%t, %q, want %t, %q", ok, why, test.ok, test.why)
		}
	}
	if len(shown) != 3 || !strings.Contains(shown[0], "does not fit") || !strings.Contains(fmt.Sprint(shown), `"plugin"="talker"`) {
		t.Errorf("shown: %q", shown)
	}
}
