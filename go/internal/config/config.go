// Package config reads the one config.yaml that every binary of OOM Tracer shares.
//
// Rule of the package: strict. An unknown key, a second document, a value out of range is an error
// that names the key's path, and all of them are reported at once. Every key has a default.
package config

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Config is the whole file. The tags yaml are the names of the keys, the tags check rules for single values: see checkTags.
type Config struct {
	Node      Node      `yaml:"node"`
	Kernel    Kernel    `yaml:"kernel"`
	NATS      NATS      `yaml:"nats"`
	Policy    Policy    `yaml:"policy"`
	Annotator Annotator `yaml:"annotator"`
	Auth      Auth      `yaml:"auth"`
	Notify    Notify    `yaml:"notify"`
	Metrics   Metrics   `yaml:"metrics"`
	Log       Log       `yaml:"log"`
}

// Node says which node this is.
type Node struct {
	// Name is a DNS-1123 subdomain. The flag --node-name and NODE_NAME from the environment go
	// before it; where all three are empty, the host's name is taken. See NodeName.
	Name string `yaml:"name"`
	// CgroupRoot is the absolute cgroup path under which this node's kills happen. Anything but
	// "/" is for several nodes on one kernel (kind, k3d).
	CgroupRoot string `yaml:"cgroup_root"`
	// StateFile is an absolute path. The file remembers over restarts and reboots up to where kills were
	// recorded; empty: nothing is remembered.
	StateFile string `yaml:"state_file" check:"file"`
	// StatusInterval is how often the node says that it is watched, 1 s .. 1 h, give or take a tenth.
	StatusInterval time.Duration `yaml:"status_interval" check:"1s..1h"`
	// Neighbours is how many pods are published, those that use most, when the node runs out of memory; 0..50. 0: none, and
	// after no kill is it read what the memory was used for.
	Neighbours int `yaml:"neighbours" check:"0..50"`
}

// Kernel is about the BPF program.
type Kernel struct {
	// Tier is auto, fentry, kprobe, stack or none.
	Tier string `yaml:"tier" check:"auto|fentry|kprobe|stack|none"`
	// Notify is how the reader learns of a kill: auto, perf, ringbuf or poll.
	Notify string `yaml:"notify" check:"auto|perf|ringbuf|poll"`
	// JournalSize is how much memory the journal takes; a power of two, 128 KiB..256 MiB.
	JournalSize Bytes `yaml:"journal_size"`
	// PinDir is an absolute path in a bpffs, where the program stays while no tracer runs; empty: nowhere.
	PinDir string `yaml:"pin_dir" check:"dir"`
}

// NATS is the connection; an empty URL means the embedded server.
type NATS struct {
	URL string `yaml:"url"` // comma-separated nats:// or tls:// URLs, without credentials
	// CredsFile is a NATS credentials file (JWT and nkey seed), NKeyFile a bare nkey seed, TokenFile a token such as
	// that of a service account. User goes with PasswordFile. At most one of the four ways, and only with a URL.
	CredsFile    string   `yaml:"creds_file" check:"file"`
	NKeyFile     string   `yaml:"nkey_file" check:"file"`
	TokenFile    string   `yaml:"token_file" check:"file"`
	User         string   `yaml:"user"`
	PasswordFile string   `yaml:"password_file" check:"file"`
	TLS          TLS      `yaml:"tls"`
	Embedded     Embedded `yaml:"embedded"`
	Stream       Stream   `yaml:"stream"`
}

// TLS holds absolute file paths; empty ones mean the system's CAs and no client certificate.
type TLS struct {
	CAFile   string `yaml:"ca_file" check:"file"`
	CertFile string `yaml:"cert_file" check:"file"`
	KeyFile  string `yaml:"key_file" check:"file"`
}

// Embedded is the NATS server inside oom-tracer, used when NATS.URL is empty.
type Embedded struct {
	// Listen is a loopback address and port; port 0 picks a free one.
	Listen string `yaml:"listen"`
	// Dir holds the stream's files and the password file. It is made with mode 0700.
	Dir string `yaml:"dir"`
	// SyncAlways makes the server fsync each message before it acks it.
	SyncAlways bool `yaml:"sync_always"`
}

// Stream is how long JetStream keeps what happened.
type Stream struct {
	MaxAge      time.Duration `yaml:"max_age"`      // at least a minute
	MaxBytes    Bytes         `yaml:"max_bytes"`    // at least 1 MiB
	Replicas    int           `yaml:"replicas"`     // 1, 3 or 5; the embedded server has 1
	DedupWindow time.Duration `yaml:"dedup_window"` // 1 s .. max_age
}

// Policy says of which kills the annotator marks the pod. All of its conditions must hold.
type Policy struct {
	// Annotation is what marks a pod: key=value, or a key, whose value is then "true". Empty: nothing is
	// marked. See Mark.
	Annotation string `yaml:"annotation"`
	// Condition is the type of a pod condition that a marked pod has as well, for as long: for the unmodified
	// descheduler, whose PodLifeTime evicts by it. Empty: none is set. Without Annotation it means nothing.
	Condition string `yaml:"condition"`
	// MaxEventAge is 1 s .. 24 h. Older events are recorded only.
	MaxEventAge time.Duration `yaml:"max_event_age" check:"1s..24h"`
	// Scopes are event.Scope, Levels event.LimitLevel or OwnLimit.
	Scopes []string `yaml:"scopes"`
	Levels []string `yaml:"levels"`
	// InferredLimits lets a limit count whose owner is only inferred (event.Limit).
	InferredLimits bool       `yaml:"inferred_limits"`
	Namespaces     Namespaces `yaml:"namespaces"`
	// Selector is labels that the pod must have, all of them.
	Selector map[string]string `yaml:"selector"`
	// OptOutAnnotation is the key of an annotation that protects the pod that carries it, whatever its
	// value, unless that is "false". Empty: none does.
	OptOutAnnotation string      `yaml:"opt_out_annotation"`
	Protections      Protections `yaml:"protections"`
	Budgets          Budgets     `yaml:"budgets"`
	// MarkLifetime is how long after its kill a pod is marked at most, 1 m .. 168 h: then the annotation goes.
	MarkLifetime time.Duration `yaml:"mark_lifetime" check:"1m..168h"`
}

// Budgets bound how many pods are marked. All of them must hold.
type Budgets struct {
	// Window is 1 m .. 24 h: the bounds hold for any time of that length.
	Window time.Duration `yaml:"window" check:"1m..24h"`
	// Node and Owner are how many pods of one node, and of one owner, 0..1000; 0: no bound of its own.
	Node  int `yaml:"node" check:"0..1000"`
	Owner int `yaml:"owner" check:"0..1000"`
	// Cluster is how many in all, 1..1000: what is remembered of them must fit into one message.
	Cluster int `yaml:"cluster" check:"1..1000"`
	// Cooldown is the least time between two pods of one node, and of one owner, 0 .. 24 h.
	Cooldown time.Duration `yaml:"cooldown" check:"0s..24h"`
}

// Namespaces are names of namespaces.
type Namespaces struct {
	Include []string `yaml:"include"` // none means all
	Exclude []string `yaml:"exclude"`
}

// Protections say which pods are never marked.
type Protections struct {
	Static         bool `yaml:"static"`          // static pods, and the mirror pods that show them
	DaemonSet      bool `yaml:"daemonset"`       // pods of a DaemonSet
	SystemCritical bool `yaml:"system_critical"` // of the priority of system components, 2000000000 and above
}

// Annotator is about oom-annotator.
type Annotator struct {
	// Kubeconfig is an absolute path; empty: the service account of the pod that it runs in.
	Kubeconfig string `yaml:"kubeconfig" check:"file"`
	// SummaryAnnotation is the key of the annotation that says which kill a pod was marked for.
	SummaryAnnotation string `yaml:"summary_annotation"`
	// WaitForPod is how long an event waits for a pod that is not known yet, 0 .. 5 m.
	WaitForPod time.Duration `yaml:"wait_for_pod" check:"0s..5m"`
	// Workers is how many events are worked on at once, 1..256.
	Workers int `yaml:"workers" check:"1..256"`
	// QPS is how many requests are sent to the API server per second, and Burst how many at once. 0: the client sets no limit.
	QPS   int `yaml:"qps" check:"0..10000"`
	Burst int `yaml:"burst" check:"0..10000"`
	// WorkloadMetrics is how many workloads' kills are counted apart, 0..10000. 0: no such metric.
	WorkloadMetrics int `yaml:"workload_metrics" check:"0..10000"`
	// Events has a Kubernetes Event written for each kill.
	Events bool `yaml:"events"`
	// Listen is Metrics.Listen for oom-annotator, which may run beside oom-tracer.
	Listen string `yaml:"listen" check:"listen"`
}

// Auth is oom-auth: whose tokens it takes, and what it signs its answers with.
type Auth struct {
	// ServiceAccount is namespace/name.
	ServiceAccount string `yaml:"service_account"`
	// Audience is what a token must be for.
	Audience string `yaml:"audience"`
	// IssuerFile is the absolute path of a secret from which the keys are made. NATS knows their public halves.
	IssuerFile string `yaml:"issuer_file" check:"file"`
	// Kubeconfig is an absolute path; empty means the service account of the pod.
	Kubeconfig string `yaml:"kubeconfig" check:"file"`
	// Listen is host:port for /metrics, /healthz and /readyz; empty: nothing is served.
	Listen string `yaml:"listen" check:"listen"`
}

// Notify is oom-notify: who gets messages about kills and gaps, and how often.
type Notify struct {
	Slack        Receiver `yaml:"slack"`        // a webhook that takes {"text": ...}
	Alertmanager Receiver `yaml:"alertmanager"` // the base URL of its API
	Webhook      Receiver `yaml:"webhook"`      // takes JSON
	// GroupWait is how long the first kill of an owner waits for others, 0 .. 10 m. GroupInterval is the least time between two
	// messages about one owner, 1 s .. 24 h.
	GroupWait     time.Duration `yaml:"group_wait" check:"0s..10m"`
	GroupInterval time.Duration `yaml:"group_interval" check:"1s..24h"`
	// WaitForOutcome is how long a kill waits for its outcome, which names the pod, 0 .. 1 m.
	WaitForOutcome time.Duration `yaml:"wait_for_outcome" check:"0s..1m"`
	// MinInterval is the least time between two messages to one receiver, 0 .. 1 m.
	MinInterval time.Duration `yaml:"min_interval" check:"0s..1m"`
	// MaxAge is how old a kill is at most in a message, 1 m .. 168 h. A message that fails is tried again for so long.
	MaxAge time.Duration `yaml:"max_age" check:"1m..168h"`
	// ResolveAfter is how long after the last kill an alert ends in Alertmanager, 1 m .. 24 h.
	ResolveAfter time.Duration `yaml:"resolve_after" check:"1m..24h"`
	// Link is an http or https URL that the messages show; empty: none.
	Link string `yaml:"link" check:"url"`
	// Listen is Metrics.Listen for oom-notify.
	Listen string `yaml:"listen" check:"listen"`
}

// Receiver gets messages by HTTP. Without URL and URLFile it gets none.
type Receiver struct {
	// URL is an http or https URL. URLFile is the absolute path of a file that holds it, where it is a secret. At most one of them.
	URL     string `yaml:"url" check:"url"`
	URLFile string `yaml:"url_file" check:"file"`
	// TokenFile is the absolute path of a file with a bearer token; empty: none is sent.
	TokenFile string `yaml:"token_file" check:"file"`
	// CAFile is the absolute path of the CA certificates to trust, PEM; empty: those of the system.
	CAFile string `yaml:"ca_file" check:"file"`
	// Template is the text of a message (text/template of Go); empty: the default.
	Template string `yaml:"template"`
}

// Enabled reports whether the receiver gets messages.
func (r *Receiver) Enabled() bool { return r.URL != "" || r.URLFile != "" }

// Metrics is where /metrics, /healthz and /readyz are served; an empty address serves nothing.
type Metrics struct {
	Listen string `yaml:"listen" check:"listen"`
}

// Log is about what a program prints: its own messages, on standard error, and kills.
type Log struct {
	Level  string `yaml:"level" check:"debug|info|warn|error"` // debug, info, warn or error
	Format string `yaml:"format" check:"text|json"`            // text or json
	// Kills is how oom-tracer prints kills and gaps on standard output: text, json or none.
	Kills string `yaml:"kills" check:"text|json|none"`
}

// Values of Log.Kills.
const (
	KillsText = "text"
	KillsJSON = "json"
	KillsNone = "none"
)

// Default is the configuration of an empty file, and of the one that is shipped.
func Default() Config {
	return Config{
		Node:   Node{CgroupRoot: "/", StateFile: "/var/lib/oom-tracer/state.json", StatusInterval: 5 * time.Minute, Neighbours: 5},
		Kernel: Kernel{Tier: "auto", Notify: "auto", JournalSize: 2 << 20, PinDir: "/sys/fs/bpf/oom-tracer"},
		NATS: NATS{
			Embedded: Embedded{
				Listen: "127.0.0.1:4222",
				Dir:    "/var/lib/oom-tracer/nats",
				// A node that ran out of memory may panic or be reset next: what was acked must be on disk.
				SyncAlways: true,
			},
			Stream: Stream{
				MaxAge:      168 * time.Hour,
				MaxBytes:    1 << 30,
				Replicas:    1,
				DedupWindow: 10 * time.Minute,
			},
		},
		Policy: Policy{
			Annotation:       "oom-tracer.alpha.kubernetes.io/evict-me=true",
			MaxEventAge:      10 * time.Minute,
			Scopes:           []string{"global", "cgroup"},
			Levels:           []string{"node", "kubepods"},
			OptOutAnnotation: "oom-tracer.alpha.kubernetes.io/opt-out",
			Protections:      Protections{Static: true, DaemonSet: true, SystemCritical: true},
			Budgets:          Budgets{Window: time.Hour, Node: 2, Owner: 1, Cluster: 10, Cooldown: 10 * time.Minute},
			MarkLifetime:     time.Hour,
		},
		Annotator: Annotator{
			SummaryAnnotation: "oom-tracer.alpha.kubernetes.io/last-kill",
			WaitForPod:        30 * time.Second,
			Workers:           16,
			WorkloadMetrics:   500,
			Events:            true,
			Listen:            "127.0.0.1:9106",
		},
		Auth: Auth{ServiceAccount: "oom-tracer/oom-tracer", Audience: "oom-tracer-nats", Listen: "127.0.0.1:9107"},
		Notify: Notify{
			GroupWait:      30 * time.Second,
			GroupInterval:  5 * time.Minute,
			WaitForOutcome: 10 * time.Second,
			MinInterval:    time.Second,
			MaxAge:         24 * time.Hour,
			ResolveAfter:   15 * time.Minute,
			Listen:         "127.0.0.1:9108",
		},
		Metrics: Metrics{Listen: "127.0.0.1:9105"},
		Log:     Log{Level: "info", Format: "text", Kills: KillsText},
	}
}

// Bytes is a size in bytes. In the file it is an integer, or digits with a binary unit: 512MiB.
type Bytes int64

// parseBytes reads digits followed by KiB, MiB, GiB, TiB or nothing. Decimal units are refused: the
// kernel and NATS count in binary ones, and a GB that means a GiB elsewhere is a trap.
func parseBytes(s string) (Bytes, error) {
	digits := strings.TrimRight(s, "KMGTiB")
	shift, ok := map[string]uint{"": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}[s[len(digits):]]
	n, err := strconv.ParseUint(digits, 10, 63)
	if !ok || err != nil || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("must be a number of bytes or a size such as 512MiB or 1GiB (KiB, MiB, GiB, TiB), not %s", show(s))
	}
	return Bytes(n << shift), nil
}
