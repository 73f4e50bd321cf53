package advice

import (
	"encoding/json"
	"fmt"
	"math"
	"reflect"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// kill is one kill in a test. What is left out is as in a usual kill for the limit of a container.
type kill struct {
	scope     event.Scope      // default: cgroup
	level     event.LimitLevel // default: container
	limit     uint64
	usage     uint64 // default: limit
	inferred  bool
	held      uint64 // default: nearly the limit
	shmem     uint64
	swap      uint64
	capacity  uint64 // of the node
	bigPages  bool   // the figures do not prove pages of 4 KiB
	age       time.Duration
	after     time.Duration // since the kill before; default: an hour
	qos       string        // default: burstable
	adj       int16
	nspid     uint32 // default: 1
	pid       uint32 // default: a new one
	container string // its ID; default: another one each time
	group     bool
	same      bool // of the incident of the kill before
	name      string
	outcome   event.KillOutcome
	owner     string // default: Deployment/cart
	others    string
	podMax    *uint64
	pods      bool // there is a Neighbours
}

// history adds kills.
func history(kills ...kill) *History {
	h, now, incident := &History{}, time.Date(2026, 11, 28, 0, 0, 0, 0, time.UTC), ""
	for n, k := range kills {
		def := func(to *string, s string) {
			if *to == "" {
				*to = s
			}
		}
		def((*string)(&k.scope), "cgroup")
		def((*string)(&k.level), "container")
		def((*string)(&k.outcome), "killed")
		def(&k.qos, "burstable")
		def(&k.container, fmt.Sprint("c-", n))
		def(&k.name, "main")
		def(&k.owner, "Deployment/cart")
		if k.after == 0 && !k.same {
			k.after = time.Hour
		}
		if k.usage == 0 {
			k.usage = k.limit
		}
		if k.held == 0 {
			k.held = k.limit / 100 * 98 / 4096 * 4096
		}
		if k.pid == 0 {
			k.pid = uint32(1000 + n)
		}
		if k.nspid == 0 {
			k.nspid = 1
		}
		if !k.same {
			incident = fmt.Sprint("i-", n)
		}
		now = now.Add(k.after)
		e := &event.Event{
			ID: fmt.Sprint("k-", n), Time: now, BoottimeNS: uint64(1000 * time.Hour), Scope: k.scope, Outcome: k.outcome,
			Victim: event.Victim{
				PID: k.pid, TID: k.pid, NSPID: k.nspid, Comm: "java", OOMScoreAdj: &k.adj, StartBoottimeNS: uint64(1000*time.Hour - k.age),
				Memory: &event.Memory{TotalVM: 4096, AnonRSS: k.held - k.shmem, ShmemRSS: k.shmem, Swap: k.swap},
			},
			Incident:  &event.Incident{ID: incident, Group: k.group},
			Container: &event.Container{PodUID: "u", ContainerID: k.container, QoS: k.qos},
		}
		if k.age == 0 {
			e.Victim.StartBoottimeNS = 0
		}
		if k.bigPages {
			e.Victim.Memory.TotalVM = 64 << 10
		}
		if k.scope == event.ScopeGlobal {
			e.Limit = &event.Limit{Level: event.LevelNode}
			e.Alloc = &event.Alloc{TotalPages: k.capacity / 4096}
		} else {
			e.Limit = &event.Limit{Level: k.level, Max: &k.limit, Usage: &k.usage, Inferred: k.inferred}
		}
		h.Add(e, &event.Outcome{Kill: e.ID, Stage: event.StageAnnotate, Container: k.name, Pod: &event.PodRef{Namespace: "shop", Name: fmt.Sprint("cart-", n), UID: "u", Owner: k.owner}})
		if k.others != "" {
			h.AddNeighbours(&event.Outcome{Kill: e.ID, Stage: event.StageNeighbours, Detail: k.others})
		}
		if k.pods {
			h.AddPods(&event.Neighbours{Incident: incident, Pods: []event.PodMemory{{PodUID: "other"}, {PodUID: "u", Max: k.podMax, Victim: true}}})
		}
	}
	return h
}

// repeat is the same kill n times.
func repeat(n int, k kill) (all []kill) {
	for range n {
		all = append(all, k)
	}
	return all
}

// TestAdvice has for each rule when it speaks, and when it must not.
func TestAdvice(t *testing.T) {
	global := func(k kill) kill {
		k.scope, k.limit = event.ScopeGlobal, 0
		if k.capacity == 0 {
			k.capacity = 16 * gib
		}
		return k
	}
	kubepods := func(k kill) kill {
		k.level, k.limit = event.LevelKubepods, 8*gib
		return k
	}
	worker := kill{limit: gib, age: time.Minute, nspid: 12, container: "c"}
	small := kill{limit: gib, age: 40 * time.Second}
	for _, tt := range []struct {
		name  string
		kills []kill
		rule  Rule
		says  string // part of the sentence
		patch string // the resources in the patch, limits/requests
	}{
		{"nothing", nil, None, "not proven", ""},
		{"once", []kill{small}, None, "has reached its own limit of 1.0 GiB once, and one kill shows no pattern", ""},
		{"at the start", repeat(3, small), LimitTooSmall, "reached its own limit of 1.0 GiB 3 times, 40 s after its start: raise the limit to 1280Mi", "1280Mi/"},
		{"a small limit", repeat(2, kill{limit: 64 * mib, age: time.Second}), LimitTooSmall, "raise the limit to 176Mi", "176Mi/"},
		{"inferred, and full", repeat(2, kill{limit: gib, age: time.Second, inferred: true}), LimitTooSmall, "1.0 GiB (inferred) 2 times", "1280Mi/"},
		{"inferred, and not full", repeat(2, kill{limit: gib, age: time.Second, inferred: true, usage: gib / 2}), None, "not proven", ""},
		{"Guaranteed stays so", repeat(2, kill{limit: gib, age: time.Second, qos: "guaranteed"}), LimitTooSmall, "1280Mi", "1280Mi/1280Mi"},
		{"the pod's limit", repeat(2, kill{limit: gib, age: time.Second, level: event.LevelPod}), LimitTooSmall, "1280Mi", "1280Mi/"},
		{"the pod's limit, and another container", repeat(2, kill{limit: gib, age: time.Second, level: event.LevelPod, held: 7 * gib / 10}), LimitTooSmall, "1280Mi", ""},
		{"the limit was raised since", append(repeat(3, small), kill{limit: 2 * gib, age: time.Second}), None, "2.0 GiB once", ""},
		{"age not known", repeat(3, kill{limit: gib}), None, "how long it had run is not known", ""},
		{"not proven to be killed", repeat(3, kill{limit: gib, age: time.Second, outcome: event.OutcomeUnknown}), None, "not proven", ""},
		{"SysRq", repeat(3, kill{scope: event.ScopeSysrq, limit: gib}), None, "not proven", ""},
		{"a cgroup of others", repeat(3, kill{level: event.LevelOther, limit: gib}), None, "not proven", ""},
		{"a limit that nobody has", repeat(3, kill{limit: math.MaxUint64, held: math.MaxUint64, age: time.Second}), None, "not proven", ""},
		{"a Pod", repeat(2, kill{limit: gib, age: time.Second, owner: "Pod/x"}), LimitTooSmall, "1280Mi", ""},
		{"a Rollout", repeat(2, kill{limit: gib, age: time.Second, owner: "Rollout/x"}), LimitTooSmall, "1280Mi", ""},
		{"a container without a name", []kill{{limit: gib, age: 1, name: "\n"}, {limit: gib, age: 1, name: "\n"}}, LimitTooSmall, `container \n has`, ""},

		{"spike", []kill{{limit: gib, age: 90 * time.Hour}, {limit: gib, age: 12 * time.Minute}}, Spike, "after 12 min to 3 days of work", "1280Mi/"},
		{"no spike: within the hour", []kill{{limit: gib, age: 50 * time.Minute}, {limit: gib, age: 5 * time.Minute}}, None, "5 min to 50 min, and that shows no pattern yet", ""},
		{"no spike: alike", []kill{{limit: gib, age: 5 * time.Hour}, {limit: gib, age: 6 * time.Hour}}, None, "no pattern yet", ""},

		{"leak: raised and filled again", []kill{{limit: gib, age: 5 * time.Hour}, {limit: 2 * gib, age: 10 * time.Hour}}, Leak,
			"filled its own limit of 1.0 GiB after 5 h, and then one of 2.0 GiB, too, after 10 h", ""},
		{"leak: raised twice", []kill{{limit: gib, age: time.Second}, {limit: 2 * gib, age: 5 * time.Hour}, {limit: 4 * gib, age: 10 * time.Hour}}, Leak, "one of 4.0 GiB", ""},
		{"no leak: filled at once again", []kill{{limit: gib, age: 5 * time.Hour}, {limit: 2 * gib, age: time.Hour}}, None, "2.0 GiB once", ""},
		{"no leak: needed at the start", []kill{{limit: gib, age: time.Second}, {limit: 2 * gib, age: 2 * time.Second}}, None, "2.0 GiB once", ""},
		{"no leak: lowered", []kill{{limit: 2 * gib, age: 5 * time.Hour}, {limit: gib, age: 6 * time.Hour}}, None, "1.0 GiB once", ""},
		{"leak: at the same pace", []kill{{limit: gib, age: 5 * time.Hour}, {limit: gib, age: 6 * time.Hour}, {limit: gib, age: 7 * time.Hour}}, Leak, "5 h to 7 h after its start", ""},
		{"no leak: another pace", []kill{{limit: gib, age: 5 * time.Hour}, {limit: gib, age: 6 * time.Hour}, {limit: gib, age: 12 * time.Hour}}, None, "no pattern yet", ""},

		{"child", repeat(2, worker), ChildProcess, "lived on when its process java (PID 12 in the container) was killed at the limit of 1.0 GiB", ""},
		{"child: another container each time", []kill{{limit: gib, age: time.Minute, nspid: 12}, {limit: gib, age: time.Minute, nspid: 12}}, LimitTooSmall, "", "1280Mi/"},
		{"child: at once", []kill{worker, {limit: gib, age: time.Minute, nspid: 13, container: "c", after: time.Second}}, LimitTooSmall, "", "1280Mi/"},
		{"child: the first process", repeat(2, kill{limit: gib, age: time.Minute, container: "c"}), LimitTooSmall, "", "1280Mi/"},
		{"child: the whole container dies", repeat(2, kill{limit: gib, age: time.Minute, nspid: 12, container: "c", group: true}), LimitTooSmall, "", "1280Mi/"},
		{"child: it sees the node's processes", repeat(2, kill{limit: gib, age: time.Minute, nspid: 4711, pid: 4711, container: "c"}), LimitTooSmall, "", "1280Mi/"},

		{"shared memory", repeat(2, kill{limit: gib, age: time.Minute, shmem: 600 * mib}), SharedMemory, "has 600.0 MiB of shared memory", ""},
		{"little shared memory", repeat(2, kill{limit: gib, age: time.Minute, shmem: 400 * mib}), LimitTooSmall, "", "1280Mi/"},
		{"something else", []kill{{limit: gib, age: time.Minute, held: 100 * mib}}, NotTheVictim, "held only 100.0 MiB of the limit of 1.0 GiB; the rest is other processes, tmpfs", ""},
		{"something else in the pod", []kill{{limit: gib, age: time.Minute, held: 100 * mib, level: event.LevelPod}}, NotTheVictim, "the rest is another container of the pod, other", ""},
		{"no process", []kill{{limit: gib, held: 100 * mib, group: true, container: "c"}, {limit: gib, held: 90 * mib, group: true, container: "c", same: true}}, NotTheVictim,
			"all 2 processes together held only 190.0 MiB of the limit of 1.0 GiB; the rest is tmpfs", ""},
		{"all processes together", []kill{{limit: gib, held: 400 * mib, group: true, container: "c"}, {limit: gib, held: 400 * mib, group: true, container: "c", same: true}}, None, "once", ""},
		{"in one of three", []kill{small, small, {limit: gib, age: time.Minute, held: 100 * mib}}, LimitTooSmall, "", "1280Mi/"},

		{"no request and no limit", []kill{global(kill{held: 300 * mib, qos: "besteffort", adj: 1000})}, NoLimit, "once: request at least 304Mi (the most that a victim held) and limit it to 400Mi", "400Mi/304Mi"},
		{"no request", []kill{global(kill{held: 300 * mib, adj: 999}), kubepods(kill{held: 200 * mib, adj: 999})}, NoRequest, "2 times: request at least 304Mi", "/304Mi"},
		{"no request and no limit of the pod", []kill{global(kill{held: 300 * mib, adj: 999, pods: true})}, NoRequest, "Its pod has no memory limit either", "/304Mi"},
		{"a process that raised its oom_score_adj", []kill{global(kill{held: 300 * mib, adj: 1000})}, None, "whether container main held more than its request is not known", ""},
		{"Guaranteed", []kill{global(kill{held: gib, qos: "guaranteed", adj: -997, others: "other pods then used: shop/b 3.1 GiB"})}, Neighbours, "(once); other pods then used: shop/b 3.1 GiB. Give those", ""},
		{"below its request", []kill{global(kill{held: gib, adj: 800})}, Neighbours, "held 1.0 GiB and requests at least 3.2 GiB, by its oom_score_adj of 800", ""},
		{"below its request, of all pods", []kill{kubepods(kill{held: gib, adj: 800})}, Neighbours, "requests at least 1.6 GiB", ""},
		{"above its request", []kill{global(kill{held: 4 * gib, adj: 800})}, RequestTooSmall, "held 4.0 GiB and requests at most 3.2 GiB", "/4096Mi"},
		{"above or below its request", []kill{kubepods(kill{held: 2 * gib, adj: 800})}, None, "not known", ""},
		{"with swap the node's memory is not known", []kill{global(kill{held: 4 * gib, adj: 800, swap: 4096})}, None, "not known", ""},
		{"nor with pages of another size", []kill{global(kill{held: 4 * gib, adj: 800, bigPages: true})}, None, "not known", ""},
		{"request not known, no limit of the pod", []kill{kubepods(kill{held: 2 * gib, adj: 800, pods: true})}, NoLimit, "the pod of container main has no memory limit", ""},
		{"request not known, limit of the pod", []kill{kubepods(kill{held: 2 * gib, adj: 800, pods: true, podMax: new(uint64(9))})}, None, "not known", ""},
		{"node too small", []kill{global(kill{held: 9 * gib, adj: 800})}, NodeTooSmall, "held 9.0 GiB of the node's 16.0 GiB: it needs a larger node. Request 9216Mi, so", "/9216Mi"},
		{"node too small, and requested", []kill{global(kill{held: 9 * gib, adj: 300})}, NodeTooSmall, "it needs a larger node", ""},
		{"half of the pods' memory is not half of the node", []kill{kubepods(kill{held: 5 * gib, adj: 800})}, None, "not known", ""},
		{"more at each kill", []kill{global(kill{held: gib, adj: 999}), global(kill{held: 2 * gib, adj: 999}), global(kill{held: 3 * gib, adj: 999})}, Leak, "held 1.0 GiB, and at its last kill 3.0 GiB", ""},
		{"not more at each kill", []kill{global(kill{held: gib, adj: 999}), global(kill{held: 3 * gib, adj: 999}), global(kill{held: 2 * gib, adj: 999})}, NoRequest, "request at least 3072Mi", "/3072Mi"},

		{"what happened most", append([]kill{global(kill{held: gib, adj: 999})}, repeat(2, small)...), LimitTooSmall, "", "1280Mi/"},
		{"the container that was killed most", append(repeat(2, small), kill{limit: gib, name: "other"}), LimitTooSmall, "container main", "1280Mi/"},
		{"a StatefulSet", repeat(2, kill{limit: gib, age: time.Second, owner: "StatefulSet/true"}), LimitTooSmall, "", "1280Mi/"},
		{"a CronJob", repeat(2, kill{limit: gib, age: time.Second, owner: "CronJob/nightly"}), LimitTooSmall, "", "1280Mi/"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := history(tt.kills...).Advice()
			if a.Rule != tt.rule || !strings.Contains(a.Sentence, tt.says) || a.Clause == "" {
				t.Errorf("%s: %s, want %s: …%s…", a.Rule, a.Sentence, tt.rule, tt.says)
			}
			got := ""
			if a.Patch != nil {
				got = resourcesOf(t, a.Patch)
			}
			if got != tt.patch {
				t.Errorf("patch %q, want %q", got, tt.patch)
			}
		})
	}
}

// resourcesOf checks that both forms of a patch are the same, and returns its limit and its request.
func resourcesOf(t *testing.T, p *Patch) string {
	t.Helper()
	data, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	var asJSON, asYAML any
	if err := json.Unmarshal(data, &asJSON); err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal([]byte(p.YAML()), &asYAML); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(asJSON, asYAML) {
		t.Errorf("JSON and YAML differ:\n%s\n%s", data, p.YAML())
	}
	limit, request := "", ""
	if m := p.container.Resources.Limits; m != nil {
		limit = m.Memory
	}
	if m := p.container.Resources.Requests; m != nil {
		request = m.Memory
	}
	return limit + "/" + request
}

// However many kills there are, no more of them is kept.
func TestBounded(t *testing.T) {
	h := history(repeat(3*maxIncidents, kill{limit: gib, age: time.Second})...)
	if len(h.incidents) != maxIncidents || h.incidents[0].kill != fmt.Sprint("k-", 2*maxIncidents) {
		t.Errorf("%d incidents from %s on", len(h.incidents), h.incidents[0].kill)
	}
}

func TestClause(t *testing.T) {
	for _, tt := range []struct {
		name string
		kill kill
		want string
	}{
		{"own limit", kill{limit: gib}, ""},
		{"child", kill{limit: gib, nspid: 7}, "a child process, the container may live on"},
		{"child of a whole container", kill{limit: gib, nspid: 7, group: true}, ""},
		{"child, and the node ran out", kill{scope: event.ScopeGlobal, nspid: 7, held: gib}, ""},
		{"BestEffort", kill{scope: event.ScopeGlobal, held: gib, qos: "besteffort"}, "it has no memory request and no limit"},
		{"BestEffort, own limit", kill{limit: gib, qos: "besteffort"}, ""},
		{"no request", kill{level: event.LevelKubepods, limit: gib, adj: 999}, "it has no memory request"},
		{"a request", kill{level: event.LevelKubepods, limit: gib, adj: 998}, ""},
		{"not proven", kill{limit: gib, nspid: 7, outcome: event.OutcomeUnknown}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var e event.Event
			e.Outcome, e.Scope = event.OutcomeKilled, event.ScopeCgroup
			if tt.kill.outcome != "" {
				e.Outcome = tt.kill.outcome
			}
			e.Container = &event.Container{ContainerID: "c", QoS: "burstable"}
			if tt.kill.qos != "" {
				e.Container.QoS = tt.kill.qos
			}
			e.Victim = event.Victim{PID: 100, NSPID: max(tt.kill.nspid, 1), OOMScoreAdj: &tt.kill.adj}
			e.Incident = &event.Incident{Group: tt.kill.group}
			e.Limit = &event.Limit{Level: event.LevelContainer, Max: &tt.kill.limit}
			if tt.kill.level != "" {
				e.Limit.Level = tt.kill.level
			}
			if tt.kill.scope != "" {
				e.Scope = tt.kill.scope
			}
			if got := Clause(&e); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
}
