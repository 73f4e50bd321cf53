package kubetest

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"strings"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// auditPolicy has the server log all that ends pods, and nothing else.
const auditPolicy = `apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived]
rules:
  - level: Request
    verbs: [create]
    resources: [{group: "", resources: [pods/eviction]}]
  - level: Request
    verbs: [delete, deletecollection]
    resources: [{group: "", resources: [pods]}]
  - level: None
`

// AuditEvent is a request as the server's own audit log has it (Event of audit.k8s.io/v1, level Request).
type AuditEvent struct {
	Verb string `json:"verb"`
	User struct {
		Username string `json:"username"`
	} `json:"user"`
	ObjectRef struct {
		Resource    string `json:"resource"`
		Namespace   string `json:"namespace"`
		Name        string `json:"name"`
		Subresource string `json:"subresource"`
	} `json:"objectRef"`
	ResponseStatus struct {
		Code int `json:"code"`
	} `json:"responseStatus"`
	RequestObject            json.RawMessage  `json:"requestObject"`
	RequestReceivedTimestamp metav1.MicroTime `json:"requestReceivedTimestamp"`
}

// Audit is every eviction and deletion of pods that anybody has asked for and got an answer to, in the order of
// the answers.
func (c *Cluster) Audit() []AuditEvent {
	c.t.Helper()
	// The log is written in that order too, but a moment later: what stands before a request that was made
	// only now is complete.
	last := strings.ToLower(rand.Text())
	if err := c.Client.CoreV1().Pods(auditMark).Delete(c.t.Context(), last, metav1.DeleteOptions{}); !apierrors.IsNotFound(err) {
		c.t.Fatalf("delete a pod that is not there: %v", err)
	}
	var all []AuditEvent
	c.Eventually("the audit log is written", func() error {
		log, err := os.ReadFile(c.auditLog)
		if err != nil {
			return err
		}
		all = nil
		for line := range bytes.Lines(log) {
			var e AuditEvent
			if err := json.Unmarshal(line, &e); err != nil {
				return err // half a line
			}
			switch {
			case e.ObjectRef.Name == last:
				return nil
			case e.ObjectRef.Namespace != auditMark:
				all = append(all, e)
			}
		}
		return errors.New("the last request is not in it yet")
	})
	return all
}

// auditMark is the namespace of the pods that Audit deletes, which are not there.
const auditMark = "audit-mark"
