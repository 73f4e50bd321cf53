package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/aquasecurity/libbpfgo"
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/perf"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

// How the reader learns of a new record. The record itself is in the journal.

// Notify is a way to notify the reader.
type Notify string

// The ways to notify, from the best down.
const (
	NotifyAuto    Notify = "auto"    // the best that this process may use
	NotifyPerf    Notify = "perf"    // a perf buffer, which needs a perf event on each CPU
	NotifyRingbuf Notify = "ringbuf" // a BPF ring buffer, which needs CAP_BPF only
	NotifyPoll    Notify = "poll"    // none: the reader looks at the journal
)

// values are those of enum oom_notify.
func (n Notify) value() uint32 { return map[Notify]uint32{NotifyPerf: 1, NotifyRingbuf: 2}[n] }

// The maps that carry notifications.
var notifyMaps = map[Notify]string{NotifyPerf: "oom_perf", NotifyRingbuf: "oom_ringbuf"}

// ErrBPF is wrapped by the error of CheckBPF and Open where bpf(2) itself is refused.
var ErrBPF = errors.New("the bpf system call is refused")

// ErrPerfBuffer is wrapped by the error of Open where the kernel permits perf events and refuses their buffers.
var ErrPerfBuffer = errors.New("open a perf buffer of one page per CPU")

// CheckBPF reports whether this process may use bpf(2): nil, or why not.
func CheckBPF() error {
	// To a command that it does not know the kernel answers EINVAL.
	const unknown = 1 << 30
	var attr [16]byte
	_, _, errno := unix.Syscall(unix.SYS_BPF, unknown, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != unix.EINVAL {
		return fmt.Errorf("%w: %w", ErrBPF, errno)
	}
	// Since v6.5 it asks for the right only here (commit 1d28635abcf1).
	m, err := newMap(libbpfgo.MapTypeArray, "oom_check", 4, 1)
	if err != nil {
		return err
	}
	return m.Close()
}

// CheckPerfEvents reports why this process may not open perf events for a whole CPU, as perf buffers and kprobes need them.
// EACCES comes from the kernel (kernel.perf_event_paranoid), EPERM from a seccomp filter or a security module.
func CheckPerfEvents() error {
	attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_BPF_OUTPUT}
	attr.Size = uint32(unsafe.Sizeof(attr))
	fd, err := unix.PerfEventOpen(&attr, -1, 0, -1, unix.PERF_FLAG_FD_CLOEXEC)
	switch {
	case errors.Is(err, unix.ENODEV): // CPU 0 is offline
		return nil
	case err != nil:
		return fmt.Errorf("perf_event_open: %w", err)
	}
	return unix.Close(fd)
}

type notifier struct {
	way    Notify
	m      *ebpf.Map   // nil: the program sends none
	reader interface { // nil: the program sends none
		SetDeadline(time.Time)
		Flush() error
		Close() error
	}
	read   func() ([]byte, error) // the reader's next sample
	failed atomic.Bool            // there will be no more of them
	timer  chan struct{}          // interrupts wait where it is only a timer

	// waiting is the program's oom_waiting: it notifies the next record while this is not 0, and then makes it 0.
	waiting *uint32
}

// openNotifier opens the way that is wanted, or the best. why has the reason against each better way, such as perfErr.
func openNotifier(want Notify, perfErr error) (n *notifier, why error, err error) {
	for _, way := range []Notify{NotifyPerf, NotifyRingbuf, NotifyPoll} {
		if want != NotifyAuto && want != way {
			continue
		}
		n := &notifier{way: way, timer: make(chan struct{}, 1)}
		err := n.open(perfErr)
		if err == nil {
			return n, why, nil
		}
		n.close()
		err = fmt.Errorf("notify by %s: %w", way, err)
		if want != NotifyAuto {
			return nil, nil, fmt.Errorf("%w (set kernel.notify to auto to use another way)", err)
		}
		if why == nil {
			why = err
		} else {
			why = fmt.Errorf("%w; %w", why, err)
		}
	}
	return nil, nil, fmt.Errorf("kernel.notify %q is not known", want)
}

func (n *notifier) open(perfErr error) (err error) {
	switch n.way {
	case NotifyPerf:
		if perfErr != nil {
			return perfErr
		}
		cpus, err := libbpfgo.NumPossibleCPUs()
		if err != nil {
			return fmt.Errorf("count the possible CPUs: %w", err)
		}
		if n.m, err = newMap(libbpfgo.MapTypePerfEventArray, notifyMaps[n.way], 4, cpus); err != nil {
			return err
		}
		reader, err := perf.NewReader(n.m, os.Getpagesize())
		if err != nil {
			return fmt.Errorf("%w: %w", ErrPerfBuffer, err)
		}
		var record perf.Record
		n.reader, n.read = reader, func() ([]byte, error) {
			err := reader.ReadInto(&record)
			return record.RawSample, err
		}
	case NotifyRingbuf:
		// The kernel wants a multiple of the page and a power of two, and a page is both.
		if n.m, err = newMap(libbpfgo.MapTypeRingbuf, notifyMaps[n.way], 0, os.Getpagesize()); err != nil {
			return err
		}
		reader, err := ringbuf.NewReader(n.m)
		if err != nil {
			return fmt.Errorf("open the ring buffer: %w", err)
		}
		var record ringbuf.Record
		n.reader, n.read = reader, func() ([]byte, error) {
			err := reader.ReadInto(&record)
			return record.RawSample, err
		}
	}
	return nil
}

// newMap creates a map. libbpf raises the limit of locked memory for it where the kernel needs that (before v5.11).
func newMap(kind libbpfgo.MapType, name string, size, entries int) (*ebpf.Map, error) {
	m, err := libbpfgo.CreateMap(kind, name, size, size, entries, nil)
	if err != nil {
		return nil, err
	}
	return ebpf.NewMapFromFD(m.FileDescriptor()) // takes it
}

// wait asks for a notification of the next record, and returns the seq that it names. It returns 0 where unread then reports
// a record, at the deadline or a little earlier, and at the end of ctx. After an error it is only a timer.
func (n *notifier) wait(ctx context.Context, deadline time.Time, unread func() bool) (seq uint64, err error) {
	if n.polls() {
		select {
		case <-time.After(time.Until(deadline)):
		case <-n.timer:
		case <-ctx.Done():
		}
		return 0, nil
	}
	// The program may have written head and seen nobody wait, and its head may not be visible yet.
	if soon := time.Now().Add(visibleTime); atomic.SwapUint32(n.waiting, 1) == 0 && soon.Before(deadline) {
		deadline = soon
	}
	if unread() {
		return 0, nil
	}
	n.reader.SetDeadline(deadline)
	sample, err := n.read()
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, perf.ErrFlushed), errors.Is(err, ringbuf.ErrFlushed):
		return 0, nil
	case err != nil:
		n.failed.Store(true)
		return 0, fmt.Errorf("read notifications by %s: %w", n.way, err)
	case len(sample) < 8: // it says that samples were lost; the program has counted them as refused
		return 0, nil
	}
	return binary.NativeEndian.Uint64(sample), nil
}

// polls reports whether wait is only a timer.
func (n *notifier) polls() bool { return n.reader == nil || n.failed.Load() }

func (n *notifier) interrupt() {
	if n.reader != nil {
		_ = n.reader.Flush()
	}
	select {
	case n.timer <- struct{}{}:
	default:
	}
}

func (n *notifier) close() {
	if n.reader != nil {
		_ = n.reader.Close()
	}
	_ = n.m.Close() // also of nil
}

// kprobeWay says how to attach kprobes: by a perf event each, or by a kprobe.multi link (v5.18, commit 0dcac2725406).
func kprobeWay(sysfs string, kernel *btf.Spec, perfErr error) (multi bool, err error) {
	if perfErr == nil {
		// Documentation/ABI/testing/sysfs-bus-event_source-devices. It is there with CONFIG_KPROBE_EVENTS.
		if _, perfErr = os.Stat(sysfs + "/bus/event_source/devices/kprobe/type"); perfErr == nil {
			return false, nil
		}
		if errors.Is(perfErr, fs.ErrNotExist) {
			perfErr = errors.New("the kernel has no kprobe events (CONFIG_KPROBE_EVENTS)")
		}
	}
	// Defined with CONFIG_FPROBE only.
	var link *btf.Struct
	if kernel.TypeByName("bpf_kprobe_multi_link", &link) == nil {
		return true, nil
	}
	return false, fmt.Errorf("%w; and it has no kprobe.multi links (Linux 5.18, CONFIG_FPROBE)", perfErr)
}
