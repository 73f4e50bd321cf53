package event_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/invopop/jsonschema"
	validator "github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// messages are what is published, by the name of their schema's file.
var messages = map[string]any{
	"event": event.Event{}, "gap": event.Gap{}, "node-status": event.NodeStatus{}, "outcome": event.Outcome{}, "neighbours": event.Neighbours{},
	"eviction": event.Eviction{},
}

// TestSchema holds the JSON Schemas beside this package against its types and their comments, and the golden
// messages against the schemas.
func TestSchema(t *testing.T) {
	for name, message := range messages {
		r := jsonschema.Reflector{AllowAdditionalProperties: true} // v1 may grow
		if err := r.AddGoComments("github.com/oom-tracer/oom-tracer/go/event", "."); err != nil {
			t.Fatal(err)
		}
		// The library leaves the directory out of the names that it looks comments up by.
		for key, text := range r.CommentMap {
			r.CommentMap[strings.Replace(key, "/event/.", "/event.", 1)] = strings.Join(strings.Fields(text), " ")
		}
		got, err := json.MarshalIndent(r.Reflect(message), "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, '\n')
		file := filepath.Join("schema", name+".schema.json")
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("%s (-file +types; -update writes it):\n%s", file, diff)
		}
	}
	compiler := validator.NewCompiler()
	for golden, name := range map[string]string{
		"full": "event", "bare": "event", "zero": "event", "sparse": "event",
		"gap-full": "gap", "gap-bare": "gap", "status-full": "node-status", "status-bare": "node-status",
		"outcome-full": "outcome", "outcome-bare": "outcome",
		"neighbours-full": "neighbours", "neighbours-bare": "neighbours",
		"eviction": "eviction",
	} {
		schema, err := compiler.Compile(filepath.Join("schema", name+".schema.json"))
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(filepath.Join("testdata", golden+".json"))
		if err != nil {
			t.Fatal(err)
		}
		message, err := validator.UnmarshalJSON(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(message); err != nil {
			t.Errorf("%s.json: %v", golden, err)
		}
		// And it is a schema that can fail.
		delete(message.(map[string]any), "id")
		if schema.Validate(message) == nil {
			t.Errorf("%s.json is valid without an id", golden)
		}
	}
}
