package loader

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

// The pin directory, in bpffs:
//
//	state                    struct oom_state: which generation speaks, how far it has come
//	<generation>/journal-v2  the journal of one load of the program, or of several; the version is that of its layout
//	<generation>/<program>   the links, which hold the program and its maps
//
// A tracer pins a generation as a whole before it switches to it, so that at any moment one whole
// generation speaks, whoever is killed when. Leftovers of others are removed at the next start.

const (
	statePin   = "state"
	journalPin = "journal-v"
	// journalVersion is that of struct oom_segment. In version 1 each record had a slot of sizeof(struct oom_event).
	journalVersion = "2"
)

// ErrNoBPFFS means that nothing can be pinned, because the directory is not in a bpffs.
var ErrNoBPFFS = errors.New("no bpffs is mounted there")

var errLocked = errors.New("is in use: is another oom-tracer running?")

// lockWait is how long a tracer waits for another one to end, as at an update of a DaemonSet.
const lockWait = 10 * time.Second

type pins struct {
	dir  string
	lock *os.File
}

// lockPins makes the directory if need be and locks it against other tracers. The lock goes with the
// process. It fails where other users can get at the directory, with an error that wraps statedir.ErrUnsafe.
func lockPins(ctx context.Context, dir string) (*pins, error) {
	if err := onBPFFS(filepath.Dir(dir)); err != nil {
		return nil, err
	}
	d, err := statedir.Make(dir)
	if err == nil {
		defer d.Close()
		err = d.Private() // or another user could hold the lock
	}
	switch {
	case errors.Is(err, statedir.ErrUnsafe):
		return nil, fmt.Errorf("pin directory: %w; to keep other users out of the whole bpffs: mount -t bpf -o mode=0700 bpf %s", err, filepath.Dir(dir))
	case err != nil:
		return nil, fmt.Errorf("make the pin directory: %w", err)
	}
	// It may be a mount of its own, or no directory of ours at all.
	if err := onBPFFS(dir); err != nil {
		return nil, err
	}
	lock, err := d.Open(".")
	if err != nil {
		return nil, fmt.Errorf("open the pin directory: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lockWait, errLocked)
	defer cancel()
	for {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return &pins{dir: dir, lock: lock}, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			if err = context.Cause(ctx); err == nil {
				time.Sleep(50 * time.Millisecond)
				continue
			}
		}
		lock.Close()
		return nil, fmt.Errorf("lock the pin directory %s: %w", dir, err)
	}
}

func onBPFFS(dir string) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNoBPFFS, dir, err)
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%w: %s", ErrNoBPFFS, dir)
	}
	return nil
}

func (p *pins) close() { p.lock.Close() }

func (p *pins) path(parts ...string) string {
	return filepath.Join(append([]string{p.dir}, parts...)...)
}

func (p *pins) generation(n uint64) string { return p.path(strconv.FormatUint(n, 10)) }

// generations are those that have left something, whole or not, in no order.
func (p *pins) generations() (found []uint64, err error) {
	entries, err := os.ReadDir(p.dir)
	if err != nil {
		return nil, fmt.Errorf("read the pin directory: %w", err)
	}
	for _, entry := range entries {
		if n, err := strconv.ParseUint(entry.Name(), 10, 64); err == nil && entry.IsDir() {
			found = append(found, n)
		}
	}
	return found, nil
}

// linkPins and allPins begin the names that a tracer of any version gives its pins.
var (
	linkPins = []string{"oom_", fentryPrefix, kprobePrefix}
	allPins  = append(linkPins, journalPin)
)

// remove removes the pins of a generation: the kernel detaches its links. A directory with other files stays.
func remove(dir string) error {
	err := removePins(dir, allPins)
	if err == nil {
		err = os.Remove(dir)
	}
	if err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove pins: %w", err)
	}
	return nil
}

// removePins removes from a directory what has a name that begins so. It leaves a directory alone that another user can get
// at, or that is a link, and follows no link in it.
func removePins(dir string, prefixes []string) error {
	d, err := statedir.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	entries, err := fs.ReadDir(d.FS(), ".")
	for _, entry := range entries {
		ours := slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(entry.Name(), p) })
		if ours && entry.Type().IsRegular() {
			err = errors.Join(err, d.Remove(entry.Name()))
		}
	}
	return err
}

// openState opens the pinned state, if there is one: of this version, or of another. It fails on what is no state.
func (p *pins) openState() (ours, other *ebpf.Map, err error) {
	path := p.path(statePin)
	m, err := ebpf.LoadPinnedMap(path, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("open the pinned state %s: %w", path, err)
	}
	value := make([]byte, m.ValueSize())
	if !mappable(m, statePrefix) || m.MaxEntries() != 1 {
		err = fmt.Errorf("it is %v", m)
	} else if err = m.Lookup(uint32(0), value); err == nil && binary.NativeEndian.Uint32(value) != stateMagic {
		err = fmt.Errorf("it begins with %#x", binary.NativeEndian.Uint32(value))
	}
	switch {
	case err != nil:
		m.Close()
		return nil, nil, fmt.Errorf("%s is not the state of an oom-tracer: %w; discard it with: oom-tracer unload --force", path, err)
	case binary.NativeEndian.Uint32(value[4:]) == stateVersion && uintptr(len(value)) == unsafe.Sizeof(state{}):
		return m, nil, nil
	}
	return nil, m, nil
}

// mappable reports whether a map is an array that can be mapped into memory, of values with so many bytes or more.
func mappable(m *ebpf.Map, bytes uint32) bool {
	return m.Type() == ebpf.Array && m.Flags()&unix.BPF_F_MMAPABLE != 0 && m.ValueSize() >= bytes
}

// pinnedJournal opens the journal of a generation, and tells whether it is of this version; nil if it has none.
func (p *pins) pinnedJournal(generation uint64) (m *ebpf.Map, ours bool, err error) {
	entries, err := os.ReadDir(p.generation(generation))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, false, fmt.Errorf("read the pinned generation: %w", err)
	}
	i := slices.IndexFunc(entries, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), journalPin) })
	if i < 0 {
		return nil, false, nil
	}
	path := filepath.Join(p.generation(generation), entries[i].Name())
	if m, err = ebpf.LoadPinnedMap(path, nil); err != nil {
		return nil, false, fmt.Errorf("open the pinned journal %s: %w", path, err)
	}
	if n := m.MaxEntries(); !mappable(m, recordPrefix) || n&(n-1) != 0 {
		m.Close()
		return nil, false, fmt.Errorf("%s is not the journal of an oom-tracer: %v", path, m)
	}
	return m, filepath.Base(path) == journalPin+journalVersion, nil
}

// Unload removes everything that is pinned in dir, and returns how many records nobody has published. Without force it fails
// rather than throw any away. Where there is no directory, the error wraps os.ErrNotExist.
func Unload(ctx context.Context, dir string, force bool) (unpublished uint64, err error) {
	if _, err := os.Stat(dir); err != nil {
		return 0, err
	}
	p, err := lockPins(ctx, dir)
	if err != nil {
		return 0, err
	}
	defer p.close()
	ours, other, err := p.openState()
	if err != nil && !force {
		return 0, err
	}
	if m := cmp.Or(ours, other); m != nil {
		defer m.Close()
		memory, s, err := mapState(m.FD())
		if err != nil {
			return 0, err
		}
		defer unix.Munmap(memory)
		unpublished = atomic.LoadUint64(&s.Head) - min(atomic.LoadUint64(&s.Head), atomic.LoadUint64(&s.Acked))
		if unpublished > 0 && !force {
			return unpublished, fmt.Errorf("%d records in %s are not published yet: run oom-tracer to publish them, or discard them with --force", unpublished, dir)
		}
	}
	generations, err := p.generations()
	if err != nil {
		return unpublished, err
	}
	for _, n := range generations {
		if err := remove(p.generation(n)); err != nil {
			return unpublished, err
		}
	}
	if err := os.Remove(p.path(statePin)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return unpublished, fmt.Errorf("remove pin: %w", err)
	}
	// What is not ours stays, and so does the directory then; as where it is a mount.
	if err := os.Remove(dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) {
		return unpublished, fmt.Errorf("remove the pin directory: %w", err)
	}
	return unpublished, nil
}
