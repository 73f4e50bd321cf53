package bus_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// The outcomes since a time are read in order and whole, and nothing else of the stream is.
func TestOutcomes(t *testing.T) {
	for _, n := range []int{1, 2, 300, 3500} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			ctx := begin(t)
			cfg, _ := startEmbedded(t)
			c := connect(ctx, t, cfg, bus.Options{}, quiet())
			check(t, bus.EnsureStreams(ctx, c, streamConfig))
			read := func(since time.Time) (ids []string) {
				t.Helper()
				check(t, c.Outcomes(ctx, since, func(m bus.Stored) error {
					if m.Seq == 0 || m.Time.Before(since) || !strings.HasPrefix(m.Subject, "oom.v1.outcome.boot-1-") || string(m.Data) != "{}" {
						t.Errorf("read %+v", m)
					}
					ids = append(ids, m.ID)
					return nil
				}))
				return ids
			}
			begun := time.Now()
			if got := read(begun); got != nil {
				t.Errorf("of an empty stream: %q", got)
			}
			var want []string
			var middle time.Time
			for i := range n {
				if i == n/2 {
					time.Sleep(5 * time.Millisecond)
					middle = time.Now()
				}
				want = append(want, fmt.Sprint(i))
				_, err := c.JetStream().Publish(ctx, fmt.Sprintf("oom.v1.outcome.boot-1-%d_annotate.%s", i, node), []byte("{}"), jetstream.WithMsgID(want[i]))
				check(t, err)
				if i%3 == 0 {
					_, err = c.JetStream().Publish(ctx, "oom.v1.kill.global."+node, []byte("{}"))
					check(t, err)
				}
			}
			if got := read(begun); !slices.Equal(got, want) {
				t.Errorf("read %d of %d: %q", len(got), n, got)
			}
			if got := read(middle); !slices.Equal(got, want[n/2:]) {
				t.Errorf("since the middle: read %d of %d: %q", len(got), n/2, got)
			}
			if got := read(time.Now()); got != nil {
				t.Errorf("since the end: %q", got)
			}
		})
	}
}
