package statedir

import "io/fs"

// Of a file's owner and names Windows says nothing here. Only oom-tap runs there, which reads files that its user names.

func owner(fs.FileInfo) uint32 { return 0 }

// The mode is made up: it gives everybody the rights that the user has.
func perm(info fs.FileInfo) fs.FileMode { return info.Mode().Perm() &^ 0o077 }

func hardLinked(fs.FileInfo) bool { return false }
