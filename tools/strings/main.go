// Command strings prints every text that a user meets, by kind, each with its place: make strings. It fails on a word
// of the table below, and on a log message that is not a constant phrase in lower case.
//
// It knows a call by its name. Any other string in Go that has words is listed as "text".
package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// replacements has what to write in place of words that readers stumble over.
var replacements = map[string]string{
	"to be had": "available", "likewise": "the same", "in the end": "finally", "of its own": "its own", "anew": "again",
	"for good": "permanently", "tell": "publish, report", "tells": "publishes, reports", "told": "published, recorded",
	"teller": "recorder", "settle": "ack", "settled": "acked", "brake": "pause", "cell": "KV entry",
	"lookout": "memory usage of the pods", "onlooker": "enricher", "closer": "lifecycle", "go on": "continue, resume",
	"goes on": "continues, resumes",
}

// calls has the kind of text that a function takes, and the index of that argument.
var calls = map[string]struct {
	kind string
	arg  int
}{
	"Debug": {"log", 0}, "Info": {"log", 0}, "Warn": {"log", 0}, "Error": {"log", 0}, "Log": {"log", 2}, "once": {"log", 2},
	"New": {"error", 0}, "Errorf": {"error", 0}, "Usagef": {"error", 0}, "bad": {"error", 1}, "clash": {"error", 2},
	"NewDesc": {"metric", 1}, "desc": {"metric", 1}, "counter": {"metric", 1}, "gauge": {"metric", 1},
	"StringVar": {"flag", 3}, "BoolVar": {"flag", 3}, "IntVar": {"flag", 3}, "DurationVar": {"flag", 3}, "Var": {"flag", 2},
	"StringVarP": {"flag", 4}, "BoolVarP": {"flag", 4}, "IntVarP": {"flag", 4}, "DurationVarP": {"flag", 4}, "VarP": {"flag", 3},
}

// fields has the kind of text that a member of a struct holds.
var fields = map[string]string{"Short": "command", "Long": "command", "Example": "command"}

// consts has the types, and one name, of constants that are read as words: the reasons of outcomes, gaps and Events.
var consts = map[string]bool{"Reason": true, "Result": true, "GapCause": true}

// inEvents are the packages whose texts Kubernetes Events show.
var inEvents = regexp.MustCompile(`^go/(internal/(text|kubeevents)|descheduler/removeannotated)/`)

// files are those that are not in Go. Each line that matches is a text; one without a kind is checked and not listed.
var files = []struct{ kind, glob, line string }{
	{"alert", "deploy/chart/files/alerts.yaml", `(?:summary|description): (.+)`},
	{"notes", "deploy/chart/templates/NOTES.txt", `(.+)`},
	{"", "config.yaml", `(.+)`}, {"", "deploy/chart/values.yaml", `# (.+)`}, {"", "deploy/chart/files/alerts.yaml", `# (.+)`},
	{"", "README.md", `(.+)`}, {"", "CONTRIBUTING.md", `(.+)`}, {"", "deploy/docs/*.md", `(.+)`},
}

// forTests are packages that only tests import.
var forTests = regexp.MustCompile(`/(kubetest|nodetest|oomtest)/`)

var words = regexp.MustCompile(`\pL{2}.* | .*\pL{2}`)

type found struct{ kind, place, text string }

func main() {
	texts, err := list()
	if err != nil {
		fmt.Fprintln(os.Stderr, "strings:", err)
		os.Exit(2)
	}
	slices.SortStableFunc(texts, func(a, b found) int { return strings.Compare(a.kind, b.kind) })
	kind, failed := "", false
	for _, t := range texts {
		if t.kind != kind {
			kind = t.kind
			fmt.Printf("\n# %s\n", kind)
		}
		if kind != "" {
			fmt.Printf("%s: %q\n", t.place, t.text)
		}
		for _, fault := range faults(t) {
			failed = true
			fmt.Fprintf(os.Stderr, "%s: %s: %q\n", t.place, fault, t.text)
		}
	}
	if failed {
		os.Exit(1)
	}
}

// faults are what is wrong with a text.
func faults(t found) (faults []string) {
	for word, better := range replacements {
		if regexp.MustCompile(`(?i)\b` + word + `\b`).MatchString(t.text) {
			faults = append(faults, fmt.Sprintf("write %q, not %q", better, word))
		}
	}
	// The descheduler's messages follow those of Kubernetes.
	if t.kind == "log" && !strings.HasPrefix(t.place, "go/descheduler/") && !regexp.MustCompile(`^[a-z][^%…]*$`).MatchString(t.text) {
		faults = append(faults, "a log message is constant and begins with a lower-case letter")
	}
	return faults
}

// list finds all texts.
func list() ([]found, error) {
	var texts []found
	var errs []error
	for _, f := range files {
		paths, err := filepath.Glob(f.glob)
		errs = append(errs, err)
		for _, path := range paths {
			content, err := os.ReadFile(path)
			errs = append(errs, err)
			for i, line := range strings.Split(string(content), "\n") {
				if m := regexp.MustCompile(f.line).FindStringSubmatch(line); m != nil {
					texts = append(texts, found{f.kind, path + ":" + strconv.Itoa(i+1), m[1]})
				}
			}
		}
	}
	errs = append(errs, filepath.WalkDir("go", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") || forTests.MatchString(path) {
			return err
		}
		positions := token.NewFileSet()
		file, err := parser.ParseFile(positions, path, nil, 0)
		if err != nil {
			return err
		}
		collect(file, func(kind string, at token.Pos, text string) {
			if kind == "text" && inEvents.MatchString(path) {
				kind = "event"
			}
			texts = append(texts, found{kind, positions.Position(at).String(), text})
		})
		return nil
	}))
	return texts, errors.Join(errs...)
}

// collect calls add for each text of a file. A sum of strings is one text, with … for what varies.
func collect(file *ast.File, add func(kind string, at token.Pos, text string)) {
	seen := map[ast.Expr]bool{}
	var flat func(e ast.Expr) string
	flat = func(e ast.Expr) string {
		seen[e] = true
		switch e := e.(type) {
		case *ast.BasicLit:
			if text, err := strconv.Unquote(e.Value); err == nil && e.Kind == token.STRING {
				return text
			}
		case *ast.BinaryExpr:
			return flat(e.X) + flat(e.Y)
		}
		return "…"
	}
	take := func(kind string, e ast.Expr) {
		if text := flat(e); strings.Trim(text, "…") != "" {
			add(kind, e.Pos(), text)
		}
	}
	ast.Inspect(file, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ImportSpec:
			return false
		case *ast.Field:
			n.Tag = nil
		case *ast.CompositeLit:
			members := map[string]ast.Expr{}
			for _, e := range n.Elts {
				if pair, ok := e.(*ast.KeyValueExpr); ok {
					if key, ok := pair.Key.(*ast.Ident); ok {
						members[key.Name] = pair.Value
					}
				}
			}
			if name, help := members["Name"], members["Help"]; name != nil && help != nil {
				add("metric", help.Pos(), flat(name)+": "+flat(help))
			}
		case *ast.KeyValueExpr:
			if key, ok := n.Key.(*ast.Ident); ok && fields[key.Name] != "" {
				take(fields[key.Name], n.Value)
			}
		case *ast.ValueSpec:
			of, _ := n.Type.(*ast.Ident)
			if len(n.Values) == 1 && (of != nil && consts[of.Name] || consts[n.Names[0].Name]) {
				take("reason", n.Values[0])
			}
		case *ast.CallExpr:
			name := ""
			switch f := n.Fun.(type) {
			case *ast.SelectorExpr:
				name = f.Sel.Name
			case *ast.Ident:
				name = f.Name
			}
			if c, ok := calls[name]; ok && c.arg < len(n.Args) {
				if text := flat(n.Args[c.arg]); c.kind == "metric" && text != "…" {
					add(c.kind, n.Pos(), flat(n.Args[0])+": "+text)
				} else {
					take(c.kind, n.Args[c.arg])
				}
			}
		case *ast.BasicLit, *ast.BinaryExpr:
			if e := n.(ast.Expr); !seen[e] && words.MatchString(flat(e)) {
				take("text", e)
			}
		}
		return true
	})
}
