package deploy

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// profile is a seccomp profile, as the OCI runtime specification has it.
type profile struct {
	DefaultAction   string   `json:"defaultAction"`
	DefaultErrnoRet uint32   `json:"defaultErrnoRet"`
	Architectures   []string `json:"architectures"`
	Syscalls        []struct {
		Names    []string `json:"names"`
		Action   string   `json:"action"`
		ErrnoRet uint32   `json:"errnoRet"`
		Args     []struct {
			Index    uint32 `json:"index"`
			Value    uint32 `json:"value"`
			ValueTwo uint32 `json:"valueTwo"`
			Op       string `json:"op"`
		} `json:"args"`
	} `json:"syscalls"`
}

// syscallNumbers are those of an architecture, by name, of the tables of golang.org/x/sys.
func syscallNumbers(t *testing.T, arch string) map[string]uint32 {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "golang.org/x/sys").Output()
	if err != nil {
		t.Fatal(err)
	}
	text := readFile(t, filepath.Join(strings.TrimSpace(string(dir)), "unix", "zsysnum_linux_"+arch+".go"))
	numbers := map[string]uint32{}
	for _, m := range regexp.MustCompile(`SYS_(\w+) += (\d+)`).FindAllStringSubmatch(text, -1) {
		n, err := strconv.ParseUint(m[2], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		numbers[strings.ToLower(m[1])] = uint32(n)
	}
	return numbers
}

// filter is the profile as a program of the kernel's: what a rule allows, and else an errno.
func (p *profile) filter(t *testing.T, numbers map[string]uint32) []unix.SockFilter {
	t.Helper()
	const number, arg0 = 0, 16 // of struct seccomp_data
	ret := func(action string, errno uint32) unix.SockFilter {
		switch action {
		case "SCMP_ACT_ALLOW":
			return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}
		case "SCMP_ACT_ERRNO":
			return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | errno}
		}
		t.Fatalf("action %q", action)
		return unix.SockFilter{}
	}
	var filter []unix.SockFilter
	for _, rule := range p.Syscalls {
		for _, name := range rule.Names {
			n, known := numbers[name]
			if !known {
				continue // of another architecture
			}
			filter = append(filter, unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: number})
			switch {
			case len(rule.Args) == 0:
				filter = append(filter, unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: n})
			case len(rule.Args) == 1 && rule.Args[0].Op == "SCMP_CMP_MASKED_EQ" && rule.Args[0].Index == 0:
				filter = append(filter,
					unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 4, K: n},
					unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: arg0},
					unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: rule.Args[0].Value},
					unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: rule.Args[0].ValueTwo})
			default:
				t.Fatalf("arguments of %s: %+v", name, rule.Args)
			}
			filter = append(filter, ret(rule.Action, rule.ErrnoRet))
		}
	}
	return append(filter, ret(p.DefaultAction, p.DefaultErrnoRet))
}

// runUnder runs a program under a filter.
func runUnder(filter []unix.SockFilter, program string, args ...string) (string, error) {
	type result struct {
		out []byte
		err error
	}
	done := make(chan result)
	go func() {
		runtime.LockOSThread() // for good: the filter is the thread's, which ends with this goroutine
		fprog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			done <- result{err: err}
			return
		}
		if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&fprog)), 0, 0); err != nil {
			done <- result{err: fmt.Errorf("install the filter: %w", err)}
			return
		}
		out, err := exec.Command(program, args...).CombinedOutput()
		done <- result{out, err}
	}()
	r := <-done
	return string(r.out), r.err
}

// TestSeccompProfile: under the profile that is shipped the tracer traces a real kill and publishes it to its NATS, and says
// that it has all that it needs. The profile forbids what is not named, and to make namespaces.
func TestSeccompProfile(t *testing.T) {
	var p profile
	if err := json.Unmarshal([]byte(readFile(t, root+"/deploy/seccomp/oom-tracer.json")), &p); err != nil {
		t.Fatal(err)
	}
	amd64, arm64 := syscallNumbers(t, "amd64"), syscallNumbers(t, "arm64")
	for _, rule := range p.Syscalls {
		for _, name := range rule.Names {
			_, one := amd64[name]
			_, other := arm64[name]
			if !one && !other {
				t.Errorf("no system call %q", name)
			}
		}
	}
	filter := p.filter(t, map[string]map[string]uint32{"amd64": amd64, "arm64": arm64}[runtime.GOARCH])

	dir := t.TempDir()
	file := filepath.Join(dir, "config.yaml")
	text := fmt.Sprintf("node: {state_file: %q}\nkernel: {pin_dir: ''}\nnats: {embedded: {listen: '127.0.0.1:0', dir: %q}}\nmetrics: {listen: ''}\n",
		filepath.Join(dir, "state.json"), filepath.Join(dir, "nats"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	tracer := oomtest.Program(t, "oom-tracer")
	if out, err := runUnder(filter, tracer, "selftest", "--config", file); err != nil || !strings.Contains(out, "selftest: ok") {
		t.Errorf("selftest: %v\n%s", err, out)
	}
	free, err := exec.Command(tracer, "doctor", "--config", file).CombinedOutput()
	if err != nil {
		t.Fatalf("doctor: %v\n%s", err, free)
	}
	if out, err := runUnder(filter, tracer, "doctor", "--config", file); err != nil || out != string(free) {
		t.Errorf("doctor: %v\n%s\nwithout the profile:\n%s", err, out, free)
	}
	for _, forbidden := range []string{"unshare -m true", "mount -t tmpfs none /mnt", "chroot / true"} {
		args := strings.Fields(forbidden)
		if out, err := runUnder(filter, args[0], args[1:]...); err == nil || !strings.Contains(out, "not implemented") {
			t.Errorf("%s: %v %s", forbidden, err, out)
		}
	}
}
