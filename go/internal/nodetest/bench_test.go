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
	table := []string{head}
	only := strings.Fields(os.Getenv("OOM_TEST_STORIES"))
	for _, s := range stories() {
		if len(only) > 0 && !slices.Contains(only, s.name) {
			continue
		}
		took := map[string][]time.Duration{}
		for i := range kills {
			if i > 0 {
				l.remake(s.name)
			}
			for stage, d := range l.tell(t, r, s) {
				took[stage] = append(took[stage], d)
			}
		}
		line := fmt.Sprintf("%-10s %5d  ", s.name, kills)
		for _, stage := range stages {
			d := took[stage]
			if len(d) == 0 {
				line += fmt.Sprintf("%18s", "-")
				continue
			}
			slices.Sort(d)
			line += fmt.Sprintf("%18s", fmt.Sprintf("%.2f / %.2f s", d[len(d)/2].Seconds(), d[len(d)-1].Seconds()))
		}
		table = append(table, line)
		l.logf("%s", line)
	}
	l.memory()
	fmt.Println("descheduler's interval: 10 s")
	fmt.Println(strings.Join(table, "\n"))
}

// remake makes a pod anew: the kubelet would wait ever longer before it restarts a container. A Deployment does that by itself.
func (l *Lab) remake(name string) {
	l.t.Helper()
	pods := l.Client.CoreV1().Pods("shop")
	switch name {
	case "container", "pod", "init":
		if err := pods.Delete(l.t.Context(), name, metav1.DeleteOptions{}); err != nil {
			l.t.Fatal(err)
		}
	case "static":
		l.Machine.Must("rm /etc/kubernetes/manifests/static.yaml")
		name += "-" + nodeName
	default:
		return
	}
	l.await("the pod before is gone", 2*time.Minute, func() error {
		_, err := pods.Get(l.t.Context(), name, metav1.GetOptions{})
		if err == nil {
			return fmt.Errorf("it is there")
		}
		if !apierrors.IsNotFound(err) {
			return err
		}
		return nil
	})
	l.make(strings.TrimSuffix(name, "-"+nodeName))
}
