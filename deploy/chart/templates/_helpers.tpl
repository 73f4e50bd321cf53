{{- define "oom.labels" -}}
app.kubernetes.io/name: {{ .name }}
app.kubernetes.io/part-of: oom-tracer
{{- with merge (dict) (.more | default dict) .root.Values.labels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* The metadata of an object, {root, name, more, of, cluster}: more are further labels, of is what it belongs to if that has another name;
cluster: it is in no namespace. */ -}}
{{- define "oom.meta" -}}
name: {{ .name }}
{{- if not .cluster }}
namespace: {{ .root.Release.Namespace }}
{{- end }}
labels:
  {{- include "oom.labels" (dict "root" .root "name" (.of | default .name) "more" .more) | nindent 2 }}
{{- end }}

{{- define "oom.selector" -}}
app.kubernetes.io/name: {{ . }}
app.kubernetes.io/part-of: oom-tracer
{{- end }}

{{- /* Gives a role to the service account of the same name. kind: ClusterRole or Role. */ -}}
{{- define "oom.binding" -}}
apiVersion: rbac.authorization.k8s.io/v1
kind: {{ .kind }}Binding
metadata:
  {{- include "oom.meta" (dict "root" .root "name" .name "cluster" (eq .kind "ClusterRole")) | nindent 2 }}
roleRef:
  apiGroup: rbac.authorization.k8s.io
  kind: {{ .kind }}
  name: {{ .name }}
subjects:
  - kind: ServiceAccount
    name: {{ .name }}
    namespace: {{ .root.Release.Namespace }}
{{- end }}

{{- define "oom.disruption" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  {{- include "oom.meta" . | nindent 2 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {{- include "oom.selector" .name | nindent 6 }}
{{- end }}

{{- /* Two on the node that is out of memory help nobody. */ -}}
{{- define "oom.spread" -}}
- maxSkew: 1
  topologyKey: kubernetes.io/hostname
  whenUnsatisfiable: ScheduleAnyway
  labelSelector:
    matchLabels: {app.kubernetes.io/name: {{ . }}}
{{- end }}

{{- /* The security contexts of a pod without any right, by its user, and of each of its containers. */ -}}
{{- define "oom.nobody" -}}
runAsNonRoot: true
runAsUser: {{ . }}
runAsGroup: {{ . }}
fsGroup: {{ . }}
seccompProfile: {type: RuntimeDefault}
{{- end }}
{{- define "oom.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{- /* An image: registry/repository:tag@digest. The registry and the tag of all of ours stand below image. */ -}}
{{- define "oom.image" -}}
{{- with .image.registry | default .registry }}{{ . }}/{{ end }}{{ .image.repository }}:{{ .image.tag | default .tag }}{{ with .image.digest }}@{{ . }}{{ end }}
{{- end }}
{{- define "oom.ourImage" -}}
{{- include "oom.image" (dict "image" .image "registry" .root.Values.image.registry "tag" (.root.Values.image.tag | default .root.Chart.AppVersion)) }}
{{- end }}

{{- /* What every pod of ours says. */ -}}
{{- define "oom.pod" -}}
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{ toJson . }}
{{- end }}
{{- with .of.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with merge (dict) (.of.nodeSelector | default dict) (ternary dict .root.Values.nodeSelector (.everywhere | default false)) }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with concat (.of.tolerations | default list) .root.Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .of.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- /* The annotations of a pod: ours is protected from our own marks, and "more" goes before it. */ -}}
{{- define "oom.annotations" -}}
{{- $ours := dict }}
{{- with dig "policy" "opt_out_annotation" "oom-tracer.alpha.kubernetes.io/opt-out" .root.Values.config }}
{{- $_ := set $ours . "true" }}
{{- end }}
{{- with merge (dict) (.more | default dict) $ours }}
{{- toYaml . }}
{{- end }}
{{- end }}

{{- /* Resources with the requests written out: what has no request of its own requests its limit, as the API server has it. */ -}}
{{- define "oom.resources" -}}
{{- $limits := .limits | default dict }}
{{- toYaml (dict "requests" (merge (dict) (.requests | default dict) $limits) "limits" $limits) }}
{{- end }}

{{- /* The bytes of a quantity of Kubernetes (256Mi, 1G, 1e9) or of a size of config.yaml (1GiB). */ -}}
{{- define "oom.bytes" -}}
{{- $text := toString .size }}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 }}
{{- $number := regexFind "^[0-9]+(\\.[0-9]+)?([eE][+-]?[0-9]+)?" $text }}
{{- $unit := trimPrefix $number $text | trimSuffix "B" }}
{{- if or (not $number) (not (hasKey $units $unit)) }}
{{- fail (printf "%s: %s is not a size such as 256Mi" .name $text) }}
{{- end }}
{{- mulf (float64 $number) (get $units $unit) | int64 }}
{{- end }}

{{- /* The environment, {name, resources, env}: env, and Go's soft limit, at 85% of the memory limit: the rest is for what Go does not count (the program's text, C, the kernel's
page cache and maps). Without a memory limit, and where env has its own GOMEMLIMIT, there is none. */ -}}
{{- define "oom.env" -}}
{{- $own := false }}
{{- range .env }}{{ if eq .name "GOMEMLIMIT" }}{{ $own = true }}{{ end }}{{ end }}
{{- with dig "limits" "memory" "" .resources }}
{{- if not $own -}}
- name: GOMEMLIMIT
  value: {{ div (include "oom.bytes" (dict "size" . "name" (printf "%s.resources.limits.memory" $.name)) | int64 | mul 85) 100 | quote }}
{{- end }}
{{- end }}
{{- with .env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- /* The probes of our programs on their metrics' port. /healthz asks only for what a restart cures; NATS or the API
server being away is not. The times are those of a node in trouble: while a node runs out of memory it thrashes for
minutes, and a program that is restarted then is missing when it is needed. The start may take ten minutes; a
program that hangs is restarted after five. */ -}}
{{- define "oom.probes" -}}
{{- $scheme := .scheme | default "HTTP" -}}
startupProbe:
  httpGet: {path: /healthz, port: metrics, scheme: {{ $scheme }}}
  periodSeconds: 5
  timeoutSeconds: 10
  failureThreshold: 120
livenessProbe:
  httpGet: {path: /healthz, port: metrics, scheme: {{ $scheme }}}
  periodSeconds: 30
  timeoutSeconds: 20
  failureThreshold: 10
readinessProbe:
  httpGet: {path: {{ .ready | default "/readyz" }}, port: metrics, scheme: {{ $scheme }}}
  periodSeconds: 10
  timeoutSeconds: 10
  failureThreshold: 3
{{- end }}

{{- /* The container of a program that needs no right on its node. The mounts come last: more may follow. */ -}}
{{- define "oom.container" -}}
{{- $of := index .root.Values .who -}}
name: oom-{{ .who }}
image: {{ include "oom.ourImage" (dict "root" .root "image" $of.image) }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
args:
  - --config=/etc/oom-tracer/config/config.yaml
  {{- with $of.extraArgs }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
env:
  {{- include "oom.env" (dict "name" .who "resources" $of.resources "env" $of.extraEnv) | nindent 2 }}
ports:
  - name: metrics
    containerPort: {{ index .root.Values.metrics (printf "%sPort" .who) }}
{{ include "oom.probes" (dict) }}
resources:
  {{- include "oom.resources" $of.resources | nindent 2 }}
securityContext: {{- include "oom.confined" . | nindent 2 }}
volumeMounts:
  {{- include "oom.mounts" . | nindent 2 }}
{{- end }}

{{- define "oom.natsHost" -}}
oom-tracer-nats.{{ .Release.Namespace }}.svc
{{- end }}

{{- define "oom.passwords" -}}
{{ .Values.nats.passwordSecret | default "oom-tracer-nats" }}
{{- end }}

{{- /* Whether there is a cluster to ask: "true", or "" for helm template and for what uses it (Argo CD). */ -}}
{{- define "oom.live" -}}
{{- if lookup "v1" "Namespace" "" "kube-system" }}true{{ end }}
{{- end }}

{{- /* A Secret that somebody else makes, {root, value, name, keys}: refused where it is missing or incomplete. */ -}}
{{- define "oom.need" -}}
{{- if include "oom.live" .root }}
{{- $secret := lookup "v1" "Secret" .root.Release.Namespace .name }}
{{- if not $secret }}
{{- fail (printf "%s: there is no Secret %s in namespace %s: make it first, with the keys %s (deploy/docs/install.md)" .value .name .root.Release.Namespace (join ", " .keys)) }}
{{- end }}
{{- range .keys }}
{{- if not (index ($secret.data | default dict) .) }}
{{- fail (printf "%s: the Secret %s in namespace %s has no key %s: it needs %s (deploy/docs/install.md)" $.value $.name $.root.Release.Namespace . (join ", " $.keys)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "oom.passwordNames" -}}
tracer annotator owner operator tap route auth issuer
{{- if include "oom.notify" . }} notify{{ end }}
{{- end }}

{{- /* The chart's own passwords, base64, as JSON. Made once: later renderings read them from the cluster, and one that cannot is refused.
What is made is kept in .Values, so that all templates of one rendering have the same. */ -}}
{{- define "oom.made" -}}
{{- if not (hasKey .Values "made") }}
{{- $have := (lookup "v1" "Secret" .Release.Namespace "oom-tracer-nats").data | default dict }}
{{- if not (include "oom.live" .) }}
{{- fail "nats.passwordSecret: this chart is rendered without a cluster (helm template, Argo CD), and each rendering would make other passwords. Make a Secret once, as deploy/docs/install.md says (Passwords), and set nats.passwordSecret to its name" }}
{{- end }}
{{- $made := dict }}
{{- range splitList " " (include "oom.passwordNames" .) }}
{{- /* A letter first: the server reads each as a value of its configuration. */}}
{{- $_ := set $made . (index $have . | default (printf "p%s" (randAlphaNum 31) | b64enc)) }}
{{- end }}
{{- $_ := set .Values "made" $made }}
{{- end }}
{{- toJson .Values.made }}
{{- end }}

{{- /* Changes with the passwords: servers and oom-auth read them at their start. Of a Secret of the user's only its version, since a weak
password could be guessed from a hash. */ -}}
{{- define "oom.passwordsVersion" -}}
{{- if .Values.nats.passwordSecret }}
{{- lookup "v1" "Secret" .Release.Namespace .Values.nats.passwordSecret | dig "metadata" "resourceVersion" "" }}
{{- else }}
{{- include "oom.made" . | sha256sum }}
{{- end }}
{{- end }}

{{- /* The Secret that readers may read: without the other passwords, and without the key of NATS. Empty where there is none. */ -}}
{{- define "oom.readersSecret" -}}
{{- .Values.readers.secret | default (ternary "oom-tracer-readers" "" (and (not (empty .Values.readers.subjects)) (not .Values.nats.passwordSecret))) }}
{{- end }}

{{- /* How tracers say who they are. */ -}}
{{- define "oom.tracers" -}}
{{- .Values.nats.tracers | default (ternary "tokens" "shared" (eq .Values.nats.mode "cluster")) }}
{{- end }}

{{- define "oom.audience" -}}
{{- dig "auth" "audience" "oom-tracer-nats" .Values.config }}
{{- end }}

{{- /* Who a program is on NATS: {secret, key, user}. */ -}}
{{- define "oom.identity" -}}
{{- $nats := .root.Values.nats }}
{{- $tracers := include "oom.tracers" .root }}
{{- if and (eq .who "tracer") (eq $tracers "nkeys") }}
type: nkey
path: /etc/oom-tracer/node/nats.nk
{{- else if and (eq .who "tracer") (eq $tracers "tokens") }}
type: token
path: /etc/oom-tracer/token/token
{{- else if eq $nats.mode "cluster" }}
type: password
path: /etc/oom-tracer/secret/{{ .who }}
secret: {{ include "oom.passwords" .root }}
key: {{ .who }}
user: oom-{{ .who }}
{{- else if eq $nats.mode "external" }}
{{- with index $nats.external .who }}
{{- if .secret }}
type: {{ .type }}
path: /etc/oom-tracer/secret/{{ .type }}
secret: {{ .secret }}
key: {{ .type }}
user: {{ .user | quote }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "oom.tlsSecret" -}}
{{- if eq .Values.nats.mode "cluster" }}{{ .Values.nats.tlsSecret }}{{ else if eq .Values.nats.mode "external" }}{{ .Values.nats.external.tlsSecret }}{{ end }}
{{- end }}

{{- /* The config.yaml of one program: values.config, and over it what the chart decides. */ -}}
{{- define "oom.config" -}}
{{- $root := .root }}
{{- $config := deepCopy $root.Values.config }}
{{- $nats := dict "creds_file" "" "nkey_file" "" "token_file" "" "user" "" "password_file" "" }}
{{- $tls := dict "ca_file" "" "cert_file" "" "key_file" "" }}
{{- if eq $root.Values.nats.mode "cluster" }}
{{- $scheme := ternary "tls" "nats" (ne $root.Values.nats.tlsSecret "") }}
{{- $_ := set $nats "url" (printf "%s://%s:4222" $scheme (include "oom.natsHost" $root)) }}
{{- $_ := set $nats "stream" (dict "replicas" (ternary 1 3 (lt (int $root.Values.nats.replicas) 3))) }}
{{- else if eq $root.Values.nats.mode "embedded" }}
{{- $_ := set $nats "url" "" }}
{{- $_ := set $nats "embedded" (dict "dir" "/var/lib/oom-tracer/nats") }}
{{- $_ := set $nats "stream" (dict "replicas" 1) }}
{{- end }}
{{- with include "oom.identity" . | fromYaml }}
{{- if eq .type "password" }}
{{- $_ := set $nats "user" .user }}
{{- $_ := set $nats "password_file" .path }}
{{- else }}
{{- $_ := set $nats (printf "%s_file" .type) .path }}
{{- end }}
{{- end }}
{{- if include "oom.tlsSecret" $root }}
{{- $_ := set $tls "ca_file" "/etc/oom-tracer/tls/ca.crt" }}
{{- if and (eq $root.Values.nats.mode "external") $root.Values.nats.external.clientCertificate }}
{{- $_ := set $tls "cert_file" "/etc/oom-tracer/tls/tls.crt" }}
{{- $_ := set $tls "key_file" "/etc/oom-tracer/tls/tls.key" }}
{{- end }}
{{- end }}
{{- $_ := set $nats "tls" $tls }}
{{- /* Probes ask the same port, so that it is open without metrics.enabled too. In a file for one program the port of the other is empty: the
two may be equal, which one file cannot say. */}}
{{- $listen := ternary "" (printf ":%d" (int $root.Values.metrics.tracerPort)) (eq .who "annotator") }}
{{- $annotatorListen := ternary (printf ":%d" (int $root.Values.metrics.annotatorPort)) "" (eq .who "annotator") }}
{{- $authListen := printf ":%d" (int $root.Values.metrics.authPort) }}
{{- $decided := dict "nats" $nats
	"node" (dict "state_file" "/var/lib/oom-tracer/state.json")
	"kernel" (dict "pin_dir" "/run/oom-tracer/bpf/oom-tracer")
	"metrics" (dict "listen" $listen)
	"annotator" (dict "listen" $annotatorListen "kubeconfig" "")
	"notify" (dict "listen" (printf ":%d" (int $root.Values.metrics.notifyPort)))
	"auth" (dict "service_account" (printf "%s/oom-tracer" $root.Release.Namespace) "issuer_file" "/etc/oom-tracer/issuer/issuer" "listen" $authListen "kubeconfig" "") }}
{{- if $root.Values.dryRun }}
{{- $_ := set $decided "policy" (dict "annotation" "") }}
{{- end }}
{{- $config = mustMergeOverwrite $config $decided }}
{{- /* It may have a URL that is a secret, and its templates change more often than the others should restart. */}}
{{- if ne .who "notify" }}{{ $_ := unset $config "notify" }}{{ end }}
{{- toYaml $config }}
{{- end }}

{{- define "oom.volumes" -}}
- name: config
  configMap:
    name: oom-tracer
    items:
      - {key: {{ .who }}.yaml, path: config.yaml}
{{- with include "oom.identity" . | fromYaml }}
{{- if .secret }}
- name: secret
  secret:
    secretName: {{ .secret }}
    # Root's, and for those who are not root their group's (fsGroup).
    defaultMode: 0440
    items:
      - {key: {{ .key }}, path: {{ .key }}}
{{- end }}
{{- end }}
{{- with include "oom.tlsSecret" .root }}
- name: tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    {{- if not (and (eq $.root.Values.nats.mode "external") $.root.Values.nats.external.clientCertificate) }}
    items:
      - {key: ca.crt, path: ca.crt}
    {{- end }}
{{- end }}
{{- end }}

{{- define "oom.mounts" -}}
- {name: config, mountPath: /etc/oom-tracer/config, readOnly: true}
{{- with include "oom.identity" . | fromYaml }}
{{- if .secret }}
- {name: secret, mountPath: /etc/oom-tracer/secret, readOnly: true}
{{- end }}
{{- end }}
{{- if include "oom.tlsSecret" .root }}
- {name: tls, mountPath: /etc/oom-tracer/tls, readOnly: true}
{{- end }}
{{- end }}

{{- /* A change of the config rolls the pods. */ -}}
{{- define "oom.checksum" -}}
{{ include "oom.config" . | sha256sum }}
{{- end }}

{{- /* Whether the annotator and oom-notify run, and whether the annotator may act. */ -}}
{{- define "oom.annotator" -}}
{{- if and .Values.annotator.enabled (ne .Values.nats.mode "embedded") }}true{{ end }}
{{- end }}
{{- define "oom.notify" -}}
{{- if and .Values.notify.enabled (ne .Values.nats.mode "embedded") }}true{{ end }}
{{- end }}
{{- define "oom.annotation" -}}
{{- if not .Values.dryRun }}{{ include "oom.mark" . | splitList "=" | first }}{{ end }}
{{- end }}

{{- /* config.policy.annotation. A key that is null has its default, here as in the program. */ -}}
{{- define "oom.mark" -}}
{{- dig "policy" "annotation" "oom-tracer.alpha.kubernetes.io/evict-me=true" .Values.config }}
{{- end }}

{{- /* The value that goes with it: Policy.Mark in go/internal/config. */ -}}
{{- define "oom.annotationValue" -}}
{{- $annotation := include "oom.mark" . }}
{{- if contains "=" $annotation }}{{ regexReplaceAll "^[^=]*=" $annotation "" }}{{ else }}true{{ end }}
{{- end }}

{{- define "oom.owner" -}}
{{- if or (eq .Values.nats.mode "cluster") (and (eq .Values.nats.mode "external") .Values.nats.external.setup) }}true{{ end }}
{{- end }}

{{- /* A port of metrics, open to whom the values name. */ -}}
{{- define "oom.metricsIngress" }}
{{- if .root.Values.metrics.enabled }}
  ingress:
    - ports: [{port: metrics}]
      {{- with .root.Values.networkPolicy.metricsClients }}
      from:
        {{- toYaml . | nindent 8 }}
      {{- end }}
{{- else }}
  ingress: []
{{- end }}
{{- end }}

{{- /* A user of NATS for each node, which may publish for that node alone. On one line: a ConfigMap has 1 MiB. */ -}}
{{- define "oom.nodeUsers" -}}
# A user for each node. It publishes the kills, gaps and status of that node, and receives the acks. The annotator publishes outcomes and evictions.
users: [
{{- range $node, $key := .Values.nats.nodeKeys }}
{{- $token := replace "." "_" $node }}
  {nkey: {{ $key }}, permissions: {publish: {allow: "oom.v1.*.*.{{ $token }}", deny: ["oom.v1.outcome.>", "oom.v1.eviction.>"]}, subscribe: "_INBOX_oom-tracer.{{ $token }}.>"}}
{{- end }}
]
{{- end }}
