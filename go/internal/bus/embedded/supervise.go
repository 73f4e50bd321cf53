package embedded

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

// nats-server does not recover from a failed write. The stream then refuses every message, or JetStream switches itself
// off, until the server is restarted. So the server is restarted in place once the disk takes writes again.

const (
	checkTime   = 5 * time.Second  // between two checks while something is wrong
	restTime    = time.Second      // between two checks in any case: other users of the machine can cause warnings
	patience    = 15 * time.Second // while publishing fails and the server itself finds nothing wrong
	restartTime = 10 * time.Second // between two restarts; doubled after each one that did not help
	maxRestart  = 2 * time.Minute
	hungTime    = time.Minute // a restart that takes longer does not end
	enough      = 4           // restarts in a row, after which another one in place will not help either

	probeName = "probe"
	probeSize = 1 << 20 // what the disk must take before a restart
)

// Suspect has Supervise check the server soon. It does not block.
func (s *Server) Suspect() {
	select {
	case s.suspect <- struct{}{}:
	default:
	}
}

// Supervise keeps the server working until ctx ends. It calls onStart after each start of the server, until it succeeds;
// for a server that is ready already the caller has done that. failing is why messages are not acknowledged; nil: they are.
func (s *Server) Supervise(ctx context.Context, onStart func(context.Context) error, failing func() error) {
	started := s.Ready() == nil
	var (
		since    time.Time // of the trouble; zero: there is none
		next     time.Time // of the next restart, at the earliest
		restarts int       // in a row
		said     string
	)
	for {
		var again <-chan time.Time
		if !since.IsZero() {
			again = time.After(checkTime)
		}
		select {
		case <-s.suspect:
		case <-again:
		case <-ctx.Done():
			return
		}
		err := s.check()
		broken := err != nil
		if s.current() != nil && !started { // it also makes a stream anew, around its messages, whose description is damaged
			bounded, cancel := context.WithTimeout(ctx, patience)
			err = onStart(bounded)
			cancel()
			if started = err == nil; started {
				err = s.check()
				broken = err != nil
			}
		}
		if err == nil {
			err = failing()
		}
		now := time.Now()
		switch {
		case err == nil:
			if said != "" {
				s.log.Info("embedded nats-server stores messages again", "after", now.Sub(since).Round(time.Second))
			}
			since, next, restarts, said = time.Time{}, time.Time{}, 0, ""
		case since.IsZero():
			since = now
		}
		if err != nil && now.After(next) && (broken || now.Sub(since) > patience) {
			if diskErr := s.probe(); diskErr != nil {
				err = diskErr
			} else {
				s.log.Warn("restarting the embedded nats-server", "reason", err)
				started = false
				next = now.Add(min(restartTime<<restarts, maxRestart))
				if restarts < enough {
					restarts++
				}
				if err = s.restart(); err == nil {
					s.Suspect() // for onStart
					err = errors.New("embedded nats-server was restarted a moment ago")
				}
			}
		}
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		s.trouble, s.hopeless = err, restarts >= enough && !DiskTrouble(err)
		s.mu.Unlock()
		if err != nil && err.Error() != said {
			said = err.Error()
			s.log.Warn("embedded nats-server cannot store messages, will retry: kills wait in the journal", "error", err)
		}
		select {
		case <-time.After(restTime):
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) check() error {
	i := s.current()
	if i == nil {
		return errors.New("embedded nats-server is down")
	}
	if status := i.Healthz(nil); status.Error != "" {
		return fmt.Errorf("embedded nats-server: %s", status.Error)
	}
	return nil
}

func (s *Server) probe() error {
	dir, err := statedir.Make(s.cfg.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := dir.WriteFile(probeName, make([]byte, probeSize)); err != nil {
		return err
	}
	return dir.Remove(probeName)
}

func (s *Server) restart() error {
	s.restarting.Store(new(time.Now()))
	defer s.restarting.Store(nil)
	s.life.Lock()
	defer s.life.Unlock()
	if s.closed {
		return errors.New("embedded nats-server is shut down")
	}
	s.stop()
	return s.start()
}

// Ready is why nothing is stored at the moment. It passes by itself, as soon as the disk works.
func (s *Server) Ready() error {
	s.mu.Lock()
	trouble := s.trouble
	s.mu.Unlock()
	if trouble != nil {
		return trouble
	}
	return s.check()
}

// Healthy is what only a restart of the process may cure: a restart in place that does not end, or several that did not help.
// A full or broken disk is not: a new process would find the same disk, and kills would not be recorded meanwhile.
func (s *Server) Healthy() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if since := s.restarting.Load(); since != nil && time.Since(*since) > hungTime {
		return fmt.Errorf("embedded nats-server: a restart in place has not returned since %s", since.UTC().Format(time.RFC3339))
	}
	if s.hopeless {
		return fmt.Errorf("embedded nats-server: still fails after several restarts in place: %w", s.trouble)
	}
	return nil
}

// DiskTrouble tells whether an error comes from a disk that is full, read-only or broken. nats-server hands on the words alone.
func DiskTrouble(err error) bool {
	return err != nil && slices.ContainsFunc([]syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EROFS, syscall.EIO}, func(e syscall.Errno) bool {
		return strings.Contains(err.Error(), e.Error())
	})
}
