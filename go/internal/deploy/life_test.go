package deploy

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// bases are the releases that the values are changed in: each value where it has an effect.
var bases = map[string]string{
	"cluster": `
nats: {passwordSecret: oom-tracer-nats}
descheduler: {enabled: true}
notify: {enabled: true}
metrics: {podMonitor: {enabled: true}, rules: {enabled: true}, dashboard: {enabled: true}}
config: {notify: {webhook: {url: "http://x"}}}
`,
	"nkeys": `
nats: {passwordSecret: oom-tracer-nats, tracers: nkeys, nodeKeys: {node-1: UC4TMAWHBXJLKRO6XD3NBEVJUHBUXMRVQQFQWJKVOLNYNQX2R72AU7OJ}}
`,
	"external": `
nats:
  mode: external
  external: {tlsSecret: a, tracer: {secret: a, user: a}, annotator: {secret: a, user: a}, owner: {secret: a, user: a}, tap: {secret: a, user: a}, notify: {secret: a, user: a}}
notify: {enabled: true}
config: {nats: {url: "nats://nats.example.com:4222"}, notify: {webhook: {url: "http://x"}}}
`,
}

func baseOf(path string) string {
	switch {
	case strings.HasPrefix(path, "nats.external.") || strings.HasPrefix(path, "config.nats."):
		return "external"
	case strings.HasPrefix(path, "nats.nodeKey"):
		return "nkeys"
	default:
		return "cluster"
	}
}

// others are other values, by the path or by the end of it, for what the schema alone does not say.
var others = map[string]any{
	"labels":                       map[string]any{"team": "x"},
	"annotations":                  map[string]any{"team": "x"},
	"nodeSelector":                 map[string]any{"pool": "x"},
	"affinity":                     map[string]any{"nodeAffinity": map[string]any{"requiredDuringSchedulingIgnoredDuringExecution": map[string]any{"nodeSelectorTerms": []any{map[string]any{"matchExpressions": []any{map[string]any{"key": "a", "operator": "Exists"}}}}}}},
	"tolerations":                  []any{map[string]any{"key": "x", "operator": "Exists"}},
	"extraArgs":                    []any{"--log-level=debug"},
	"extraEnv":                     []any{map[string]any{"name": "A", "value": "b"}},
	"resources.requests":           map[string]any{"memory": "48Mi"},
	"resources.limits":             map[string]any{"memory": "300Mi"},
	"image.registry":               "registry.example.com:5000/a",
	"image.repository":             "other/name",
	"image.tag":                    "v9",
	"image.digest":                 "sha256:" + strings.Repeat("0a", 32),
	"image.pullSecrets":            []any{map[string]any{"name": "login"}},
	"priorityClassName":            "",
	"tracer.statePath":             "/srv/oom",
	"tracer.bpffsPath":             "/run/bpf",
	"tracer.cgroupPath":            "/run/cgroup",
	"tracer.capabilities":          []any{"SYS_ADMIN", "SYSLOG"},
	"tracer.seLinuxOptions":        map[string]any{"type": "spc_t"},
	"tracer.updateStrategy":        map[string]any{"type": "OnDelete", "rollingUpdate": nil},
	"descheduler.interval":         "10s",
	"descheduler.policy":           map[string]any{"apiVersion": "descheduler/v1alpha2", "kind": "DeschedulerPolicy", "profiles": []any{}},
	"nats.nodeKeys":                map[string]any{"node-2": "UBYORPFFJQNMVVG32YBMFWRDRSAJQF4RF54U7TW3OPZSBT2YRIUF2GMJ"},
	"nats.nodeKeyPath":             "/srv/keys",
	"nats.storage.size":            "4Gi",
	"nats.storage.className":       "fast",
	"nats.listen":                  "::",
	"slack.url":                    "http://y",
	"url_file":                     "/srv/url",
	"Secret":                       "other",
	"secret":                       "other",
	"user":                         "other",
	"metrics.podMonitor.interval":  "1m",
	"readers.subjects":             []any{map[string]any{"kind": "Group", "name": "readers"}},
	"networkPolicy.natsClients":    []any{map[string]any{"podSelector": map[string]any{}}},
	"networkPolicy.metricsClients": []any{map[string]any{"podSelector": map[string]any{}}},
}

// with are the values that another one needs beside it.
var with = map[string]string{
	"nats.mode=external":                   `{config: {nats: {url: "nats://x:4222"}}}`,
	"nats.mode=embedded":                   `{descheduler: {enabled: false}, notify: {enabled: false}}`,
	"nats.tracers=nkeys":                   `{nats: {nodeKeys: {node-1: UC4TMAWHBXJLKRO6XD3NBEVJUHBUXMRVQQFQWJKVOLNYNQX2R72AU7OJ}}}`,
	"config.annotator.qps=50":              `{config: {annotator: {burst: 100}}}`,
	"config.annotator.burst=100":           `{config: {annotator: {qps: 50}}}`,
	"nats.routesTLSSecret":                 `{nats: {tlsSecret: a}}`,
	"readers.subjects":                     `{readers: {secret: a}}`,
	"readers.secret":                       `{readers: {subjects: [{kind: Group, name: readers}]}}`,
	"tracer.seccompProfile.type=Localhost": `{tracer: {seccompProfile: {localhostProfile: a.json}}}`,
}

// silent are the values that change nothing in the cluster, each for its reason.
var silent = map[string]string{
	"global":                                 "helm's own",
	"nats.external.tap.secret":               "of helm test alone, whose hook is no part of the release",
	"tracer.seccompProfile.localhostProfile": "goes with type Localhost, which is tried",
	"config.node.state_file":                 "the chart's", "config.kernel.pin_dir": "the chart's",
	"config.nats.creds_file": "the chart's", "config.nats.nkey_file": "the chart's", "config.nats.token_file": "the chart's",
	"config.nats.user": "the chart's", "config.nats.password_file": "the chart's",
	"config.nats.tls.ca_file": "the chart's", "config.nats.tls.cert_file": "the chart's", "config.nats.tls.key_file": "the chart's",
	"config.metrics.listen": "the chart's", "config.annotator.listen": "the chart's", "config.annotator.kubeconfig": "the chart's",
	"config.notify.listen":        "the chart's",
	"config.auth.service_account": "the chart's", "config.auth.issuer_file": "the chart's", "config.auth.kubeconfig": "the chart's", "config.auth.listen": "the chart's",
}

// immutable are the values that the API server refuses to change in place. The chart refuses them first: TestUpgrades.
var immutable = []string{"nats.storage.className", "nats.storage.size"}

// change is one value that is changed.
type change struct {
	name, base string
	values     string
	objects    []*unstructured.Unstructured
	err        error
}

// changes are other values for each leaf of the schema, and of config.
func changes(t *testing.T) []*change {
	t.Helper()
	var schema, defaults, full map[string]any
	for file, out := range map[string]*map[string]any{chart + "/values.schema.json": &schema, chart + "/values.yaml": &defaults, "../config/testdata/full.yaml": &full} {
		if err := yaml.Unmarshal([]byte(readFile(t, file)), out); err != nil {
			t.Fatal(err)
		}
	}
	full = map[string]any{"config": full}
	inBase := map[string]map[string]any{}
	for name, text := range bases {
		var set map[string]any
		if err := yaml.Unmarshal([]byte(text), &set); err != nil {
			t.Fatal(err)
		}
		inBase[name] = set
	}
	var all []*change
	add := func(path string, value any) {
		c := &change{name: fmt.Sprintf("%s=%v", path, value), base: baseOf(path)}
		if c.base == "cluster" {
			for _, p := range []string{path, c.name} {
				if text, ok := with[p]; ok {
					c.values = text
				}
			}
		}
		nested := value
		parts := strings.Split(path, ".")
		for i := len(parts) - 1; i >= 0; i-- {
			nested = map[string]any{parts[i]: nested}
		}
		text, err := yaml.Marshal(nested)
		if err != nil {
			t.Fatal(err)
		}
		c.values = string(text) + "---" + c.values
		all = append(all, c)
	}
	var walk func(path string, schema map[string]any)
	definitions := schema["definitions"].(map[string]any)
	walk = func(path string, schema map[string]any) {
		if ref, ok := schema["$ref"].(string); ok {
			schema = definitions[strings.TrimPrefix(ref, "#/definitions/")].(map[string]any)
		}
		if properties, ok := schema["properties"].(map[string]any); ok {
			for name, s := range properties {
				walk(strings.TrimPrefix(path+"."+name, "."), s.(map[string]any))
			}
			return
		}
		if silent[path] != "" {
			return
		}
		now, _ := at(defaults, path)
		if set, ok := at(inBase[baseOf(path)], path); ok {
			now = set
		}
		if other, ok := at(full, path); ok { // a key of config
			add(path, other)
			return
		}
		if enum, ok := schema["enum"].([]any); ok {
			for _, value := range enum {
				if !reflect.DeepEqual(value, now) && value != "" {
					add(path, value)
				}
			}
			return
		}
		for end := path; ; {
			if other, ok := others[end]; ok {
				add(path, other)
				return
			}
			_, rest, more := strings.Cut(end, ".")
			if !more {
				break
			}
			end = rest
		}
		for suffix, other := range others {
			if suffix == "Secret" && strings.HasSuffix(path, suffix) {
				add(path, other)
				return
			}
		}
		switch schema["type"] {
		case "boolean":
			is, _ := now.(bool)
			add(path, !is)
		case "integer":
			is, _ := now.(float64)
			add(path, is+1)
		default:
			t.Errorf("%s: this test knows no other value of it", path)
		}
	}
	walk("", schema)
	slices.SortFunc(all, func(a, b *change) int { return strings.Compare(a.base+a.name, b.base+b.name) })
	return all
}

// at finds a value by its path.
func at(values map[string]any, path string) (any, bool) {
	var v any = values
	for name := range strings.SplitSeq(path, ".") {
		m, ok := v.(map[string]any)
		if !ok {
			return nil, false
		}
		if v, ok = m[name]; !ok {
			return nil, false
		}
	}
	return v, true
}

// key says which object it is.
func key(o *unstructured.Unstructured) string {
	return o.GetKind() + " " + o.GetNamespace() + " " + o.GetName()
}

// release are the objects of a rendering, by key, without helm's hooks.
func release(objects []*unstructured.Unstructured) map[string]*unstructured.Unstructured {
	byKey := map[string]*unstructured.Unstructured{}
	for _, o := range objects {
		if o.GetAnnotations()["helm.sh/hook"] == "" {
			byKey[key(o)] = o
		}
	}
	return byKey
}

// renderAll renders many values with as many helms at once as there are processors.
func renderAll(t *testing.T, all []*change) {
	t.Helper()
	dir := t.TempDir()
	work := make(chan int)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for i := range work {
				c := all[i]
				args := []string{"template", "oom-tracer", chart, "--namespace", namespace, "--kube-version", "1.36.3"}
				for j, text := range append([]string{bases[c.base]}, strings.Split(c.values, "---")...) {
					file := filepath.Join(dir, fmt.Sprintf("%d-%d.yaml", i, j))
					if c.err = os.WriteFile(file, []byte(text), 0o600); c.err != nil {
						break
					}
					args = append(args, "--values", file)
				}
				var text string
				if text, c.err = kubetest.Helm(t, args...); c.err == nil {
					c.objects, c.err = kubetest.Parse(strings.NewReader(text))
				}
			}
		})
	}
	for i := range all {
		work <- i
	}
	close(work)
	wg.Wait()
}

// state is what a change may touch of an object, without what the server and controllers write.
func state(o *unstructured.Unstructured) map[string]any {
	s := o.DeepCopy().Object
	delete(s, "status")
	metadata := s["metadata"].(map[string]any)
	for _, name := range []string{"managedFields", "resourceVersion", "generation", "uid", "creationTimestamp"} {
		delete(metadata, name)
	}
	// Of a Job the server writes its id into the labels and the selector; of a DaemonSet its generation into the annotations.
	unstructured.RemoveNestedField(s, "metadata", "annotations")
	if o.GetKind() == "Service" { // one that is made anew has another address
		unstructured.RemoveNestedField(s, "spec", "clusterIP")
		unstructured.RemoveNestedField(s, "spec", "clusterIPs")
	}
	if o.GetKind() == "Job" {
		unstructured.RemoveNestedField(s, "spec", "selector")
		unstructured.RemoveNestedField(s, "spec", "template", "metadata", "labels")
	}
	return s
}

// lifeCluster is an API server with the namespace, and with the kinds of the prometheus-operator.
func lifeCluster(t *testing.T) *kubetest.Cluster {
	t.Helper()
	c := kubetest.Start(t)
	for _, crd := range []string{"podmonitors", "prometheusrules"} {
		c.Apply(filepath.Join(oomtest.Program(t, "deploy"), "crds", crd+".yaml"))
	}
	c.Namespace(namespace)
	return c
}

// TestEveryValue: every value of the chart's schema and every key of config can be changed in a release, and back, on a real API
// server: then all is as before. What cannot is known by name.
func TestEveryValue(t *testing.T) {
	all := changes(t)
	for name := range bases {
		all = append(all, &change{name: name, base: name, values: "{}"})
	}
	for name, example := range examples {
		if example.values != "" {
			values := readFile(t, filepath.Join(root, example.values))
			if name == "embedded" {
				values += "\n---\n" + with["nats.mode=embedded"]
			}
			all = append(all, &change{name: "example " + name, base: "cluster", values: values})
		}
	}
	renderAll(t, all)
	bare := map[string]map[string]*unstructured.Unstructured{}
	for _, c := range all {
		if c.name == c.base {
			if c.err != nil {
				t.Fatalf("%s: %v", c.name, c.err)
			}
			bare[c.base] = release(c.objects)
		}
	}
	cluster := lifeCluster(t)
	objects := cluster.Objects()
	cluster.Eventually("the server knows the kinds", func() error {
		for _, o := range bare["cluster"] {
			if _, err := objects.Get(o); err != nil && !apierrors.IsNotFound(err) {
				objects = cluster.Objects()
				return err
			}
		}
		return nil
	})
	// to brings the cluster from one set of objects to another, as helm does: what is equal is not written.
	to := func(from, target map[string]*unstructured.Unstructured) (written []string, err error) {
		for _, k := range slices.Sorted(maps.Keys(target)) {
			if was := from[k]; was == nil || !reflect.DeepEqual(was.Object, target[k].Object) {
				written = append(written, k)
				if e := objects.Apply(target[k]); e != nil {
					err = errors.Join(err, fmt.Errorf("%s: %w", k, e))
				}
			}
		}
		for k, o := range from {
			if target[k] == nil && o.GetKind() != "Namespace" {
				written = append(written, k)
				err = errors.Join(err, objects.Delete(o))
			}
		}
		return written, err
	}
	live := func(keys []string, from map[string]*unstructured.Unstructured) map[string]any {
		states := map[string]any{}
		for _, k := range keys {
			if o := from[k]; o != nil {
				now, err := objects.Get(o)
				if err != nil {
					t.Fatalf("%s: %v", k, err)
				}
				states[k] = state(now)
			}
		}
		return states
	}
	var refused []string
	tried, at := 0, map[string]*unstructured.Unstructured{}
	for _, base := range []string{"cluster", "nkeys", "external"} {
		if _, err := to(at, bare[base]); err != nil {
			t.Fatalf("install %s: %v", base, err)
		}
		at = bare[base]
		before := live(slices.Collect(maps.Keys(at)), at)
		for _, c := range all {
			if c.base != base || c.name == base {
				continue
			}
			tried++
			if c.err != nil {
				t.Errorf("%s: %v", c.name, c.err)
				continue
			}
			path, _, _ := strings.Cut(c.name, "=")
			target := release(c.objects)
			for _, name := range []string{"tracer.yaml", "annotator.yaml", "owner.yaml"} {
				text, ok, _ := unstructured.NestedString(target["ConfigMap "+namespace+" oom-tracer"].Object, "data", name)
				if _, err := config.Parse(name, []byte(text)); ok && err != nil {
					t.Errorf("%s: %v", c.name, err)
				}
			}
			written, err := to(at, target)
			if err != nil {
				refused = append(refused, path)
				t.Logf("%s: refused: %v", c.name, err)
			} else if len(written) == 0 {
				t.Errorf("%s: changes nothing", c.name)
			}
			if _, err := to(target, at); err != nil {
				t.Errorf("%s, and back: %v", c.name, err)
			}
			want := map[string]any{}
			for _, k := range written {
				if s, ok := before[k]; ok {
					want[k] = s
				}
			}
			if now := live(written, at); !reflect.DeepEqual(now, want) {
				for k := range want {
					if !reflect.DeepEqual(now[k], want[k]) {
						a, _ := json.Marshal(want[k])
						b, _ := json.Marshal(now[k])
						t.Errorf("%s, and back: %s is not as before:\n%s\n%s", c.name, k, a, b)
						before[k] = now[k] // told once
					}
				}
			}
		}
	}
	slices.Sort(refused)
	if !slices.Equal(refused, append(slices.Clone(immutable), "example own-nats")) && !slices.Equal(refused, append([]string{"example own-nats"}, immutable...)) {
		t.Errorf("refused: %q, want %q", refused, immutable)
	}
	t.Logf("%d values and examples changed, and back", tried)
}

// chartBefore is the last commit before the chart had what these tests are about.
const chartBefore = "e4174ef1"

// TestUpgrades: with helm itself: a chart of before becomes this one, and back; passwords stay; what cannot be changed in place is refused
// with the way, and nothing happened; a Secret that is missing is named.
func TestUpgrades(t *testing.T) {
	c := lifeCluster(t)
	kubeconfig := c.Kubeconfig(c.Admin)
	helm := func(args ...string) (string, error) {
		return kubetest.Helm(t, append(args, "--namespace", namespace, "--kubeconfig", kubeconfig)...)
	}
	must := func(args ...string) {
		t.Helper()
		if _, err := helm(args...); err != nil {
			t.Fatalf("helm %q: %v", args, err)
		}
	}
	passwords := func() *corev1.Secret {
		t.Helper()
		secret, err := c.Client.CoreV1().Secrets(namespace).Get(t.Context(), "oom-tracer-nats", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return secret
	}
	servers := func() (annotations map[string]string, revision string) {
		t.Helper()
		set, err := c.Client.AppsV1().StatefulSets(namespace).Get(t.Context(), "oom-tracer-nats", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return set.Spec.Template.Annotations, set.ResourceVersion
	}

	// The manifests have no passwords, and what has is no ConfigMap and no argument.
	before := t.TempDir()
	archive := exec.Command("sh", "-c", "git archive "+chartBefore+" deploy/chart | tar -x -C "+before)
	archive.Dir = root
	step := archive.Run() == nil
	if step {
		must("install", "oom-tracer", filepath.Join(before, "deploy/chart"))
		must("upgrade", "oom-tracer", chart)
		must("rollback", "oom-tracer", "1")
		must("upgrade", "oom-tracer", chart)
	} else {
		t.Logf("no commit %s in this clone: the step from the chart before is not tried", chartBefore)
		must("install", "oom-tracer", chart)
	}
	made := passwords()
	if len(made.Data) != len(passwordNames)-1 { // notify.enabled is false
		t.Errorf("%d passwords", len(made.Data))
	}
	for name, password := range made.Data {
		if len(password) != 32 {
			t.Errorf("the password %s has %d characters", name, len(password))
		}
	}
	text, err := helm("get", "manifest", "oom-tracer")
	if err != nil {
		t.Fatal(err)
	}
	objects, err := kubetest.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range objects {
		text, _ := o.MarshalJSON()
		for name, password := range made.Data {
			if o.GetKind() != "Secret" && strings.Contains(string(text), string(password)) {
				t.Errorf("the password %s stands in %s %s", name, o.GetKind(), o.GetName())
			}
		}
	}
	for name, template := range templates(t, objects) {
		for _, volume := range template.Spec.Volumes {
			if volume.Secret != nil && len(volume.Secret.Items) != 1 {
				t.Errorf("%s sees %v", name, volume.Secret.Items)
			}
		}
	}
	notes, err := helm("get", "notes", "oom-tracer")
	if n := strings.Count(strings.TrimSpace(notes), "\n"); err != nil || n > 10 || !strings.Contains(notes, "oom-operator") {
		t.Errorf("NOTES of %d lines (%v):\n%s", n, err, notes)
	}
	// One upgrade that changes what was refused once: the Job of the set-up.
	annotations, _ := servers()
	must("upgrade", "oom-tracer", chart, "--set", "labels.team=x,image.pullSecrets[0].name=login,image.pullPolicy=Always")
	must("rollback", "oom-tracer")
	if again, _ := servers(); !reflect.DeepEqual(again, annotations) {
		t.Errorf("the servers are rolled: %v, before %v", again, annotations)
	}
	if !reflect.DeepEqual(passwords().Data, made.Data) {
		t.Error("an upgrade changed the passwords")
	}

	_, was := servers()
	for set, want := range map[string]string{
		"nats.storage.size=4Gi":          "nats.storage.size: is 4Gi, and the volumes of the servers were made with 2Gi",
		"nats.storage.className=fast":    `nats.storage.className: is "fast", and the volumes of the servers were made with ""`,
		"nats.replicas=1":                "nats.replicas: is 1, and 3 NATS servers run",
		"nats.passwordSecret=mine":       "nats.passwordSecret: there is no Secret mine in namespace oom-tracer",
		"nats.tlsSecret=oom-tracer-nats": "nats.tlsSecret: the Secret oom-tracer-nats in namespace oom-tracer has no key ca.crt",
		"nats.mode=external,config.nats.url=nats://x:4222,nats.external.tracer.secret=x,nats.external.tracer.user=u": "nats.external.tracer.secret: there is no Secret x",
	} {
		if _, err := helm("upgrade", "oom-tracer", chart, "--set", set+",labels.touched=yes"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want it to say %s", set, err, want)
		}
	}
	if _, now := servers(); now != was {
		t.Error("an upgrade that was refused changed the servers")
	}
	must("upgrade", "oom-tracer", chart, "--set", "nats.storage.size=2048Mi,nats.replicas=5,labels.touched=no")

	// New passwords: the chart makes them, and the servers are rolled.
	annotations, _ = servers()
	if err := c.Client.CoreV1().Secrets(namespace).Delete(t.Context(), "oom-tracer-nats", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	must("upgrade", "oom-tracer", chart, "--set", "nats.replicas=5")
	if again, _ := servers(); again["checksum/passwords"] == annotations["checksum/passwords"] {
		t.Error("new passwords do not roll the servers")
	}

	// The way for the others: only NATS runs, then its set is made anew.
	must("upgrade", "oom-tracer", chart, "--set", "nats.replicas=5,nats.maintenance=true")
	if _, err := c.Client.AppsV1().DaemonSets(namespace).Get(t.Context(), "oom-tracer", metav1.GetOptions{}); err == nil {
		t.Error("in maintenance the tracers run")
	}
	if err := c.Client.AppsV1().StatefulSets(namespace).Delete(t.Context(), "oom-tracer-nats", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	must("upgrade", "oom-tracer", chart, "--set", "nats.maintenance=true,nats.replicas=1,nats.storage.size=4Gi")
	must("upgrade", "oom-tracer", chart, "--set", "nats.replicas=1,nats.storage.size=4Gi")
	if _, err := helm("upgrade", "oom-tracer", chart, "--set", "nats.replicas=3,nats.storage.size=4Gi"); err == nil || !strings.Contains(err.Error(), "nats.replicas: is 3, and 1 NATS servers run") {
		t.Errorf("from one server to three: %v", err)
	}
}
