package config

import (
	"errors"
	"strings"
	"testing"
)

func TestNodeName(t *testing.T) {
	host := func(name string) func() (string, error) { return func() (string, error) { return name, nil } }
	noHost := errors.New("no such host")
	for _, tt := range []struct {
		name, flag, env, file string
		hostname              func() (string, error)
		want                  string
		wantErr               string
	}{
		{name: "flag first", flag: "f", env: "e", file: "n", hostname: host("h"), want: "f"},
		{name: "then environment", env: "e", file: "n", hostname: host("h"), want: "e"},
		{name: "then file", file: "n.example.com", hostname: host("h"), want: "n.example.com"},
		{name: "then host", hostname: host("h"), want: "h"},
		{name: "bad flag is not passed over", flag: "F", env: "e", wantErr: `--node-name: node name "F" is not`},
		{name: "bad environment", env: "a_b", file: "n", wantErr: `NODE_NAME: node name "a_b" is not`},
		{name: "blank environment", env: " ", file: "n", wantErr: `NODE_NAME: node name " " is not`},
		{name: "bad file", file: "a..b", wantErr: `node.name: node name "a..b" is not`},
		{name: "host is not lower-cased", hostname: host("Big"), wantErr: `host name (set node.name to use another): node name "Big" is not`},
		{name: "empty host", hostname: host(""), wantErr: `host name (set node.name to use another): node name "" is not`},
		{name: "no host", hostname: func() (string, error) { return "", noHost }, wantErr: "host name (set node.name to use another): no such host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			getenv := func(key string) string {
				if key != "NODE_NAME" {
					t.Errorf("asked for %s", key)
				}
				return tt.env
			}
			got, err := NodeName(tt.flag, getenv, Node{Name: tt.file}, tt.hostname)
			if tt.wantErr == "" && (err != nil || got != tt.want) {
				t.Errorf("%q, %v, want %q", got, err, tt.want)
			}
			if tt.wantErr != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.wantErr) || got != "") {
				t.Errorf("%q, %v, want error %q", got, err, tt.wantErr)
			}
		})
	}
}
