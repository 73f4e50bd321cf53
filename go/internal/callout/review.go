package callout

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
)

// What is asked of the API server at most, by this process.
const (
	queriesPerSecond = 200
	queriesAtOnce    = 200
)

// nodeName is where an API server from 1.30 on puts the node of the token's pod (KEP 4193).
const nodeName = "authentication.kubernetes.io/node-name"

// Identity is whom a token was issued to.
type Identity struct {
	Node    string // name
	Expires time.Time
}

// ErrRefused means that a token is not accepted. Other errors of Review may pass.
var ErrRefused = errors.New("refused")

// TokenReviewer has tokens reviewed by the API server.
type TokenReviewer struct {
	client   rest.Interface
	user     string
	audience string
}

// NewTokenReviewer takes tokens of one service account, namespace/name, for one audience. Nothing is asked of the server.
func NewTokenReviewer(cfg *rest.Config, serviceAccount, audience, userAgent string) (*TokenReviewer, error) {
	// A scheme of our own: client-go's knows every kind there is, which would be most of the program.
	scheme := runtime.NewScheme()
	if err := authenticationv1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("make API client: %w", err)
	}
	metav1.AddToGroupVersion(scheme, authenticationv1.SchemeGroupVersion)
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath = "/apis"
	cfg.GroupVersion = &authenticationv1.SchemeGroupVersion
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.UserAgent = userAgent
	cfg.QPS, cfg.Burst = queriesPerSecond, queriesAtOnce
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("make API client: %w", err)
	}
	return &TokenReviewer{client: client, audience: audience, user: "system:serviceaccount:" + strings.ReplaceAll(serviceAccount, "/", ":")}, nil
}

// claims are what of a token is read here. They prove nothing before the API server has reviewed it.
type claims struct {
	Subject  string   `json:"sub"`
	Audience []string `json:"aud"`
	Expires  int64    `json:"exp"`
}

func parse(token string) (claims, error) {
	var c claims
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return c, fmt.Errorf("%w: not the token of a service account", ErrRefused)
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &c)
	}
	if err != nil {
		return c, fmt.Errorf("%w: not the token of a service account: %w", ErrRefused, err)
	}
	return c, nil
}

// Review checks a token. What a token claims is looked at first, so that a wrong one costs the API server nothing.
func (r *TokenReviewer) Review(ctx context.Context, token string) (Identity, error) {
	c, err := parse(token)
	expires := time.Unix(c.Expires, 0)
	switch {
	case err != nil:
		return Identity{}, err
	case c.Subject != r.user:
		return Identity{}, fmt.Errorf("%w: token of %q, not of %s", ErrRefused, c.Subject, r.user)
	case !slices.Contains(c.Audience, r.audience):
		return Identity{}, fmt.Errorf("%w: token for the audience %q, not for %s", ErrRefused, c.Audience, r.audience)
	case !time.Now().Before(expires):
		return Identity{}, fmt.Errorf("%w: token expired at %s: the kubelet has not renewed it", ErrRefused, expires.UTC().Format(time.RFC3339))
	}
	review := &authenticationv1.TokenReview{Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{r.audience}}}
	err = r.client.Post().Resource("tokenreviews").Body(review).MaxRetries(0).Do(ctx).Into(review)
	if apierrors.IsForbidden(err) {
		return Identity{}, fmt.Errorf("review token: the verb create on tokenreviews is missing in the role of this account: %w", err)
	}
	if err != nil {
		return Identity{}, fmt.Errorf("review token: %w", err)
	}
	status := review.Status
	switch {
	case !status.Authenticated:
		return Identity{}, fmt.Errorf("%w: the API server does not accept the token: %s", ErrRefused, status.Error)
	case status.User.Username != r.user || !slices.Contains(status.Audiences, r.audience):
		return Identity{}, fmt.Errorf("%w: token of %q for %q", ErrRefused, status.User.Username, status.Audiences)
	}
	nodes := status.User.Extra[nodeName]
	if len(nodes) != 1 || nodes[0] == "" {
		return Identity{}, fmt.Errorf("%w: the token names no node: it is not that of a pod on a node, or Kubernetes is older than 1.30", ErrRefused)
	}
	return Identity{Node: nodes[0], Expires: expires}, nil
}
