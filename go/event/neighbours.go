package event

import "time"

// Neighbours says how much memory the pods of a node held a moment after a kill for which no single pod's limit was
// the cause: the victim need not be the one that took the memory. There is at most one for an incident, and
// none in the seconds after another one, nor where the tracer could not read the node's cgroups.
//
// The figures are of the moment when they were read, about a second after the kill: the victim's memory is given
// back by then, as a rule, and a pod that was killed as a whole may be missing.
type Neighbours struct {
	Schema string `json:"schema"`
	// ID is NeighboursID(Incident); it is also the JetStream message ID.
	ID string `json:"id"`
	// Incident is Event.Incident's ID, Kill is Event.ID, of the kill for which the figures were read.
	Incident string `json:"incident"`
	Kill     string `json:"kill"`
	// Time is when the reading began, and ReadNS how long it took, in nanoseconds.
	Time   time.Time `json:"time"`
	ReadNS uint64    `json:"read_ns"`
	Node   Node      `json:"node"`
	// Scope and Level are those of the kill.
	Scope Scope      `json:"scope"`
	Level LimitLevel `json:"level,omitempty"`
	// Pods are those that held most, the largest first, out of PodsSeen.
	Pods     []PodMemory `json:"pods"`
	PodsSeen uint32      `json:"pods_seen"`
	// Incomplete means that there was no time for every pod, or that some could not be read.
	Incomplete bool `json:"incomplete,omitempty"`
}

// PodMemory is the memory of a pod's cgroup, in bytes. What the kernel does not say is absent.
type PodMemory struct {
	// PodUID and Static are as in Container.
	PodUID string `json:"pod_uid"`
	Static bool   `json:"static,omitempty"`
	// Victim means that a process in this pod was killed in the incident.
	Victim bool   `json:"victim,omitempty"`
	QoS    string `json:"qos,omitempty"`
	// Usage is memory.current, or memory.usage_in_bytes of version 1. It includes the page cache.
	Usage uint64 `json:"usage"`
	// WorkingSet is Usage without inactive_file of memory.stat, which the kernel could have had for the
	// asking: what the kubelet ranks and evicts by.
	WorkingSet *uint64 `json:"working_set,omitempty"`
	// Max is the limit (memory.max, memory.limit_in_bytes); absent: unlimited.
	Max *uint64 `json:"max,omitempty"`
	// Low and Min are what is protected from reclaim (memory.low, memory.min); version 2 only.
	Low *uint64 `json:"low,omitempty"`
	Min *uint64 `json:"min,omitempty"`
	// Swap is memory.swap.current, or what memory.memsw.usage_in_bytes has above Usage.
	Swap *uint64 `json:"swap,omitempty"`
}

// NeighboursID is the ID of the Neighbours of an incident.
func NeighboursID(incident string) string { return incident + "/neighbours" }

// Subject is the NATS subject under which they are published: oom.v1.neighbours.<scope>.<node>.
func (n *Neighbours) Subject() (string, error) {
	return Subject(KindNeighbours, string(n.Scope), n.Node.Name)
}

// ParseNeighbours reads one, as Parse reads an event.
func ParseNeighbours(data []byte) (Neighbours, error) {
	var n Neighbours
	if err := parse("neighbours", data, &n, &n.Schema); err != nil {
		return Neighbours{}, err
	}
	if err := missing("neighbours", []field{
		{"id", n.ID == ""},
		{"incident", n.Incident == ""},
		{"time", n.Time.IsZero()},
		{"node.name", n.Node.Name == ""},
	}); err != nil {
		return Neighbours{}, err
	}
	return n, nil
}
