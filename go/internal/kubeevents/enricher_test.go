package kubeevents

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

func find(_, uid, _ string) (pods.Found, error) {
	switch uid {
	case "uid-cart":
		return pods.Found{Pod: &pods.Pod{Namespace: "shop", Name: "cart", UID: uid, Request: 64 << 20}}, nil
	case "uid-web":
		return pods.Found{Pod: &pods.Pod{Namespace: "shop", Name: "web", UID: uid, Request: 512 << 20}}, nil
	case "uid-api":
		return pods.Found{Pod: &pods.Pod{Namespace: "shop", Name: "api", UID: uid}}, nil
	case "hash": // of a static pod
		return pods.Found{Pod: &pods.Pod{Namespace: "kube-system", Name: "etcd", UID: "uid-etcd"}}, nil
	}
	return pods.Found{}, pods.ErrUnknown
}

// The victims of an incident are none of the others.
func TestAfter(t *testing.T) {
	cart, web := victimKill{}, victimKill{}
	cart.e, cart.o = nodeKill("cart", 1)
	web.e, web.o = nodeKill("web", 2)
	static := victimKill{}
	static.e, static.o = nodeKill("etcd", 3)
	static.e.Container.PodUID = "" // found by its container
	uses := func(uid string, mib uint64) event.PodMemory { return event.PodMemory{PodUID: uid, Usage: mib << 20} }
	hit := func(uid string, mib uint64) event.PodMemory {
		p := uses(uid, mib)
		p.Victim = true
		return p
	}
	for _, tt := range []struct {
		name       string
		kills      []victimKill
		pods       []event.PodMemory
		incomplete bool
		want       string
	}{
		{"the others", []victimKill{cart}, []event.PodMemory{uses("uid-web", 3072), uses("uid-cart", 1), uses("uid-api", 1), uses("x\x1b", 1), uses("uid-5", 1)}, false,
			`other pods then used: shop/web 3.0 GiB (request 512.0 MiB), shop/api 1.0 MiB (no request), pod x\x1b 1.0 MiB`},
		{"its own uses most", []victimKill{cart}, []event.PodMemory{uses("uid-cart", 3072), uses("uid-api", 1)}, false,
			"its own pod still used 3.0 GiB (request 64.0 MiB); other pods then used: shop/api 1.0 MiB (no request)"},
		{"nobody else", []victimKill{cart}, []event.PodMemory{uses("uid-cart", 3072)}, false, "its own pod still used 3.0 GiB (request 64.0 MiB)"},
		{"another victim, which this replica does not know", []victimKill{cart}, []event.PodMemory{hit("uid-web", 3072), hit("uid-cart", 2), uses("uid-api", 1)}, false,
			"other pods then used: shop/api 1.0 MiB (no request)"},
		{"two victims", []victimKill{cart, web}, []event.PodMemory{uses("uid-cart", 3), uses("uid-web", 2), uses("uid-api", 1)}, false,
			"other pods then used: shop/api 1.0 MiB (no request)"},
		{"a static pod", []victimKill{static}, []event.PodMemory{uses("uid-api", 2), uses("hash", 1)}, false, "other pods then used: shop/api 2.0 MiB (no request)"},
		{"not all", []victimKill{cart}, []event.PodMemory{uses("uid-api", 2)}, true, "other pods then used: shop/api 2.0 MiB (no request); not every pod could be read"},
		{"none", []victimKill{cart}, []event.PodMemory{uses("uid-web", 0)}[:0], true, ""},
	} {
		n := NewEnricher(nil, slog.New(slog.DiscardHandler))
		n.Find = find
		if got := n.after(tt.kills, &event.Neighbours{Pods: tt.pods, Incomplete: tt.incomplete}); got != tt.want {
			t.Errorf("%s:\n%s, want\n%s", tt.name, got, tt.want)
		}
	}
}

// The Event of a node's kill is there at once, and says more when the tracer does.
func TestEnricher(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		n := NewEnricher(r, slog.New(slog.DiscardHandler))
		var stored []byte
		var looks int
		var published []event.Outcome
		n.Find = find
		n.Last = func(_ context.Context, subject string) ([]byte, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if looks++; subject != "oom.v1.neighbours.global.node-1" {
				t.Errorf("read %s", subject)
			}
			if stored == nil {
				return nil, errors.New("no message")
			}
			return stored, nil
		}
		n.Publish = func(o *event.Outcome) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			published = append(published, *o)
			return nil
		}
		looked := func() int {
			s.mu.Lock()
			defer s.mu.Unlock()
			return looks
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			n.Run(ctx)
		}()
		store := func(incident, kill string) {
			m := event.Neighbours{
				Schema: event.Schema, ID: event.NeighboursID(incident), Incident: incident, Kill: kill, Time: time.Now(), Node: event.Node{Name: "node-1"},
				Scope: event.ScopeGlobal, Pods: []event.PodMemory{{PodUID: "uid-api", Usage: 1 << 30}},
			}
			data, err := json.Marshal(&m)
			if err != nil {
				t.Fatal(err)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			stored = data
		}

		one, o := nodeKill("cart", 1)
		two, o2 := nodeKill("web", 2)
		n.Record(group(one, o, 0, event.ReasonMarked))
		store("another", "x")
		synctest.Wait()
		const told, after = "1 OOM killer killed java[1] (rss 1.0 MiB) in container main: the node is out of memory; marked for eviction", "; other pods then used: shop/api 1.0 GiB (no request)"
		if got, want := s.on("cart"), []string{told}; !slices.Equal(got, want) || looked() > 0 {
			t.Errorf("at once there is %q\nwant %q, after %d looks", got, want, looked())
		}
		sleep(1500 * time.Millisecond)
		n.Record(group(two, o2, 1, event.ReasonBudget))
		store(one.Incident.ID, one.ID)
		sleep(2 * time.Second)
		if got, want := s.on("cart"), []string{told + after}; !slices.Equal(got, want) {
			t.Errorf("then there is %q\nwant %q", got, want)
		}
		s.mu.Lock()
		if len(published) != 1 || published[0].ID != one.ID+"/neighbours" || published[0].Detail != after[2:] || published[0].Pod.Name != "cart" || published[0].Result != event.ResultObserved || published[0].Annotation != "" {
			t.Errorf("published %+v", published)
		}
		s.mu.Unlock()
		sleep(2 * time.Second)
		if got := s.on("web"); len(got) != 1 || got[0] != "1 OOM killer killed java[2] (rss 1.0 MiB) in container main: the node is out of memory; not marked for eviction: budget (policy.budgets)"+after {
			t.Errorf("on the other victim's pod there is %q", got)
		}

		// Nobody says anything: that is waited for, and not for ever. Nor is anything asked for a pod's own limit.
		before := looked()
		n.Record(nodeKill("api", 3))
		n.Record(podKill("api", 4))
		sleep(time.Hour)
		cancel()
		<-done
		if looks := looked() - before; len(n.waiting) > 0 || looks < 3 || looks > 10 {
			t.Errorf("%d looks, %d are still waited for", looks, len(n.waiting))
		}
	})
}
