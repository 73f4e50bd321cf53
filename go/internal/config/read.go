package config

import (
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"

	"gopkg.in/yaml.v3"
)

// reader carries a document over into a Config. It walks the nodes itself because yaml.v3's own
// strict mode knows lines but no paths, and reads 0100 as 64 and no value as a value.
type reader struct {
	faults []fault
	lines  map[string]int // where each key stands, by path
}

func (r *reader) report(path string, line int, format string, args ...any) {
	r.faults = append(r.faults, fault{keys: []string{path}, line: line, what: fmt.Sprintf(format, args...)})
}

// line is where the first of the keys that stands in the file does, 0 if none does.
func (r *reader) line(keys []string) int {
	for _, k := range keys {
		if line := r.lines[k]; line > 0 {
			return line
		}
	}
	return 0
}

// section reads a mapping into the struct that out points to. A section without a value is one
// whose keys are all absent, for that is what is left when they are commented out.
func (r *reader) section(path string, n *yaml.Node, out any) {
	if n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" {
		return
	}
	if n.Kind != yaml.MappingNode || n.ShortTag() != "!!map" {
		r.report(path, n.Line, "must be a section with keys, not %s", kind(n))
		return
	}
	fields := map[string]any{}
	var known []string
	for v, i := reflect.ValueOf(out).Elem(), 0; i < v.NumField(); i++ {
		name := v.Type().Field(i).Tag.Get("yaml")
		fields[name] = v.Field(i).Addr().Interface()
		known = append(known, name)
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		if key.Kind != yaml.ScalarNode {
			r.report(path, key.Line, "a key must be a word, not %s", kind(key))
			continue
		}
		at := join(path, key.Value)
		field, ok := fields[key.Value]
		switch first := r.lines[at]; {
		case key.ShortTag() == "!!merge" || key.Anchor != "" || val.Anchor != "" || val.Kind == yaml.AliasNode:
			r.report(at, key.Line, "anchors, aliases and merge keys are not supported: write the value out")
		case !ok:
			r.report(at, key.Line, "unknown key%s", suggest(key.Value, known))
		case first > 0:
			r.report(at, key.Line, "is already set on line %d", first)
		default:
			r.lines[at] = key.Line
			if reflect.TypeOf(field).Elem().Kind() == reflect.Struct {
				r.section(at, val, field)
			} else if words, ok := field.(*[]string); ok {
				r.list(at, val, words)
			} else if pairs, ok := field.(*map[string]string); ok {
				r.pairs(at, val, pairs)
			} else if err := scalar(val, field); err != nil {
				r.report(at, key.Line, "%v", err)
			}
		}
	}
}

// list reads a list of strings. An empty one is nil, so that two configurations of equal meaning are equal.
func (r *reader) list(path string, n *yaml.Node, out *[]string) {
	if n.Kind != yaml.SequenceNode || n.ShortTag() != "!!seq" {
		r.report(path, n.Line, "must be a list, such as [a, b] or [], not %s", kind(n))
		return
	}
	var words []string
	for _, val := range n.Content {
		var word string
		if val.Anchor != "" || val.Kind == yaml.AliasNode {
			r.report(path, val.Line, "anchors and aliases are not supported: write the value out")
		} else if err := scalar(val, &word); err != nil {
			r.report(path, val.Line, "an entry %v", err)
		}
		words = append(words, word)
	}
	*out = words
}

// pairs reads a mapping of strings to strings, whose keys are the user's own.
func (r *reader) pairs(path string, n *yaml.Node, out *map[string]string) {
	if n.Kind != yaml.MappingNode || n.ShortTag() != "!!map" {
		r.report(path, n.Line, "must be keys with values, such as {a: b} or {}, not %s", kind(n))
		return
	}
	var pairs map[string]string
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, val := n.Content[i], n.Content[i+1]
		var k, v string
		if key.ShortTag() == "!!merge" || key.Anchor != "" || val.Anchor != "" || key.Kind == yaml.AliasNode || val.Kind == yaml.AliasNode {
			r.report(path, key.Line, "anchors, aliases and merge keys are not supported: write the value out")
			continue
		}
		if err := scalar(key, &k); err != nil {
			r.report(path, key.Line, "a key %v", err)
			continue
		}
		at := join(path, k)
		if first := r.lines[at]; first > 0 {
			r.report(at, key.Line, "is already set on line %d", first)
			continue
		}
		r.lines[at] = key.Line
		if err := scalar(val, &v); err != nil {
			r.report(at, key.Line, "%v", err)
		}
		if pairs == nil {
			pairs = map[string]string{}
		}
		pairs[k] = v
	}
	*out = pairs
}

// scalar reads one value into the field that out points to.
func scalar(n *yaml.Node, out any) error {
	tag := n.ShortTag()
	if n.Kind == yaml.ScalarNode && tag == "!!null" {
		return errors.New(noValue)
	}
	if n.Kind != yaml.ScalarNode {
		tag = "" // a list that is tagged !!str is still none
	}
	isString, isInt := tag == "!!str", tag == "!!int"
	switch out := out.(type) {
	case *string:
		if !isString {
			return fmt.Errorf("must be a string (in quotes if necessary), not %s", kind(n))
		}
		*out = n.Value
	case *bool:
		if tag != "!!bool" {
			return fmt.Errorf("must be true or false, not %s", value(n))
		}
		*out = strings.EqualFold(n.Value, "true")
	case *int:
		// Decimal digits alone: YAML would take 0100 for 64.
		v, err := strconv.Atoi(n.Value)
		if !isInt || err != nil {
			return fmt.Errorf("must be a decimal integer, not %s", value(n))
		}
		*out = v
	case *Bytes:
		if !isInt && !isString {
			return fmt.Errorf("must be a number of bytes or a size such as 512MiB, not %s", value(n))
		}
		v, err := parseBytes(n.Value)
		if err != nil {
			return err
		}
		*out = v
	case *time.Duration:
		v, err := time.ParseDuration(n.Value)
		if !isString || err != nil {
			return fmt.Errorf("must be a duration such as 90s, 10m or 168h, not %s (units: ms, s, m, h; a day is 24h)", value(n))
		}
		*out = v
	default:
		panic(fmt.Sprintf("config: no reader for %T", out)) // a field of a new type was added to Config
	}
	return nil
}

// noValue is what a key without a value is told.
const noValue = "has no value: write one, or delete the key for its default"

// kind describes a node for an error, without its value, which may be a secret in the wrong place.
func kind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a section"
	case yaml.SequenceNode:
		return "a list"
	case yaml.AliasNode:
		return "an alias"
	}
	switch tag := n.ShortTag(); tag {
	case "!!null":
		return "empty"
	case "!!str":
		return "a string"
	case "!!int", "!!float":
		return "a number"
	case "!!bool":
		return "a boolean"
	case "!!timestamp":
		return "a date"
	default:
		return "a value tagged " + show(tag)
	}
}

// value is kind with the value of a scalar, for keys that hold no secret.
func value(n *yaml.Node) string {
	if n.Kind != yaml.ScalarNode {
		return kind(n)
	}
	return kind(n) + " " + show(n.Value)
}

// maxShown is how much of a value an error repeats, in bytes.
const maxShown = 60

// show quotes a value for an error, and shortens it.
func show(s string) string {
	if len(s) > maxShown {
		s = strings.ToValidUTF8(s[:maxShown], "") + "…"
	}
	return strconv.Quote(s)
}

var plainKey = regexp.MustCompile(`^[A-Za-z0-9_-]{1,60}$`)

// join extends a path. What is not plainly a key is quoted, so that one key "a.b" does not look
// like b in the section a.
func join(path, key string) string {
	if !plainKey.MatchString(key) {
		key = show(key)
	}
	if path == "" {
		return key
	}
	return path + "." + key
}

// suggest names the known key that is nearest to key, or all of them if none is near.
func suggest(key string, known []string) string {
	nearest := Nearest(strings.ReplaceAll(key, "-", "_"), known)
	if nearest == "" {
		return ": known keys here: " + strings.Join(known, ", ")
	}
	return ": did you mean " + nearest + "?"
}

// Nearest returns the known word that word was probably meant to be; empty if none is near.
func Nearest(word string, known []string) string {
	word = strings.ToLower(word)
	best, nearest := 1+len(word)/4, ""
	for _, k := range known {
		if d := distance(word, k, best); d <= best && (nearest == "" || d < best) {
			best, nearest = d, k
		}
	}
	return nearest
}

// distance is how many bytes must be inserted, deleted or replaced to make b of a (Levenshtein);
// more than limit when their lengths alone say so.
func distance(a, b string, limit int) int {
	if d := len(a) - len(b); d > limit || -d > limit {
		return limit + 1
	}
	row := make([]int, len(b)+1) // row[j]: from the part of a that was seen to b[:j]
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
