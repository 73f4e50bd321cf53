package pods

import (
	"context"
	"fmt"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// What one request to the API server may take.
const (
	requestTimeout = 5 * time.Second // of one that is neither a list nor a watch
	listTimeout    = 30 * time.Second
	maxEvents      = 500 // on one pod, for one reason
)

// FieldManager is who the API server writes down as having set a field. deploy/manifests/admission.yaml goes by it.
const FieldManager = "oom-annotator"

// Client speaks with the API server about pods and the Events on them. Its errors name the verb of RBAC
// that was missing, if that was it. It makes no second attempts of its own.
type Client struct {
	rest   rest.Interface
	params runtime.ParameterCodec
}

// Config finds the API server: that of the kubeconfig file, or, where the path is empty, the one of the pod
// that this runs in.
func Config(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("find the API server: %w (outside of a cluster, name a kubeconfig file)", err)
		}
		return cfg, nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", kubeconfig, err)
	}
	return cfg, nil
}

// NewClient makes a client that sends at most qps requests a second, and burst at once; with qps 0 it leaves that to the
// server's priority and fairness. Nothing is asked of the server.
func NewClient(cfg *rest.Config, userAgent string, qps, burst int) (*Client, error) {
	// A scheme of our own: client-go's knows every kind there is, which would be most of the program.
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("make API client: %w", err)
	}
	metav1.AddToGroupVersion(scheme, corev1.SchemeGroupVersion)
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath = "/api"
	cfg.GroupVersion = &corev1.SchemeGroupVersion
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	cfg.UserAgent = userAgent
	if cfg.QPS, cfg.Burst = float32(qps), burst; qps == 0 {
		cfg.QPS = -1 // client-go takes 0 for its default of 5
	}
	cfg.WarningHandler = rest.NoWarnings{}
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("make API client: %w", err)
	}
	return &Client{rest: client, params: runtime.NewParameterCodec(scheme)}, nil
}

// Get reads one pod.
func (c *Client) Get(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	pod := &corev1.Pod{}
	err := c.rest.Get().Resource("pods").Namespace(namespace).Name(name).MaxRetries(0).Do(ctx).Into(pod)
	if err != nil {
		return nil, explain("get", "pods", err)
	}
	return pod, nil
}

// Patch applies a JSON merge patch (RFC 7386) to one pod.
func (c *Client) Patch(ctx context.Context, namespace, name string, patch []byte) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	pod := &corev1.Pod{}
	err := c.rest.Patch(types.MergePatchType).Resource("pods").Namespace(namespace).Name(name).Param("fieldManager", FieldManager).Body(patch).MaxRetries(0).Do(ctx).Into(pod)
	if err != nil {
		return nil, explain("patch", "pods", err)
	}
	return pod, nil
}

// PatchStatus applies a strategic merge patch to the status of one pod: of the conditions it changes those that it names.
func (c *Client) PatchStatus(ctx context.Context, namespace, name string, patch []byte) (*corev1.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	pod := &corev1.Pod{}
	err := c.rest.Patch(types.StrategicMergePatchType).Resource("pods").SubResource("status").Namespace(namespace).Name(name).Param("fieldManager", FieldManager).Body(patch).MaxRetries(0).Do(ctx).Into(pod)
	if err != nil {
		return nil, explain("patch", "pods/status", err)
	}
	return pod, nil
}

// Events lists the Events of a reason on the pod of a UID.
func (c *Client) Events(ctx context.Context, namespace, uid, reason string) ([]corev1.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list := &corev1.EventList{}
	o := &metav1.ListOptions{FieldSelector: fields.Set{"involvedObject.uid": uid, "reason": reason}.String(), Limit: maxEvents}
	err := c.rest.Get().Resource("events").Namespace(namespace).VersionedParams(o, c.params).MaxRetries(0).Do(ctx).Into(list)
	if err != nil {
		return nil, explain("list", "events", err)
	}
	return list.Items, nil
}

// GetEvent reads one Event; nil where there is none. It needs the verb list, which Events needs too, and not get. The
// server looks it up by its name.
func (c *Client) GetEvent(ctx context.Context, namespace, name string) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	list := &corev1.EventList{}
	o := &metav1.ListOptions{FieldSelector: fields.Set{"metadata.name": name}.String()}
	err := c.rest.Get().Resource("events").Namespace(namespace).VersionedParams(o, c.params).MaxRetries(0).Do(ctx).Into(list)
	if err != nil {
		return nil, explain("list", "events", err)
	}
	if len(list.Items) == 0 {
		return nil, nil
	}
	return &list.Items[0], nil
}

// CreateEvent makes an Event.
func (c *Client) CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	made := &corev1.Event{}
	err := c.rest.Post().Resource("events").Namespace(e.Namespace).Body(e).MaxRetries(0).Do(ctx).Into(made)
	if err != nil {
		return nil, explain("create", "events", err)
	}
	return made, nil
}

// PatchEvent applies a JSON merge patch (RFC 7386) to one Event.
func (c *Client) PatchEvent(ctx context.Context, namespace, name string, patch []byte) (*corev1.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	patched := &corev1.Event{}
	err := c.rest.Patch(types.MergePatchType).Resource("events").Namespace(namespace).Name(name).Body(patch).MaxRetries(0).Do(ctx).Into(patched)
	if err != nil {
		return nil, explain("patch", "events", err)
	}
	return patched, nil
}

// list reads one page of all pods, from the place where the one before ended.
func (c *Client) list(ctx context.Context, next string, limit int64) (*corev1.PodList, error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	list := &corev1.PodList{}
	o := &metav1.ListOptions{Limit: limit, Continue: next}
	err := c.rest.Get().Resource("pods").VersionedParams(o, c.params).MaxRetries(0).Do(ctx).Into(list)
	if err != nil {
		return nil, explain("list", "pods", err)
	}
	return list, nil
}

// watch follows all pods for about that time: from a version on, or from the pods as they are, which the server then
// streams first. A server without WatchList refuses the latter as invalid.
func (c *Client) watch(ctx context.Context, version string, lasts time.Duration) (watch.Interface, error) {
	seconds := int64(lasts.Seconds())
	o := &metav1.ListOptions{Watch: true, ResourceVersion: version, AllowWatchBookmarks: true, TimeoutSeconds: &seconds}
	if version == "" {
		o.SendInitialEvents, o.ResourceVersionMatch = new(true), metav1.ResourceVersionMatchNotOlderThan
	}
	w, err := c.rest.Get().Resource("pods").VersionedParams(o, c.params).MaxRetries(0).Watch(ctx)
	if err != nil {
		return nil, explain("watch", "pods", err)
	}
	return w, nil
}

// explain adds what an operator must do to an error of the API server.
func explain(verb, resource string, err error) error {
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s %s: the API server forbids it, the verb %q on %s is missing in the role of this account: %w", verb, resource, verb, resource, err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s %s: the API server does not take the token or certificate of this account: %w", verb, resource, err)
	}
	return fmt.Errorf("%s %s: %w", verb, resource, err)
}

// Transient tells errors of the API server that may pass by themselves from those that will not. A missing
// permission is not one of either kind: an operator can give it.
func Transient(err error) bool {
	var status apierrors.APIStatus
	if !asStatus(err, &status) {
		return true // of the network, or of time
	}
	code := status.Status().Code
	return code == http.StatusTooManyRequests || code == http.StatusRequestTimeout || code >= 500 || code == http.StatusUnauthorized || code == 0
}
