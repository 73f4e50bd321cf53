// Package usage reads, in the moment after a kill, what the memory of a cgroup or of the node is used for, and how
// much the pods of the node use.
//
// Rule of the package: it reads when the node has the least memory to spare. So it is bounded in time and in what it
// looks at, and what it cannot read it leaves out, and says so.
package usage

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Tree is the hierarchy of the memory controller.
type Tree struct {
	Mount   string // where its root is mounted
	Version int    // 1 or 2
	Root    string // the node's own root within it; see cgroup.Parse
}

// gone tells that the cgroup, or a file that its version of the kernel does not have, is not there.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

// maxFile bounds what is read of one file, in bytes.
const maxFile = 64 << 10

// read reads the beginning of a file, and reports whether that was all.
func read(dir *os.Root, name string) (data []byte, whole bool, err error) {
	file, err := dir.Open(name)
	if err != nil {
		return nil, false, err
	}
	defer file.Close()
	if data, err = io.ReadAll(io.LimitReader(file, maxFile+1)); err != nil {
		return nil, false, err
	}
	return data[:min(len(data), maxFile)], len(data) <= maxFile, nil
}

// number parses a file that has one number. It returns nil for "max".
func number(data []byte) (*uint64, error) {
	text := strings.TrimSpace(string(data))
	if text == "max" {
		return nil, nil
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return nil, err
	}
	return &n, nil
}
