package embedded

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// logger hands nats-server's log to slog, its notices at debug: they matter only to somebody who looks for something.
type logger struct {
	log     *slog.Logger
	trouble func() // called for each warning and error
	// Of what the server warns of, others on the machine choose how often: each wrong password is one.
	limit *rate.Limiter

	mu      sync.Mutex
	left    int // messages that the limit left out since the last one
	running bool
	fatal   string // the first fatal message of the start, which Start returns as its error
}

func newLogger(log *slog.Logger, trouble func()) *logger {
	return &logger{log: log, trouble: trouble, limit: rate.NewLimiter(rate.Every(5*time.Second), 30)}
}

const said = "nats-server log"

func (l *logger) Noticef(format string, v ...any) {
	l.log.Debug(said, "text", fmt.Sprintf(format, v...))
}
func (l *logger) Warnf(format string, v ...any)  { l.limited(slog.LevelWarn, format, v) }
func (l *logger) Errorf(format string, v ...any) { l.limited(slog.LevelError, format, v) }

func (l *logger) limited(level slog.Level, format string, v []any) {
	l.trouble()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.limit.Allow() {
		l.left++
		return
	}
	args := []any{"text", fmt.Sprintf(format, v...)}
	if l.left > 0 {
		args = append(args, "messages_left_out_before", l.left)
	}
	l.left = 0
	l.log.Log(context.Background(), level, said, args...)
}

// Debugf and Tracef are not called: both are switched off in the server.
func (l *logger) Debugf(string, ...any) {}
func (l *logger) Tracef(string, ...any) {}

// Fatalf must return: the process is not the server's.
func (l *logger) Fatalf(format string, v ...any) {
	text := fmt.Sprintf(format, v...)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running {
		l.log.Error(said, "text", text)
	} else if l.fatal == "" {
		l.fatal = text
	}
}

// started ends the time in which fatal messages are kept, and returns the first one.
func (l *logger) started() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.running = true
	return l.fatal
}
