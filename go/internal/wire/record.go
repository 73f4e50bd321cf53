// Package wire turns the bytes that the kernel program sends into events.
//
// Rule of the package: the layout is src/oom_event.h and nothing else. The structs here mirror it field
// by field; the loader proves that against the BTF of the object that it loads, and the golden records
// in testdata are written by a C program that includes the header.
package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
)

// ABIVersion is OOM_ABI_VERSION.
const ABIVersion = 1

// Enumerations and flags of src/oom_event.h.
const (
	flagVictim        = 1 << 0
	flagMemory        = 1 << 1
	flagExact         = 1 << 2
	flagLimit         = 1 << 3
	flagLimitInferred = 1 << 4
	flagIncident      = 1 << 5
	flagGroup         = 1 << 6
	flagAlloc         = 1 << 7

	cgroupPresent   = 1 << 0
	cgroupV2        = 1 << 1
	cgroupTruncated = 1 << 2

	rssFile     = 0
	rssAnon     = 1
	rssSwap     = 2
	rssShmem    = 3
	rssCounters = 4

	roleVictim      = 0
	roleVictimMemcg = 1
	roleLimit       = 2
	roleTrigger     = 3
	roles           = 4
)

// Header mirrors struct oom_event up to its data. The abi tags are the C names.
type Header struct {
	ABIVersion  uint16        `abi:"abi_version"`
	HeaderSize  uint16        `abi:"header_size"`
	Size        uint32        `abi:"size"`
	Seq         uint64        `abi:"seq"`
	BoottimeNS  uint64        `abi:"boottime_ns"`
	Flags       uint32        `abi:"flags"`
	Tier        uint8         `abi:"tier"`
	Scope       uint8         `abi:"scope"`
	Outcome     uint8         `abi:"outcome"`
	Pad         uint8         `abi:"pad"`
	Victim      Victim        `abi:"victim"`
	Trigger     Trigger       `abi:"trigger"`
	Memory      Memory        `abi:"memory"`
	Limit       Limit         `abi:"limit"`
	Alloc       Alloc         `abi:"alloc"`
	Incident    Incident      `abi:"incident"`
	CgroupRoles [roles]Cgroup `abi:"cgroup"`
}

// Victim mirrors struct oom_victim.
type Victim struct {
	TGID            uint32   `abi:"tgid"`
	TID             uint32   `abi:"tid"`
	NSTGID          uint32   `abi:"ns_tgid"`
	UID             uint32   `abi:"uid"`
	StartBoottimeNS uint64   `abi:"start_boottime_ns"`
	Comm            [16]byte `abi:"comm"`
	OOMScoreAdj     int16    `abi:"oom_score_adj"`
	Pad             [6]uint8 `abi:"pad"`
}

// Trigger mirrors struct oom_trigger.
type Trigger struct {
	TGID uint32   `abi:"tgid"`
	TID  uint32   `abi:"tid"`
	Comm [16]byte `abi:"comm"`
}

// Memory mirrors struct oom_memory.
type Memory struct {
	TotalVM  uint64              `abi:"total_vm"`
	RSS      [rssCounters]uint64 `abi:"rss"`
	Batched  [rssCounters]uint64 `abi:"batched"`
	PgTables uint64              `abi:"pgtables"`
}

// Limit mirrors struct oom_limit.
type Limit struct {
	Max       uint64 `abi:"max"`
	Usage     uint64 `abi:"usage"`
	SwapMax   uint64 `abi:"swap_max"`
	SwapUsage uint64 `abi:"swap_usage"`
}

// Alloc mirrors struct oom_alloc.
type Alloc struct {
	TotalPages uint64 `abi:"total_pages"`
	GFPMask    uint32 `abi:"gfp_mask"`
	Order      int32  `abi:"order"`
}

// Incident mirrors struct oom_incident.
type Incident struct {
	BoottimeNS uint64 `abi:"boottime_ns"`
	Index      uint32 `abi:"index"`
	Pad        uint32 `abi:"pad"`
}

// Cgroup mirrors struct oom_cgroup.
type Cgroup struct {
	ID    uint64 `abi:"id"`
	Off   uint16 `abi:"off"`
	Len   uint16 `abi:"len"`
	Flags uint32 `abi:"flags"`
}

// HeaderSize is OOM_HEADER_SIZE in bytes: where the names of the cgroup paths begin.
const HeaderSize = 312

// MaxSize is sizeof(struct oom_event) in bytes: of a slot of the journal.
const MaxSize = 4024

// ErrSample is wrapped by every error of Decode.
var ErrSample = errors.New("malformed record")

// Record is one sample, taken apart and checked.
type Record struct {
	Header
	// Paths are the cgroup paths by role, from the root of the hierarchy; empty where absent. One
	// whose levels next to the root are missing begins with ".../".
	Paths [roles]string
}

// Decode reads one record of the journal. It fails, naming the field, on anything that src/oom.bpf.c does not write.
func Decode(sample []byte) (*Record, error) {
	var r Record
	if err := r.decode(sample); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSample, err)
	}
	return &r, nil
}

func (r *Record) decode(sample []byte) (err error) {
	if len(sample) < HeaderSize {
		return fmt.Errorf("%d bytes, a header has %d", len(sample), HeaderSize)
	}
	if v := binary.NativeEndian.Uint16(sample); v != ABIVersion {
		return fmt.Errorf("abi_version %d, this build reads %d", v, ABIVersion)
	}
	if _, err := binary.Decode(sample, binary.NativeEndian, &r.Header); err != nil {
		return err
	}
	switch {
	case r.HeaderSize != HeaderSize:
		return fmt.Errorf("header_size %d, want %d", r.HeaderSize, HeaderSize)
	case r.Size < HeaderSize || r.Size > MaxSize:
		return fmt.Errorf("size %d is not in %d..%d", r.Size, HeaderSize, MaxSize)
	case int(r.Size) != len(sample):
		return fmt.Errorf("size %d in a sample of %d bytes", r.Size, len(sample))
	case r.Seq == 0:
		return errors.New("seq 0")
	case r.Victim.TID == 0:
		return errors.New("victim.tid 0")
	case int(r.Tier) >= len(tiers):
		return fmt.Errorf("tier %d is unknown", r.Tier)
	case int(r.Scope) >= len(scopes):
		return fmt.Errorf("scope %d is unknown", r.Scope)
	case int(r.Outcome) >= len(outcomes):
		return fmt.Errorf("outcome %d is unknown", r.Outcome)
	}
	data := sample[HeaderSize:]
	for role, c := range r.CgroupRoles {
		if c.Flags&cgroupPresent == 0 {
			continue
		}
		end := int(c.Off) + int(c.Len)
		if end > len(data) {
			return fmt.Errorf("cgroup[%d] ends at %d of %d bytes", role, end, len(data))
		}
		if r.Paths[role], err = joinNames(data[c.Off:end], c.Flags&cgroupTruncated != 0); err != nil {
			return fmt.Errorf("cgroup[%d]: %w", role, err)
		}
	}
	return nil
}

// joinNames builds a path of names that stand leaf first, each ended by a NUL.
func joinNames(names []byte, truncated bool) (string, error) {
	root := ""
	if truncated {
		root = "..."
	}
	if len(names) == 0 {
		return root + "/", nil
	}
	if names[len(names)-1] != 0 {
		return "", errors.New("the last name is not terminated")
	}
	var path strings.Builder
	path.WriteString(root)
	parts := bytes.Split(names[:len(names)-1], []byte{0})
	for _, name := range slices.Backward(parts) {
		if len(name) == 0 || bytes.IndexByte(name, '/') >= 0 {
			return "", fmt.Errorf("%q is not the name of a cgroup", name)
		}
		path.WriteByte('/')
		path.Write(name)
	}
	return path.String(), nil
}
