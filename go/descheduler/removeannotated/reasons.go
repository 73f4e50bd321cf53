package removeannotated

import (
	"context"
	"fmt"
	"strings"
	"sync"

	"github.com/go-logr/logr"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/klog/v2"

	"sigs.k8s.io/descheduler/pkg/framework/pluginregistry"
	frameworktypes "sigs.k8s.io/descheduler/pkg/framework/types"
)

// Reasons has the reason for which an evictor plugin refused a pod. In the framework such plugins return only a bool. DefaultEvictor
// logs its reasons, some of them at --v=4 only, so they are read from its logger at every level.
type Reasons struct {
	mu   sync.Mutex
	last string
}

// Wrap makes a builder whose plugin has a logger that records the reasons.
func (r *Reasons) Wrap(build pluginregistry.PluginBuilder) pluginregistry.PluginBuilder {
	return func(ctx context.Context, args runtime.Object, handle frameworktypes.Handle) (frameworktypes.Plugin, error) {
		logger := klog.FromContext(ctx)
		return build(klog.NewContext(ctx, logger.WithSink(&recordingSink{logger.GetSink(), r})), args, handle)
	}
}

// capture calls a filter. If the filter refuses, it returns what was logged meanwhile.
func (r *Reasons) capture(filter func() bool) (why string, ok bool) {
	r.mu.Lock()
	r.last = ""
	r.mu.Unlock()
	if filter() {
		return "", true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last, false
}

// recordingSink records messages, and forwards those that are enabled.
type recordingSink struct {
	logr.LogSink
	reasons *Reasons
}

// Enabled implements logr.LogSink: every level is recorded.
func (l *recordingSink) Enabled(int) bool { return true }

// Info implements logr.LogSink.
func (l *recordingSink) Info(level int, message string, keysAndValues ...any) {
	l.note(message, keysAndValues)
	if l.LogSink.Enabled(level) {
		l.LogSink.Info(level, message, keysAndValues...)
	}
}

// Error implements logr.LogSink.
func (l *recordingSink) Error(err error, message string, keysAndValues ...any) {
	l.note(fmt.Sprintf("%s: %v", message, err), keysAndValues)
	l.LogSink.Error(err, message, keysAndValues...)
}

// WithValues implements logr.LogSink.
func (l *recordingSink) WithValues(keysAndValues ...any) logr.LogSink {
	return &recordingSink{l.LogSink.WithValues(keysAndValues...), l.reasons}
}

// WithName implements logr.LogSink.
func (l *recordingSink) WithName(name string) logr.LogSink {
	return &recordingSink{l.LogSink.WithName(name), l.reasons}
}

// WithCallDepth implements logr.CallDepthLogSink, so that klog logs the right source line.
func (l *recordingSink) WithCallDepth(depth int) logr.LogSink {
	if sink, ok := l.LogSink.(logr.CallDepthLogSink); ok {
		return &recordingSink{sink.WithCallDepth(depth), l.reasons}
	}
	return l
}

// note records the checks that failed, if the message has them, else the message.
func (l *recordingSink) note(message string, keysAndValues []any) {
	for i := 0; i+1 < len(keysAndValues); i += 2 {
		if keysAndValues[i] == "checks" {
			message = strings.Trim(fmt.Sprint(keysAndValues[i+1]), "[]")
		}
	}
	l.reasons.mu.Lock()
	defer l.reasons.mu.Unlock()
	l.reasons.last = message
}
