// Package statedir opens the directories in which oom-tracer keeps things on a node, and reads and writes the files
// in them. The tracer is root: in a place that another user can write to, that user would choose what root reads,
// overwrites and deletes.
//
// Rule of the package: a directory is used only if nobody but root and the user who runs this can change it or
// replace it. Whoever is neither can then put nothing into it, neither before nor after the check.
package statedir

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
)

// ErrUnsafe is wrapped by the errors about a directory or file that another user can change, or may have made.
var ErrUnsafe = errors.New("not safe from other users")

// Dir is an open directory. Names are those of files in it; nothing outside of it can be reached.
type Dir struct {
	*os.Root
	path string
}

// Open opens a directory, by its absolute path. The error names what is wrong with it or with a directory above it,
// and the remedy.
func Open(path string) (*Dir, error) { return open(path, false) }

// Make opens a directory, and makes it, and those above it, where there is none: with mode 0700.
func Make(path string) (*Dir, error) { return open(path, true) }

func open(path string, missing bool) (*Dir, error) {
	path = filepath.Clean(path)
	checked, err := check(path, missing)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return nil, err
	}
	opened, err := root.Stat(".") // the kernel has gone the same way a second time
	if err == nil && !os.SameFile(checked, opened) {
		err = fmt.Errorf("%s was replaced by another directory: %w", path, ErrUnsafe)
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return &Dir{Root: root, path: path}, nil
}

// check looks at a directory and at each one above it, from the root down: once nobody else can replace the entries
// of one, what was found there stays.
func check(path string, missing bool) (fs.FileInfo, error) {
	if !filepath.IsAbs(path) {
		return nil, fmt.Errorf("%s is not an absolute path", path)
	}
	const maxLinks = 40 // as the kernel
	links := 0
	at := "/"
	info, err := lstat(at)
	if err != nil {
		return nil, err
	}
	rest := split(path)
	for len(rest) > 0 {
		if others(info) && info.Mode()&fs.ModeSticky == 0 {
			return nil, fmt.Errorf("%s has mode %04o, other users can replace %s in it: %w; chmod 0755 %s", at, perm(info), rest[0], ErrUnsafe, at)
		}
		next := filepath.Join(at, rest[0]) // or the one above: the target of a link may say ..
		rest = rest[1:]
		if info, err = lstat(next); missing && errors.Is(err, fs.ErrNotExist) {
			if err = os.Mkdir(next, 0o700); err == nil || errors.Is(err, fs.ErrExist) {
				info, err = lstat(next)
			}
		}
		switch {
		case err != nil:
			return nil, err
		case info.IsDir():
			at = next
		case info.Mode()&fs.ModeSymlink != 0 && len(rest) > 0: // such as /var/run
			target, err := os.Readlink(next)
			if err != nil {
				return nil, err
			}
			if links++; links > maxLinks {
				return nil, &fs.PathError{Op: "open", Path: path, Err: syscall.ELOOP}
			}
			if filepath.IsAbs(target) {
				at = "/"
			}
			if info, err = lstat(at); err != nil {
				return nil, err
			}
			rest = append(split(target), rest...)
		case info.Mode()&fs.ModeSymlink != 0:
			return nil, fmt.Errorf("%s is a symbolic link: %w; remove it, or configure the directory that it points to", next, ErrUnsafe)
		default:
			return nil, fmt.Errorf("%w; remove it, or configure another directory", &fs.PathError{Op: "open", Path: next, Err: syscall.ENOTDIR})
		}
	}
	if others(info) {
		return nil, fmt.Errorf("%s has mode %04o, other users can write to it: %w; check its contents, then chmod 0700 %s", at, perm(info), ErrUnsafe, at)
	}
	return info, nil
}

func split(path string) []string {
	return strings.FieldsFunc(path, func(r rune) bool { return r == '/' })
}

// lstat looks at something that must belong to root or to the user who runs this.
func lstat(path string) (fs.FileInfo, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if uid, ok := foreign(info); ok {
		return nil, fmt.Errorf("%s belongs to user %d: %w; remove it, or check its contents, then chown root %s", path, uid, ErrUnsafe, path)
	}
	return info, nil
}

// foreign reports whether something belongs to somebody else, and to whom.
func foreign(info fs.FileInfo) (uid uint32, ok bool) {
	uid = owner(info)
	return uid, uid != 0 && int(uid) != os.Geteuid()
}

// others reports whether its mode lets other users write to something. An access control list shows in it too: its
// mask is the group's part.
func others(info fs.FileInfo) bool { return perm(info)&0o022 != 0 }

// Path is the absolute path of a file in the directory, for messages.
func (d *Dir) Path(name string) string { return filepath.Join(d.path, name) }

// Private fails if other users can read the directory.
func (d *Dir) Private() error {
	info, err := d.Stat(".")
	if err != nil {
		return err
	}
	if perm := perm(info); perm&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o, other users can read it: %w; chmod 0700 %s", d.path, perm, ErrUnsafe, d.path)
	}
	return nil
}

// CheckContents fails if something in the directory, at any depth, is neither a directory nor a file that only root
// and the user who runs this can write to. A directory may have been another user's before it was root's, and a
// program that knows nothing of this package would follow what that user has left in it.
func (d *Dir) CheckContents() error {
	return fs.WalkDir(d.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil {
			return fmt.Errorf("read %s: %w", d.path, err)
		}
		info, err := entry.Info()
		switch {
		case errors.Is(err, fs.ErrNotExist): // it was there a moment ago
			return nil
		case err != nil:
			return fmt.Errorf("read %s: %w", d.path, err)
		case entry.IsDir():
			return d.check(name, info)
		}
		return d.checkFile(name, info)
	})
}

// check fails if other users own something, or can write to it.
func (d *Dir) check(name string, info fs.FileInfo) error {
	path := d.Path(name)
	if uid, ok := foreign(info); ok {
		return fmt.Errorf("%s belongs to user %d: %w; remove it", path, uid, ErrUnsafe)
	}
	if others(info) {
		return fmt.Errorf("%s has mode %04o, other users can write to it: %w; remove it, or check its contents, then chmod go-w %s", path, perm(info), ErrUnsafe, path)
	}
	return nil
}

// checkFile is check, and fails for what is no regular file, and for one that has another name elsewhere.
func (d *Dir) checkFile(name string, info fs.FileInfo) error {
	switch {
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is not a regular file (%v): %w; remove it", d.Path(name), info.Mode().Type(), ErrUnsafe)
	case hardLinked(info):
		return fmt.Errorf("%s is a hard link to a file that has another name too: %w; remove it", d.Path(name), ErrUnsafe)
	}
	return d.check(name, info)
}

// ReadFile reads a file of at most limit bytes that nobody else can have written.
func (d *Dir) ReadFile(name string, limit int64) ([]byte, error) { return d.read(name, limit, 0) }

// ReadSecret is ReadFile for a file that nobody else can have read either.
func (d *Dir) ReadSecret(name string, limit int64) ([]byte, error) { return d.read(name, limit, 0o077) }

func (d *Dir) read(name string, limit int64, forbidden fs.FileMode) ([]byte, error) {
	info, err := d.Lstat(name)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.Path(name), err)
	}
	if err := d.checkFile(name, info); err != nil {
		return nil, err
	}
	if perm := perm(info); perm&forbidden != 0 {
		return nil, fmt.Errorf("%s has mode %04o and must have 0600, other users may have read it: %w", d.Path(name), perm, ErrUnsafe)
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, at most %d are allowed", d.Path(name), info.Size(), limit)
	}
	f, err := d.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.Path(name), err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.Path(name), err)
	}
	return data, nil
}

// WriteFile makes or replaces a file in one step: it holds either what it held before or all of data, and that on the
// disk, for a node that has run out of memory may be reset next. Its mode is 0600. Only one process may write to the
// same file at a time.
func (d *Dir) WriteFile(name string, data []byte) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", d.Path(name), err)
		}
	}()
	temp := "." + name + ".tmp" // always the same: what a killed process has left goes here
	if err := d.RemoveAll(temp); err != nil {
		return err
	}
	f, err := d.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = d.Rename(temp, name)
	}
	if err != nil {
		_ = d.Remove(temp)
		return err
	}
	return d.sync()
}

// SetAside gives something another name, name.bad, and returns its path. What had that name before is replaced.
func (d *Dir) SetAside(name string) (string, error) {
	bad := name + ".bad"
	err := d.Rename(name, bad)
	if err == nil {
		err = d.sync()
	}
	if err != nil {
		return "", fmt.Errorf("rename %s: %w", d.Path(name), err)
	}
	return d.Path(bad), nil
}

// sync writes the names to the disk.
func (d *Dir) sync() error {
	self, err := d.Root.Open(".")
	if err != nil {
		return err
	}
	return errors.Join(self.Sync(), self.Close())
}
