// Package removeannotated is RemoveAnnotated, a plugin of the descheduler (sigs.k8s.io/descheduler) that evicts
// the pods that carry an annotation: those that oom-annotator marked.
//
// Rule of the package: it only chooses. What may be evicted, and how many at a time, is up to the policy's
// evictor plugins, to the descheduler's limits and to the API server; and every marked pod that stays has its
// reason in the log.
package removeannotated

//go:generate go tool deepcopy-gen --output-file zz_generated.deepcopy.go .
