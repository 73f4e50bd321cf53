//go:build node && bench

package nodetest

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestBench is what make bench-node runs: OOM_TEST_KILLS (20) kills of each kind, or of those in OOM_TEST_STORIES ("cart web"), and a table of how long each stage took
// after them. It stands on an emulated node, 15 to 20 times slower than the processor.
func TestBench(t *testing.T) {
	kills := 20
	if s := os.Getenv("OOM_TEST_KILLS"); s != "" {
		var err error
		if kills, err = strconv.Atoi(s); err != nil || kills < 1 {
			t.Fatalf("OOM_TEST_KILLS: must be a number from 1 on, not %q", s)
		}
	}
	l := start(t)
	l.Apply("go/internal/nodetest/testdata/lab.yaml")
	l.secondNode()
	l.install()
	l.memory()
	r := l.tail()
	l.Namespace("shop")
	l.shop()
	stages := []string{"stored", "outcome", "Event", "annotated", "evicted", "gone", "replaced"}
	head := fmt.Sprintf("%-10s %5s  ", "p50 / max", "kills")
	for _, stage := range stages {
		head += fmt.Sprintf("%18s", stage)
	}
	only := strings.Fields(os.Getenv("OOM_TEST_STORIES"))
	all := slices.DeleteFunc(stories(), func(s story) bool { return len(only) > 0 && !slices.Contains(only, s.name) })
	took := map[string]map[string][]time.Duration{}
	// The kinds take turns, so that a pod is made anew while the others are killed.
	deleted := map[string]bool{}
	for round := range kills {
		l.logf("round %d of %d", round+1, kills)
		for _, s := range all {
			if deleted[s.name] {
				l.await("the pod before is gone", 3*time.Minute, func() error { return l.gone(s.name) })
				l.make(s.name)
				delete(deleted, s.name)
			}
			if took[s.name] == nil {
				took[s.name] = map[string][]time.Duration{}
			}
			for stage, d := range l.tell(t, r, s) {
				took[s.name][stage] = append(took[s.name][stage], d)
			}
			deleted[s.name] = l.delete(s.name)
			for name := range deleted {
				if deleted[name] && l.gone(name) == nil {
					l.make(name)
					delete(deleted, name)
				}
			}
		}
		fmt.Println(head)
		for _, s := range all {
			line := fmt.Sprintf("%-10s %5d  ", s.name, len(took[s.name]["stored"]))
			for _, stage := range stages {
				d := took[s.name][stage]
				if len(d) == 0 {
					line += fmt.Sprintf("%18s", "-")
					continue
				}
				slices.Sort(d)
				line += fmt.Sprintf("%18s", fmt.Sprintf("%.2f / %.2f s", d[len(d)/2].Seconds(), d[len(d)-1].Seconds()))
			}
			fmt.Println(line)
		}
	}
	l.memory()
	fmt.Println("descheduler's interval: 10 s")
}

// delete deletes a pod that was killed, as the kubelet would wait ever longer before it restarts a container, and returns true. A
// Deployment makes another one by itself.
func (l *Lab) delete(name string) bool {
	l.t.Helper()
	switch name {
	case "container", "pod", "init":
		if err := l.Client.CoreV1().Pods("shop").Delete(l.t.Context(), name, metav1.DeleteOptions{}); err != nil {
			l.t.Fatal(err)
		}
	case "static":
		l.Machine.Must("rm /etc/kubernetes/manifests/static.yaml")
	default:
		return false
	}
	return true
}

// gone returns an error unless the pod of a kind is gone.
func (l *Lab) gone(name string) error {
	if name == "static" {
		name += "-" + nodeName
	}
	_, err := l.Client.CoreV1().Pods("shop").Get(l.t.Context(), name, metav1.GetOptions{})
	if err == nil {
		return fmt.Errorf("pod %s is there", name)
	}
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
