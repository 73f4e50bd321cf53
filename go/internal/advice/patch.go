package advice

import (
	"fmt"
	"regexp"
	"strings"
)

// Patch is a strategic-merge patch of a workload: kubectl patch takes it, and kustomize.
type Patch struct {
	APIVersion string         `json:"apiVersion"`
	Kind       string         `json:"kind"`
	Metadata   metadata       `json:"metadata"`
	Spec       map[string]any `json:"spec"`

	path      []string // from spec to the pod's spec
	container container
}

type metadata struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
}

type container struct {
	Name      string    `json:"name"`
	Resources resources `json:"resources"`
}

type resources struct {
	Limits   *memory `json:"limits,omitempty"`
	Requests *memory `json:"requests,omitempty"`
}

type memory struct {
	Memory string `json:"memory"`
}

// name is the rule for names in Kubernetes: a DNS-1123 subdomain. Names come from whoever may publish outcomes.
var name = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)

// patch makes the patch of the workload of an incident. There is none for a Pod or a Job, whose resources and template cannot
// be changed, nor for kinds that Kubernetes itself does not know: the server takes no strategic merge of those.
func patch(i *incident, changes *resources) *Patch {
	kind, owner, _ := strings.Cut(i.pod.Owner, "/")
	p := Patch{Kind: kind, Metadata: metadata{owner, i.pod.Namespace}, path: []string{"template", "spec"}}
	switch kind {
	case "Deployment", "StatefulSet", "DaemonSet", "ReplicaSet":
		p.APIVersion = "apps/v1"
	case "ReplicationController":
		p.APIVersion = "v1"
	case "CronJob":
		p.APIVersion, p.path = "batch/v1", []string{"jobTemplate", "spec", "template", "spec"}
	default:
		return nil
	}
	if changes == nil || !name.MatchString(owner) || !name.MatchString(i.pod.Namespace) || !name.MatchString(i.name) {
		return nil
	}
	p.container = container{i.name, *changes}
	spec := map[string]any{"containers": []container{p.container}}
	for j := len(p.path) - 1; j >= 0; j-- {
		spec = map[string]any{p.path[j]: spec}
	}
	p.Spec = spec
	return &p
}

// YAML is the patch as YAML. Names are in quotes, for a name may look like a number or a truth value.
func (p *Patch) YAML() string {
	var b strings.Builder
	fmt.Fprintf(&b, "apiVersion: %s\nkind: %s\nmetadata:\n  name: %q\n  namespace: %q\nspec:\n", p.APIVersion, p.Kind, p.Metadata.Name, p.Metadata.Namespace)
	indent := "  "
	for _, key := range p.path {
		fmt.Fprintf(&b, "%s%s:\n", indent, key)
		indent += "  "
	}
	fmt.Fprintf(&b, "%[1]scontainers:\n%[1]s- name: %[2]q\n%[1]s  resources:\n", indent, p.container.Name)
	for _, r := range []struct {
		key string
		*memory
	}{{"limits", p.container.Resources.Limits}, {"requests", p.container.Resources.Requests}} {
		if r.memory != nil {
			fmt.Fprintf(&b, "%[1]s    %[2]s:\n%[1]s      memory: %[3]s\n", indent, r.key, r.Memory)
		}
	}
	return b.String()
}
