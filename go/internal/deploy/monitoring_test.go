package deploy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// lintMetrics has promtool read a scrape.
func lintMetrics(t *testing.T, families exposed) {
	t.Helper()
	var text bytes.Buffer
	for _, family := range families {
		if _, err := expfmt.MetricFamilyToText(&text, family); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(oomtest.Program(t, "deploy"), "promtool"), "check", "metrics")
	cmd.Stdin = &text
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// alerts are the rules of deploy/alerts.yaml.
func alerts(t *testing.T) (names []string, queries map[string]string, text []byte) {
	t.Helper()
	text, err := os.ReadFile(root + "/deploy/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr string
				Annotations map[string]string
			}
		}
	}
	if err := yaml.Unmarshal(text, &file); err != nil {
		t.Fatal(err)
	}
	queries = map[string]string{}
	for _, group := range file.Groups {
		for _, rule := range group.Rules {
			names = append(names, rule.Alert)
			queries["alert "+rule.Alert] = rule.Expr
			if want := "https://github.com/oom-tracer/oom-tracer/blob/main/deploy/docs/runbook.md#" + strings.ToLower(rule.Alert); rule.Annotations["runbook_url"] != want || rule.Annotations["summary"] == "" {
				t.Errorf("%s has the annotations %v", rule.Alert, rule.Annotations)
			}
		}
	}
	return names, queries, text
}

// promtool runs promtool in a directory of the alerts and their tests.
func promtool(t *testing.T, files map[string][]byte, args ...string) {
	t.Helper()
	dir := t.TempDir()
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(oomtest.Program(t, "deploy"), "promtool"), args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %v: %v\n%s", args, err, out)
	}
}

// TestAlerts: each alert is shown to fire and not to fire, and the runbook says what to do about it.
func TestAlerts(t *testing.T) {
	names, _, text := alerts(t)
	tests, err := os.ReadFile("testdata/alerts-test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	promtool(t, map[string][]byte{"alerts.yaml": text}, "check", "rules", "--lint=all", "--lint-fatal", "alerts.yaml")
	promtool(t, map[string][]byte{"alerts.yaml": text, "test.yaml": tests}, "test", "rules", "test.yaml")

	var cases struct {
		Tests []struct {
			Cases []struct {
				Alertname string `json:"alertname"`
				Exp       []any  `json:"exp_alerts"`
			} `json:"alert_rule_test"`
		}
	}
	if err := yaml.Unmarshal(tests, &cases); err != nil {
		t.Fatal(err)
	}
	fires, quiet := map[string]bool{}, map[string]bool{}
	for _, test := range cases.Tests {
		for _, c := range test.Cases {
			if len(c.Exp) > 0 {
				fires[c.Alertname] = true
			} else {
				quiet[c.Alertname] = true
			}
		}
	}
	runbook, err := os.ReadFile(root + "/deploy/docs/runbook.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if !fires[name] || !quiet[name] {
			t.Errorf("%s: shown to fire %v, not to fire %v", name, fires[name], quiet[name])
		}
		if !bytes.Contains(runbook, []byte("\n## "+name+"\n")) {
			t.Errorf("the runbook has no section %s", name)
		}
	}
}

// exposed are the metrics that a program shows.
type exposed map[string]*dto.MetricFamily

func parseMetrics(t *testing.T, r io.Reader) exposed {
	t.Helper()
	families, err := readMetrics(r)
	if err != nil {
		t.Fatal(err)
	}
	return families
}

func readMetrics(r io.Reader) (exposed, error) {
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(r)
}

// has reports whether there is a series with that label, and that value if it is not "".
func (e exposed) has(metric, label, value string) bool {
	family := e[metric]
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		if family == nil {
			family = e[strings.TrimSuffix(metric, suffix)]
		}
	}
	if family == nil || label == "" {
		return family != nil
	}
	for _, m := range family.Metric {
		for _, l := range m.Label {
			if l.GetName() == label && (value == "" || l.GetValue() == value) {
				return true
			}
		}
	}
	return false
}

// startAnnotator runs the real annotator until the test ends, and returns the address of its metrics too. With the rendered role, policy and
// permissions of NATS it has all it needs.
func startAnnotator(t *testing.T, s *servers, c *kubetest.Cluster) (cmd *exec.Cmd, address string) {
	t.Helper()
	address = freeAddr(t)
	text, err := os.ReadFile(s.config("annotator"))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "config.yaml")
	if err := os.WriteFile(file, []byte(replaced(t, true, string(text), "listen: :9106", fmt.Sprintf("listen: %q", address))), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd = exec.Command(oomtest.Program(t, "oom-annotator"), "--config", file, "--kubeconfig", c.Kubeconfig(c.Annotator()))
	startLogged(t, cmd)
	eventually(t, "the annotator is ready", func() error {
		resp, err := http.Get("http://" + address + "/readyz")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if body, _ := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", resp.Status, body)
		}
		return nil
	})
	return cmd, address
}

// scrapeAnnotator reads the metrics of the real annotator.
func scrapeAnnotator(t *testing.T) exposed {
	t.Helper()
	_, address := startAnnotator(t, startServers(t, "--values", root+"/deploy/examples/single-node.yaml"), kubetest.Start(t))
	var metrics exposed
	eventually(t, "the budgets are read from NATS", func() (err error) {
		if metrics, err = scrape(address); err == nil && !metrics.has("oom_tracer_paused", "", "") {
			err = fmt.Errorf("they are not")
		}
		return err
	})
	return metrics
}

var (
	stringLiteral = regexp.MustCompile(`"[^"]*"`)
	// A metric with its matchers. PromQL's own words are followed by "(", or stand alone.
	selector = regexp.MustCompile(`([a-zA-Z_:][a-zA-Z0-9_:]*)\{([^}]*)\}`)
	matcher  = regexp.MustCompile(`^\s*([a-zA-Z_]\w*)\s*(=~|!~|!=|=)\s*"([^"]*)"\s*$`)
	ourName  = regexp.MustCompile(`\b(oom_tracer|process|go|up|kube)_?\w*`)
	grouping = regexp.MustCompile(`\b(?:by|on)\s*\(([^)]*)\)`)
)

// foreign are metrics that are not ours, and ours that each scrape has.
var foreign = []string{"up", "kube_node_info"}

// TestQueries: each query of the dashboard and of the alerts is PromQL, and asks for metrics, labels and values
// that the programs really expose.
func TestQueries(t *testing.T) {
	_, queries, _ := alerts(t)
	data, err := os.ReadFile(root + "/deploy/dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct{ List []struct{ Query any } }
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		t.Fatal(err)
	}
	for _, panel := range dashboard.Panels {
		for i, target := range panel.Targets {
			queries[fmt.Sprintf("panel %s, %d", panel.Title, i)] = strings.ReplaceAll(target.Expr, "$node", ".*")
		}
	}
	if len(queries) < 40 {
		t.Fatalf("%d queries", len(queries))
	}

	golden, err := os.ReadFile(root + "/go/internal/agent/testdata/metrics-start.golden")
	if err != nil {
		t.Fatal(err)
	}
	programs := map[string]exposed{"oom-tracer": parseMetrics(t, bytes.NewReader(golden)), "oom-annotator": scrapeAnnotator(t), "oom-notify": scrapeNotify(t),
		"oom-auth": startTokens(t, "--values", root+"/deploy/examples/single-node.yaml").auth().metrics(t)}
	for name, family := range programs["oom-annotator"] {
		if strings.HasPrefix(name, "process_") { // of obs.NewRegistry, which the golden file leaves out
			programs["oom-tracer"][name] = family
		}
	}
	docs := readFile(t, root+"/deploy/docs/metrics.md")
	for program, families := range programs {
		lintMetrics(t, families)
		for name := range families {
			if strings.HasPrefix(name, "oom_tracer_") && !strings.Contains(docs, "`"+name+"`") && !strings.Contains(docs, "`"+name+"{") {
				t.Errorf("metrics.md does not have %s of %s", name, program)
			}
		}
	}
	var rules strings.Builder
	rules.WriteString("groups:\n- name: parsed\n  rules:\n")
	n := 0
	for name, query := range queries {
		fmt.Fprintf(&rules, "  - {record: 'q%d', expr: %q}\n", n, query)
		n++
		checkQuery(t, name, query, programs)
	}
	promtool(t, map[string][]byte{"queries.yaml": []byte(rules.String())}, "check", "rules", "queries.yaml")
}

func checkQuery(t *testing.T, name, query string, programs map[string]exposed) {
	t.Helper()
	selectors := selector.FindAllStringSubmatch(query, -1)
	// Every name of a metric has matchers, with the job among them, but for the one that is not ours.
	var named []string
	for _, m := range ourName.FindAllString(stringLiteral.ReplaceAllString(query, ""), -1) {
		if m != "kube_node_info" {
			named = append(named, m)
		}
	}
	if len(named) != len(selectors) || len(named) == 0 {
		t.Errorf("%s: metrics %v, and %d of them with matchers: %s", name, named, len(selectors), query)
	}
	labels := map[string]bool{"node": true, "job": true, "le": true}
	for _, s := range selectors {
		metric, jobs := s[1], []string{}
		matchers := map[string][2]string{}
		for _, part := range strings.Split(s[2], ",") {
			m := matcher.FindStringSubmatch(part)
			if m == nil {
				t.Errorf("%s: matcher %s", name, part)
				continue
			}
			if m[1] == "job" {
				jobs = strings.Split(m[3], "|")
			} else {
				matchers[m[1]] = [2]string{m[2], m[3]}
			}
		}
		if len(jobs) == 0 {
			t.Errorf("%s: no job in %s", name, s[0])
		}
		for _, job := range jobs {
			program, ok := programs[job]
			if !ok {
				t.Errorf("%s: no program is %s", name, job)
			}
			if slices.Contains(foreign, metric) {
				continue
			}
			if !program.has(metric, "", "") {
				t.Errorf("%s: %s does not expose %s", name, job, metric)
			}
			for label, m := range matchers {
				if label == "node" {
					continue
				}
				for value := range strings.SplitSeq(m[1], "|") {
					if !program.has(metric, label, value) {
						t.Errorf("%s: %s{%s=%q} is not exposed by %s", name, metric, label, value, job)
					}
				}
			}
			for _, by := range grouping.FindAllStringSubmatch(query, -1) {
				for label := range strings.SplitSeq(by[1], ",") {
					label = strings.TrimSpace(label)
					if !labels[label] && !program.has(metric, label, "") {
						t.Errorf("%s: %s has no label %s", name, metric, label)
					}
				}
			}
		}
	}
}
