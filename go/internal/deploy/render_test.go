// Package deploy holds the tests of what lies in deploy/: the chart, the manifests, NATS' permissions, the alerts
// and the dashboard, each with the programs and servers that will read them.
package deploy

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	admissionregistrationv1 "k8s.io/api/admissionregistration/v1"
	appsv1 "k8s.io/api/apps/v1"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

const (
	root      = "../../.."
	chart     = root + "/deploy/chart"
	namespace = "oom-tracer"
)

// ownSecret is the argument without which the chart makes no passwords where it has no cluster to ask. Arguments after it go before it.
func ownSecret(t *testing.T) []string { return values(t, "nats: {passwordSecret: oom-tracer-nats}") }

// render renders the chart, strictly read, and checks that helm's lint has nothing to say.
func render(t *testing.T, args ...string) []*unstructured.Unstructured {
	t.Helper()
	args = slices.Concat(ownSecret(t), args, []string{"--namespace", namespace, "--kube-version", "1.36.3"})
	if _, err := kubetest.Helm(t, append([]string{"lint", "--strict", chart}, args...)...); err != nil {
		t.Fatalf("lint: %v", err)
	}
	text, err := kubetest.Helm(t, append([]string{"template", "oom-tracer", chart}, args...)...)
	if err != nil {
		t.Fatalf("template: %v", err)
	}
	objects, err := kubetest.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// values writes values into a file and returns the arguments that name it.
func values(t *testing.T, text string) []string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "values.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"--values", file}
}

// get finds the object of a kind and name, as T; nil where there is none.
func get[T any](t *testing.T, objects []*unstructured.Unstructured, kind, name string) *T {
	t.Helper()
	for _, o := range objects {
		if o.GetKind() == kind && o.GetName() == name {
			typed := new(T)
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, typed); err != nil {
				t.Fatal(err)
			}
			return typed
		}
	}
	return nil
}

// configs are the config files of the programs, read as they read them.
func configs(t *testing.T, objects []*unstructured.Unstructured) map[string]config.Config {
	t.Helper()
	read := map[string]config.Config{}
	for name, text := range get[corev1.ConfigMap](t, objects, "ConfigMap", "oom-tracer").Data {
		cfg, err := config.Parse(name, []byte(text))
		if err != nil {
			t.Errorf("%v in:\n%s", err, text)
		}
		read[strings.TrimSuffix(name, ".yaml")] = cfg
	}
	return read
}

// templates are the pods that the objects make, by the object's name.
func templates(t *testing.T, objects []*unstructured.Unstructured) map[string]corev1.PodTemplateSpec {
	t.Helper()
	pods := map[string]corev1.PodTemplateSpec{}
	for _, o := range objects {
		switch o.GetKind() {
		case "DaemonSet":
			pods[o.GetName()] = get[appsv1.DaemonSet](t, objects, "DaemonSet", o.GetName()).Spec.Template
		case "Deployment":
			pods[o.GetName()] = get[appsv1.Deployment](t, objects, "Deployment", o.GetName()).Spec.Template
		case "StatefulSet":
			set := get[appsv1.StatefulSet](t, objects, "StatefulSet", o.GetName())
			for _, claim := range set.Spec.VolumeClaimTemplates { // as its controller does
				set.Spec.Template.Spec.Volumes = append(set.Spec.Template.Spec.Volumes, corev1.Volume{Name: claim.Name, VolumeSource: corev1.VolumeSource{
					PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: claim.Name},
				}})
			}
			pods[o.GetName()] = set.Spec.Template
		case "Pod":
			pod := get[corev1.Pod](t, objects, "Pod", o.GetName())
			pods[o.GetName()] = corev1.PodTemplateSpec{ObjectMeta: pod.ObjectMeta, Spec: pod.Spec}
		case "Job":
			pods["oom-tracer-setup"] = get[batchv1.Job](t, objects, "Job", o.GetName()).Spec.Template
		}
	}
	return pods
}

// examples are the values that the docs name, and what of them comes out.
var examples = map[string]struct {
	values string // "" is the default
	pods   []string
}{
	"default":              {"", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"manifests":            {"deploy/manifests-values.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"single-node":          {"deploy/examples/single-node.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"embedded":             {"deploy/examples/embedded.yaml", []string{"oom-tracer"}},
	"own-nats":             {"deploy/examples/own-nats.yaml", []string{"oom-annotator", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"existing-nats":        {"deploy/examples/existing-nats.yaml", []string{"oom-annotator", "oom-tracer", "oom-tracer-test"}},
	"observe-only":         {"deploy/examples/observe-only.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"act":                  {"deploy/examples/act.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"evict":                {"deploy/examples/evict.yaml", []string{"oom-annotator", "oom-auth", "oom-descheduler", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"upstream-descheduler": {"deploy/examples/upstream-descheduler.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"air-gapped":           {"deploy/examples/air-gapped.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"gitops":               {"deploy/examples/gitops.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"tainted-pools":        {"deploy/examples/tainted-pools.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"cri-o":                {"deploy/examples/cri-o.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"notify":               {"deploy/examples/notify.yaml", []string{"oom-annotator", "oom-auth", "oom-notify", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
	"ipv6-only":            {"deploy/examples/ipv6-only.yaml", []string{"oom-annotator", "oom-auth", "oom-tracer", "oom-tracer-nats", "oom-tracer-setup", "oom-tracer-test"}},
}

// TestExamples: what each documented file of values renders is taken by a real API server, kinds of the
// prometheus-operator too; its pods keep within Pod Security's levels; its configs are read by our programs.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob(root + "/deploy/examples/*.yaml")
	if err != nil || len(files)+2 != len(examples) {
		t.Fatalf("%d examples, and this test knows %d of them: %v", len(files), len(examples)-2, err)
	}
	c := kubetest.Start(t)
	for _, crd := range []string{"podmonitors", "prometheusrules"} {
		c.Apply(filepath.Join(oomtest.Program(t, "deploy"), "crds", crd+".yaml"))
	}
	for name, level := range map[string]string{namespace: "privileged", "restricted": "restricted"} {
		ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"pod-security.kubernetes.io/enforce": level}}}
		if _, err := c.Client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		for _, account := range []string{"default", "oom-tracer", "oom-annotator", "oom-auth", "oom-descheduler"} {
			c.ServiceAccount(name, account)
		}
	}
	for name, example := range examples {
		t.Run(name, func(t *testing.T) {
			var args []string
			if example.values != "" {
				args = []string{"--values", filepath.Join(root, example.values)}
			}
			objects := render(t, args...)
			if len(objects) < 5 {
				t.Fatalf("%d objects", len(objects))
			}
			c := c.In(t)
			c.Eventually("the server knows the kinds", func() error { return c.DryRun(objects[len(objects)-1]) })
			for _, o := range objects {
				if err := c.DryRun(o); err != nil {
					t.Errorf("%s %s: %v", o.GetKind(), o.GetName(), err)
				}
			}
			configs(t, objects)
			pods := templates(t, objects)
			if got := slices.Sorted(maps.Keys(pods)); !slices.Equal(got, example.pods) {
				t.Errorf("pods of %v, want of %v", got, example.pods)
			}
			for name, template := range pods {
				// What Pod Security's level "restricted" forbids, nobody but the tracer asks for.
				where := "restricted"
				if name == "oom-tracer" {
					where = namespace
					checkTracer(t, template)
				}
				pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: template.Labels, Annotations: template.Annotations}, Spec: *template.Spec.DeepCopy()}
				created, err := c.Client.CoreV1().Pods(where).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
				if err != nil {
					t.Errorf("pod of %s: %v", name, err)
					continue
				}
				checkSpared(t, created)
				token := slices.ContainsFunc(created.Spec.Volumes, func(v corev1.Volume) bool { return v.Projected != nil && strings.HasPrefix(v.Name, "kube-api-access") })
				if token != (name == "oom-annotator" || name == "oom-auth" || name == "oom-descheduler") {
					t.Errorf("%s has an API token: %v", name, token)
				}
			}
		})
	}
}

// checkTracer: what the tracer asks of its node, and no more.
func checkTracer(t *testing.T, template corev1.PodTemplateSpec) {
	t.Helper()
	spec, container := template.Spec, template.Spec.Containers[0]
	security := container.SecurityContext
	if *security.Privileged || *security.AllowPrivilegeEscalation || !*security.ReadOnlyRootFilesystem || *security.RunAsUser != 0 {
		t.Errorf("security context %+v", security)
	}
	if got := security.Capabilities; !reflect.DeepEqual(got.Drop, []corev1.Capability{"ALL"}) ||
		!reflect.DeepEqual(got.Add, []corev1.Capability{"BPF", "PERFMON", "SYSLOG", "SYS_RESOURCE"}) {
		t.Errorf("capabilities %+v", got)
	}
	if spec.HostPID || spec.HostIPC || spec.SecurityContext.SeccompProfile.Type == corev1.SeccompProfileTypeUnconfined ||
		spec.PriorityClassName != "system-node-critical" || !slices.Contains(spec.Tolerations, corev1.Toleration{Operator: corev1.TolerationOpExists}) {
		t.Errorf("spec %+v", spec)
	}
	// Where the node's mounts are private the runtime refuses anything else.
	for _, mount := range container.VolumeMounts {
		if mount.MountPropagation != nil && *mount.MountPropagation != corev1.MountPropagationNone {
			t.Errorf("mount propagation of %s: %s", mount.Name, *mount.MountPropagation)
		}
	}
	writable := map[string]bool{}
	for _, volume := range spec.Volumes {
		if volume.HostPath != nil {
			for _, mount := range container.VolumeMounts {
				if mount.Name == volume.Name {
					writable[volume.HostPath.Path] = !mount.ReadOnly
				}
			}
		}
	}
	delete(writable, "/etc/oom-tracer") // read-only below, where there are keys
	if want := map[string]bool{"/var/lib/oom-tracer": true, "/sys/fs/bpf": true, "/sys/fs/cgroup": false}; !reflect.DeepEqual(writable, want) {
		t.Errorf("directories of the node, and whether they are written: %v", writable)
	}
}

// TestDefaults: the keys of config.yaml that values.yaml repeats are as there.
func TestDefaults(t *testing.T) {
	shipped := config.Default()
	for who, cfg := range configs(t, render(t)) {
		if cfg.Policy.Annotation != shipped.Policy.Annotation || cfg.Annotator.SummaryAnnotation != shipped.Annotator.SummaryAnnotation ||
			cfg.Annotator.Events != shipped.Annotator.Events {
			t.Errorf("%s: %+v %+v", who, cfg.Policy, cfg.Annotator)
		}
	}
}

// TestEveryKey: a config with another value in each key comes out as it went in, but for what the chart decides.
func TestEveryKey(t *testing.T) {
	file := filepath.Join("../config/testdata/full.yaml")
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	want, err := config.Parse(file, text)
	if err != nil {
		t.Fatal(err)
	}
	indented := "config:\n  " + strings.ReplaceAll(strings.TrimSpace(string(text)), "\n", "\n  ")
	objects := render(t, values(t, indented+"\nnats: {mode: external, external: {tlsSecret: tls, clientCertificate: true,\n"+
		"  tracer: {secret: a, user: tracer}, annotator: {secret: a, user: tracer}, owner: {secret: a, user: tracer}, tap: {secret: a, user: tracer}, notify: {secret: a, user: tracer}}}\n"+
		"notify: {enabled: true}\n")...)
	for who, got := range configs(t, objects) {
		want := want
		want.Node.StateFile, want.Kernel.PinDir = "/var/lib/oom-tracer/state.json", "/run/oom-tracer/bpf/oom-tracer"
		want.NATS.PasswordFile = "/etc/oom-tracer/secret/password"
		want.NATS.TLS = config.TLS{CAFile: "/etc/oom-tracer/tls/ca.crt", CertFile: "/etc/oom-tracer/tls/tls.crt", KeyFile: "/etc/oom-tracer/tls/tls.key"}
		want.Metrics.Listen, want.Annotator.Listen, want.Annotator.Kubeconfig = ":9105", "", ""
		want.Notify.Listen = ":9108"
		if who != "notify" {
			want.Notify = config.Default().Notify
		}
		if who == "annotator" {
			want.Metrics.Listen, want.Annotator.Listen = "", ":9106"
		}
		want.Auth = config.Auth{ServiceAccount: "oom-tracer/oom-tracer", Audience: want.Auth.Audience, IssuerFile: "/etc/oom-tracer/issuer/issuer", Listen: ":9107"}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\n%+v\nwant:\n%+v", who, got, want)
		}
	}
}

// TestHelmTest: what helm test runs is a hook and no part of the release, in each mode that has a stream; it waits for an
// outcome where somebody makes one.
func TestHelmTest(t *testing.T) {
	for set, want := range map[string][]string{
		"nats.mode=cluster":       {"await", "--config=/etc/oom-tracer/config/config.yaml", "--pod-uid=$(POD_UID)", "--outcome"},
		"annotator.enabled=false": {"await", "--config=/etc/oom-tracer/config/config.yaml", "--pod-uid=$(POD_UID)"},
		"nats.mode=external,config.nats.url=nats://x:4222,nats.external.tap.secret=s,nats.external.tap.user=reader": {
			"await", "--config=/etc/oom-tracer/config/config.yaml", "--pod-uid=$(POD_UID)", "--outcome"},
		"nats.mode=embedded": nil,
	} {
		objects := render(t, "--set", set)
		pod := get[corev1.Pod](t, objects, "Pod", "oom-tracer-test")
		if (pod == nil) != (want == nil) {
			t.Errorf("%s: pod %v", set, pod)
		}
		if pod == nil {
			continue
		}
		if pod.Annotations["helm.sh/hook"] != "test" || !slices.Equal(pod.Spec.Containers[0].Args, want) {
			t.Errorf("%s: annotations %v, arguments %q", set, pod.Annotations, pod.Spec.Containers[0].Args)
		}
		victim, all := pod.Spec.InitContainers[0].Resources.Limits.Memory(), pod.Spec.Containers[0].Resources.Limits.Memory()
		if victim.Value() > 32<<20 || all.Cmp(*victim) <= 0 {
			t.Errorf("%s: the victim's limit is %s, the pod's %s", set, victim, all)
		}
		reader := configs(t, objects)["tap"].NATS
		if user := map[bool]string{true: "reader", false: "oom-tap"}[strings.Contains(set, "external")]; reader.User != user || reader.PasswordFile == "" {
			t.Errorf("%s: user %q, password in %q", set, reader.User, reader.PasswordFile)
		}
	}
}

// TestDryRun: it marks nothing, and the admission policy lets it take back marks only; kubetest.TestAdmission asks a server.
func TestDryRun(t *testing.T) {
	for _, test := range []struct {
		set  string
		acts bool
	}{{"dryRun=true", false}, {"config.policy.annotation=", false}, {"dryRun=false", true}} {
		objects := render(t, "--set", test.set)
		cfg := configs(t, objects)["annotator"]
		key, _ := cfg.Policy.Mark()
		policy, err := get[unstructured.Unstructured](t, objects, "ValidatingAdmissionPolicy", "oom-annotator").MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		if permits := !strings.Contains(string(policy), "may not mark pods"); (key != "") != test.acts || permits != test.acts {
			t.Errorf("%s: annotation %q, may mark pods: %v", test.set, key, permits)
		}
	}
}

// TestAdmissionFollowsConfig: the policy is made from the config that the annotator reads, its defaults too. What it then lets through
// kubetest.TestAdmission asks a server.
func TestAdmissionFollowsConfig(t *testing.T) {
	const strict = "may not mark a static pod;may not mark a pod of a DaemonSet;may not mark a pod with the priority of system components"
	for set, protections := range map[string]string{
		"": strict,
		"config.policy.annotation=example.com/evict=now,config.annotator.summary_annotation=example.com/kill,config.policy.opt_out_annotation=example.com/stay,config.policy.condition=example.com/c": strict,
		"config.policy.protections.static=false,config.policy.namespaces.include={a,b},config.policy.namespaces.exclude={c},config.policy.selector.app=web":                                           "may not mark a pod of a DaemonSet;may not mark a pod with the priority of system components",
		"config.policy.protections.daemonset=false,config.policy.protections.system_critical=false,config.policy.annotation=example.com/evict":                                                        "may not mark a static pod",
	} {
		args := []string{"--set", "annotator.replicas=2"}
		if set != "" {
			args = append(args, "--set", set)
		}
		objects := render(t, args...)
		cfg := configs(t, objects)["annotator"]
		policy := get[admissionregistrationv1.ValidatingAdmissionPolicy](t, objects, "ValidatingAdmissionPolicy", "oom-annotator")
		var text strings.Builder
		for _, v := range policy.Spec.Variables {
			text.WriteString(v.Expression + "\n")
		}
		for _, v := range policy.Spec.Validations {
			text.WriteString(v.Expression + "\n" + v.Message + "\n")
		}
		key, value := cfg.Policy.Mark()
		want := []string{"[?'" + cfg.Annotator.SummaryAnnotation + "']", "'" + key + "' in variables.after", "variables.after['" + key + "'] == " + strconv.Quote(value)}
		if cfg.Policy.OptOutAnnotation != "" {
			want = append(want, "variables.before[?'"+cfg.Policy.OptOutAnnotation+"']")
		}
		if cfg.Policy.Condition != "" {
			want = append(want, "c.type == '"+cfg.Policy.Condition+"'")
		}
		for _, list := range [][]string{cfg.Policy.Namespaces.Include, cfg.Policy.Namespaces.Exclude} {
			if len(list) > 0 {
				want = append(want, "request.namespace in ['"+strings.Join(list, "','")+"']")
			}
		}
		for k, v := range cfg.Policy.Selector {
			want = append(want, "[?'"+k+"'] == optional.of('"+v+"')")
		}
		for _, w := range append(want, strings.Split(protections, ";")...) {
			if !strings.Contains(text.String(), w) {
				t.Errorf("%s: no %s in:\n%s", set, w, text.String())
			}
		}
		if n := strings.Count(text.String(), "(policy.protections."); n != len(strings.Split(protections, ";")) {
			t.Errorf("%s: %d protections", set, n)
		}
		if key != "oom-tracer.alpha.kubernetes.io/evict-me" && strings.Contains(text.String(), "'oom-tracer.alpha.kubernetes.io/evict-me'") {
			t.Errorf("%s: another annotation is allowed", set)
		}
	}
}

// TestRefused: values that cannot work are refused, by name.
func TestRefused(t *testing.T) {
	for set, want := range map[string]string{
		"tracer.privileged=true": "privileged",
		"tracr.image=x":          "tracr",
		"image.tag=4663511":      "at '/image/tag': got number, want string",
		"dryRun=perhaps":         "/dryRun",
		"nats.mode=none":         "/nats/mode",
		"nats.mode=external":     "/config",
		"nats.mode=external,nats.tracers=tokens,config.nats.url=nats://x:4222": "/nats/tracers",
		"nats.mode=embedded,nats.tracers=tokens":                               "/nats/tracers",
		"nats.tracers=token":                                                   "/nats/tracers",
		"nats.replicas=2":                                                      "/nats/replicas",
		"config.nats.url=nats://x:1":                                           "/config/nats/url",
		"nats.nodeKeys.node-1=SUAXYZ":                                          "/nats/nodeKeys/node-1",
		"annotator.replicas=0":                                                 "/annotator/replicas",
		"tracer.resources.cpu=200m":                                            "/tracer/resources",
		"tracer.resources.limits.memory=lots":                                  "/tracer/resources/limits/memory",
		"tracer.resources.limits.memory=1Xi":                                   "tracer.resources.limits.memory: 1Xi is not a size",
		"tracer.seccompProfile.type=Localhost":                                 "/tracer/seccompProfile",
		"nats.storage.size=1Gi":                                                "nats.storage.size: 1Gi is too small: the streams need 1104 MiB",
		"config.nats.stream.max_bytes=4GiB":                                    "Set nats.storage.size to at least 4913Mi, or lower config.nats.stream.max_bytes",
		"nats.passwordSecret=":                                                 "nats.passwordSecret: this chart is rendered without a cluster",
		"config.policy.budgets.clutser=3":                                      "at '/config/policy/budgets': additional properties 'clutser' not allowed",
		"config.polcy.annotation=x":                                            "at '/config': additional properties 'polcy' not allowed",
		"config.kernel.tier=fast":                                              "/config/kernel/tier",
		"config.node.neighbours=51":                                            "/config/node/neighbours",
		"config.nats.stream.max_age=7d":                                        "/config/nats/stream/max_age",
		"tracer.image=x":                                                       "/tracer/image",
		"nats.image.digest=sha256:1":                                           "/nats/image/digest",
		"labels.app\\.kubernetes\\.io/name=x":                                  "invalid propertyName 'app.kubernetes.io/name'",
		"tracer.statePath=relative":                                            "/tracer/statePath",
		"descheduler.interval=0s":                                              "/descheduler/interval",
		"descheduler.policy.profils=x":                                         "/descheduler/policy",
		"descheduler.enabled=true,config.policy.annotation=":                   "descheduler.enabled: config.policy.annotation is empty",
		"readers.subjects[0].kind=Group,readers.subjects[0].name=x":            "readers.subjects: the Secret oom-tracer-nats (nats.passwordSecret) has the passwords of all users",
		"readers.subjects[0].kind=Grp,readers.subjects[0].name=x":              "/readers/subjects/0/kind",
		"descheduler.enabled=true,nats.mode=embedded":                          "descheduler.enabled: with nats.mode embedded there is no annotator",
		"notify.enabled=true":                                                  "notify.enabled: no receiver: set config.notify.slack.url_file",
		"notify.enabled=true,nats.mode=embedded":                               "notify.enabled: with nats.mode embedded each node keeps its own kills",
		"notify.enabled=true,config.notify.slack.url_file=/etc/oom-tracer/receivers/slack": "notify.secret: is empty, and config.notify has files in /etc/oom-tracer/receivers/: slack",
	} {
		_, err := kubetest.Helm(t, slices.Concat([]string{"template", "x", chart, "--kube-version", "1.36.3", "--set", set}, ownSecret(t))...)
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want it to name %s", set, err, want)
		}
	}
}

// TestAPITokens: of our pods only those that ask the API server have a token for it, in each example and by default.
func TestAPITokens(t *testing.T) {
	with := []string{"oom-annotator", "oom-auth", "oom-descheduler"}
	for name, args := range map[string][]string{
		"defaults": nil, "evict": {"--values", root + "/deploy/examples/evict.yaml"}, "notify": {"--values", root + "/deploy/examples/notify.yaml"},
	} {
		for pod, template := range templates(t, render(t, args...)) {
			token := template.Spec.AutomountServiceAccountToken == nil || *template.Spec.AutomountServiceAccountToken
			if token != slices.Contains(with, pod) {
				t.Errorf("%s: %s has a token for the API server: %t", name, pod, token)
			}
		}
	}
}

// TestDocs: relative links lead to files, and no reason, cause, example or alert is left out.
func TestDocs(t *testing.T) {
	docs, err := filepath.Glob(root + "/deploy/docs/*.md")
	if err != nil || len(docs) < 6 {
		t.Fatalf("%d docs: %v", len(docs), err)
	}
	link := regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)
	for _, doc := range append(docs, root+"/README.md") {
		text, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range link.FindAllStringSubmatch(string(text), -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(doc), m[1])); err != nil {
				t.Errorf("%s: %v", doc, err)
			}
		}
	}
	events, err := os.ReadFile(root + "/deploy/docs/events.md")
	if err != nil {
		t.Fatal(err)
	}
	for result, reasons := range event.Reasons() {
		for _, reason := range reasons {
			if !bytes.Contains(events, fmt.Appendf(nil, "| %s | %s | ", result, reason)) {
				t.Errorf("events.md has no %s/%s", result, reason)
			}
		}
	}
	for _, cause := range event.GapCauses() {
		if !bytes.Contains(events, fmt.Appendf(nil, "\n| %s | ", cause)) {
			t.Errorf("events.md has no gap %s", cause)
		}
	}
	install, err := os.ReadFile(root + "/deploy/docs/install.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, example := range examples {
		if strings.HasPrefix(example.values, "deploy/examples/") && !bytes.Contains(install, fmt.Appendf(nil, "(../examples/%s.yaml)", name)) {
			t.Errorf("install.md does not name %s", name)
		}
	}
}
