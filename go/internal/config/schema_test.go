package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/invopop/jsonschema"
)

const valuesSchema = "../../../deploy/chart/values.schema.json"

// bounds are the rules of the tags that a schema can have too. TestSchemaBounds holds them against Validate.
var bounds = boundsOf("", reflect.TypeFor[Config](), map[string]func(*jsonschema.Schema){"nats.stream.replicas": oneOf(1, 3, 5)})

func boundsOf(path string, section reflect.Type, all map[string]func(*jsonschema.Schema)) map[string]func(*jsonschema.Schema) {
	for i := range section.NumField() {
		f := section.Field(i)
		key, rule := join(path, f.Tag.Get("yaml")), f.Tag.Get("check")
		from, to, _ := strings.Cut(rule, "..")
		switch {
		case f.Type.Kind() == reflect.Struct:
			boundsOf(key, f.Type, all)
		case rule != "" && f.Type.Kind() == reflect.Int:
			all[key] = between(json.Number(from), json.Number(to))
		case strings.Contains(rule, "|"):
			var words []any
			for word := range strings.SplitSeq(rule, "|") {
				words = append(words, word)
			}
			all[key] = oneOf(words...)
		}
	}
	return all
}

func between(least, most json.Number) func(*jsonschema.Schema) {
	return func(s *jsonschema.Schema) { s.Minimum, s.Maximum = least, most }
}

func oneOf(values ...any) func(*jsonschema.Schema) {
	return func(s *jsonschema.Schema) { s.Enum = values }
}

// schema is the JSON schema of Config, made from the types and their comments.
func schema(t *testing.T) *jsonschema.Schema {
	t.Helper()
	r := jsonschema.Reflector{
		FieldNameTag: "yaml", DoNotReference: true, Anonymous: true,
		RequiredFromJSONSchemaTags: true, // every key has a default
		Mapper: func(typ reflect.Type) *jsonschema.Schema {
			switch typ {
			case reflect.TypeFor[time.Duration]():
				return &jsonschema.Schema{Type: "string", Pattern: `^(0|([0-9]+(\.[0-9]+)?(h|m|s|ms|us|µs|ns))+)$`}
			case reflect.TypeFor[Bytes]():
				return &jsonschema.Schema{AnyOf: []*jsonschema.Schema{{Type: "string", Pattern: "^[0-9]+([KMGT]iB)?$"}, {Type: "integer", Minimum: "0"}}}
			}
			return nil
		},
	}
	if err := r.AddGoComments("github.com/oom-tracer/oom-tracer/go/internal/config", "."); err != nil {
		t.Fatal(err)
	}
	// The library leaves the directory out of the names that it looks comments up by.
	for key, text := range r.CommentMap {
		r.CommentMap[strings.Replace(key, "/config/.", "/config.", 1)] = strings.Join(strings.Fields(text), " ")
	}
	s := r.Reflect(Config{})
	s.Version = ""
	for path, bound := range bounds {
		bound(property(t, s, path))
	}
	return s
}

// property is the schema of the key at path.
func property(t *testing.T, s *jsonschema.Schema, path string) *jsonschema.Schema {
	t.Helper()
	for name := range strings.SplitSeq(path, ".") {
		next, ok := s.Properties.Get(name)
		if !ok {
			t.Fatalf("no key %s", path)
		}
		s = next
	}
	return s
}

// TestValuesSchema: the schema of `config` in the chart's values is the one of these types, so that helm names a key that is none.
func TestValuesSchema(t *testing.T) {
	text, err := os.ReadFile(valuesSchema)
	if err != nil {
		t.Fatal(err)
	}
	// Only this part is made: the order of the rest stays.
	var parts struct {
		Properties struct {
			Config json.RawMessage `json:"config"`
		} `json:"properties"`
	}
	if err := json.Unmarshal(text, &parts); err != nil {
		t.Fatal(err)
	}
	var made bytes.Buffer
	encoder := json.NewEncoder(&made)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("    ", "  ")
	if err := encoder.Encode(schema(t)); err != nil {
		t.Fatal(err)
	}
	got := bytes.TrimSpace(made.Bytes())
	if *update {
		if err := os.WriteFile(valuesSchema, bytes.Replace(text, parts.Properties.Config, got, 1), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(string(parts.Properties.Config), string(got)); diff != "" {
		t.Errorf("values.schema.json (-file +types; make manifests writes it):\n%s", diff)
	}
}

// TestSchemaBounds: Validate takes what the schema's bounds allow, and no more.
func TestSchemaBounds(t *testing.T) {
	s := schema(t)
	refuses := func(path string, value any) bool {
		// In flow style, with a closing brace for each opening one.
		text := fmt.Sprintf("{%s: %v%s", strings.ReplaceAll(path, ".", ": {"), value, strings.Repeat("}", 1+strings.Count(path, ".")))
		_, err := Parse("config", []byte(text))
		return err != nil && strings.Contains(err.Error(), path+": must be")
	}
	for path := range bounds {
		p := property(t, s, path)
		for _, value := range p.Enum {
			if refuses(path, value) && path != "nats.stream.replicas" { // which needs a URL too
				t.Errorf("%s: %v is refused", path, value)
			}
		}
		if p.Enum != nil {
			if other := map[string]any{"string": "other", "integer": 2}[p.Type]; !refuses(path, other) {
				t.Errorf("%s: %v is taken", path, other)
			}
			continue
		}
		if path == "annotator.burst" {
			continue // 0 goes with annotator.qps
		}
		least, _ := p.Minimum.Int64()
		most, _ := p.Maximum.Int64()
		for value, want := range map[int64]bool{least - 1: true, least: false, most: false, most + 1: true} {
			if refuses(path, value) != want {
				t.Errorf("%s: %d is refused: %t, want %t", path, value, !want, want)
			}
		}
	}
}
