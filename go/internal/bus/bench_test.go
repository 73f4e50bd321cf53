package bus_test

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// BenchmarkPublish measures from Enqueue to the acknowledgement, over TCP to the embedded server.
func BenchmarkPublish(b *testing.B) {
	for _, window := range []struct {
		name string
		size int
	}{{"one", 1}, {"many", 1 << 16}} {
		b.Run(window.name, func(b *testing.B) {
			ctx := context.Background()
			cfg, _ := startEmbedded(b)
			c := connect(ctx, b, cfg, bus.Options{}, quiet())
			if err := bus.EnsureStreams(ctx, c, streamConfig); err != nil {
				b.Fatal(err)
			}
			acks := make(chan struct{}, window.size)
			p, _ := publisher(b, c, window.size, bus.Hooks{OnAck: func(bus.Msg, bool) { acks <- struct{}{} }}, quiet())
			data, subject := bytes.Repeat([]byte("x"), 1024), subject(b, "global", node)
			b.SetBytes(int64(len(data)))
			b.ResetTimer()
			waiting := 0
			for i := range b.N {
				if err := p.Enqueue(bus.Msg{ID: fmt.Sprintf("boot-%d-%d", i, i), Subject: subject, Data: data}); err != nil {
					b.Fatal(err)
				}
				if waiting++; waiting == window.size {
					for ; waiting > window.size/2; waiting-- {
						<-acks
					}
				}
			}
			for ; waiting > 0; waiting-- {
				<-acks
			}
		})
	}
}
