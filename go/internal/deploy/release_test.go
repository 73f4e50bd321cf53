package deploy

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/buildinfo"
	"debug/elf"
	"debug/pe"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// run runs a command in a directory and returns what it prints.
func run(t *testing.T, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// untar reads the regular files of a tar.gz.
func untar(t *testing.T, file string) map[string][]byte {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	unzipped, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for archive := tar.NewReader(unzipped); ; {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if header.Typeflag != tar.TypeReg {
			continue
		}
		if files[header.Name], err = io.ReadAll(archive); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRelease: make release, without images, makes a release of the last commit, whatever lies in the working tree, and says so. (make
// test-image runs the images.)
func TestRelease(t *testing.T) {
	repository, out := t.TempDir(), filepath.Join(t.TempDir(), "release")
	run(t, root, "git", "clone", "-q", "--shared", ".", repository)
	commit := run(t, repository, "git", "rev-parse", "HEAD")
	tag := run(t, repository, "git", "describe", "--tags", "--always")
	if err := os.WriteFile(filepath.Join(repository, "go/cmd/oom-tap/main.go"), []byte("not Go, and not committed"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, repository, "make", "release", "IMAGES=none", "TARGETS=linux/amd64 windows/arm64", "RELEASE_DIR="+out)

	sums := map[string]string{}
	for line := range strings.Lines(readFile(t, filepath.Join(out, "SHA256SUMS"))) {
		sum, name, _ := strings.Cut(strings.TrimSpace(line), "  ")
		if sums[name] = sum; fmt.Sprintf("%x", sha256.Sum256([]byte(readFile(t, filepath.Join(out, name))))) != sum {
			t.Errorf("%s is not what SHA256SUMS says", name)
		}
	}
	var provenance struct {
		Subject []struct {
			Name   string
			Digest struct{ SHA256 string }
		}
		Predicate struct {
			BuildDefinition struct {
				ResolvedDependencies []struct{ Digest struct{ GitCommit string } }
			}
		}
	}
	if err := json.Unmarshal([]byte(readFile(t, filepath.Join(out, "provenance.json"))), &provenance); err != nil {
		t.Fatal(err)
	}
	if got := provenance.Predicate.BuildDefinition.ResolvedDependencies[0].Digest.GitCommit; got != commit {
		t.Errorf("provenance names the commit %s, want %s", got, commit)
	}
	for _, s := range provenance.Subject {
		if sums[s.Name] != s.Digest.SHA256 {
			t.Errorf("provenance has another digest of %s", s.Name)
		}
	}
	if len(sums) != len(provenance.Subject)+1 || len(sums) < 10 {
		t.Errorf("%d checksums, %d subjects", len(sums), len(provenance.Subject))
	}

	// The programs are those of the system, and of the commit.
	linux := untar(t, filepath.Join(out, "oom-tap_linux_amd64.tar.gz"))
	if names := slices.Sorted(maps.Keys(linux)); !slices.Equal(names, []string{"LICENSE", "kubectl-oom", "kubectl_complete-oom", "oom-tap"}) {
		t.Errorf("for Linux: %q", names)
	}
	for _, name := range []string{"oom-tap", "kubectl-oom"} {
		if program, err := elf.NewFile(bytes.NewReader(linux[name])); err != nil || program.Machine != elf.EM_X86_64 || !bytes.Contains(linux[name], []byte(commit)) {
			t.Errorf("%s for Linux: %v", name, err)
		}
	}
	windows, err := zip.OpenReader(filepath.Join(out, "oom-tap_windows_arm64.zip"))
	if err != nil {
		t.Fatal(err)
	}
	defer windows.Close()
	var names []string
	for _, f := range windows.File {
		names = append(names, f.Name)
		r, err := f.Open()
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if p, err := pe.NewFile(bytes.NewReader(data)); f.Name != "LICENSE" && (err != nil || p.Machine != pe.IMAGE_FILE_MACHINE_ARM64) {
			t.Errorf("%s: %v", f.Name, err)
		}
	}
	if !slices.Equal(names, []string{"LICENSE", "kubectl-oom.exe", "oom-tap.exe"}) {
		t.Errorf("for Windows: %q", names)
	}

	// krew checks the manifest, the digest and what is in the archive.
	for platform, archive := range map[string]string{"linux/amd64": "oom-tap_linux_amd64.tar.gz", "windows/arm64": "oom-tap_windows_arm64.zip"} {
		os, arch, _ := strings.Cut(platform, "/")
		home := t.TempDir()
		cmd := exec.CommandContext(t.Context(), oomtest.Program(t, "krew"), "install", "--manifest", filepath.Join(out, "oom.yaml"), "--archive", filepath.Join(out, archive))
		cmd.Env = []string{"HOME=" + home, "KREW_ROOT=" + home, "KREW_OS=" + os, "KREW_ARCH=" + arch, "KREW_NO_UPGRADE_CHECK=1", "PATH=" + filepath.Join(home, "bin")}
		if said, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("krew install for %s: %v\n%s", platform, err, said)
		} else if os == "linux" && !strings.Contains(run(t, home, filepath.Join(home, "bin/kubectl-oom"), "--version"), commit) {
			t.Error("the installed plugin is of another commit")
		}
		if manifest := readFile(t, filepath.Join(out, "oom.yaml")); !strings.Contains(manifest, "/"+archive+"\n    sha256: "+sums[archive]+"\n") {
			t.Errorf("the manifest of krew does not have the digest of %s:\n%s", archive, manifest)
		}
	}

	// The list of modules is that of the program.
	for _, name := range []string{"oom-tap", "kubectl-oom"} {
		info, err := buildinfo.Read(bytes.NewReader(linux[name]))
		if err != nil {
			t.Fatal(err)
		}
		var want, got []string
		for _, m := range info.Deps {
			want = append(want, m.Path+" "+m.Version+" Go module hash "+m.Sum)
		}
		var sbom struct {
			Packages []struct{ Name, VersionInfo, Comment string }
		}
		if err := json.Unmarshal([]byte(readFile(t, filepath.Join(out, "sbom", name+".spdx.json"))), &sbom); err != nil {
			t.Fatal(err)
		}
		for _, p := range sbom.Packages {
			if p.Comment != "" {
				got = append(got, p.Name+" "+p.VersionInfo+" "+p.Comment)
			}
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(got, want) || len(got) < 10 {
			t.Errorf("the SBOM of %s has %q,\nthe program %q", name, got, want)
		}
	}

	// Chart and manifests install these images.
	packages, err := filepath.Glob(filepath.Join(out, "oom-tracer-*.tgz"))
	if err != nil || len(packages) != 1 {
		t.Fatalf("%q, %v", packages, err)
	}
	text, err := kubetest.Helm(t, slices.Concat([]string{"template", "x", packages[0], "--kube-version", "1.36.3"}, ownSecret(t))...)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range untar(t, filepath.Join(out, "manifests.tar.gz")) {
		if _, err := kubetest.Parse(bytes.NewReader(data)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		text += string(data)
	}
	images := 0
	for line := range strings.Lines(text) {
		if image, ok := strings.CutPrefix(strings.TrimSpace(line), "image: "); ok && !strings.HasPrefix(image, "nats:") {
			if images++; !strings.HasSuffix(image, ":"+tag) {
				t.Errorf("image %s, want :%s", image, tag)
			}
		}
	}
	if images < 12 {
		t.Errorf("%d images", images)
	}
}
