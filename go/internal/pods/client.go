package pods

import (
	"context"
	"errors"
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

// Limits of one request to the API server.
const (
	requestTimeout = 5 * time.Second // neither a list of pods nor a watch
	listTimeout    = 30 * time.Second
	maxEvents      = 500 // on one pod, for one reason
)

// FieldManager is the field manager of our patches. deploy/manifests/admission.yaml reads it.
const FieldManager = "oom-annotator"

// Client reads and patches pods and Events. If a permission is missing, its errors name the RBAC verb. It does not retry.
type Client struct {
	rest   rest.Interface
	params runtime.ParameterCodec
}

// Config reads the kubeconfig file. If the path is empty, it returns the config of the pod that this process runs in.
func Config(kubeconfig string) (*rest.Config, error) {
	if kubeconfig == "" {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("find the API server: %w (outside of a cluster, a kubeconfig file is needed)", err)
		}
		return cfg, nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig %s: %w", kubeconfig, err)
	}
	return cfg, nil
}

// NewClient makes a client that sends at most qps requests a second, and burst at once. With qps 0 the server's priority and
// fairness decides. Nothing is requested from the server.
func NewClient(cfg *rest.Config, userAgent string, qps, burst int) (*Client, error) {
	// client-go's scheme has every kind, which would be most of the program.
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("make API client: %w", err)
	}
	if err := metav1.AddMetaToScheme(scheme); err != nil {
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
	return do(ctx, "get", "pods", c.rest.Get().Resource("pods").Namespace(namespace).Name(name), &corev1.Pod{})
}

// metadataOnly asks for the metadata of the pod that a patch has changed, and not for all of it.
const metadataOnly = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

// Patch applies a JSON merge patch (RFC 7386) to one pod. It returns the new resourceVersion.
func (c *Client) Patch(ctx context.Context, namespace, name string, patch []byte) (version string, err error) {
	return patchPod(ctx, "pods", c.rest.Patch(types.MergePatchType).Resource("pods").Namespace(namespace).Name(name).Body(patch))
}

// PatchStatus applies a strategic merge patch to the status of one pod: it changes only the conditions that the patch names. It returns
// the new resourceVersion.
func (c *Client) PatchStatus(ctx context.Context, namespace, name string, patch []byte) (version string, err error) {
	return patchPod(ctx, "pods/status", c.rest.Patch(types.StrategicMergePatchType).Resource("pods").SubResource("status").Namespace(namespace).Name(name).Body(patch))
}

func patchPod(ctx context.Context, resource string, r *rest.Request) (version string, err error) {
	r = r.Param("fieldManager", FieldManager).SetHeader("Accept", metadataOnly)
	pod, err := do(ctx, "patch", resource, r, &metav1.PartialObjectMetadata{})
	if err != nil {
		return "", err
	}
	return pod.ResourceVersion, nil
}

// Events lists the Events of a reason on the pod of a UID.
func (c *Client) Events(ctx context.Context, namespace, uid, reason string) ([]corev1.Event, error) {
	return c.events(ctx, namespace, fields.Set{"involvedObject.uid": uid, "reason": reason})
}

// GetEvent reads one Event. It returns nil and nil if there is none. It needs the verb list, which Events needs too, and not get:
// the server looks it up by its name.
func (c *Client) GetEvent(ctx context.Context, namespace, name string) (*corev1.Event, error) {
	events, err := c.events(ctx, namespace, fields.Set{"metadata.name": name})
	if err != nil || len(events) == 0 {
		return nil, err
	}
	return &events[0], nil
}

func (c *Client) events(ctx context.Context, namespace string, selector fields.Set) ([]corev1.Event, error) {
	o := &metav1.ListOptions{FieldSelector: selector.String(), Limit: maxEvents}
	list, err := do(ctx, "list", "events", c.rest.Get().Resource("events").Namespace(namespace).VersionedParams(o, c.params), &corev1.EventList{})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// CreateEvent creates an Event.
func (c *Client) CreateEvent(ctx context.Context, e *corev1.Event) (*corev1.Event, error) {
	return do(ctx, "create", "events", c.rest.Post().Resource("events").Namespace(e.Namespace).Body(e), &corev1.Event{})
}

// PatchEvent applies a JSON merge patch (RFC 7386) to one Event.
func (c *Client) PatchEvent(ctx context.Context, namespace, name string, patch []byte) (*corev1.Event, error) {
	return do(ctx, "patch", "events", c.rest.Patch(types.MergePatchType).Resource("events").Namespace(namespace).Name(name).Body(patch), &corev1.Event{})
}

// do sends one request, without retries.
func do[T runtime.Object](ctx context.Context, verb, resource string, r *rest.Request, into T) (answer T, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := r.MaxRetries(0).Do(ctx).Into(into); err != nil {
		return answer, explain(verb, resource, err)
	}
	return into, nil
}

// list reads the next page of all pods.
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

// watch watches all pods for about that time, from a resourceVersion on. Without one, the server streams the present pods first
// (WatchList); a server without WatchList answers that the request is invalid.
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

// explain adds the remedy to an error of the API server.
func explain(verb, resource string, err error) error {
	switch {
	case apierrors.IsForbidden(err):
		return fmt.Errorf("%s %s: the API server forbids it, the verb %q on %s is missing in the role of this account: %w", verb, resource, verb, resource, err)
	case apierrors.IsUnauthorized(err):
		return fmt.Errorf("%s %s: the API server refuses the token or certificate of this account: %w", verb, resource, err)
	}
	return fmt.Errorf("%s %s: %w", verb, resource, err)
}

// Transient reports whether an error of a request may disappear without a change. A missing permission does not, but an operator
// can grant it.
func Transient(err error) bool {
	var status apierrors.APIStatus
	if !errors.As(err, &status) {
		return true // a network error or a timeout
	}
	code := status.Status().Code
	return code == http.StatusTooManyRequests || code == http.StatusRequestTimeout || code >= 500 || code == http.StatusUnauthorized || code == 0
}
