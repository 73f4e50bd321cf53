package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"

	"gopkg.in/yaml.v3"
)

// maxSize is the most that a configuration file may hold, in bytes. The shipped one has a few KiB;
// whatever is larger than this is another file.
const maxSize = 1 << 20

// Load reads the file at path; see Parse. It fails when the file cannot be read, with an error that
// wraps the cause (fs.ErrNotExist, for one).
func Load(path string) (Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return Config{}, fmt.Errorf("read config: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSize+1))
	if err != nil {
		return Config{}, fmt.Errorf("read config: %w", err)
	}
	return Parse(path, data)
}

// Parse reads the text of a configuration file. Keys that are absent have their default, so that an
// empty text is Default.
//
// Its error has one line for each fault, in the order of the file: "name:line: key.path: what". The
// line is left out where there is none.
func Parse(name string, data []byte) (Config, error) {
	if len(data) > maxSize {
		return Config{}, fmt.Errorf("%s: is larger than %d bytes: this is not a configuration file", name, maxSize)
	}
	root, err := document(data)
	if err != nil {
		return Config{}, fmt.Errorf("%s%w", name, err)
	}
	cfg := Default()
	r := reader{lines: map[string]int{}}
	if root != nil {
		r.section("", root, &cfg)
	}
	faults := r.faults
	for _, f := range cfg.faults() {
		// What could not be read has its default here: a rule that weighs it would blame the
		// wrong key.
		if !slices.ContainsFunc(r.faults, func(read fault) bool { return slices.Contains(f.keys, read.keys[0]) }) {
			f.line = r.line(f.keys)
			faults = append(faults, f)
		}
	}
	if len(faults) == 0 {
		return cfg, nil
	}
	slices.SortStableFunc(faults, func(a, b fault) int { return cmp.Compare(a.line, b.line) })
	var errs []error
	for _, f := range faults {
		f.file = name
		errs = append(errs, f)
	}
	return Config{}, errors.Join(errs...)
}

// ParseKnown reads the configuration of a program of another version: what this one does not know, or cannot read, has its default.
func ParseKnown(data []byte) (Config, error) {
	root, err := document(data)
	if err != nil {
		return Config{}, err
	}
	cfg := Default()
	if root != nil {
		r := reader{lines: map[string]int{}}
		r.section("", root, &cfg)
	}
	return cfg, nil
}

// fault is one thing that is wrong.
type fault struct {
	file string // empty: not from a file
	line int    // from 1; 0: not known
	// keys are paths: the key to blame, then those that it was weighed against.
	keys []string
	what string
}

// Error is "file:line: key.path: what", without the parts that are not known.
func (f fault) Error() string {
	var at string
	if f.file != "" {
		at = f.file
		if f.line > 0 {
			at += fmt.Sprintf(":%d", f.line)
		}
		at += ": "
	}
	if f.keys[0] != "" {
		at += f.keys[0] + ": "
	}
	return at + f.what
}

// tabIndent finds the first line that is indented with a tab, which YAML forbids and its parser
// explains poorly.
var tabIndent = regexp.MustCompile(`(?m)^ *\t`)

// document returns the root of the only document in data, nil when there is none. Its error begins
// with a colon, to follow the name of the file.
func document(data []byte) (root *yaml.Node, err error) {
	// yaml.v3 is no longer maintained, and panics on some malformed texts (go-yaml/yaml#767).
	defer func() {
		if r := recover(); r != nil {
			root, err = nil, fmt.Errorf(": is not valid YAML: %v", r)
		}
	}()
	dec := yaml.NewDecoder(bytes.NewReader(data))
	var first, second yaml.Node
	if err = dec.Decode(&first); errors.Is(err, io.EOF) {
		return nil, nil
	}
	if err == nil {
		if err = dec.Decode(&second); errors.Is(err, io.EOF) {
			return first.Content[0], nil
		}
	}
	if err == nil {
		return nil, fmt.Errorf(":%d: a second document begins: there must be one", second.Line)
	}
	if i := tabIndent.FindIndex(data); i != nil {
		return nil, fmt.Errorf(":%d: is indented with a tab: YAML wants spaces", 1+bytes.Count(data[:i[0]], []byte("\n")))
	}
	var line int
	msg := strings.TrimPrefix(err.Error(), "yaml: ")
	if n, _ := fmt.Sscanf(msg, "line %d:", &line); n == 0 {
		return nil, fmt.Errorf(": is not valid YAML: %s", msg)
	}
	// The parser counts some lines from 0 and some from 1 (its function fail), hence the wording.
	_, msg, _ = strings.Cut(msg, ": ")
	return nil, fmt.Errorf(":%d: is not valid YAML, here or on the next line: %s", line, msg)
}
