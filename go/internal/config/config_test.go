package config

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"gopkg.in/yaml.v3"
)

var update = flag.Bool("update", false, "write the golden files anew")

// shipped is the file that packages and manifests carry.
const shipped = "../../../config.yaml"

func read(t testing.TB, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestShippedFileIsDefault(t *testing.T) {
	got, err := Load(shipped)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got); diff != "" {
		t.Errorf("config.yaml is not Default (-default +file):\n%s", diff)
	}
}

// structKeys lists the paths of a struct's keys in order, sections and leaves.
func structKeys(path string, typ reflect.Type) (leaves, all []string) {
	for i := range typ.NumField() {
		f := typ.Field(i)
		at := join(path, f.Tag.Get("yaml"))
		all = append(all, at)
		if f.Type.Kind() != reflect.Struct {
			leaves = append(leaves, at)
			continue
		}
		l, a := structKeys(at, f.Type)
		leaves, all = append(leaves, l...), append(all, a...)
	}
	return leaves, all
}

// fileKeys is structKeys for a document.
func fileKeys(path string, n *yaml.Node) (all []string) {
	for i := 0; n.Kind == yaml.MappingNode && i < len(n.Content); i += 2 {
		at := join(path, n.Content[i].Value)
		all = append(append(all, at), fileKeys(at, n.Content[i+1])...)
	}
	return all
}

func TestShippedFileHasEveryKey(t *testing.T) {
	root, err := document(read(t, shipped))
	if err != nil {
		t.Fatal(err)
	}
	_, want := structKeys("", reflect.TypeFor[Config]())
	if diff := cmp.Diff(want, fileKeys("", root)); diff != "" {
		t.Errorf("keys of Config and of config.yaml (-struct +file):\n%s", diff)
	}
}

// A key that is deleted has the default that stood there. Sections that lose their only key stay.
func TestShippedFileLessAKey(t *testing.T) {
	lines := strings.Split(string(read(t, shipped)), "\n")
	leaf := regexp.MustCompile(`^ +[a-z_]+: \S`)
	var none []string
	var leaves int
	for i, line := range lines {
		if !leaf.MatchString(line) {
			none = append(none, line)
			continue
		}
		leaves++
		got, err := Parse("config.yaml", []byte(strings.Join(slices.Delete(slices.Clone(lines), i, i+1), "\n")))
		if err != nil || !reflect.DeepEqual(got, Default()) {
			t.Errorf("without line %d (%s): not the default: %v", i+1, line, err)
		}
	}
	if want, _ := structKeys("", reflect.TypeFor[Config]()); leaves != len(want) {
		t.Errorf("%d lines are keys with a value, want %d", leaves, len(want))
	}
	if got, err := Parse("config.yaml", []byte(strings.Join(none, "\n"))); err != nil || !reflect.DeepEqual(got, Default()) {
		t.Errorf("without any key: not the default: %v", err)
	}
}

// Each key of full.yaml differs from its default, and arrives in its own field.
func TestEveryKeyIsRead(t *testing.T) {
	got, err := Load("testdata/full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		Node:   Node{Name: "worker-1.example.com", CgroupRoot: "/kubelet.slice/kind", StateFile: "/srv/state.json", StatusInterval: 90 * time.Second},
		Kernel: Kernel{Tier: "stack", Notify: "ringbuf", JournalSize: 4 << 20, PinDir: "/run/bpf/oom"},
		NATS: NATS{
			URL: "tls://a.example.com:4222, nats://[2001:db8::1]:4222,tls://b", User: "tracer", PasswordFile: "/run/secrets/password",
			TLS:      TLS{CAFile: "/etc/ca.pem", CertFile: "/etc/cert.pem", KeyFile: "/etc/key.pem"},
			Embedded: Embedded{Listen: "[::1]:0", Dir: "/srv/nats"},
			Stream:   Stream{MaxAge: 90 * time.Minute, MaxBytes: 512 << 20, Replicas: 3, DedupWindow: 90 * time.Second},
		},
		Policy: Policy{
			Annotation: "example.com/evict=now", Condition: "example.com/evict", MaxEventAge: time.Hour, Scopes: []string{"cpuset"}, Levels: []string{"pod", "container"},
			InferredLimits: true,
			Namespaces:     Namespaces{Include: []string{"shop", "web-1"}, Exclude: []string{"kube-system"}},
			Selector:       map[string]string{"app.kubernetes.io/name": "cart", "tier": ""}, OptOutAnnotation: "example.com/stay",
			Budgets: Budgets{Window: 30 * time.Minute, Node: 3, Cluster: 1000}, MarkLifetime: 2 * time.Minute,
		},
		Annotator: Annotator{
			Kubeconfig: "/etc/kubeconfig", SummaryAnnotation: "example.com/kill", WaitForPod: time.Minute, Workers: 4, QPS: 50, Burst: 100, WorkloadMetrics: 7, Listen: ":9998",
		},
		Auth: Auth{
			ServiceAccount: "monitoring/agent", Audience: "example.com/nats", IssuerFile: "/run/secrets/issuer", Kubeconfig: "/etc/auth/kubeconfig", Listen: ":9997",
		},
		Notify: Notify{
			Slack: Receiver{URLFile: "/run/secrets/slack", TokenFile: "/run/secrets/slack-token", CAFile: "/etc/slack-ca.pem", Template: "{{.Title}}"},
			Alertmanager: Receiver{
				URL: "https://alertmanager.example.com/prefix", TokenFile: "/run/secrets/token", CAFile: "/etc/alertmanager-ca.pem", Template: "{{.Count}}",
			},
			Webhook: Receiver{
				URL: "http://[::1]:8080/hook?a=b", TokenFile: "/run/secrets/hook", CAFile: "/etc/hook-ca.pem", Template: "{{.Kind}}",
			},
			GroupWait: time.Second, GroupInterval: time.Minute, WaitForOutcome: 3 * time.Second, MinInterval: 250 * time.Millisecond,
			MaxAge: 2 * time.Hour, ResolveAfter: time.Hour, Link: "https://grafana.example.com/d/oom", Listen: ":9996",
		},
		Metrics: Metrics{Listen: ":9999"},
		Log:     Log{Level: "debug", Format: "json", Kills: "none"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("full.yaml (-want +got):\n%s", diff)
	}
	// Excluded by other keys: the ways to authenticate by the user, a URL by the file with it.
	excluded := []string{"nats.creds_file", "nats.nkey_file", "nats.token_file", "notify.slack.url", "notify.alertmanager.url_file", "notify.webhook.url_file"}
	for _, key := range leavesEqual("", reflect.ValueOf(got), reflect.ValueOf(Default())) {
		if !slices.Contains(excluded, key) {
			t.Errorf("full.yaml leaves %s at its default", key)
		}
	}
	got, err = Parse("x", []byte("nats: {url: 'tls://a', creds_file: /a}\n"))
	if err != nil || got.NATS.CredsFile != "/a" {
		t.Errorf("creds_file: %+v, %v", got.NATS, err)
	}
	got, err = Parse("x", []byte("nats: {url: 'tls://a', token_file: /a}\n"))
	if err != nil || got.NATS.TokenFile != "/a" {
		t.Errorf("token_file: %+v, %v", got.NATS, err)
	}
	got, err = Parse("x", []byte("nats: {url: 'tls://a', nkey_file: /a}\n"))
	if err != nil || got.NATS.NKeyFile != "/a" {
		t.Errorf("nkey_file: %+v, %v", got.NATS, err)
	}
}

func leavesEqual(path string, a, b reflect.Value) (equal []string) {
	for i := range a.NumField() {
		at := join(path, a.Type().Field(i).Tag.Get("yaml"))
		if a.Field(i).Kind() == reflect.Struct {
			equal = append(equal, leavesEqual(at, a.Field(i), b.Field(i))...)
		} else if reflect.DeepEqual(a.Field(i).Interface(), b.Field(i).Interface()) {
			equal = append(equal, at)
		}
	}
	return equal
}

// testdata/bad holds faulty files, each beside the error it must yield.
func TestErrorsGolden(t *testing.T) {
	files, err := filepath.Glob("testdata/bad/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatalf("no files: %v", err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			cfg, err := Parse(filepath.Base(file), read(t, file))
			if err == nil {
				t.Fatal("loaded")
			}
			if !reflect.DeepEqual(cfg, Config{}) {
				t.Error("a Config came with the error")
			}
			got := err.Error() + "\n"
			golden := strings.TrimSuffix(file, ".yaml") + ".golden"
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(string(read(t, golden)), got); diff != "" {
				t.Errorf("error (-golden +got; -update writes it):\n%s", diff)
			}
		})
	}
}

func TestParseOdd(t *testing.T) {
	bomb := "a0: &a0 [x]\n"
	for i := range 40 {
		bomb += fmt.Sprintf("a%d: &a%d [*a%d, *a%d, *a%d]\n", i+1, i+1, i, i, i)
	}
	for _, tt := range []struct {
		name, text string
		want       string // in the error; empty: the default
	}{
		{"empty", "", ""},
		{"blank", "\n \n\n", ""},
		{"comments", "# nats:\n#   url: x", ""},
		{"document start", "---\n", ""},
		{"document end", "log:\n  level: info\n...\n", ""},
		{"null", "null\n", ""},
		{"empty section", "nats:\nlog: ~\n", ""},
		{"byte order mark", "\ufefflog: {level: info}\n", ""},
		{"CRLF", "log:\r\n  level: info\r\n", ""},
		{"JSON", `{"log": {"level": "info"}}`, ""},
		{"bytes as integer", "nats: {stream: {max_bytes: 1073741824}}", ""},
		{"explicit tag", "log: {level: !!str info}", ""},

		{"list", "- a\n", "x:1: must be a section with keys, not a list"},
		{"word", "nats\n", `x:1: must be a section with keys, not a string`},
		{"second document", "log:\n---\nlog:\n", "x:2: a second document begins"},
		{"second empty document", "log:\n---\n", "a second document begins"},
		{"broken second document", "log:\n---\n\"\n", "is not valid YAML"},
		{"tab", "nats:\n\turl: x\n", "x:2: is indented with a tab"},
		{"tab after spaces", "nats:\n  url: x\n  \tuser: x\n", "x:3: is indented with a tab"},
		{"unclosed quote", "log:\n  level: \"info\n", "is not valid YAML"},
		{"binary", "\x7fELF\x02\x01\x01\x00\x00\x00", "x: is not valid YAML: control characters are not allowed"},
		{"not UTF-8", "log: \xff\xfe", "x: is not valid YAML: invalid"},
		{"UTF-16 rubbish", "\xff\xfe\x00", "x: is not valid YAML: incomplete"},
		{"too big", strings.Repeat("#", 10<<20), "x: is larger than 1048576 bytes"},
		{"just too big", strings.Repeat("#", 1<<20+1), "x: is larger than"},
		{"just not too big", strings.Repeat("#", 1<<20), ""},
		{"deep", strings.Repeat("[", 1<<20), "x"},
		{"deep but closed", strings.Repeat("[", 9000) + strings.Repeat("]", 9000), "x:1: must be a section with keys, not a list"},
		{"alias bomb", bomb, "x:1: a0: anchors, aliases and merge keys are not supported"},
		{"alias of itself", "nats: &a\n  tls: *a\n", "x:1: nats: anchors"},
		{"unknown alias", "nats: *a\n", "x: is not valid YAML: unknown anchor"},
		{"panics in yaml.v3", "{{},<<}", "x:1: a key must be a word, not a section"},
		{"long key", strings.Repeat("k", 1000) + ": 1\n", `k…": unknown key: known keys here: node,`},
		{"long value", "log: {level: " + strings.Repeat("v", 1000) + "}\n", `v…"`},
		{"escape in a value", `log: {level: "\e[31m"}`, `not "\x1b[31m"`},
		{"escape in a number", `node: {neighbours: !!int "\e[31m"}`, `not a number "\x1b[31m"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Parse("x", []byte(tt.text))
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("error: %.500v", err)
			case tt.want == "" && !reflect.DeepEqual(got, Default()):
				t.Errorf("not the default: %+v", got)
			case tt.want != "" && err == nil:
				t.Errorf("loaded, want error %q", tt.want)
			case tt.want != "" && !strings.Contains(err.Error(), tt.want):
				t.Errorf("error %.500q, want %q", err, tt.want)
			}
		})
	}
}

// TestParseKnown: the config of another version is read as far as this one knows it.
func TestParseKnown(t *testing.T) {
	got, err := ParseKnown([]byte("newer: {a: 1}\nnats: {url: nats://a:4222, newer: 1}\npolicy: {max_event_age: soon, annotation: a=b}\n"))
	want := Default()
	want.NATS.URL, want.Policy.Annotation = "nats://a:4222", "a=b"
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	if _, err := ParseKnown([]byte("{")); err == nil {
		t.Error("takes what is no YAML")
	}
}

func TestLoadUnreadable(t *testing.T) {
	dir := t.TempDir()
	if _, err := Load(filepath.Join(dir, "none.yaml")); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("absent file: %v", err)
	}
	if _, err := Load(dir); !errors.Is(err, syscall.EISDIR) || !strings.Contains(err.Error(), dir) {
		t.Errorf("directory: %v", err)
	}
	if _, err := Load("/dev/zero"); err == nil || !strings.Contains(err.Error(), "/dev/zero: is larger than") {
		t.Errorf("endless file: %v", err)
	}
}

func TestBytes(t *testing.T) {
	for text, want := range map[string]Bytes{
		"0": 0, "1048576": 1 << 20, "1KiB": 1 << 10, "512MiB": 512 << 20, "1GiB": 1 << 30, "2TiB": 2 << 40, "8388607TiB": 8388607 << 40,
	} {
		if got, err := parseBytes(text); err != nil || got != want {
			t.Errorf("parseBytes(%q) = %d, %v, want %d", text, got, err, want)
		}
	}
	for _, text := range []string{"", "KiB", "-1", "+1", "1.5GiB", "1 GiB", "1GB", "1G", "1gib", "1KiBKiB", "1B", "0x10", "1_000", "8388608TiB", "9223372036854775808"} {
		if got, err := parseBytes(text); err == nil {
			t.Errorf("parseBytes(%q) = %d, want an error", text, got)
		}
	}
}

// A password in the URL, or a secret in the place of its path, must not come back in an error.
func TestErrorsKeepSecrets(t *testing.T) {
	for _, text := range []string{
		"nats: {url: 'nats://u:hunter2@h:4222'}",
		"nats: {url: 'nats://u:hun/hunter2@h'}",
		"nats: {url: 'nats://a,nats://:hunter2 @%zz'}",
		"nats: {url: 'tls://a', password_file: hunter2, user: u}",
		"nats: {url: 'tls://a', creds_file: hunter2}",
		"nats: {url: 'tls://a', nkey_file: hunter2}",
		"nats: {url: 'tls://a', user: u, password_file: [hunter2]}",
		"nats: {url: 'tls://a', tls: hunter2}",
		"nats: {url: 'tls://a', password: hunter2}",
		"nats: {url: 'tls://a', tls: {cert_file: /a, key_file: hunter2}}",
		"nats:\n  url: tls://a\n  creds_file: |\n    /-----BEGIN\n    hunter2\n",
	} {
		for _, secret := range []string{"hunter2", "20240607"} { // a string and a number
			text := strings.ReplaceAll(text, "hunter2", secret)
			if _, err := Parse("x", []byte(text)); err == nil || strings.Contains(err.Error(), secret) {
				t.Errorf("%s: %v", text, err)
			}
		}
	}
}

// validate has a line for each fault: "key.path: what".
func validate(c *Config) error {
	var errs []error
	for _, f := range c.faults() {
		errs = append(errs, f)
	}
	return errors.Join(errs...)
}

func TestValidate(t *testing.T) {
	cfg := Default()
	if err := validate(&cfg); err != nil {
		t.Errorf("the default: %v", err)
	}
	cfg.Log.Level = "loud"
	cfg.Node.Neighbours = 51
	want := "node.neighbours: must be from 0 to 50, not 51\nlog.level: must be one of debug, info, warn, error, not \"loud\""
	if err := validate(&cfg); err == nil || err.Error() != want {
		t.Errorf("error:\n%v\nwant:\n%s", err, want)
	}
}

// Values at the edge of what is allowed, which the golden files show from the other side.
func TestBoundsAreAllowed(t *testing.T) {
	for _, text := range []string{
		"node: {name: " + strings.Repeat("a.", 126) + "a}",
		"kernel: {notify: perf}", "kernel: {notify: ringbuf}", "kernel: {notify: poll}",
		"kernel: {journal_size: 128KiB}", "kernel: {journal_size: 256MiB}", "node: {neighbours: 50}",
		"nats: {embedded: {listen: '127.8.9.10:0'}}", "nats: {embedded: {listen: '[::1]:65535'}}",
		"nats: {stream: {max_age: 1m, dedup_window: 1m}}", "nats: {stream: {dedup_window: 1s}}",
		"nats: {stream: {max_bytes: 1MiB}}", "nats: {stream: {max_bytes: 1048576}}",
		"nats: {url: nats://h, stream: {replicas: 5}}",
		"nats: {url: 'nats://10.0.0.1:1,tls://h:65535'}",
		"metrics: {listen: ''}", "metrics: {listen: 'localhost:0'}", "metrics: {listen: '[::]:9105'}", "metrics: {listen: '0.0.0.0:65535'}",
	} {
		if _, err := Parse("x", []byte(text)); err != nil {
			t.Errorf("%s: %v", text, err)
		}
	}
}

func TestAddresses(t *testing.T) {
	for _, url := range []string{
		"http://a", "nats://", "a:4222", "nats:a", "nats://a:4222/", "nats://a,", ",", "nats://a:0", "nats://a:65536", "nats://a:", "nats://a?x=y",
		"nats://a#x", "nats://a b", "nats://:4222", "nats://u@a", "nats://u:p@a", "nats://a, tls://b:x", " ",
	} {
		cfg := Default()
		cfg.NATS.URL = url
		if err := validate(&cfg); err == nil || !strings.HasPrefix(err.Error(), "nats.url: must ") {
			t.Errorf("nats.url %q: %v", url, err)
		}
	}
	for _, addr := range []string{"localhost", ":", "9105", "::1:9105", "127.0.0.1:http", "a_b:1", "10.0.0.1:-1", "10.0.0.1:65536", "a b:1", " :1", "http://a:1"} {
		cfg := Default()
		cfg.Metrics.Listen = addr
		if err := validate(&cfg); err == nil || !strings.HasPrefix(err.Error(), "metrics.listen: must be an address and a port") {
			t.Errorf("metrics.listen %q: %v", addr, err)
		}
	}
	for _, addr := range []string{"", ":4222", "127.0.0.1", "localhost:4222", "10.0.0.1:4222", "[::]:4222", "::1:4222", "127.0.0.1:65536", "127.1:4222"} {
		cfg := Default()
		cfg.NATS.Embedded.Listen = addr
		if err := validate(&cfg); err == nil || !strings.HasPrefix(err.Error(), "nats.embedded.listen: must be a loopback IP address") {
			t.Errorf("nats.embedded.listen %q: %v", addr, err)
		}
	}
}

func TestSuggest(t *testing.T) {
	known := []string{"url", "user", "max_age", "max_bytes", "listen"}
	for key, want := range map[string]string{
		"URL": "url", "ulr": "", "usr": "user", "maxAge": "max_age", "max-age": "max_age", "max_byte": "max_bytes", "lisetn": "listen", "x": "", "": "",
	} {
		got := suggest(key, known)
		if want == "" && !strings.HasPrefix(got, ": known keys here") || want != "" && got != ": did you mean "+want+"?" {
			t.Errorf("suggest(%q) = %q, want %q", key, got, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/bad/*.yaml")
	for _, file := range append(files, shipped, "testdata/full.yaml") {
		f.Add(read(f, file))
	}
	for _, s := range []string{
		"", "---\n---\n", "a: &a [*a]", "nats: {<<: {url: x}}", "? [a]\n: b", "\t", "\xff\xfe", "{{},<<}", "#\n - - QI\xd7", "0: [:!00 \xef", "! !00 \xf6",
		"log: !!binary aGk=", "log: !<tag:yaml.org,2002:null> x", "log: !!map", "node: {neighbours: !!int x, user: !!str, url: !!merge <<}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		_, known := ParseKnown(data)
		cfg, err := Parse("name", data)
		if err == nil && known != nil {
			t.Errorf("loaded, and refused by what ignores unknown keys: %v", known)
		}
		if err == nil {
			if err := validate(&cfg); err != nil {
				t.Errorf("loaded and is not valid: %v", err)
			}
			return
		}
		for line := range bytes.SplitSeq([]byte(err.Error()), []byte("\n")) {
			if !bytes.HasPrefix(line, []byte("name:")) || bytes.ContainsFunc(line, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Errorf("line %q of the error", line)
			}
		}
	})
}
