package tap

import (
	"bytes"
	"strconv"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// readBrief is read for those that need few members of a kill and its outcome: of a kill its name, its node, the victim's name and
// RSS, the limit's level and size, and whether it was in a container; of an outcome its kill, stage, pod and image. It looks at nothing
// else, so that it takes a tenth of the time. What it does not understand, read does, or says why not.
func readBrief(m bus.Stored) (message, error) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return message{}, err
	}
	var s skimmer
	r, schema, named, complete := message{node: node}, "", "", false
	switch kind {
	case event.KindKill:
		e := &event.Event{}
		schema = s.kill(m.Data, e)
		r.kill, r.id, named, complete = e, e.ID, e.Node.Name, true
	case event.KindOutcome:
		o := &event.Outcome{}
		schema = s.outcome(m.Data, o)
		r.outcome, r.id, named, complete = o, o.ID, o.Node, o.Kill != ""
	}
	if s.failed || schema != event.Schema || r.id == "" || named != node || !complete {
		return read(m)
	}
	return r, nil
}

// skimmer reads single members of JSON. What is between them, it need not understand.
type skimmer struct {
	failed bool
}

func (s *skimmer) kill(data []byte, e *event.Event) (schema string) {
	s.object(data, func(name, value []byte) {
		switch string(name) {
		case "schema":
			schema = s.text(value)
		case "id":
			e.ID = s.text(value)
		case "node":
			s.object(value, func(name, value []byte) {
				if string(name) == "name" {
					e.Node.Name = s.text(value)
				}
			})
		case "victim":
			s.object(value, func(name, value []byte) {
				switch string(name) {
				case "comm":
					e.Victim.Comm = s.text(value)
				case "memory":
					e.Victim.Memory = &event.Memory{}
					s.memory(value, e.Victim.Memory)
				}
			})
		case "limit":
			e.Limit = &event.Limit{}
			s.object(value, func(name, value []byte) {
				switch string(name) {
				case "level":
					e.Limit.Level = event.LimitLevel(s.text(value))
				case "max":
					e.Limit.Max = new(s.number(value))
				}
			})
		case "container":
			e.Container = &event.Container{}
			s.object(value, func(_, _ []byte) {})
		}
	})
	return schema
}

func (s *skimmer) memory(data []byte, m *event.Memory) {
	s.object(data, func(name, value []byte) {
		switch string(name) {
		case "anon_rss":
			m.AnonRSS = s.number(value)
		case "file_rss":
			m.FileRSS = s.number(value)
		case "shmem_rss":
			m.ShmemRSS = s.number(value)
		}
	})
}

func (s *skimmer) outcome(data []byte, o *event.Outcome) (schema string) {
	s.object(data, func(name, value []byte) {
		switch string(name) {
		case "schema":
			schema = s.text(value)
		case "id":
			o.ID = s.text(value)
		case "kill":
			o.Kill = s.text(value)
		case "stage":
			o.Stage = s.text(value)
		case "node":
			o.Node = s.text(value)
		case "image":
			o.Image = s.text(value)
		case "pod":
			o.Pod = &event.PodRef{}
			s.object(value, func(name, value []byte) {
				switch string(name) {
				case "namespace":
					o.Pod.Namespace = s.text(value)
				case "name":
					o.Pod.Name = s.text(value)
				case "owner":
					o.Pod.Owner = s.text(value)
				}
			})
		}
	})
	return schema
}

// object calls member with each member of an object.
func (s *skimmer) object(data []byte, member func(name, value []byte)) {
	rest, ok := after(data, '{')
	if _, end := after(rest, '}'); ok && end {
		return
	}
	for ok {
		var name, value []byte
		name, rest = split(rest)
		if rest, ok = after(rest, ':'); !ok || len(name) < 2 || name[0] != '"' || bytes.IndexByte(name, '\\') >= 0 {
			break
		}
		if value, rest = split(rest); len(value) == 0 {
			break
		}
		member(name[1:len(name)-1], value)
		if _, end := after(rest, '}'); end {
			return
		}
		rest, ok = after(rest, ',')
	}
	s.failed = true
}

// text is a string without escapes.
func (s *skimmer) text(value []byte) string {
	if len(value) < 2 || value[0] != '"' || bytes.IndexByte(value, '\\') >= 0 {
		s.failed = true
		return ""
	}
	return string(value[1 : len(value)-1])
}

func (s *skimmer) number(value []byte) uint64 {
	n, err := strconv.ParseUint(string(value), 10, 64)
	s.failed = s.failed || err != nil
	return n
}

// after is what follows c, and whether data begins with c.
func after(data []byte, c byte) (rest []byte, ok bool) {
	if data = trim(data); len(data) == 0 || data[0] != c {
		return nil, false
	}
	return data[1:], true
}

// split splits data behind the value that it begins with.
func split(data []byte) (value, rest []byte) {
	data = trim(data)
	n := length(data)
	return data[:n], data[n:]
}

func trim(data []byte) []byte {
	for len(data) > 0 && (data[0] == ' ' || data[0] == '\n' || data[0] == '\t' || data[0] == '\r') {
		data = data[1:]
	}
	return data
}

// length is that of the value that data begins with; 0 if there is none.
func length(data []byte) int {
	depth := 0
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '"':
			for i++; ; i++ {
				n := bytes.IndexByte(data[i:], '"')
				if n < 0 {
					return 0
				}
				escapes := 0
				for n > escapes && data[i+n-1-escapes] == '\\' {
					escapes++
				}
				if i += n; escapes%2 == 0 {
					break
				}
			}
			if depth == 0 {
				return i + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth--; depth == 0 {
				return i + 1
			}
			if depth < 0 {
				return i // of a number or a word
			}
		case ',', ':', ' ', '\n', '\t', '\r':
			if depth == 0 {
				return i
			}
		}
	}
	return 0
}
