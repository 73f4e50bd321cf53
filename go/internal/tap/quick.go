package tap

import (
	"bytes"
	"strconv"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// quick reads the part of kills and outcomes that is counted and that advice is given from, in a fraction of the time that read
// takes: a stream may hold millions. It understands what encoding/json writes of them, without white space and escapes, and
// leaves everything else, and everything that is wrong, to read.
type quick struct {
	data []byte
	at   int
	bad  bool

	// words are the strings that come again and again.
	words map[string]string
}

// maxWords bounds words.
const maxWords = 10_000

// read reads a message. It is false where read must.
func (q *quick) read(m bus.Stored) (message, bool) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return message{}, false
	}
	q.data, q.at, q.bad = m.Data, 0, false
	r := message{node: node}
	switch kind {
	case event.KindKill:
		e := &event.Event{}
		q.event(e)
		if q.ended() || e.Schema != event.Schema || e.ID == "" || e.Seq == 0 || e.Time.IsZero() || e.Node.Name != node || e.Scope == "" || e.Outcome == "" || e.Victim.TID == 0 {
			return message{}, false
		}
		r.kill, r.id = e, e.ID
	case event.KindOutcome:
		o := &event.Outcome{}
		q.outcome(o)
		if q.ended() || o.Schema != event.Schema || o.ID == "" || o.Kill == "" || o.Time.IsZero() || o.Node != node || o.Result == "" || o.Reason == "" {
			return message{}, false
		}
		r.outcome, r.id = o, o.ID
	default:
		return message{}, false
	}
	return r, true
}

func (q *quick) event(e *event.Event) {
	q.object(func(key []byte) {
		switch string(key) {
		case "schema":
			e.Schema = q.word()
		case "id":
			e.ID = q.string()
		case "seq":
			e.Seq = q.uint(64)
		case "time":
			q.bad = e.Time.UnmarshalJSON(q.raw()) != nil || q.bad
		case "boottime_ns":
			e.BoottimeNS = q.uint(64)
		case "node":
			q.object(func(key []byte) {
				switch string(key) {
				case "name":
					e.Node.Name = q.word()
				default:
					q.skip()
				}
			})
		case "scope":
			e.Scope = event.Scope(q.word())
		case "outcome":
			e.Outcome = event.KillOutcome(q.word())
		case "victim":
			q.victim(&e.Victim)
		case "limit":
			l := set(&e.Limit)
			q.object(func(key []byte) {
				switch string(key) {
				case "level":
					l.Level = event.LimitLevel(q.word())
				case "max":
					*set(&l.Max) = q.uint(64)
				case "usage":
					*set(&l.Usage) = q.uint(64)
				case "inferred":
					l.Inferred = q.bool()
				default:
					q.skip()
				}
			})
		case "alloc":
			a := set(&e.Alloc)
			q.object(func(key []byte) {
				switch string(key) {
				case "total_pages":
					a.TotalPages = q.uint(64)
				default:
					q.skip()
				}
			})
		case "incident":
			i := set(&e.Incident)
			q.object(func(key []byte) {
				switch string(key) {
				case "id":
					i.ID = q.string()
				case "group":
					i.Group = q.bool()
				default:
					q.skip()
				}
			})
		case "container":
			c := set(&e.Container)
			q.object(func(key []byte) {
				switch string(key) {
				case "container_id":
					c.ContainerID = q.string()
				case "qos":
					c.QoS = q.word()
				default:
					q.skip()
				}
			})
		default:
			q.skip()
		}
	})
}

func (q *quick) victim(v *event.Victim) {
	q.object(func(key []byte) {
		switch string(key) {
		case "pid":
			v.PID = uint32(q.uint(32))
		case "tid":
			v.TID = uint32(q.uint(32))
		case "ns_pid":
			v.NSPID = uint32(q.uint(32))
		case "comm":
			v.Comm = q.word()
		case "oom_score_adj":
			*set(&v.OOMScoreAdj) = q.int16()
		case "start_boottime_ns":
			v.StartBoottimeNS = q.uint(64)
		case "memory":
			m := set(&v.Memory)
			q.object(func(key []byte) {
				switch string(key) {
				case "total_vm":
					m.TotalVM = q.uint(64)
				case "anon_rss":
					m.AnonRSS = q.uint(64)
				case "file_rss":
					m.FileRSS = q.uint(64)
				case "shmem_rss":
					m.ShmemRSS = q.uint(64)
				case "swap":
					m.Swap = q.uint(64)
				case "pgtables":
					m.PgTables = q.uint(64)
				default:
					q.skip()
				}
			})
		default:
			q.skip()
		}
	})
}

func (q *quick) outcome(o *event.Outcome) {
	q.object(func(key []byte) {
		switch string(key) {
		case "schema":
			o.Schema = q.word()
		case "id":
			o.ID = q.string()
		case "kill":
			o.Kill = q.string()
		case "stage":
			o.Stage = q.word()
		case "time":
			q.bad = o.Time.UnmarshalJSON(q.raw()) != nil || q.bad
		case "result":
			o.Result = event.Result(q.word())
		case "reason":
			o.Reason = event.Reason(q.word())
		case "detail":
			o.Detail = q.string()
		case "node":
			o.Node = q.word()
		case "pod":
			p := set(&o.Pod)
			q.object(func(key []byte) {
				switch string(key) {
				case "namespace":
					p.Namespace = q.word()
				case "name":
					p.Name = q.string()
				case "uid":
					p.UID = q.string()
				case "owner":
					p.Owner = q.word()
				default:
					q.skip()
				}
			})
		case "container":
			o.Container = q.word()
		default:
			q.skip()
		}
	})
}

// set makes what a field points to, unless it is there.
func set[T any](field **T) *T {
	if *field == nil {
		*field = new(T)
	}
	return *field
}

// next takes this byte.
func (q *quick) next(want byte) bool {
	if q.bad || q.at >= len(q.data) || q.data[q.at] != want {
		return false
	}
	q.at++
	return true
}

func (q *quick) expect(want byte) { q.bad = !q.next(want) || q.bad }

// ended is false at the end of what was understood.
func (q *quick) ended() bool { return q.bad || q.at != len(q.data) }

// object calls field for each key, to take its value.
func (q *quick) object(field func(key []byte)) {
	q.expect('{')
	for first := true; !q.bad && !q.next('}'); first = false {
		if !first {
			q.expect(',')
		}
		key := q.key()
		q.expect(':')
		if q.bad {
			return
		}
		field(key)
	}
}

// key takes a key. encoding/json does not heed the case of its letters, so one with an upper-case letter is not understood.
func (q *quick) key() []byte {
	key := q.text()
	for _, c := range key {
		if c >= 'A' && c <= 'Z' {
			q.bad = true
		}
	}
	return key
}

// raw takes a string, with its quotes.
func (q *quick) raw() []byte {
	start := q.at
	q.expect('"')
	if q.bad {
		return nil
	}
	for i, c := range q.data[q.at:] {
		if special[c] {
			q.bad = c != '"'
			q.at += i + 1
			return q.data[start:q.at]
		}
	}
	q.bad = true
	return nil
}

// special are the bytes that end a string, or that quick does not understand in one.
var special = func() (table [256]bool) {
	for c := range table {
		table[c] = c < 0x20 || c >= 0x7f || c == '"' || c == '\\'
	}
	return table
}()

func (q *quick) text() []byte {
	raw := q.raw()
	if q.bad {
		return nil
	}
	return raw[1 : len(raw)-1]
}

func (q *quick) string() string { return string(q.text()) }

func (q *quick) word() string { return q.intern(q.text()) }

func (q *quick) intern(b []byte) string {
	if s, ok := q.words[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(q.words) < maxWords {
		q.words[s] = s
	}
	return s
}

// number takes what a number may have in it.
func (q *quick) number() string {
	start := q.at
	for q.at < len(q.data) && (q.data[q.at] >= '0' && q.data[q.at] <= '9' || q.data[q.at] == '-') {
		q.at++
	}
	n := q.data[start:q.at]
	if digits := bytes.TrimPrefix(n, []byte("-")); len(digits) == 0 || len(digits) > 1 && digits[0] == '0' {
		q.bad = true
	}
	return string(n)
}

func (q *quick) uint(bits int) uint64 {
	n, err := strconv.ParseUint(q.number(), 10, bits)
	q.bad = q.bad || err != nil
	return n
}

func (q *quick) int16() int16 {
	n, err := strconv.ParseInt(q.number(), 10, 16)
	q.bad = q.bad || err != nil
	return int16(n)
}

func (q *quick) bool() bool {
	for _, word := range []string{"true", "false"} {
		if bytes.HasPrefix(q.data[q.at:], []byte(word)) {
			q.at += len(word)
			return word == "true"
		}
	}
	q.bad = true
	return false
}

// skip passes over a value.
func (q *quick) skip() {
	if q.bad || q.at >= len(q.data) {
		q.bad = true
		return
	}
	switch q.data[q.at] {
	case '"':
		q.raw()
	case '{':
		q.object(func([]byte) { q.skip() })
	case '[':
		q.at++
		for first := true; !q.bad && !q.next(']'); first = false {
			if !first {
				q.expect(',')
			}
			q.skip()
		}
	case 't', 'f':
		q.bool()
	default:
		q.number()
	}
}
