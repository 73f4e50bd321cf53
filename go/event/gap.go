package event

import (
	"fmt"
	"strconv"
	"time"

	"github.com/go-json-experiment/json" // encoding/json/v2, which Go has from 1.27 on: a third of the time of encoding/json
)

// GapCause says why kills are, or may be, missing.
type GapCause string

// The causes.
const (
	// GapWrapped: the journal was written over before the records were read, or it was removed. Count is exact, unless an earlier
	// tracer may have published some: it was killed before NATS had acknowledged them. Then there is CountMax.
	GapWrapped GapCause = "wrapped"
	// GapUnreadable: the records are there, but this version cannot read them. Seqs and count are exact.
	GapUnreadable GapCause = "unreadable"
	// GapRestart: nothing recorded between two tracers of one boot, because nothing was pinned.
	GapRestart GapCause = "restart"
	// GapReboot: the boot before ended without a clean stop of its tracer. How many is not known.
	GapReboot GapCause = "reboot"
	// GapBoot: the kernel had killed before the first tracer of this boot began to record.
	GapBoot GapCause = "boot"
	// GapUnseen: the kernel counted kills of which the program saw no mark, although it was there.
	GapUnseen GapCause = "unseen"
	// GapStateLost: the state file of an earlier tracer could not be used. What that one had not published, and what
	// happened after it, is not known.
	GapStateLost GapCause = "state_lost"
	// GapStoreLost: the store of the embedded NATS was damaged and lost messages that it had acknowledged. CountMax is
	// how many: kills, gaps and outcomes.
	GapStoreLost GapCause = "store_lost"
	// GapDropped: NATS has refused the event for good. Seqs and count are exact.
	GapDropped GapCause = "dropped"
	// GapOtherNode: the kills were on another node of the same kernel, whose own tracer tells of them. None is missing.
	GapOtherNode GapCause = "other_node"
)

// GapCauses lists every cause, in the order of the documentation.
func GapCauses() []GapCause {
	return []GapCause{GapWrapped, GapUnreadable, GapRestart, GapReboot, GapBoot, GapUnseen, GapStateLost, GapStoreLost, GapDropped, GapOtherNode}
}

// Gap says that kills may have happened that no event tells of. A time without kills is only proved where
// there is no gap.
type Gap struct {
	Schema string `json:"schema"`
	// ID names the gap for ever; it is also the JetStream message ID.
	ID string `json:"id"`
	// Time is when it was found.
	Time  time.Time `json:"time"`
	Node  Node      `json:"node"`
	Cause GapCause  `json:"cause"`
	// Since and Until bound when the kills happened, as far as is known.
	Since *time.Time `json:"since,omitempty"`
	Until *time.Time `json:"until,omitempty"`
	// FirstSeq and LastSeq are the range of Event.Seq that is missing, in the epoch of Node or, for
	// GapRestart, GapReboot and GapBoot, in the one before. Absent where nothing had been recorded.
	FirstSeq uint64 `json:"first_seq,omitempty"`
	LastSeq  uint64 `json:"last_seq,omitempty"`
	// Count is how many are missing; absent when that is not known.
	Count *uint64 `json:"count,omitempty"`
	// CountMax bounds Count where only that is known.
	CountMax *uint64 `json:"count_max,omitempty"`
}

// Missing reports whether kills are, or may be, missing.
func (g *Gap) Missing() bool { return g.Count == nil || *g.Count > 0 }

// SeqGapID is the ID of a gap in the seqs of an epoch.
func SeqGapID(bootID string, epoch, first, last uint64) string {
	return fmt.Sprintf("%s-gap-%d-%d-%d", bootID, epoch, first, last)
}

// GapID is the ID of a gap outside of the seqs: there is one of each cause at the beginning of an epoch, and
// mark tells apart those that are found later (for GapUnseen, the kernel's count).
func GapID(bootID string, cause GapCause, epoch, mark uint64) string {
	return bootID + "-gap-" + string(cause) + "-" + strconv.FormatUint(epoch, 10) + "-" + strconv.FormatUint(mark, 10)
}

// Subject is the NATS subject under which the gap is published: oom.v1.gap.<cause>.<node>.
func (g *Gap) Subject() (string, error) { return Subject(KindGap, string(g.Cause), g.Node.Name) }

// ParseGap reads one gap, as Parse reads an event.
func ParseGap(data []byte) (Gap, error) {
	var g Gap
	if err := parse("gap", data, &g, &g.Schema); err != nil {
		return Gap{}, err
	}
	if err := missing("gap", []field{
		{"id", g.ID == ""},
		{"time", g.Time.IsZero()},
		{"node.name", g.Node.Name == ""},
		{"cause", g.Cause == ""},
	}); err != nil {
		return Gap{}, err
	}
	return g, nil
}

// Phase says at which point of a tracer's life a status was published.
type Phase string

// The phases.
const (
	PhaseStart Phase = "start"
	PhaseAlive Phase = "alive"
	PhaseStop  Phase = "stop"
)

// NodeStatus says that a node is watched, and how well. Of each node the last one is kept: where nothing new
// comes by Due, nobody watches, or nobody can say so.
type NodeStatus struct {
	Schema  string    `json:"schema"`
	ID      string    `json:"id"` // Nats-Msg-Id
	Time    time.Time `json:"time"`
	Node    Node      `json:"node"` // its tier is the one in use
	Phase   Phase     `json:"phase"`
	Version string    `json:"version"` // of oom-tracer
	// Prototype is what the kernel's mark_victim hands over: task or pid.
	Prototype string `json:"prototype"`
	// Pinned means that the kernel goes on recording while no tracer runs.
	Pinned bool `json:"pinned"`
	// Since is when recording began: the time of Node.Epoch.
	Since time.Time `json:"since"`
	// Due is when the next status comes at the latest; absent at PhaseStop.
	Due *time.Time `json:"due,omitempty"`
	// Seq is that of the last record, Acked the one up to which everything is on NATS.
	Seq   uint64 `json:"seq"`
	Acked uint64 `json:"acked"`
	// Lost is how many records of this epoch were told as gaps.
	Lost uint64 `json:"lost"`
	// Unseen bounds the kills that the kernel counted in this epoch and the program saw no mark of.
	// Absent where the kernel does not count.
	Unseen *Bounds `json:"unseen,omitempty"`
	// LastKill is when the last kill of this epoch happened; absent if there was none.
	LastKill *time.Time `json:"last_kill,omitempty"`
}

// Bounds is a number that is known to lie between two others.
type Bounds struct {
	AtLeast uint64 `json:"at_least"`
	AtMost  uint64 `json:"at_most"`
}

// Subject is the NATS subject under which the status is published: oom.v1.node.status.<node>.
func (s *NodeStatus) Subject() (string, error) { return Subject(KindNode, "status", s.Node.Name) }

// ParseNodeStatus reads one status, as Parse reads an event.
func ParseNodeStatus(data []byte) (NodeStatus, error) {
	var s NodeStatus
	if err := parse("node status", data, &s, &s.Schema); err != nil {
		return NodeStatus{}, err
	}
	if err := missing("node status", []field{
		{"id", s.ID == ""},
		{"time", s.Time.IsZero()},
		{"node.name", s.Node.Name == ""},
		{"phase", s.Phase == ""},
	}); err != nil {
		return NodeStatus{}, err
	}
	return s, nil
}

// parse reads a message of this schema into out, whose field schema is a part of it. A name that comes twice, or invalid
// UTF-8, is an error: consumers would differ on what it means (RFC 8259, section 4).
func parse(what string, data []byte, out any, schema *string) error {
	err := json.Unmarshal(data, out)
	if err != nil {
		// On its own, for in another version the other fields may have other types.
		var m struct {
			Schema string `json:"schema"`
		}
		if json.Unmarshal(data, &m) != nil {
			return fmt.Errorf("parse %s: %w", what, err)
		}
		schema = &m.Schema
	}
	switch {
	case *schema == "":
		return fmt.Errorf("parse %s: schema is missing", what)
	case *schema != Schema:
		return fmt.Errorf("parse %s: schema %q: %w (this build reads %s)", what, *schema, ErrSchema, Schema)
	case err != nil:
		return fmt.Errorf("parse %s: %w", what, err)
	}
	return nil
}

type field struct {
	name    string
	missing bool
}

func missing(what string, fields []field) error {
	for _, f := range fields {
		if f.missing {
			return fmt.Errorf("parse %s: %s is missing", what, f.name)
		}
	}
	return nil
}
