//go:build unix

package statedir

import (
	"io/fs"
	"syscall"
)

// owner is the user that something belongs to.
func owner(info fs.FileInfo) uint32 { return info.Sys().(*syscall.Stat_t).Uid }

// perm is who may do what with something.
func perm(info fs.FileInfo) fs.FileMode { return info.Mode().Perm() }

// hardLinked reports whether a file has another name.
func hardLinked(info fs.FileInfo) bool { return info.Sys().(*syscall.Stat_t).Nlink != 1 }
