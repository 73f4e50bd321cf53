package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// faults collects every rule that c breaks. No message repeats what may be a secret.
func (c *Config) faults() []fault {
	var faults []fault
	bad := func(key, format string, args ...any) {
		faults = append(faults, fault{keys: []string{key}, what: fmt.Sprintf(format, args...)})
	}
	// clash blames key for what the value of other makes of it.
	clash := func(key, other, format string, args ...any) {
		faults = append(faults, fault{keys: []string{key, other}, what: fmt.Sprintf(format, args...)})
	}
	checkTags("", reflect.ValueOf(c).Elem(), bad)

	if c.Node.Name != "" {
		if _, err := event.NodeToken(c.Node.Name); err != nil {
			bad("node.name", "%v", err)
		}
	}
	if !path.IsAbs(c.Node.CgroupRoot) || path.Clean(c.Node.CgroupRoot) != c.Node.CgroupRoot {
		bad("node.cgroup_root", "must be an absolute path without \"..\", \"//\" or a slash at its end, not %s", show(c.Node.CgroupRoot))
	}

	if n := c.Kernel.JournalSize; n < 128<<10 || n > 256<<20 || n&(n-1) != 0 {
		bad("kernel.journal_size", "must be a power of two from 128KiB to 256MiB, not %d bytes", n)
	}
	n := c.NATS
	if n.URL != "" {
		if err := checkURLs(n.URL); err != nil {
			bad("nats.url", "%v", err)
		}
	}
	var ways []string // of authentication, the key that stands for each
	for _, k := range []struct {
		key, value string
		way        bool
	}{
		{"nats.creds_file", n.CredsFile, true},
		{"nats.nkey_file", n.NKeyFile, true},
		{"nats.token_file", n.TokenFile, true},
		{"nats.user", n.User, true},
		{"nats.password_file", n.PasswordFile, n.User == ""},
		{"nats.tls.ca_file", n.TLS.CAFile, false},
		{"nats.tls.cert_file", n.TLS.CertFile, false},
		{"nats.tls.key_file", n.TLS.KeyFile, false},
	} {
		if k.value == "" {
			continue
		}
		if n.URL == "" {
			clash(k.key, "nats.url", "needs nats.url: the embedded server makes its own credentials and has no TLS")
		}
		if k.way {
			ways = append(ways, k.key)
		}
	}
	for _, way := range ways[min(1, len(ways)):] {
		clash(way, ways[0], "cannot be set with %s: choose one way to authenticate", ways[0])
	}
	pair := func(key, value, other, otherValue string) {
		if value != "" && otherValue == "" {
			clash(key, other, "needs %s too", other)
		}
	}
	pair("nats.user", n.User, "nats.password_file", n.PasswordFile)
	pair("nats.password_file", n.PasswordFile, "nats.user", n.User)
	pair("nats.tls.cert_file", n.TLS.CertFile, "nats.tls.key_file", n.TLS.KeyFile)
	pair("nats.tls.key_file", n.TLS.KeyFile, "nats.tls.cert_file", n.TLS.CertFile)

	// A name is refused, even localhost: what it resolves to is not in this file.
	if ap, err := netip.ParseAddrPort(n.Embedded.Listen); err != nil || !ap.Addr().IsLoopback() {
		bad("nats.embedded.listen", "must be a loopback IP address and a port, such as 127.0.0.1:4222 or [::1]:4222, not %s", show(n.Embedded.Listen))
	}
	if !isPath(n.Embedded.Dir) {
		bad("nats.embedded.dir", "must be the absolute path of a directory, not %s", show(n.Embedded.Dir))
	}

	s := n.Stream
	if s.MaxAge < time.Minute {
		bad("nats.stream.max_age", "must be at least 1m, not %s", s.MaxAge)
	}
	if s.MaxBytes < 1<<20 {
		bad("nats.stream.max_bytes", "must be at least 1MiB, not %d bytes", s.MaxBytes)
	}
	if s.Replicas != 1 && s.Replicas != 3 && s.Replicas != 5 {
		bad("nats.stream.replicas", "must be 1, 3 or 5, not %d", s.Replicas)
	} else if s.Replicas > 1 && n.URL == "" {
		clash("nats.stream.replicas", "nats.url", "must be 1 without nats.url: the embedded server is a single server")
	}
	if s.DedupWindow < time.Second {
		bad("nats.stream.dedup_window", "must be at least 1s, not %s", s.DedupWindow)
	} else if s.DedupWindow > s.MaxAge && s.MaxAge >= time.Minute {
		clash("nats.stream.dedup_window", "nats.stream.max_age", "is %s and must not exceed nats.stream.max_age, which is %s", s.DedupWindow, s.MaxAge)
	}

	c.policyFaults(bad, clash)
	a := c.Annotator
	if err := checkKey(a.SummaryAnnotation); err != nil {
		bad("annotator.summary_annotation", "%v", err)
	}
	if (a.Burst == 0) != (a.QPS == 0) {
		clash("annotator.burst", "annotator.qps", "must be 0 if annotator.qps is 0, and above 0 otherwise")
	}
	if a.Listen != "" && c.Metrics.Listen == a.Listen && !strings.HasSuffix(a.Listen, ":0") {
		clash("annotator.listen", "metrics.listen", "must differ from metrics.listen: oom-tracer and oom-annotator may run on one machine")
	}
	namespace, account, _ := strings.Cut(c.Auth.ServiceAccount, "/")
	if _, err := event.NodeToken(account); err != nil || len(namespace) > 63 || !dnsLabel.MatchString(namespace) {
		bad("auth.service_account", "must be namespace/name, not %s", show(c.Auth.ServiceAccount))
	}
	if c.Auth.Audience == "" {
		bad("auth.audience", "must not be empty: a token for any audience would be accepted")
	}
	c.notifyFaults(clash)
	return faults
}

// checkTags holds the values of a section, and of those in it, against the tags check of their fields: bounds (1s..1h, 0..50), words
// (text|json), or what a text is (file, dir, listen, url), if it is not empty. No message repeats a path or a URL: it may be the secret,
// pasted in place of its path.
func checkTags(path string, section reflect.Value, bad func(key, format string, args ...any)) {
	for i := range section.NumField() {
		field, value := section.Type().Field(i), section.Field(i)
		key, rule := join(path, field.Tag.Get("yaml")), field.Tag.Get("check")
		switch {
		case value.Kind() == reflect.Struct:
			checkTags(key, value, bad)
		case rule == "":
		case value.CanInt():
			if from, to, _ := strings.Cut(rule, ".."); value.Int() < bound(from) || value.Int() > bound(to) {
				bad(key, "must be from %s to %s, not %v", from, to, value)
			}
		case strings.Contains(rule, "|"):
			if words := strings.Split(rule, "|"); !slices.Contains(words, value.String()) {
				bad(key, "must be one of %s, not %s", strings.Join(words, ", "), show(value.String()))
			}
		case value.String() == "":
		case rule == "file" && !isPath(value.String()):
			bad(key, "must be the absolute path of a file")
		case rule == "dir" && !isPath(value.String()):
			bad(key, "must be the absolute path of a directory")
		case rule == "url" && !isHTTP(value.String()):
			bad(key, "must be an http:// or https:// URL without user and password")
		case rule == "listen":
			if err := checkListen(value.String()); err != nil {
				bad(key, "%v", err)
			}
		}
	}
}

// bound reads a number or a duration.
func bound(s string) int64 {
	if n, err := strconv.ParseInt(s, 10, 64); err == nil {
		return n
	}
	d, _ := time.ParseDuration(s) // a tag that is wrong refuses the default
	return int64(d)
}

// notifyFaults is the part of faults for the section notify; it reports to clash.
func (c *Config) notifyFaults(clash func(key, other, format string, args ...any)) {
	for _, k := range []struct {
		name string
		Receiver
	}{{"slack", c.Notify.Slack}, {"alertmanager", c.Notify.Alertmanager}, {"webhook", c.Notify.Webhook}} {
		at := "notify." + k.name + "."
		if k.URL != "" && k.URLFile != "" {
			clash(at+"url_file", at+"url", "cannot be set with %surl: choose one", at)
		}
		for _, v := range []struct{ key, value string }{{"token_file", k.TokenFile}, {"ca_file", k.CAFile}, {"template", k.Template}} {
			if v.value != "" && !k.Enabled() {
				clash(at+v.key, at+"url", "needs %surl or %surl_file", at, at)
			}
		}
	}
}

// isHTTP reports whether s is a URL of a web server.
func isHTTP(s string) bool {
	u, err := url.Parse(s)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" && u.User == nil && !strings.ContainsFunc(s, unicode.IsSpace)
}

// isPath tells an absolute path from a word, or from the text of a file.
func isPath(s string) bool {
	return path.IsAbs(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// checkURLs checks a comma-separated list of servers.
func checkURLs(list string) error {
	// Asked first, so that no other message can repeat a password.
	if strings.Contains(list, "@") {
		return errors.New("must not hold credentials: use nats.creds_file, nats.nkey_file, or nats.user with nats.password_file")
	}
	for entry := range strings.SplitSeq(list, ",") {
		u, err := url.Parse(strings.TrimSpace(entry))
		if err != nil || u.Scheme != "nats" && u.Scheme != "tls" || u.Hostname() == "" ||
			u.Path+u.RawQuery+u.Fragment != "" || strings.HasSuffix(u.Host, ":") || u.Port() != "" && !isPort(u.Port(), 1) {
			return fmt.Errorf("must be nats://host:port or tls://host:port, or several with commas between, not %s", show(entry))
		}
	}
	return nil
}

// checkListen checks host:port. The host may be empty, which is every address of the machine.
func checkListen(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	_, notIP := netip.ParseAddr(host)
	_, notName := event.NodeToken(host)
	if err != nil || host != "" && notIP != nil && notName != nil || !isPort(port, 0) {
		return fmt.Errorf("must be an address and a port, such as 127.0.0.1:9105 or :9105, not %s", show(addr))
	}
	return nil
}

// isPort reports whether s is a decimal port number of at least lowest.
func isPort(s string, lowest uint64) bool {
	n, err := strconv.ParseUint(s, 10, 16)
	return err == nil && n >= lowest
}
