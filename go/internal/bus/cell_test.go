package bus_test

import (
	"errors"
	"fmt"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// Whoever changes the value changes the newest one.
func TestCell(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	first := connect(ctx, t, cfg, bus.Options{}, quiet())
	if _, err := first.Cell("n").Load(ctx); !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("without a bucket: %v", err)
	}
	check(t, bus.EnsureStreams(ctx, first, streamConfig))
	if data, err := first.Cell("n").Load(ctx); err != nil || data != nil {
		t.Errorf("at the beginning: %q, %v", data, err)
	}
	second := connect(ctx, t, cfg, bus.Options{}, quiet())
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			cell := []*bus.Conn{first, second}[i%2].Cell("n")
			for range 10 {
				check(t, cell.Update(ctx, func(data []byte) ([]byte, error) {
					n, _ := strconv.Atoi(string(data))
					return strconv.AppendInt(nil, int64(n)+1, 10), nil
				}))
			}
		})
	}
	wg.Wait()
	if data, err := second.Cell("n").Load(ctx); err != nil || string(data) != "80" {
		t.Errorf("%q, %v, want 80", data, err)
	}
	// Who does not want to change anything does not.
	enough := errors.New("enough")
	if err := first.Cell("n").Update(ctx, func([]byte) ([]byte, error) { return nil, enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
	check(t, first.Cell("n").Update(ctx, func([]byte) ([]byte, error) { return nil, nil }))
	if data, err := first.Cell("other").Load(ctx); err != nil || data != nil {
		t.Errorf("%q, %v", data, err)
	}
	// The bucket stays as it is when it is made again.
	check(t, bus.EnsureStreams(ctx, second, streamConfig))
	if data, err := first.Cell("n").Load(ctx); err != nil || string(data) != "80" {
		t.Errorf("%q, %v, want 80", data, err)
	}
}

// A missing permission is told by its name, and soon.
func TestCellPermissions(t *testing.T) {
	ctx := begin(t)
	inbox := bus.InboxPrefix("reader")
	d := startNatsd(t, fmt.Sprintf(`authorization { users: [
		{ user: owner, password: owner-secret }
		{ user: reader, password: reader-secret, permissions: { publish: ["$JS.API.STREAM.INFO.KV_OOM_ANNOTATOR", "$JS.API.DIRECT.GET.KV_OOM_ANNOTATOR.>"], subscribe: "%s.>" } }
		{ user: nobody, password: nobody-secret, permissions: { publish: "x", subscribe: "%s.>" } }
	] }`, inbox, inbox))
	as := func(user string) *bus.Conn {
		return connect(ctx, t, config.NATS{URL: d.url(), User: user, PasswordFile: secret(t, user+"-secret")}, bus.Options{Name: "reader"}, quiet())
	}
	owner := as("owner")
	check(t, bus.EnsureStreams(ctx, owner, streamConfig))
	value := func([]byte) ([]byte, error) { return []byte("x"), nil }
	check(t, owner.Cell("n").Update(ctx, value))
	reader := as("reader").Cell("n")
	if data, err := reader.Load(ctx); err != nil || string(data) != "x" {
		t.Errorf("%q, %v", data, err)
	}
	began := time.Now()
	if err := reader.Update(ctx, value); !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("update: %v", err)
	}
	if _, err := as("nobody").Cell("n").Load(ctx); !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("load: %v", err)
	}
	if took := time.Since(began); took > 4*time.Second { // a request without an answer takes five
		t.Errorf("it was told after %s", took)
	}
}
