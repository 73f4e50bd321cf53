package wire

import (
	"bytes"
	"fmt"
	"math"
	"math/bits"
	"strings"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroup"
)

// The names of enum oom_tier, oom_scope and oom_outcome, by value.
var (
	tiers  = [...]string{"none", "stack", "kprobe", "fentry"}
	scopes = [...]event.Scope{
		event.ScopeUnknown, event.ScopeGlobal, event.ScopeCgroup, event.ScopeCpuset, event.ScopeMempolicy, event.ScopeSysrq,
	}
	outcomes = [...]event.KillOutcome{event.OutcomeUnknown, event.OutcomeKilled, event.OutcomeExiting}
)

// Converter turns records into events. It knows what a record does not say of its own node.
type Converter struct {
	// Node is copied into each event, but for the tier, which each record says for itself.
	Node event.Node
	// CgroupRoot is the node's own cgroup, "/" unless several nodes share the kernel.
	CgroupRoot string
	// PageSize is the kernel's, in bytes.
	PageSize uint64
	// GFPFlags are the names of the bits of a gfp mask on this kernel, by bit; empty where the kernel has none.
	GFPFlags map[int]string
	// Now reads CLOCK_REALTIME and CLOCK_BOOTTIME (in nanoseconds) at one moment.
	Now func() (time.Time, uint64)
}

// OnNode reports whether the record is of this node: with several nodes on one kernel each tracer
// sees the kills of all. A victim whose cgroup could not be read whole is everybody's, for a kill that
// is told twice is better than one that nobody tells.
func (c *Converter) OnNode(r *Record) bool {
	raw := r.CgroupRoles[roleVictim]
	if raw.Flags&cgroupPresent == 0 || raw.Flags&cgroupTruncated != 0 {
		return true
	}
	return cgroup.Under(c.CgroupRoot, r.Paths[roleVictim])
}

// Event is the event that the record tells. What no flag of the record proves is absent.
func (c *Converter) Event(r *Record) event.Event {
	now, boottime := c.Now()
	e := event.Event{
		Schema:     event.Schema,
		Seq:        r.Seq,
		BoottimeNS: r.BoottimeNS,
		Time:       now.Add(-time.Duration(boottime - r.BoottimeNS)).UTC(),
		Node:       c.Node,
		Scope:      scopes[r.Scope],
		Outcome:    outcomes[r.Outcome],
		Victim:     c.victim(r),
		Container:  cgroup.Parse(c.CgroupRoot, r.Paths[roleVictim]),
		Trigger: &event.Trigger{
			PID:    r.Trigger.TGID,
			TID:    r.Trigger.TID,
			Comm:   comm(r.Trigger.Comm),
			Cgroup: r.cgroup(roleTrigger),
		},
		Limit: c.limit(r),
	}
	e.Node.Tier, e.ID = tiers[r.Tier], c.id(r)
	if r.Flags&flagIncident != 0 {
		e.Incident = &event.Incident{
			ID:    event.IncidentID(c.Node.BootID, r.Incident.BoottimeNS),
			Group: r.Flags&flagGroup != 0,
			Index: r.Incident.Index,
		}
	}
	if r.Flags&flagAlloc != 0 {
		e.Alloc = &event.Alloc{
			GFPMask:    fmt.Sprintf("%#x", r.Alloc.GFPMask),
			GFPFlags:   c.gfpFlags(r.Alloc.GFPMask),
			Order:      int(r.Alloc.Order),
			TotalPages: r.Alloc.TotalPages,
		}
	}
	return e
}

func (c *Converter) id(r *Record) string {
	if r.Flags&flagVictim == 0 {
		return event.UnreadableID(c.Node.BootID, r.Victim.TID, r.BoottimeNS)
	}
	id := event.VictimID(c.Node.BootID, r.Victim.TGID, r.Victim.StartBoottimeNS)
	if outcomes[r.Outcome] == event.OutcomeExiting {
		return event.ExitingID(id, r.Victim.TID)
	}
	return id
}

func (c *Converter) victim(r *Record) event.Victim {
	v := event.Victim{TID: r.Victim.TID}
	if r.Flags&flagVictim == 0 {
		return v
	}
	v.PID, v.NSPID, v.Comm, v.UID = r.Victim.TGID, r.Victim.NSTGID, comm(r.Victim.Comm), &r.Victim.UID
	v.OOMScoreAdj, v.StartBoottimeNS = &r.Victim.OOMScoreAdj, r.Victim.StartBoottimeNS
	v.Cgroup = r.cgroup(roleVictim)
	if memcg := r.cgroup(roleVictimMemcg); memcg != nil && (v.Cgroup == nil || memcg.ID != v.Cgroup.ID) {
		v.Memcg = memcg
	}
	if r.Flags&flagMemory != 0 {
		m := &r.Memory
		v.Memory = &event.Memory{
			TotalVM:     m.TotalVM * c.PageSize,
			AnonRSS:     m.RSS[rssAnon] * c.PageSize,
			FileRSS:     m.RSS[rssFile] * c.PageSize,
			ShmemRSS:    m.RSS[rssShmem] * c.PageSize,
			Swap:        m.RSS[rssSwap] * c.PageSize,
			PgTables:    m.PgTables,
			Approximate: r.Flags&flagExact == 0,
		}
		if r.Flags&flagExact != 0 {
			v.Memory.Batched = &event.Batched{
				AnonRSS:  m.Batched[rssAnon] * c.PageSize,
				FileRSS:  m.Batched[rssFile] * c.PageSize,
				ShmemRSS: m.Batched[rssShmem] * c.PageSize,
				Swap:     m.Batched[rssSwap] * c.PageSize,
			}
		}
	}
	return v
}

func (c *Converter) limit(r *Record) *event.Limit {
	if scopes[r.Scope] == event.ScopeGlobal {
		return &event.Limit{Level: event.LevelNode}
	}
	if r.Flags&flagLimit == 0 {
		return nil
	}
	return &event.Limit{
		Cgroup:    r.cgroup(roleLimit),
		Level:     cgroup.Level(c.CgroupRoot, r.Paths[roleLimit]),
		Max:       c.bounded(r.Limit.Max),
		Usage:     c.bytes(r.Limit.Usage),
		SwapMax:   c.bounded(r.Limit.SwapMax),
		SwapUsage: c.bytes(r.Limit.SwapUsage),
		Inferred:  r.Flags&flagLimitInferred != 0,
	}
}

// gfpFlags names the bits of a mask, lowest first; nil unless every one of them has a name.
func (c *Converter) gfpFlags(mask uint32) []string {
	var names []string
	for ; mask != 0; mask &= mask - 1 {
		name, ok := c.GFPFlags[bits.TrailingZeros32(mask)]
		if !ok {
			return nil
		}
		names = append(names, name)
	}
	return names
}

func (c *Converter) bytes(pages uint64) *uint64 { return new(pages * c.PageSize) }

// bounded is nil where the limit is none: PAGE_COUNTER_MAX pages or more (include/linux/page_counter.h).
func (c *Converter) bounded(pages uint64) *uint64 {
	if pages >= math.MaxInt64/c.PageSize {
		return nil
	}
	return c.bytes(pages)
}

func (r *Record) cgroup(role int) *event.Cgroup {
	raw := r.CgroupRoles[role]
	if raw.Flags&cgroupPresent == 0 {
		return nil
	}
	version := 1
	if raw.Flags&cgroupV2 != 0 {
		version = 2
	}
	return &event.Cgroup{
		Path:      strings.ToValidUTF8(r.Paths[role], "\uFFFD"),
		ID:        raw.ID,
		Version:   version,
		Truncated: raw.Flags&cgroupTruncated != 0,
	}
}

// comm is a task's name up to its NUL.
func comm(raw [16]byte) string {
	name, _, _ := bytes.Cut(raw[:], []byte{0})
	return strings.ToValidUTF8(string(name), "\uFFFD")
}
