package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// forwarder connects to the NATS of a release as kubectl port-forward does. It opens no port: what is read and written goes to the
// streams, and nobody else on this machine can use them.
type forwarder struct {
	client    core.CoreV1Interface
	rest      *rest.Config
	namespace string
}

// forward returns a new connection to a server that is ready.
func (f *forwarder) forward(ctx context.Context) (net.Conn, error) {
	pod, port, err := f.server(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := f.dial(ctx, pod, port)
	if err != nil && strings.Contains(err.Error(), " is forbidden: ") { // the dialers keep no more of the answer
		err = fmt.Errorf("%w (%s)", err, readersRemedy)
	}
	if err != nil {
		return nil, fmt.Errorf("forward port %d of pod %s in namespace %s: %w", port, pod, f.namespace, err)
	}
	return conn, nil
}

// server chooses a server's pod, and names the port of NATS in it.
func (f *forwarder) server(ctx context.Context) (string, int32, error) {
	pods, err := f.client.Pods(f.namespace).List(ctx, metav1.ListOptions{LabelSelector: natsPods})
	if apierrors.IsForbidden(err) {
		err = fmt.Errorf("%w (%s)", err, readersRemedy)
	}
	if err != nil {
		return "", 0, fmt.Errorf("find the servers of NATS: %w", err)
	}
	var not []string
	for _, i := range rand.Perm(len(pods.Items)) {
		pod := &pods.Items[i]
		if state := stateOf(pod); state != "" {
			not = append(not, pod.Name+" is "+state)
			continue
		}
		for _, container := range pod.Spec.Containers {
			for _, port := range container.Ports {
				if port.Name == "nats" {
					return pod.Name, port.ContainerPort, nil
				}
			}
		}
	}
	if not == nil {
		return "", 0, fmt.Errorf("no pod of NATS in namespace %s: kubectl -n %s describe statefulset oom-tracer-nats", f.namespace, f.namespace)
	}
	return "", 0, fmt.Errorf("no pod of NATS is ready in namespace %s (%s): kubectl -n %s describe pods -l %s", f.namespace, strings.Join(not, ", "), f.namespace, natsPods)
}

// stateOf is empty for a pod that is ready.
func stateOf(pod *corev1.Pod) string {
	if pod.DeletionTimestamp != nil {
		return "terminating"
	}
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady && condition.Status == corev1.ConditionTrue {
			return ""
		}
	}
	if pod.Status.Phase == corev1.PodRunning {
		return "not ready"
	}
	return strings.ToLower(cmp.Or(string(pod.Status.Phase), "pending"))
}

// dial opens the streams of a port: over a WebSocket, or over SPDY where the API server or a proxy has no WebSockets.
func (f *forwarder) dial(ctx context.Context, pod string, port int32) (net.Conn, error) {
	url := f.client.RESTClient().Post().Resource("pods").Namespace(f.namespace).Name(pod).SubResource("portforward").URL()
	transport, upgrader, err := spdy.RoundTripperFor(f.rest)
	if err != nil {
		return nil, err
	}
	tunnel, err := portforward.NewSPDYOverWebsocketDialerForStreaming(url, f.rest)
	if err != nil {
		return nil, err
	}
	dialer := portforward.NewFallbackDialerForStreaming(tunnel, spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, url), func(err error) bool {
		return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
	})
	type result struct {
		conn httpstream.Connection
		err  error
	}
	// The dialers know no context. A connection that comes too late is closed again.
	dialed := make(chan result, 1)
	go func() {
		conn, protocol, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
		if err == nil && protocol != portforward.PortForwardProtocolV1Name {
			err = errors.Join(fmt.Errorf("the API server offers the protocol %q, and not %q", protocol, portforward.PortForwardProtocolV1Name), conn.Close())
		}
		dialed <- result{conn, err}
	}()
	select {
	case r := <-dialed:
		if r.err != nil {
			return nil, r.err
		}
		return open(r.conn, port)
	case <-ctx.Done():
		go func() {
			if r := <-dialed; r.err == nil {
				_ = r.conn.Close()
			}
		}()
		return nil, context.Cause(ctx)
	}
}

// streams is the data stream of a port as a net.Conn.
type streams struct {
	net.Conn       // our end of a pipe: a stream has no deadlines
	reason   error // why the other end was closed; after io.EOF
}

// open opens the two streams of a port, as handleConnection in client-go's portforward.go does.
func open(conn httpstream.Connection, port int32) (net.Conn, error) {
	create := func(kind string) (httpstream.Stream, error) {
		headers := http.Header{}
		headers.Set(corev1.StreamType, kind)
		headers.Set(corev1.PortHeader, strconv.Itoa(int(port)))
		headers.Set(corev1.PortForwardRequestIDHeader, "0")
		return conn.CreateStream(headers)
	}
	failure, err := create(corev1.StreamTypeError)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	_ = failure.Close() // for writing
	data, err := create(corev1.StreamTypeData)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	ours, theirs := net.Pipe()
	s := &streams{Conn: ours}
	failed := make(chan error, 1)
	go func() {
		message, err := io.ReadAll(failure)
		if err == nil && len(message) > 0 {
			err = errors.New(string(message))
		}
		failed <- err
	}()
	go func() {
		_, _ = io.Copy(theirs, data) // the reason comes on the other stream
		select {
		case s.reason = <-failed:
		case <-conn.CloseChan():
		case <-time.After(time.Second):
		}
		_ = theirs.Close()
		_ = conn.Close()
	}()
	go func() {
		_, _ = io.Copy(data, theirs) // until either end is closed
		_ = conn.Close()
	}()
	return s, nil
}

// Read has the reason for the end, where the kubelet gave one.
func (s *streams) Read(p []byte) (int, error) {
	n, err := s.Conn.Read(p)
	if errors.Is(err, io.EOF) && s.reason != nil {
		err = fmt.Errorf("the forwarded port was closed: %w", s.reason)
	}
	return n, err
}
