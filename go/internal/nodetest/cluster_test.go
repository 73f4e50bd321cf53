//go:build node

// Package nodetest runs a cluster of one real node for tests: a virtual machine with a stock Debian kernel, systemd,
// containerd and a kubelet, and on this machine the rest of Kubernetes. make test-node runs its tests, in a
// network namespace of their own. tools/node builds what it needs.
package nodetest

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// nodeName is the node's. Its address and images do not depend on it.
const nodeName = "node-1"

// bootTime is how long the machine may take until its node is ready: 2 minutes where nothing else runs.
const bootTime = 8 * time.Minute

// auditPolicy has the server log what changes the pods of the test and what is written about them.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Request
    verbs: [create, update, patch, delete, deletecollection]
    resources:
      - {group: "", resources: [pods, pods/status, pods/eviction, events]}
      - {group: events.k8s.io, resources: [events]}
  - level: None
`

// Lab is the cluster.
type Lab struct {
	*kubetest.Cluster
	Machine *Machine

	t          testing.TB
	kubeconfig string // the administrator's
}

// start brings the cluster up, until the node is ready.
func start(t testing.TB) *Lab {
	t.Helper()
	ownNetwork(t)
	dir := t.TempDir()
	token := map[string]string{}
	var tokens []string
	for user, group := range map[string]string{
		"system:node:" + nodeName: "system:nodes", "system:kube-controller-manager": "", "system:kube-scheduler": "", "system:kube-proxy": "",
	} {
		token[user] = rand.Text()
		tokens = append(tokens, fmt.Sprintf("%s,%s,%s,%q", token[user], user, user, group))
	}
	certificate, key := clientCertificate(t, "kube-apiserver-kubelet-client", "system:masters")
	kubeletCert, kubeletKey := filepath.Join(dir, "kubelet-client.crt"), filepath.Join(dir, "kubelet-client.key")
	write(t, kubeletCert, certificate)
	write(t, kubeletKey, key)
	l := &Lab{t: t}
	l.Cluster = kubetest.StartWith(t, kubetest.Options{
		Tokens: tokens, AuditPolicy: auditPolicy,
		Args: map[string]string{
			"advertise-address": hostIP, "endpoint-reconciler-type": "lease", "service-cluster-ip-range": "10.96.0.0/16",
			"authorization-mode": "Node,RBAC", "enable-admission-plugins": "NodeRestriction", "enable-priority-and-fairness": "true",
			"kubelet-client-certificate": kubeletCert, "kubelet-client-key": kubeletKey, "kubelet-preferred-address-types": "InternalIP",
		},
	})
	_, port, err := net.SplitHostPort(strings.TrimPrefix(l.Admin.Host, "https://"))
	if err != nil {
		t.Fatal(err)
	}
	l.kubeconfig = l.Kubeconfig(l.Admin)
	config := func(server, user string) []byte {
		return kubetest.Kubeconfig(t, &rest.Config{Host: server, BearerToken: token[user], TLSClientConfig: rest.TLSClientConfig{CAData: l.Admin.CAData}})
	}

	programs := oomtest.Program(t, "kube-node")
	for name, args := range map[string][]string{
		"kube-controller-manager": {
			"--use-service-account-credentials", "--service-account-private-key-file=" + filepath.Join(l.Dir, "sa.key"),
			"--root-ca-file=" + filepath.Join(l.Dir, "certs", "apiserver.crt"), "--leader-elect=false", "--bind-address=127.0.0.1",
			"--cluster-cidr=10.244.0.0/16", "--controllers=*,-node-ipam-controller,-node-route-controller,-cloud-node-lifecycle-controller,-service-lb-controller",
		},
		"kube-scheduler": {"--leader-elect=false", "--bind-address=127.0.0.1"},
	} {
		file := filepath.Join(dir, name+".kubeconfig")
		write(t, file, config(l.Admin.Host, "system:"+name))
		p := &kubetest.Process{
			Path: filepath.Join(programs, name), Log: filepath.Join(dir, name+".log"),
			Args: append(args, "--kubeconfig="+file, "--authentication-kubeconfig="+file, "--authorization-kubeconfig="+file),
		}
		t.Cleanup(func() {
			p.End(t)
			if t.Failed() {
				t.Logf("%s:\n%s", name, p.Tail())
			}
		})
		p.Start(t)
	}

	server := "https://" + net.JoinHostPort(hostIP, port)
	crio, err := resolved(read(t, "/usr/share/containers/seccomp.json"), "CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG", "CAP_SYS_RESOURCE")
	if err != nil {
		t.Fatalf("CRI-O's seccomp profile: %v", err)
	}
	settings := filepath.Join(dir, "settings.tar")
	write(t, settings, archive(t, map[string][]byte{
		"etc/kubernetes/kubelet.kubeconfig":    config(server, "system:node:"+nodeName),
		"etc/kubernetes/kube-proxy.kubeconfig": config(server, "system:kube-proxy"),
		"etc/kubernetes/kubelet-client-ca.crt": certificate,
		"usr/local/bin/pod":                    read(t, oomtest.Program(t, "pod")),
		// What the chart ships, and what CRI-O has (Debian's golang-github-containers-common).
		"var/lib/kubelet/seccomp/oom-tracer.json": read(t, repository(l, "deploy/seccomp/oom-tracer.json")),
		"var/lib/kubelet/seccomp/crio.json":       crio,
	}))
	// The emulator has faults (../../../tools/vm/test-vm.sh): a machine that does not come up is started once more, and it says so.
	for try := 1; ; try++ {
		booted := time.Now()
		l.Machine = boot(t, oomtest.Program(t, "node"), oomtest.Program(t, "node-images.img"), settings, nodeName)
		err := wait(t.Context(), bootTime, l.nodeReady)
		if err == nil {
			l.logf("boot to node ready: %.0f s", time.Since(booted).Seconds())
			break
		}
		l.logf("the machine is not ready after %s (try %d): %v\n%s", bootTime, try, err, l.Machine.consoleTail())
		if try == 2 {
			l.diagnose()
			t.Fatal("the node does not become ready")
		}
		l.Machine.qemu.End(t)
	}
	return l
}

// ownNetwork makes the node's address one of this network namespace, for the API server connects to the kubelet there,
// and refuses to do so in one where others are.
func ownNetwork(t testing.TB) {
	t.Helper()
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	if len(links) != 1 {
		t.Fatal("the test changes the network of the namespace that it runs in: run it with make test-node")
	}
	for _, args := range [][]string{
		{"link", "set", "lo", "up"},
		{"addr", "add", nodeIP + "/32", "dev", "lo"},
		// QEMU forwards only what comes from the loopback's own address.
		{"route", "replace", "local", nodeIP, "dev", "lo", "table", "local", "proto", "kernel", "scope", "host", "src", "127.0.0.1"},
	} {
		if out, err := exec.CommandContext(t.Context(), "ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %s: %v: %s", strings.Join(args, " "), err, out)
		}
	}
}

// nodeReady returns nil once the kubelet reports so.
func (l *Lab) nodeReady() error {
	node, err := l.Client.CoreV1().Nodes().Get(l.t.Context(), nodeName, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return errors.New("its Ready condition is not true")
}

// wait calls try until it returns nil, and returns its last error where that does not happen in time.
func wait(ctx context.Context, patience time.Duration, try func() error) error {
	deadline := time.Now().Add(patience)
	for {
		err := try()
		if err == nil || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		time.Sleep(250 * time.Millisecond)
	}
}

// await waits until try returns nil. Where it does not in time, the test ends with what the node has to say.
func (l *Lab) await(what string, patience time.Duration, try func() error) {
	l.t.Helper()
	if err := wait(l.t.Context(), patience, try); err != nil {
		l.diagnose()
		l.t.Fatalf("%s: not after %s: %v", what, patience, err)
	}
}

// diagnose prints what is wrong with the node and its pods.
func (l *Lab) diagnose() {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(l.t.Context()), 3*time.Minute)
	defer cancel()
	for _, args := range [][]string{
		{"get", "nodes", "-o", "wide"}, {"get", "pods", "-A", "-o", "wide"}, {"get", "events", "-A", "--sort-by=.lastTimestamp"},
	} {
		out, err := l.kubectl(ctx, "", args...)
		l.t.Logf("kubectl %s: %v\n%s", strings.Join(args, " "), err, lastLines(out, 40))
	}
	pods, err := l.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		l.t.Log(err)
	} else {
		for _, pod := range pods.Items {
			for _, status := range append(pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses...) {
				healthy := status.Ready && status.RestartCount == 0
				if healthy && pod.Namespace != namespace || pod.Namespace == "shop" {
					continue
				}
				for _, previous := range []string{"--previous=true", "--previous=false"} {
					if healthy && previous == "--previous=true" {
						continue
					}
					out, err := l.kubectl(ctx, "", "logs", "-n", pod.Namespace, pod.Name, "-c", status.Name, "--tail=40", previous)
					l.t.Logf("log of %s/%s %s (%s): %v\n%s", pod.Namespace, pod.Name, status.Name, previous, err, out)
				}
			}
		}
	}
	out, err := l.Machine.Run(ctx, "journalctl -u kubelet -u containerd -u node-setup -n 60 --no-pager -o cat; free -m; systemctl --failed --no-pager")
	l.t.Logf("the node's journal: %v\n%s", err, out)
}

func (l *Lab) kubectlPath() string {
	return filepath.Join(oomtest.Program(l.t, "kube-node"), "kubectl")
}

// kubectl runs it as the administrator. It returns what it prints on both streams.
func (l *Lab) kubectl(ctx context.Context, stdin string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, l.kubectlPath(), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+l.kubeconfig)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// helm runs it as the administrator, or fails the test.
func (l *Lab) helm(args ...string) string {
	l.t.Helper()
	cmd := exec.CommandContext(l.t.Context(), filepath.Join(oomtest.Program(l.t, "deploy"), "helm"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+l.kubeconfig, "HOME="+l.t.TempDir())
	out, err := cmd.CombinedOutput()
	if err != nil {
		l.diagnose()
		l.t.Fatalf("helm %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func (l *Lab) logf(format string, args ...any) {
	fmt.Printf("%s  %s\n", time.Now().UTC().Format("15:04:05.000"), fmt.Sprintf(format, args...))
}

func lastLines(s string, n int) string {
	lines := strings.SplitAfter(s, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

func read(t testing.TB, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func write(t testing.TB, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// clientCertificate makes a certificate that is its own authority, in PEM.
func clientCertificate(t testing.TB, name, group string) (certificate, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name, Organization: []string{group}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret})
}

// archive is a tar archive of these files, for a disk: a whole number of its sectors.
func archive(t testing.TB, files map[string][]byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, data := range files {
		err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o755, Size: int64(len(data)), ModTime: time.Now()})
		if err == nil {
			_, err = w.Write(data)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return append(b.Bytes(), make([]byte, -b.Len()&511)...)
}

// resolved is a profile of containers/common as CRI-O gives it to a container with these capabilities. containerd does not know
// its conditions and would take every rule.
func resolved(profile []byte, capabilities ...string) ([]byte, error) {
	type conditions struct{ Caps, Arches []string }
	var p struct {
		DefaultAction   string           `json:"defaultAction"`
		DefaultErrnoRet *uint            `json:"defaultErrnoRet,omitempty"`
		Syscalls        []map[string]any `json:"syscalls"`
	}
	var rules struct {
		Syscalls []struct{ Includes, Excludes conditions }
	}
	if err := errors.Join(json.Unmarshal(profile, &p), json.Unmarshal(profile, &rules)); err != nil {
		return nil, err
	}
	has := func(name string) bool { return slices.Contains(capabilities, name) }
	all := p.Syscalls
	p.Syscalls = nil
	for i, r := range rules.Syscalls {
		if len(r.Includes.Arches) > 0 && !slices.Contains(r.Includes.Arches, "amd64") || slices.ContainsFunc(r.Excludes.Caps, has) ||
			slices.ContainsFunc(r.Includes.Caps, func(name string) bool { return !has(name) }) {
			continue
		}
		delete(all[i], "includes")
		delete(all[i], "excludes")
		p.Syscalls = append(p.Syscalls, all[i])
	}
	return json.Marshal(p)
}
