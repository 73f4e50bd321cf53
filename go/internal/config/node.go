package config

import (
	"fmt"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// NodeName decides which node this is: the flag --node-name, else NODE_NAME from the environment,
// else node.name from the file, else the host's name. The first that is not empty counts, and is
// taken as it is: a name that were lower-cased or cut to fit would be a guess.
//
// It fails when that name is not a DNS-1123 subdomain, or when the host's name cannot be read; the
// error says where the name came from. getenv and hostname are os.Getenv and os.Hostname.
func NodeName(flag string, getenv func(string) string, node Node, hostname func() (string, error)) (string, error) {
	name, source := flag, "--node-name"
	if name == "" {
		name, source = getenv("NODE_NAME"), "NODE_NAME"
	}
	if name == "" {
		name, source = node.Name, "node.name"
	}
	if name == "" {
		source = "host name (set node.name to use another)"
		var err error
		if name, err = hostname(); err != nil {
			return "", fmt.Errorf("%s: %w", source, err)
		}
	}
	if _, err := event.NodeToken(name); err != nil {
		return "", fmt.Errorf("%s: %w", source, err)
	}
	return name, nil
}
