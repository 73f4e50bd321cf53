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

// Reasons knows why an evictor plugin refused a pod. The framework asks such plugins for a yes or no; DefaultEvictor
// says why in its log, some of it at --v=4 only, and nowhere else. So its log is read, whatever of it is shown.
type Reasons struct {
	mu   sync.Mutex
	last string
}

// Listen builds what build does, with a logger that is listened to.
func (r *Reasons) Listen(build pluginregistry.PluginBuilder) pluginregistry.PluginBuilder {
	return func(ctx context.Context, args runtime.Object, handle frameworktypes.Handle) (frameworktypes.Plugin, error) {
		logger := klog.FromContext(ctx)
		return build(klog.NewContext(ctx, logger.WithSink(&listener{logger.GetSink(), r})), args, handle)
	}
}

// hear asks a filter, and returns what was logged meanwhile where it refuses.
func (r *Reasons) hear(filter func() bool) (why string, ok bool) {
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

// listener passes on what is logged to those who would have had it without us.
type listener struct {
	logr.LogSink
	reasons *Reasons
}

// Enabled implements logr.LogSink: everything is heard.
func (l *listener) Enabled(int) bool { return true }

// Info implements logr.LogSink.
func (l *listener) Info(level int, message string, keysAndValues ...any) {
	l.note(message, keysAndValues)
	if l.LogSink.Enabled(level) {
		l.LogSink.Info(level, message, keysAndValues...)
	}
}

// Error implements logr.LogSink.
func (l *listener) Error(err error, message string, keysAndValues ...any) {
	l.note(fmt.Sprintf("%s: %v", message, err), keysAndValues)
	l.LogSink.Error(err, message, keysAndValues...)
}

// WithValues implements logr.LogSink.
func (l *listener) WithValues(keysAndValues ...any) logr.LogSink {
	return &listener{l.LogSink.WithValues(keysAndValues...), l.reasons}
}

// WithName implements logr.LogSink.
func (l *listener) WithName(name string) logr.LogSink {
	return &listener{l.LogSink.WithName(name), l.reasons}
}

// WithCallDepth implements logr.CallDepthLogSink, for the lines that klog names.
func (l *listener) WithCallDepth(depth int) logr.LogSink {
	if sink, ok := l.LogSink.(logr.CallDepthLogSink); ok {
		return &listener{sink.WithCallDepth(depth), l.reasons}
	}
	return l
}

// note keeps the checks that failed, where the message has them, else the message.
func (l *listener) note(message string, keysAndValues []any) {
	for i := 0; i+1 < len(keysAndValues); i += 2 {
		if keysAndValues[i] == "checks" {
			message = strings.Trim(fmt.Sprint(keysAndValues[i+1]), "[]")
		}
	}
	l.reasons.mu.Lock()
	defer l.reasons.mu.Unlock()
	l.reasons.last = message
}
