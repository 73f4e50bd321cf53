package kubeevents

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"slices"
	"strings"
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
		breakdown  *event.Breakdown
	}{
		{"the others", []victimKill{cart}, []event.PodMemory{uses("uid-web", 3072), uses("uid-cart", 1), uses("uid-api", 1), uses("x\x1b", 1), uses("uid-5", 1)}, false,
			`other pods then used: shop/web 3.0 GiB (request 512.0 MiB), shop/api 1.0 MiB (no request), pod x\x1b 1.0 MiB`, nil},
		{"its own uses most", []victimKill{cart}, []event.PodMemory{uses("uid-cart", 3072), uses("uid-api", 1)}, false,
			"its own pod still used 3.0 GiB (request 64.0 MiB); other pods then used: shop/api 1.0 MiB (no request)", nil},
		{"nobody else", []victimKill{cart}, []event.PodMemory{uses("uid-cart", 3072)}, false, "its own pod still used 3.0 GiB (request 64.0 MiB)", nil},
		{"another victim, which this replica does not know", []victimKill{cart}, []event.PodMemory{hit("uid-web", 3072), hit("uid-cart", 2), uses("uid-api", 1)}, false,
			"other pods then used: shop/api 1.0 MiB (no request)", nil},
		{"two victims", []victimKill{cart, web}, []event.PodMemory{uses("uid-cart", 3), uses("uid-web", 2), uses("uid-api", 1)}, false,
			"other pods then used: shop/api 1.0 MiB (no request)", nil},
		{"a static pod", []victimKill{static}, []event.PodMemory{uses("uid-api", 2), uses("hash", 1)}, false, "other pods then used: shop/api 2.0 MiB (no request)", nil},
		{"not all", []victimKill{cart}, []event.PodMemory{uses("uid-api", 2)}, true, "other pods then used: shop/api 2.0 MiB (no request); not every pod could be read", nil},
		{"none", []victimKill{cart}, []event.PodMemory{uses("uid-web", 0)}[:0], true, "", nil},
		{"a part", []victimKill{cart}, []event.PodMemory{uses("uid-api", 2)}, false, "of 64.0 MiB, 32.0 MiB were tmpfs or shared memory; other pods then used: shop/api 2.0 MiB (no request)",
			&event.Breakdown{Total: new(uint64(64 << 20)), Shmem: new(uint64(32 << 20))}},
		{"a part alone", []victimKill{cart}, nil, true, "of 64.0 MiB, 32.0 MiB were tmpfs or shared memory",
			&event.Breakdown{Total: new(uint64(64 << 20)), Shmem: new(uint64(32 << 20))}},
	} {
		n := NewEnricher(nil, slog.New(slog.DiscardHandler))
		n.Find = find
		if got := n.after(tt.kills, &event.Neighbours{Pods: tt.pods, Incomplete: tt.incomplete, Breakdown: tt.breakdown}); got != tt.want {
			t.Errorf("%s:\n%s, want\n%s", tt.name, got, tt.want)
		}
	}
}

// The Event of a node's kill is there at once, and says more when the tracer does.
func TestEnricher(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		n := NewEnricher(r, slog.New(slog.DiscardHandler))
		var stored [][]byte // from the sequence 10 on
		var looks int
		var published []event.Outcome
		want := "oom.v1.neighbours.global.node-1"
		n.Find = find
		n.Next = func(_ context.Context, subject string, from uint64) ([]byte, uint64, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if looks++; subject != want {
				t.Errorf("read %s, want %s", subject, want)
			}
			if from = max(from, 10); from-10 >= uint64(len(stored)) {
				return nil, 0, errors.New("no message")
			}
			return stored[from-10], from, nil
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
		store := func(m event.Neighbours, incident, kill string) {
			m.Schema, m.ID, m.Incident, m.Kill, m.Time, m.Node.Name = event.Schema, event.NeighboursID(incident), incident, kill, time.Now(), "node-1"
			data, err := json.Marshal(&m)
			if err != nil {
				t.Fatal(err)
			}
			s.mu.Lock()
			defer s.mu.Unlock()
			stored = append(stored, data)
		}

		one, o := nodeKill("cart", 1)
		two, o2 := nodeKill("web", 2)
		api := event.Neighbours{Scope: event.ScopeGlobal, Pods: []event.PodMemory{{PodUID: "uid-api", Usage: 1 << 30}}}
		record := func(e *event.Event, o *event.Outcome) { n.Record(e, o, 9) }
		record(group(one, o, 0, event.ReasonMarked))
		store(api, "another", "x")
		synctest.Wait()
		const told, after = "1 OOM killer killed java[1] (rss 1.0 MiB) in container main: the node is out of memory; marked for eviction", "; other pods then used: shop/api 1.0 GiB (no request)"
		if got, want := s.on("cart"), []string{told}; !slices.Equal(got, want) || looked() > 0 {
			t.Errorf("at once there is %q\nwant %q, after %d looks", got, want, looked())
		}
		sleep(1500 * time.Millisecond)
		record(group(two, o2, 1, event.ReasonBudget))
		store(api, one.Incident.ID, one.ID)
		store(api, "a later one", "y") // is not in the way
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

		// Nobody says anything: that is waited for, and not for ever.
		before := looked()
		record(nodeKill("api", 3))
		sleep(time.Minute)
		if looks := looked() - before; looks < 3 || looks > 12 {
			t.Errorf("%d looks", looks)
		}

		// At a pod's own limit only what the memory was used for is read, and at once.
		s.mu.Lock()
		want, stored = "oom.v1.neighbours.cgroup.node-1", nil
		s.mu.Unlock()
		own, ownOutcome := podKill("api", 4)
		own.Incident = &event.Incident{ID: "i-own"}
		record(own, ownOutcome)
		store(event.Neighbours{Scope: event.ScopeCgroup, Breakdown: &event.Breakdown{Limit: &event.Limit{Max: new(uint64(64 << 20))}, Shmem: new(uint64(32 << 20))}}, "i-own", own.ID)
		store(event.Neighbours{Scope: event.ScopeCgroup}, "another", "x")
		sleep(3 * time.Minute)
		if got := s.on("api"); len(got) == 0 || !strings.HasSuffix(got[len(got)-1], "; of 64.0 MiB, 32.0 MiB were tmpfs or shared memory") {
			t.Errorf("at its own limit: %q", got)
		}
		before = looked()
		again, againOutcome := podKill("web", 5)
		again.Incident = &event.Incident{ID: "i-none"}
		record(again, againOutcome)
		sleep(time.Hour)
		cancel()
		<-done
		if looks := looked() - before; len(n.waiting) > 0 || looks < 3 || looks > 8 {
			t.Errorf("%d looks, %d are still waited for", looks, len(n.waiting))
		}
	})
}
