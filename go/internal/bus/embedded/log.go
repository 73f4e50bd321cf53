package embedded

import (
	"fmt"
	"log/slog"
	"sync"
)

// logger hands nats-server's log to slog. The server's notices are of interest only when one looks for
// something, so they go to debug.
type logger struct {
	log *slog.Logger

	mu      sync.Mutex
	running bool
	fatal   string // the first fatal message of the start, which Start returns as its error
}

const said = "nats-server says"

func (l *logger) Noticef(format string, v ...any) {
	l.log.Debug(said, "text", fmt.Sprintf(format, v...))
}
func (l *logger) Warnf(format string, v ...any) { l.log.Warn(said, "text", fmt.Sprintf(format, v...)) }
func (l *logger) Errorf(format string, v ...any) {
	l.log.Error(said, "text", fmt.Sprintf(format, v...))
}

// Debugf and Tracef are not called: both are switched off in the server.
func (l *logger) Debugf(string, ...any) {}
func (l *logger) Tracef(string, ...any) {}

// Fatalf must return: the process is not the server's.
func (l *logger) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.mu.Lock()
	starting := !l.running
	if starting && l.fatal == "" {
		l.fatal = text
	}
	l.mu.Unlock()
	if !starting {
		l.log.Error(said, "text", text)
	}
}

// started ends the time in which fatal messages are kept, and returns the first one.
func (l *logger) started() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running = true
	return l.fatal
}
