package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// reload has a nats-server read its configuration again (SIGHUP) whenever what is in the directories has changed. It looks every so
// often: the kubelet brings a changed Secret within a minute or two, and renewed certificates overlap by days.
func reload(ctx context.Context, pidFile string, dirs []string, every time.Duration, log *slog.Logger) error {
	last, err := contents(dirs)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
		now, err := contents(dirs)
		if err == nil && bytes.Equal(now, last) {
			continue
		}
		if err == nil {
			err = hangUp(pidFile)
		}
		if err != nil {
			log.Warn("cannot reload nats-server, trying again", "error", err)
			continue
		}
		last = now
		log.Info("certificates changed, nats-server reloads")
	}
}

// hangUp sends SIGHUP to the process whose id is in the file.
func hangUp(pidFile string) error {
	text, err := os.ReadFile(pidFile)
	if err != nil {
		return fmt.Errorf("read process id of nats-server: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil || pid < 1 {
		return fmt.Errorf("%s: is not the process id of nats-server: %q", pidFile, text)
	}
	if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
		return fmt.Errorf("send SIGHUP to nats-server (process %d): %w", pid, err)
	}
	return nil
}

// contents is a hash of the files in the directories. Those that begin with a dot are the kubelet's.
func contents(dirs []string) ([]byte, error) {
	hash := sha256.New()
	for _, dir := range dirs {
		files, err := filepath.Glob(filepath.Join(dir, "[^.]*"))
		if err != nil || len(files) == 0 {
			return nil, errors.Join(fmt.Errorf("%s: no files", dir), fs.ErrNotExist, err)
		}
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				return nil, fmt.Errorf("read certificates: %w", err)
			}
			fmt.Fprintf(hash, "%s %d ", file, len(data))
			hash.Write(data)
		}
	}
	return hash.Sum(nil), nil
}
