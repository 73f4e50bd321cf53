package embedded_test

import (
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// Each file of the store damaged at rest, as after a power cut: the server starts, and stores what comes.
func TestDamagedStore(t *testing.T) {
	oomtest.Slow(t)
	whole := filepath.Join(t.TempDir(), "nats")
	var before bus.Held
	t.Run("fill", func(t *testing.T) {
		s := supervise(t, whole)
		s.publish(t, 20)
		s.stored(t, 10*time.Second)
		var err error
		before, err = s.conn.Held(context10s(t))
		check(t, err)
	})
	var files []string
	check(t, filepath.WalkDir(whole, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.Contains(path, "KV_") && !strings.Contains(path, "OOM_NODES") {
			files = append(files, strings.TrimPrefix(path, whole))
		}
		return err
	}))
	garbage := make([]byte, 300)
	for i := range garbage {
		garbage[i] = byte(rand.IntN(256))
	}
	for _, file := range files {
		for how, damage := range map[string]func(path string) error{
			"emptied": func(path string) error { return os.Truncate(path, 0) },
			"garbage": func(path string) error { return os.WriteFile(path, garbage, 0o600) },
			"removed": os.Remove,
			"halved": func(path string) error {
				info, err := os.Stat(path)
				check(t, err)
				return os.Truncate(path, info.Size()/2)
			},
		} {
			t.Run(filepath.Base(file)+" "+how, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "nats")
				check(t, os.CopyFS(dir, os.DirFS(whole)))
				check(t, os.Chmod(dir, 0o700))
				check(t, damage(dir+file))
				s := supervise(t, dir)
				s.next = 20
				s.publish(t, 3)
				until(t, 30*time.Second, "all is stored", func() bool { return s.publisher.Pending() == 0 })
				until(t, 10*time.Second, "it is ready", func() bool { return s.Ready() == nil })
				stream, err := s.conn.JetStream().Stream(context10s(t), "OOM")
				check(t, err)
				// What stood in a damaged block is lost, and nothing else. Its sequence numbers are not given out again.
				state := stream.CachedInfo().State
				if state.LastSeq != 23 || state.Msgs != 23 && filepath.Base(file) != "1.blk" {
					t.Errorf("the stream holds %d messages, %d..%d", state.Msgs, state.FirstSeq, state.LastSeq)
				}
				held, err := s.conn.Held(context10s(t))
				check(t, err)
				if lost := before.Lost(held, streamConfig, time.Now()); lost != 23-state.Msgs {
					t.Errorf("%d messages are lost, the comparison says %d: %+v and now %+v", 23-state.Msgs, lost, before, held)
				}
			})
		}
	}
}
