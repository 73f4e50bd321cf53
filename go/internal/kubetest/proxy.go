package kubetest

import (
	"context"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strconv"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/rest"
)

// Fault is what a proxy does to a request. The zero Fault lets it through.
type Fault struct {
	Code       int           // the answer instead of the server's
	RetryAfter time.Duration // in that answer, in seconds
	Hang       bool          // no answer until the client gives up, or the proxy is closed
	Lost       bool          // the server does it, whether the client is still there or not, and nobody is told
	Delay      time.Duration // before anything of this
}

// Proxy stands between a client and the API server, and does what the server would not do on demand.
type Proxy struct {
	server *httptest.Server
	api    *httputil.ReverseProxy
	closed chan struct{}

	mu    sync.Mutex
	fault func(*http.Request) Fault
}

// Proxy starts a proxy that goes with the test, and lets everything through at first. It passes the
// client's own credentials on.
func (c *Cluster) Proxy() *Proxy {
	c.t.Helper()
	target, err := url.Parse(c.Admin.Host)
	if err != nil {
		c.t.Fatal(err)
	}
	transport, err := rest.TransportFor(rest.AnonymousClientConfig(c.Admin))
	if err != nil {
		c.t.Fatal(err)
	}
	p := &Proxy{
		closed: make(chan struct{}),
		api: &httputil.ReverseProxy{
			Rewrite:       func(r *httputil.ProxyRequest) { r.SetURL(target) },
			Transport:     transport,
			FlushInterval: -1,                         // a watch is an answer without an end
			ErrorLog:      log.New(io.Discard, "", 0), // an API server that is away is part of the tests
		},
	}
	p.server = httptest.NewUnstartedServer(p)
	p.server.EnableHTTP2 = true // as the API server
	p.server.StartTLS()
	c.t.Cleanup(func() {
		close(p.closed)
		p.server.CloseClientConnections() // watches would keep it
		p.server.Close()
	})
	return p
}

// Config is a client configuration with the same credentials, through the proxy.
func (p *Proxy) Config(cfg *rest.Config) *rest.Config {
	cfg = rest.CopyConfig(cfg)
	cfg.Host = p.server.URL
	cfg.TLSClientConfig = rest.TLSClientConfig{
		CAData: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.server.Certificate().Raw}),
	}
	return cfg
}

// Fault has each request from now on ask what becomes of it. Several goroutines call fault, one at a time.
// nil lets everything through. Cut ends the watches that are open.
func (p *Proxy) Fault(fault func(*http.Request) Fault) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fault = fault
}

// Cut cuts every connection that is open, those of watches too.
func (p *Proxy) Cut() { p.server.CloseClientConnections() }

// ServeHTTP is the proxy's side to its clients.
func (p *Proxy) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var fault Fault
	p.mu.Lock()
	if p.fault != nil {
		fault = p.fault(r)
	}
	p.mu.Unlock()

	wait := time.After(fault.Delay)
	if fault.Hang {
		wait = nil
	}
	if fault.Hang || fault.Delay > 0 {
		select {
		case <-wait:
		case <-r.Context().Done():
			return
		case <-p.closed:
			return
		}
	}
	switch {
	case fault.Code != 0:
		refuse(w, r, fault)
	case fault.Lost:
		p.api.ServeHTTP(httptest.NewRecorder(), r.WithContext(context.WithoutCancel(r.Context())))
		panic(http.ErrAbortHandler)
	default:
		p.api.ServeHTTP(w, r)
	}
}

// refuse answers as the API server does, so that the client finds the reason that goes with the code.
func refuse(w http.ResponseWriter, r *http.Request, fault Fault) {
	seconds := int(fault.RetryAfter.Seconds())
	err := apierrors.NewGenericServerResponse(fault.Code, r.Method, schema.GroupResource{Resource: "pods"}, "",
		fmt.Sprintf("the test's proxy answers %d", fault.Code), seconds, true)
	status := err.Status()
	status.APIVersion, status.Kind = "v1", "Status"
	w.Header().Set("Content-Type", "application/json")
	if seconds > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(seconds))
	}
	w.WriteHeader(fault.Code)
	_ = json.NewEncoder(w).Encode(status) // the client may have gone
}
