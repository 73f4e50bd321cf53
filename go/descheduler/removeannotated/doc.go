// Package removeannotated is RemoveAnnotated, a plugin of the descheduler (sigs.k8s.io/descheduler). It evicts the pods with an
// annotation: those that oom-annotator marked.
//
// Rule of the package: it only selects pods. The evictor plugins of the policy, the descheduler's limits and the API server decide
// which pods may be evicted, and how many at a time. The log has the reason for every marked pod that stays.
package removeannotated

//go:generate go tool deepcopy-gen --output-file zz_generated.deepcopy.go .
