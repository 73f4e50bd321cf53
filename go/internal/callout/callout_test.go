package callout

import (
	"encoding/base64"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"k8s.io/client-go/rest"
)

const secret = "p0123456789abcdefghijklmnopqrstu"

// The keys must be the same in every replica and every release: these are what NATS' configuration has.
func TestDeriveKeys(t *testing.T) {
	k, err := DeriveKeys(secret)
	if err != nil {
		t.Fatal(err)
	}
	const want = "# Written by oom-auth issuer.\nissuer: ACWH7ON2IHOZZCH4XNNGOJN7XMNLXRR7536DDZ6ERQ27IKAXS3B3BNXX\nxkey: XB53XAK3LTTWT2PSL7RZUOHESHJ3ZNSUB7E4QUBBOFH555PATVPTNND5\n"
	if got := k.Config(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if other, err := DeriveKeys(secret + "x"); err != nil || other.Issuer == k.Issuer || other.XKey == k.XKey {
		t.Errorf("another secret has the same keys: %v", err)
	}
	if _, err := DeriveKeys("short"); err == nil {
		t.Error("a short secret was taken")
	}
}

// service has an API server that cannot be reached.
func service(t testing.TB) *Service {
	t.Helper()
	k, err := DeriveKeys(secret)
	if err != nil {
		t.Fatal(err)
	}
	r, err := NewTokenReviewer(&rest.Config{Host: "127.0.0.1:1"}, "ns/tracer", "nats", "test")
	if err != nil {
		t.Fatal(err)
	}
	return New(k, r, slog.New(slog.DiscardHandler))
}

// question encrypts text as a server does, and returns what answer takes.
func question(t testing.TB, k *Keys, text string) (data []byte, server string, curve nkeys.KeyPair) {
	t.Helper()
	var err error
	if curve, err = nkeys.CreateCurveKeys(); err != nil {
		t.Fatal(err)
	}
	if server, err = curve.PublicKey(); err != nil {
		t.Fatal(err)
	}
	if data, err = curve.Seal([]byte(text), k.XKey); err != nil {
		t.Fatal(err)
	}
	return data, server, curve
}

// questionOf is a question of a server about a client with a token.
func questionOf(t testing.TB, token string) string {
	t.Helper()
	server, err1 := nkeys.CreateServer()
	user, err2 := nkeys.CreateUser()
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	key, err := user.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	c := jwt.NewAuthorizationRequestClaims("A")
	c.UserNkey, c.ConnectOptions.Token = key, token
	if c.Server.ID, err = server.PublicKey(); err != nil {
		t.Fatal(err)
	}
	text, err := c.Encode(server)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

func token(payload string) string {
	return "e30." + base64.RawURLEncoding.EncodeToString([]byte(payload)) + ".x"
}

// FuzzReview: whatever a client shows as its token, it does not get past a review without an API server.
func FuzzReview(f *testing.F) {
	s := service(f)
	for _, claims := range []string{``, `{"aud":"nats","exp":1e99}`, `{"sub":"system:serviceaccount:ns:tracer","aud":["nats"],"exp":-1}`} {
		f.Add(token(claims))
	}
	f.Fuzz(func(t *testing.T, token string) {
		if who, err := s.reviewer.Review(t.Context(), token); err == nil {
			t.Errorf("%q is taken for %+v", token, who)
		}
	})
}

// FuzzAnswer: what is no question of a server gets no answer, encrypted or not.
func FuzzAnswer(f *testing.F) {
	s := service(f)
	curve, err := nkeys.CreateCurveKeys()
	if err != nil {
		f.Fatal(err)
	}
	server, err := curve.PublicKey()
	if err != nil {
		f.Fatal(err)
	}
	f.Add("", "")
	f.Add(questionOf(f, "x")+"x", server)
	f.Add("e30.e30.e30", server)
	f.Fuzz(func(t *testing.T, text, key string) {
		data, err := curve.Seal([]byte(text), s.keys.XKey)
		if err != nil {
			t.Fatal(err)
		}
		if reply, err := s.answer(t.Context(), data, server); err == nil {
			t.Errorf("answered %q: %q", text, reply)
		}
		if reply, err := s.answer(t.Context(), []byte(text), key); err == nil {
			t.Errorf("answered %q of %q: %q", text, key, reply)
		}
	})
}

// TestAnswer: a question gets an answer that only its server can read; a client whose token says nothing is refused.
func TestAnswer(t *testing.T) {
	s := service(t)
	data, server, curve := question(t, s.keys, questionOf(t, "x"))
	reply, err := s.answer(t.Context(), data, server)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := curve.Open(reply, s.keys.XKey)
	if err != nil {
		t.Fatal(err)
	}
	response, err := jwt.DecodeAuthorizationResponseClaims(string(plain))
	if err != nil || response.Jwt != "" || response.Issuer != s.keys.Issuer || response.Error != "refused: not the token of a service account" {
		t.Errorf("answer %+v: %v", response, err)
	}
	if n := testutil.ToFloat64(s.decisions.WithLabelValues(refused)); n != 1 {
		t.Errorf("%v refused", n)
	}
}

// TestLate: what has waited too long is not looked at, and a review ends before the client does, from when its question came.
func TestLate(t *testing.T) {
	s := service(t)
	came := make(chan struct{}, 1)
	slow := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // only then the server notices that the client leaves
		came <- struct{}{}
		<-r.Context().Done()
	}))
	defer slow.Close()
	var err error
	if s.reviewer, err = NewTokenReviewer(&rest.Config{Host: slow.URL}, "ns/tracer", "nats", "test"); err != nil {
		t.Fatal(err)
	}
	data, server, _ := question(t, s.keys, questionOf(t, token(`{"sub":"system:serviceaccount:ns:tracer","aud":["nats"],"exp":9999999999}`)))
	m := &nats.Msg{Data: data, Header: nats.Header{xkeyHeader: {server}}}
	s.handle(t.Context(), asked{m, time.Now().Add(-waitTime)})
	if len(came) > 0 || testutil.ToFloat64(s.decisions.WithLabelValues(failed)) > 0 || testutil.ToFloat64(s.decisions.WithLabelValues(dropped)) != 1 {
		t.Error("a question that had waited was looked at, or not counted")
	}
	const waited = waitTime / 2
	began := time.Now()
	s.handle(t.Context(), asked{m, began.Add(-waited)})
	if took := time.Since(began); len(came) == 0 || took > answerTime-waited/2 || took < answerTime-2*waited {
		t.Errorf("the review ended after %s, with %d requests", took, len(came))
	}
}
