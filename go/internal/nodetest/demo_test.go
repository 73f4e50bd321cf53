//go:build node && demo

package nodetest

import (
	"os"
	"os/signal"
	"syscall"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// TestDemo is not a test but what make demo-node runs: the story of one kill with its times, on a cluster that stays until it
// is interrupted.
func TestDemo(t *testing.T) {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	l := start(t)
	l.Apply("go/internal/nodetest/testdata/lab.yaml")
	l.secondNode()
	l.install()
	r := l.tail()
	l.Namespace("shop")
	l.deployment("cart")
	l.running("cart", "")
	l.tell(t, r, story{name: "cart", container: "main", scope: event.ScopeCgroup, levels: []event.LimitLevel{event.LevelKubepods}, outcome: "annotated/marked",
		cause: func(l *Lab) { l.allPods(l.running("cart", "").Name) }})
	l.logf("the cluster is up until Ctrl-C. From another terminal, as root:")
	l.logf("  export KUBECONFIG=%s", l.kubeconfig)
	l.logf("  alias k='nsenter --net --target %d %s'", os.Getpid(), l.kubectlPath())
	l.logf("  k get pods -A; k -n shop describe pods; k -n %s logs daemonset/oom-tracer", namespace)
	l.logf("  a shell on the node: nsenter --net --target %d socat - TCP:%s", os.Getpid(), shellAddr)
	<-interrupted
}
