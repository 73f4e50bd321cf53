package event

import (
	"fmt"
	"strings"
)

// Kind is the third token of a subject.
type Kind string

// The kinds: those that tracers publish, and last the two of the annotator.
const (
	KindKill    Kind = "kill"    // class: the scope
	KindExiting Kind = "exiting" // class: the scope
	KindGap     Kind = "gap"     // class: the cause
	// KindNeighbours has the class of its kill: the scope.
	KindNeighbours Kind = "neighbours"
	KindNode       Kind = "node"     // class: status
	KindOutcome    Kind = "outcome"  // class: the kill and the stage; of versions before: the result
	KindEviction   Kind = "eviction" // class: the pod's UID
)

// subjectRoot opens every subject. The v1 is the schema's.
const subjectRoot = "oom.v1"

// The streams, and what they hold. Subjects are oom.v1.<kind>.<class>.<node>.
const (
	// StreamName holds everything that happened.
	StreamName = "OOM"
	// NodesStreamName holds the last status of each node.
	NodesStreamName = "OOM_NODES"
)

// StreamSubjects are the subjects of the stream StreamName. Kinds that are published by later
// versions are bound from the start, so that an older stream already takes them.
func StreamSubjects() []string {
	return []string{
		subjectRoot + ".kill.>", subjectRoot + ".exiting.>", subjectRoot + ".outcome.>", subjectRoot + ".gap.>", subjectRoot + ".neighbours.>",
		subjectRoot + ".eviction.>",
	}
}

// NodesStreamSubjects are the subjects of the stream NodesStreamName.
func NodesStreamSubjects() []string { return []string{subjectRoot + ".node.>"} }

// isDNS1123Subdomain is the rule for node names (RFC 1123, k8s.io/apimachinery validation). It is no regular expression because each
// message that is read asks for it.
func isDNS1123Subdomain(s string) bool {
	edge := true // of a label, where no '-' may stand
	for i := range len(s) {
		switch c := s[i]; {
		case c >= 'a' && c <= 'z' || c >= '0' && c <= '9':
			edge = false
		case c == '-' && !edge && i+1 < len(s) && s[i+1] != '.':
		case c == '.' && !edge:
			edge = true
		default:
			return false
		}
	}
	return !edge
}

// NodeToken turns a node's name into one token of a subject: its dots become underscores, which no
// DNS-1123 name contains, so that the way back is unique.
//
// It fails when the name is not a DNS-1123 subdomain of at most 253 characters.
func NodeToken(node string) (string, error) {
	if err := checkNode(node); err != nil {
		return "", err
	}
	return strings.ReplaceAll(node, ".", "_"), nil
}

func checkNode(node string) error {
	if len(node) > 253 || !isDNS1123Subdomain(node) {
		return fmt.Errorf("node name %q is not a DNS-1123 subdomain (lower-case letters, digits, '-' and '.', at most 253 characters)", node)
	}
	return nil
}

// checkWord has the rule for kinds and classes: one token, and no wildcard.
func checkWord(s string) error {
	valid := s != ""
	for i := 0; i < len(s) && valid; i++ {
		c := s[i]
		valid = c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-'
	}
	if !valid {
		return fmt.Errorf("%q is not a word of lower-case letters, digits, '-' and '_'", s)
	}
	return nil
}

// Subject builds oom.v1.<kind>.<class>.<node>.
//
// It fails when the kind or the class is not a plain word, or the node's name not a DNS-1123 subdomain.
func Subject(kind Kind, class, node string) (string, error) {
	for _, w := range []string{string(kind), class} {
		if err := checkWord(w); err != nil {
			return "", fmt.Errorf("build subject: %w", err)
		}
	}
	token, err := NodeToken(node)
	if err != nil {
		return "", fmt.Errorf("build subject: %w", err)
	}
	return strings.Join([]string{subjectRoot, string(kind), class, token}, "."), nil
}

// Filter builds the subject pattern that selects a kind, a class and a node. An empty one selects all of
// them, and so does "*" as the kind or the class.
func Filter(kind Kind, class, node string) (string, error) {
	tokens := []string{subjectRoot, "*", "*", "*"}
	for i, w := range []string{string(kind), class} {
		if w == "" || w == "*" {
			continue
		}
		if err := checkWord(w); err != nil {
			return "", fmt.Errorf("build subject filter: %w", err)
		}
		tokens[1+i] = w
	}
	if node != "" {
		token, err := NodeToken(node)
		if err != nil {
			return "", fmt.Errorf("build subject filter: %w", err)
		}
		tokens[3] = token
	}
	return strings.Join(tokens, "."), nil
}

// ParseSubject takes a subject apart; node is the node's name with its dots back in place. Subject makes
// the same subject of what it returns.
func ParseSubject(subject string) (kind Kind, class, node string, err error) {
	rest, ok := strings.CutPrefix(subject, subjectRoot+".")
	first, rest, _ := strings.Cut(rest, ".")
	class, token, _ := strings.Cut(rest, ".")
	if !ok || checkWord(first) != nil || checkWord(class) != nil || token == "" || strings.Contains(token, ".") {
		return "", "", "", fmt.Errorf("subject %q is not %s.<kind>.<class>.<node>", subject, subjectRoot)
	}
	node = strings.ReplaceAll(token, "_", ".")
	if err := checkNode(node); err != nil {
		return "", "", "", fmt.Errorf("subject %q: %w", subject, err)
	}
	return Kind(first), class, node, nil
}
