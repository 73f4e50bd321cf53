package statedir_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, is error, words ...string) {
	t.Helper()
	if !errors.Is(err, is) {
		t.Fatalf("error %v, want one that wraps %v", err, is)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

// write makes a file, and returns its path.
func write(t *testing.T, path, text string, mode fs.FileMode) string {
	t.Helper()
	check(t, os.WriteFile(path, []byte(text), mode))
	check(t, os.Chmod(path, mode))
	return path
}

func mkdir(t *testing.T, path string, mode fs.FileMode) string {
	t.Helper()
	check(t, os.Mkdir(path, 0o700))
	check(t, os.Chmod(path, mode))
	return path
}

// What another user has made, could change or could replace is refused, by name and with a remedy, and stays as it is.
func TestOpen(t *testing.T) {
	for name, tt := range map[string]struct {
		nobody string                            // what that user does in the shared directory
		root   func(t *testing.T, shared string) // what root does then
		path   string                            // below the shared directory
		err    error                             // nil: it opens
		words  []string                          // of the error; DIR is the shared directory
		check  func(t *testing.T, shared string) // afterwards
	}{
		"none there":       {path: "oom"},
		"none there, deep": {path: "a/b/oom"},
		"ours":             {path: "oom", root: func(t *testing.T, shared string) { mkdir(t, shared+"/oom", 0o755) }},
		"a link of root's above": {path: "link/oom", root: func(t *testing.T, shared string) {
			mkdir(t, shared+"/real", 0o755)
			check(t, os.Symlink("real", shared+"/link"))
		}, check: func(t *testing.T, shared string) {
			if _, err := os.Stat(shared + "/real/oom"); err != nil {
				t.Error(err)
			}
		}},
		"another user's":        {nobody: "mkdir oom", path: "oom", err: statedir.ErrUnsafe, words: []string{"DIR/oom belongs to user 65534", "chown root DIR/oom"}},
		"another user's, above": {nobody: "mkdir -p a/oom", path: "a/oom", err: statedir.ErrUnsafe, words: []string{"DIR/a belongs to user 65534"}},
		"another user's, above, and root's below": {nobody: "mkdir a", path: "a/oom", err: statedir.ErrUnsafe, words: []string{"DIR/a belongs to user 65534"},
			root: func(t *testing.T, shared string) { mkdir(t, shared+"/a/oom", 0o700) }},
		"a link": {nobody: "ln -s ../target oom", path: "oom", err: statedir.ErrUnsafe, words: []string{"DIR/oom belongs to user 65534"}},
		"a link above": {nobody: "ln -s .. a", path: "a/oom", err: statedir.ErrUnsafe, words: []string{"DIR/a belongs to user 65534"},
			check: func(t *testing.T, shared string) {
				if _, err := os.Lstat(filepath.Dir(shared) + "/oom"); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("where the link leads to: %v", err)
				}
			}},
		"a link of root's": {path: "oom", err: statedir.ErrUnsafe, words: []string{"DIR/oom is a symbolic link", "remove it"},
			root: func(t *testing.T, shared string) {
				mkdir(t, shared+"/real", 0o755)
				check(t, os.Symlink("real", shared+"/oom"))
			}},
		"a link of root's into another user's directory": {nobody: "mkdir a; mkdir a/oom", path: "link/oom", err: statedir.ErrUnsafe, words: []string{"DIR/a belongs to user 65534"},
			root: func(t *testing.T, shared string) { check(t, os.Symlink("a", shared+"/link")) }},
		"links in a ring": {path: "a/oom", err: syscall.ELOOP, words: []string{"DIR/a/oom"},
			root: func(t *testing.T, shared string) { check(t, os.Symlink("a", shared+"/a")) }},
		"a file":         {path: "oom", err: syscall.ENOTDIR, words: []string{"DIR/oom", "remove it"}, root: func(t *testing.T, shared string) { write(t, shared+"/oom", "", 0o600) }},
		"a file above":   {path: "oom/b", err: syscall.ENOTDIR, words: []string{"DIR/oom", "remove it"}, root: func(t *testing.T, shared string) { write(t, shared+"/oom", "", 0o600) }},
		"a FIFO":         {nobody: "mkfifo oom", path: "oom", err: statedir.ErrUnsafe, words: []string{"DIR/oom belongs to user 65534"}},
		"writable":       {path: "oom", err: statedir.ErrUnsafe, words: []string{"DIR/oom has mode 0777", "chmod 0700 DIR/oom"}, root: func(t *testing.T, shared string) { mkdir(t, shared+"/oom", 0o777) }},
		"sticky":         {path: "oom", err: statedir.ErrUnsafe, words: []string{"DIR/oom has mode 0777"}, root: func(t *testing.T, shared string) { mkdir(t, shared+"/oom", 0o777|fs.ModeSticky) }},
		"group writes":   {path: "oom", err: statedir.ErrUnsafe, words: []string{"DIR/oom has mode 0775"}, root: func(t *testing.T, shared string) { mkdir(t, shared+"/oom", 0o775) }},
		"writable above": {path: "a/oom", err: statedir.ErrUnsafe, words: []string{"DIR/a has mode 0777", "can replace oom in it", "chmod 0755 DIR/a"}, root: func(t *testing.T, shared string) { mkdir(t, shared+"/a", 0o777); mkdir(t, shared+"/a/oom", 0o700) }},
	} {
		t.Run(name, func(t *testing.T) {
			shared := oomtest.SharedDir(t)
			if tt.nobody != "" {
				oomtest.RunAsNobody(t, shared, tt.nobody)
			}
			if tt.root != nil {
				tt.root(t, shared)
			}
			path := filepath.Join(shared, tt.path)
			d, err := statedir.Make(path)
			if tt.check != nil {
				tt.check(t, shared)
			}
			if tt.err != nil {
				wantError(t, err, tt.err)
				for _, w := range tt.words {
					wantError(t, err, tt.err, strings.ReplaceAll(w, "DIR", shared))
				}
				_, err := statedir.Open(path)
				wantError(t, err, tt.err)
				return
			}
			check(t, err)
			check(t, d.WriteFile("file", []byte("text")))
			check(t, d.Close())
			d, err = statedir.Open(path)
			check(t, err)
			data, err := d.ReadSecret("file", 4)
			if err != nil || string(data) != "text" {
				t.Errorf("%q, %v", data, err)
			}
			check(t, d.Close())
		})
	}
	t.Run("open makes none", func(t *testing.T) {
		_, err := statedir.Open(t.TempDir() + "/a")
		wantError(t, err, fs.ErrNotExist)
	})
	t.Run("relative", func(t *testing.T) {
		if _, err := statedir.Make("oom"); err == nil {
			t.Error("no error")
		}
	})
}

// A user who makes and removes directories and links without end never gets a file of ours into a place of his.
func TestOpenRace(t *testing.T) {
	shared := oomtest.SharedDir(t)
	oomtest.RunAsNobody(t, shared, "mkdir mine")
	oomtest.LoopAsNobody(t, shared, "mkdir oom; rmdir oom; ln -s mine oom; rm oom")
	path := filepath.Join(shared, "oom")
	refused, opened := 0, 0
	for deadline := time.Now().Add(30 * time.Second); min(refused, opened) < 100 && time.Now().Before(deadline); {
		d, err := statedir.Make(path)
		if err != nil {
			refused++
			continue
		}
		opened++
		check(t, d.WriteFile("secret", []byte("x")))
		data, err := d.ReadSecret("secret", 10)
		if err != nil || string(data) != "x" {
			t.Errorf("%q, %v", data, err)
		}
		check(t, d.Remove("secret"))
		check(t, d.Close())
		check(t, os.Remove(path)) // for the next round
	}
	t.Logf("refused %d times, opened %d times", refused, opened)
	if min(refused, opened) < 100 {
		t.Error("the race was not run")
	}
	if entries, err := os.ReadDir(shared + "/mine"); err != nil || len(entries) > 0 {
		t.Errorf("in the other user's directory: %v, %v", entries, err)
	}
}

// What stands in the place of a file, from the time when the directory was another user's, is neither read nor
// written to.
func TestFiles(t *testing.T) {
	for name, tt := range map[string]struct {
		nobody  string
		words   []string // of ReadFile's error
		written bool     // WriteFile replaces it
	}{
		"his file":                              {"echo forged >file; chmod 600 file", []string{"belongs to user 65534", "remove it"}, true},
		"a link":                                {"ln -s ../precious file", []string{"is not a regular file (L", "remove it"}, true},
		"a hard link":                           {"ln ../precious file", []string{"has another name too", "remove it"}, true},
		"a FIFO":                                {"mkfifo file", []string{"is not a regular file (p", "remove it"}, true},
		"a directory":                           {"mkdir file; touch file/x", []string{"is not a regular file (d", "remove it"}, false},
		"a link in place of the temporary file": {"ln -s ../precious .file.tmp", nil, true},
		"a hard link in place of the temporary file": {"ln ../precious .file.tmp", nil, true},
		"a FIFO in place of the temporary file":      {"mkfifo .file.tmp", nil, true},
		"a directory in place of the temporary file": {"mkdir .file.tmp; ln -s ../.. .file.tmp/x", nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			shared := oomtest.SharedDir(t)
			// Everybody may write to it, or the kernel forbids a hard link (fs.protected_hardlinks).
			precious := write(t, shared+"/precious", "precious", 0o666)
			oomtest.RunAsNobody(t, shared, "mkdir oom; cd oom; "+tt.nobody)
			// The remedy that the error names, without a look.
			check(t, os.Chown(shared+"/oom", 0, 0))
			check(t, os.Chmod(precious, 0o600))
			d, err := statedir.Open(shared + "/oom")
			check(t, err)
			defer d.Close()

			wantError(t, d.CheckContents(), statedir.ErrUnsafe)
			if len(tt.words) > 0 {
				_, err = d.ReadFile("file", 100)
				wantError(t, err, statedir.ErrUnsafe, tt.words...)
			}
			if err := d.WriteFile("file", []byte("ours")); (err == nil) != tt.written {
				t.Errorf("write: %v", err)
			}
			if !tt.written {
				bad, err := d.SetAside("file")
				check(t, err)
				if _, err := os.Stat(shared + "/oom/file.bad/x"); err != nil || bad != shared+"/oom/file.bad" {
					t.Errorf("%s: %v", bad, err)
				}
				check(t, d.WriteFile("file", []byte("ours")))
			}
			data, err := d.ReadSecret("file", 100)
			if err != nil || string(data) != "ours" {
				t.Errorf("%q, %v", data, err)
			}
			if data, err := os.ReadFile(precious); err != nil || string(data) != "precious" {
				t.Errorf("the target of the link holds %q, %v", data, err)
			}
		})
	}
	t.Run("modes and sizes", func(t *testing.T) {
		d, err := statedir.Make(t.TempDir() + "/oom")
		check(t, err)
		defer d.Close()
		check(t, d.WriteFile("file", []byte("text")))
		if info, err := d.Stat("file"); err != nil || info.Mode() != 0o600 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
		check(t, d.CheckContents())
		_, err = d.ReadFile("file", 3)
		if err == nil || !strings.Contains(err.Error(), "has 4 bytes") {
			t.Error(err)
		}
		_, err = d.ReadFile("none", 3)
		wantError(t, err, fs.ErrNotExist)
		check(t, os.Chmod(d.Path("file"), 0o644))
		if _, err = d.ReadFile("file", 4); err != nil {
			t.Error(err)
		}
		_, err = d.ReadSecret("file", 4)
		wantError(t, err, statedir.ErrUnsafe, "has mode 0644 and must have 0600")
		check(t, os.Chmod(d.Path("file"), 0o620))
		_, err = d.ReadFile("file", 4)
		wantError(t, err, statedir.ErrUnsafe, "has mode 0620")
		wantError(t, d.CheckContents(), statedir.ErrUnsafe, "has mode 0620")
		check(t, os.Remove(d.Path("file")))
		check(t, os.Chmod(mkdir(t, d.Path("sub"), 0o700), 0o777))
		wantError(t, d.CheckContents(), statedir.ErrUnsafe, "sub has mode 0777")
		check(t, os.Chmod(d.Path("sub"), 0o750))
		check(t, d.CheckContents())
		check(t, d.Private())
		check(t, os.Chmod(d.Path("."), 0o750))
		wantError(t, d.Private(), statedir.ErrUnsafe, "has mode 0750", "chmod 0700")
	})
}

// Whoever reads while a file is replaced finds one of the two texts, and a full disk leaves the one before.
func TestAtomic(t *testing.T) {
	dir := t.TempDir()
	check(t, syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=64k,mode=0700"))
	t.Cleanup(func() { check(t, syscall.Unmount(dir, syscall.MNT_DETACH)) })
	d, err := statedir.Open(dir)
	check(t, err)
	defer d.Close()
	texts := []string{strings.Repeat("a", 10_000), strings.Repeat("b", 20_000)}
	check(t, d.WriteFile("file", []byte(texts[0])))
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stop.Load() {
			if data, err := os.ReadFile(d.Path("file")); err != nil || string(data) != texts[0] && string(data) != texts[1] {
				t.Errorf("%d bytes, %v", len(data), err)
				return
			}
		}
	}()
	for i := range 500 {
		check(t, d.WriteFile("file", []byte(texts[i%2])))
	}
	stop.Store(true)
	<-done

	check(t, d.WriteFile("file", []byte(texts[0])))
	err = d.WriteFile("file", make([]byte, 100_000))
	wantError(t, err, syscall.ENOSPC, d.Path("file"))
	if data, err := d.ReadFile("file", 1<<20); err != nil || string(data) != texts[0] {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left: %v, %v", entries, err)
	}
}
