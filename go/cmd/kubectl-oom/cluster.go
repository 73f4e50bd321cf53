package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

// What the chart makes: deploy/chart/templates/config.yaml and nats.yaml.
const (
	configMap = "oom-tracer"
	partOf    = "app.kubernetes.io/part-of=oom-tracer"
	natsPods  = partOf + ",app.kubernetes.io/name=oom-tracer-nats"

	// Annotations of the ConfigMap. Each names a Secret.
	passwords   = "oom-tracer.alpha.kubernetes.io/passwords"             // of all users
	tapPassword = "oom-tracer.alpha.kubernetes.io/tap-password"          // of the one who reads
	authority   = "oom-tracer.alpha.kubernetes.io/certificate-authority" // ca.crt, if NATS has TLS

	usualRelease  = "oom-tracer" // the namespace of the documents
	readersRemedy = "the chart's value readers gives this right: deploy/docs/install.md"
)

const (
	findTimeout  = 30 * time.Second // a program that the kubeconfig names may ask somebody for a token
	renewTimeout = 10 * time.Second // for a new forward, or a new login
	namesTimeout = 5 * time.Second  // for completion
	maxNames     = 1000
)

// cluster is what a kubeconfig and its flags name.
type cluster struct {
	rules     *clientcmd.ClientConfigLoadingRules
	overrides *clientcmd.ConfigOverrides
	release   string // its namespace; empty: the only one
}

func (c *cluster) kubeconfig() clientcmd.ClientConfig {
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(c.rules, c.overrides)
}

// client returns a client of the API server, and its configuration.
func (c *cluster) client() (*core.CoreV1Client, *rest.Config, error) {
	cfg, err := c.kubeconfig().ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		err = fmt.Errorf("%w (--kubeconfig or KUBECONFIG names a file; --config connects without a cluster)", err)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("read the kubeconfig: %w", err)
	}
	cfg.UserAgent = "kubectl-oom/" + obs.Version().Version
	client, err := core.NewForConfig(cfg)
	if err != nil {
		return nil, nil, fmt.Errorf("read the kubeconfig: %w", err)
	}
	return client, cfg, nil
}

// Namespace is that of the context, empty if it has none.
func (c *cluster) Namespace() (string, error) {
	raw, err := c.kubeconfig().RawConfig()
	if err != nil {
		return "", fmt.Errorf("read the kubeconfig: %w", err)
	}
	name := cmp.Or(c.overrides.CurrentContext, raw.CurrentContext)
	if of, ok := raw.Contexts[name]; ok {
		return of.Namespace, nil
	}
	if name != "" {
		return "", fmt.Errorf("read the kubeconfig: it has no context %q, but %s", name, strings.Join(c.contexts(), ", "))
	}
	return "", nil
}

// contexts are the names of the kubeconfig's contexts.
func (c *cluster) contexts() []string {
	raw, err := c.kubeconfig().RawConfig()
	if err != nil {
		return nil
	}
	return slices.Sorted(maps.Keys(raw.Contexts))
}

// Names are for completion, which shows no error: what cannot be listed has none.
func (c *cluster) Names(ctx context.Context, resource, namespace string) []string {
	ctx, cancel := context.WithTimeout(ctx, namesTimeout)
	defer cancel()
	client, _, err := c.client()
	if err != nil {
		return nil
	}
	request := client.RESTClient().Get().Resource(resource).VersionedParams(&metav1.ListOptions{Limit: maxNames}, metav1.ParameterCodec)
	if resource == "pods" {
		request.Namespace(namespace)
	}
	// The names alone.
	request.SetHeader("Accept", "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1")
	var list metav1.PartialObjectMetadataList
	if err := request.Do(ctx).Into(&list); err != nil {
		return nil
	}
	var names []string
	for _, item := range list.Items {
		names = append(names, item.Name)
	}
	return names
}

// Connect finds the release, and how to reach its NATS as a user. The first forward is made here, where its error is seen: nats.go
// hides what looks like a refused connection.
func (c *cluster) Connect(ctx context.Context, user string) (cfg config.Config, options bus.Options, err error) {
	within, cancel := context.WithTimeout(ctx, findTimeout)
	defer cancel()
	client, rest, err := c.client()
	if err != nil {
		return cfg, options, err
	}
	object, err := c.find(within, client)
	if err != nil {
		return cfg, options, fmt.Errorf("find the release: %w", err)
	}
	if cfg, err = readConfig(object); err != nil {
		return cfg, options, err
	}
	cfg.NATS.User = "oom-" + user

	// read reads a key of a Secret that the release names. A running command asks again at each login.
	read := func(ctx context.Context, annotation, key string) ([]byte, error) {
		ctx, cancel := context.WithTimeout(ctx, renewTimeout)
		defer cancel()
		return secret(ctx, client, object.Namespace, object.Annotations[annotation], key)
	}
	from := passwords
	if user == "tap" {
		from = tapPassword
	}
	if _, err := read(within, from, user); err != nil {
		return cfg, options, err
	}
	options.Password = func() (string, error) {
		password, err := read(ctx, from, user)
		return string(password), err
	}
	if object.Annotations[authority] != "" {
		options.RootCAs = func() (*x509.CertPool, error) {
			pem, err := read(ctx, authority, "ca.crt")
			pool := x509.NewCertPool()
			if err == nil && !pool.AppendCertsFromPEM(pem) {
				err = fmt.Errorf("the Secret %s in namespace %s: ca.crt has no certificate", object.Annotations[authority], object.Namespace)
			}
			return pool, err
		}
	}

	f := &forwarder{client: client, rest: rest, namespace: object.Namespace}
	first, err := f.forward(within)
	if err != nil {
		return cfg, options, err
	}
	options.Dial = func() (net.Conn, error) {
		if conn := first; conn != nil {
			first = nil
			return conn, nil
		}
		within, cancel := context.WithTimeout(ctx, renewTimeout)
		defer cancel()
		return f.forward(within)
	}
	return cfg, options, nil
}

// find finds the ConfigMap of the release. Who may not list those of all namespaces looks where the documents install it.
func (c *cluster) find(ctx context.Context, client core.CoreV1Interface) (*corev1.ConfigMap, error) {
	get := func(namespace string) (*corev1.ConfigMap, error) {
		return client.ConfigMaps(namespace).Get(ctx, configMap, metav1.GetOptions{})
	}
	if c.release != "" {
		object, err := get(c.release)
		switch {
		case apierrors.IsNotFound(err):
			return nil, fmt.Errorf("no OOM Tracer in namespace %s: %w (--release names another namespace)", c.release, err)
		case apierrors.IsForbidden(err):
			return nil, fmt.Errorf("%w (%s)", err, readersRemedy)
		}
		return object, err
	}
	list, err := client.ConfigMaps("").List(ctx, metav1.ListOptions{LabelSelector: partOf, FieldSelector: "metadata.name=" + configMap})
	if apierrors.IsForbidden(err) {
		if object, err := get(usualRelease); err == nil {
			return object, nil
		}
		return nil, fmt.Errorf("%w (--release names the namespace of the release; %s)", err, readersRemedy)
	}
	if err != nil {
		return nil, err
	}
	switch len(list.Items) {
	case 0:
		return nil, errors.New("no OOM Tracer in this cluster: is it the right one (--context)?")
	case 1:
		return &list.Items[0], nil
	}
	var namespaces []string
	for _, object := range list.Items {
		namespaces = append(namespaces, object.Namespace)
	}
	slices.Sort(namespaces)
	return nil, fmt.Errorf("several in this cluster, in the namespaces %s: choose one with --release NAMESPACE", strings.Join(namespaces, ", "))
}

// readConfig reads what the chart has for oom-tap. The release may be of another version.
func readConfig(object *corev1.ConfigMap) (config.Config, error) {
	text, ok := object.Data["tap.yaml"]
	if !ok {
		return config.Config{}, fmt.Errorf("the release in namespace %s has no NATS (nats.mode: embedded): each node keeps its own kills, and oom-tap shows them there", object.Namespace)
	}
	cfg, err := config.ParseKnown([]byte(text))
	if err != nil {
		return config.Config{}, fmt.Errorf("ConfigMap %s in namespace %s: tap.yaml%w", object.Name, object.Namespace, err)
	}
	if u, err := url.Parse(cfg.NATS.URL); err != nil || u.Hostname() != "oom-tracer-nats."+object.Namespace+".svc" {
		return config.Config{}, fmt.Errorf("the release in namespace %s has your own NATS, at %s: --config FILE connects there as oom-tap does", object.Namespace, cfg.NATS.URL)
	}
	if object.Annotations[tapPassword] == "" {
		return config.Config{}, fmt.Errorf("the release in namespace %s is of a chart that does not know kubectl oom yet: upgrade it, or connect with --config FILE (helm get notes)", object.Namespace)
	}
	return cfg, nil
}

// secret reads a key of a Secret.
func secret(ctx context.Context, client core.CoreV1Interface, namespace, name, key string) ([]byte, error) {
	object, err := client.Secrets(namespace).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsForbidden(err) && (key == "tap" || key == "ca.crt"):
		return nil, fmt.Errorf("read the Secret for kubectl oom: %w (%s)", err, readersRemedy)
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("read the password of the user oom-%s: %w (only who may read the passwords of NATS may do this)", key, err)
	case err != nil:
		return nil, fmt.Errorf("read Secret %s in namespace %s: %w", name, namespace, err)
	case len(object.Data[key]) == 0:
		return nil, fmt.Errorf("the Secret %s in namespace %s has no key %s: deploy/docs/install.md says which it needs", name, namespace, key)
	}
	return object.Data[key], nil
}
