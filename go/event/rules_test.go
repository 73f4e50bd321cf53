package event

import (
	"regexp"
	"testing"
)

// The rules for words and node names are those of these regular expressions.
func TestRules(t *testing.T) {
	subdomain := regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	word := regexp.MustCompile(`^[a-z0-9_-]+$`)
	const letters = "az09-._Aä"
	all := []string{""}
	for range 5 {
		for _, s := range all {
			if got := isDNS1123Subdomain(s); got != subdomain.MatchString(s) {
				t.Fatalf("%q is a subdomain: %v", s, got)
			}
			if got := checkWord(s) == nil; got != word.MatchString(s) {
				t.Fatalf("%q is a word: %v", s, got)
			}
		}
		var longer []string
		for _, s := range all {
			for _, r := range letters {
				longer = append(longer, s+string(r))
			}
		}
		all = longer
	}
}
