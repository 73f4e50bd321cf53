package event

import (
	"strings"
	"time"
)

// Result says what became of a kill in the end, as far as Kubernetes is concerned.
type Result string

// The results.
const (
	ResultAnnotated Result = "annotated" // the pod carries the annotation
	ResultObserved  Result = "observed"  // it would, but the annotator is told to act on nothing
	ResultSkipped   Result = "skipped"   // it was decided that it must not
	ResultFailed    Result = "failed"    // it should have, or nobody can tell

	// What became of a pod that was annotated.
	ResultEvicted Result = "evicted" // it has left its node
	ResultRefused Result = "refused" // it had to stay, somebody said, and its annotation is gone
	ResultExpired Result = "expired" // nobody came for it in time, or the configuration has changed, and its annotation is gone
)

// Results lists every result, in the order of the documentation.
func Results() []Result {
	return []Result{ResultAnnotated, ResultObserved, ResultSkipped, ResultFailed, ResultEvicted, ResultRefused, ResultExpired}
}

// Reason says why it is that result. Each belongs to one result; see Reasons.
type Reason string

// The reasons.
const (
	ReasonMarked Reason = "marked"

	ReasonObserveOnly Reason = "observe_only" // policy.annotation is empty
	ReasonPaused      Reason = "paused"       // somebody has paused all marking
	ReasonNeighbours  Reason = "neighbours"   // of StageNeighbours

	// What the event itself says.
	ReasonHost     Reason = "host"      // the victim was in no pod
	ReasonUnproven Reason = "unproven"  // nothing proved that the marked task was killed, and not exiting anyway
	ReasonTooOld   Reason = "too_old"   // older than policy.max_event_age
	ReasonScope    Reason = "scope"     // not among policy.scopes
	ReasonNoLimit  Reason = "no_limit"  // whose limit it was is not known
	ReasonInferred Reason = "inferred"  // the owner of the limit is only inferred, and policy.inferred_limits is false
	ReasonLevel    Reason = "level"     // not among policy.levels
	ReasonNotFound Reason = "not_found" // there is no such pod
	// What is known of the pod.
	ReasonOtherNode   Reason = "other_node"  // it runs on another node than the one that reports the kill
	ReasonAmbiguous   Reason = "ambiguous"   // several pods fit
	ReasonGone        Reason = "gone"        // it was deleted
	ReasonReborn      Reason = "reborn"      // another pod has its name now
	ReasonFinished    Reason = "finished"    // it has ended, or is about to be deleted
	ReasonAlready     Reason = "already"     // it carries the annotation, for another kill or by another hand
	ReasonStatic      Reason = "static"      // of a file on the node: it would come back in the same place
	ReasonDaemonSet   Reason = "daemonset"   // likewise
	ReasonCritical    Reason = "critical"    // the priority of system components
	ReasonNamespace   Reason = "namespace"   // policy.namespaces
	ReasonSelector    Reason = "selector"    // policy.selector
	ReasonOptOut      Reason = "opt_out"     // policy.opt_out_annotation
	ReasonBudget      Reason = "budget"      // policy.budgets
	ReasonMalformed   Reason = "malformed"   // the message is no event
	ReasonOversized   Reason = "oversized"   // the message is larger than any event
	ReasonSchema      Reason = "schema"      // the message is of another version
	ReasonForged      Reason = "forged"      // the message speaks of another node or class than its subject
	ReasonForbidden   Reason = "forbidden"   // the annotator lacks a permission
	ReasonRejected    Reason = "rejected"    // the API server refuses this change
	ReasonUnavailable Reason = "unavailable" // the API server, or NATS for the budgets, did not answer in time
)

// The reasons of what became of an annotated pod.
const (
	ReasonEvicted  Reason = "eviction" // through the API's eviction subresource, as a descheduler does
	ReasonLeft     Reason = "left"     // it was deleted or has ended otherwise, or nobody saw how
	ReasonEvictor  Reason = "evictor"  // a descheduler or the API server did not let it go: Detail has its words
	ReasonLifetime Reason = "lifetime" // policy.mark_lifetime is over
	// ReasonReconfigured: policy.annotation has another key now, or is empty (dryRun).
	ReasonReconfigured Reason = "reconfigured"
)

// Reasons lists the reasons of each result, in the order of the documentation.
func Reasons() map[Result][]Reason {
	return map[Result][]Reason{
		ResultAnnotated: {ReasonMarked},
		ResultObserved:  {ReasonObserveOnly, ReasonPaused, ReasonNeighbours},
		ResultSkipped: {
			ReasonHost, ReasonUnproven, ReasonTooOld, ReasonScope, ReasonNoLimit, ReasonInferred, ReasonLevel, ReasonNotFound,
			ReasonOtherNode, ReasonAmbiguous, ReasonGone, ReasonReborn, ReasonFinished, ReasonAlready,
			ReasonStatic, ReasonDaemonSet, ReasonCritical, ReasonNamespace, ReasonSelector, ReasonOptOut, ReasonBudget,
		},
		ResultFailed: {
			ReasonMalformed, ReasonOversized, ReasonSchema, ReasonForged, ReasonForbidden, ReasonRejected, ReasonUnavailable,
		},
		ResultEvicted: {ReasonEvicted, ReasonLeft},
		ResultRefused: {ReasonEvictor},
		ResultExpired: {ReasonLifetime, ReasonReconfigured},
	}
}

// The stages.
const (
	// StageAnnotate is that of what became of a kill. There is one for each kill.
	StageAnnotate = "annotate"
	// StageClose is that of what became of an annotated pod: there is one for each kill that was ResultAnnotated, once
	// that is known.
	StageClose = "close"
	// StageNeighbours is that of what the node's pods held then, by their names, in Detail. There is one for each
	// Neighbours that came in time.
	StageNeighbours = "neighbours"
)

// Outcome says what the annotator made of a kill. A message that is no kill has an outcome too.
type Outcome struct {
	Schema string `json:"schema"`
	// ID is OutcomeID(Kill, Stage); it is also the JetStream message ID. The stream keeps one outcome of an ID. Versions before
	// could store a second one: take the first of them.
	ID string `json:"id"`
	// Kill is Event.ID; of a message that could not be read, "OOM-" and its sequence in the stream.
	Kill  string `json:"kill"`
	Stage string `json:"stage"`
	// Time is when it was decided.
	Time   time.Time `json:"time"`
	Result Result    `json:"result"`
	Reason Reason    `json:"reason"`
	// Detail says more, for people: an error's text.
	Detail string `json:"detail,omitempty"`
	// Node is the node in the subject of the kill.
	Node string `json:"node"`
	// Pod is absent where none was found.
	Pod *PodRef `json:"pod,omitempty"`
	// Container is the name of the container in the pod, where its status names it.
	Container string `json:"container,omitempty"`
	// Image is the image of that container, as its status names it.
	Image string `json:"image,omitempty"`
	// Restarts is how often the kubelet had restarted that container: restartCount of its status, which changes seconds after a
	// kill. Absent where the status does not name the container.
	Restarts *uint32 `json:"restarts,omitempty"`
	// Annotation is what the pod carries now, or would, as key=value.
	Annotation string `json:"annotation,omitempty"`
}

// PodRef names a pod.
type PodRef struct {
	Namespace string `json:"namespace"`
	Name      string `json:"name"`
	UID       string `json:"uid"`
	// Owner is the controller that would replace the pod, as <kind>/<name>. It is empty if none would, and in outcomes of earlier
	// versions.
	Owner string `json:"owner,omitempty"`
}

// OutcomeID is the ID of a stage's outcome of a kill.
func OutcomeID(kill, stage string) string { return kill + "/" + stage }

// OutcomeSubject is the NATS subject of a stage's outcome of a kill on a node: oom.v1.outcome.<kill>_<stage>.<node>, the kill in
// lower case. No other message has it, so that the server can refuse a second one.
func OutcomeSubject(kill, stage, node string) (string, error) {
	return Subject(KindOutcome, strings.ToLower(kill)+"_"+stage, node)
}

// Subject is the NATS subject under which the outcome is published; see OutcomeSubject.
func (o *Outcome) Subject() (string, error) { return OutcomeSubject(o.Kill, o.Stage, o.Node) }

// ParseOutcome reads one outcome, as Parse reads an event.
func ParseOutcome(data []byte) (Outcome, error) {
	var o Outcome
	if err := parse("outcome", data, &o, &o.Schema); err != nil {
		return Outcome{}, err
	}
	if err := missing("outcome", []field{
		{"id", o.ID == ""},
		{"kill", o.Kill == ""},
		{"time", o.Time.IsZero()},
		{"node", o.Node == ""},
		{"result", o.Result == ""},
		{"reason", o.Reason == ""},
	}); err != nil {
		return Outcome{}, err
	}
	return o, nil
}
