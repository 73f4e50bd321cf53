package pods

import (
	"errors"
	"slices"
	"sync"
	"time"
)

// maxGone bounds the deleted pods that are kept, some 20 MB.
const maxGone = 50_000

var (
	// ErrUnknown means that the pod is not known. The watch may not have delivered it yet.
	ErrUnknown = errors.New("the pod is not known")
	// ErrOtherNode means that the pod runs on another node.
	ErrOtherNode = errors.New("the pod runs on another node")
	// ErrAmbiguous means that several pods match.
	ErrAmbiguous = errors.New("several pods match")
)

// Store holds the pods of a cluster. Its methods may be called from any goroutine.
type Store struct {
	// OnLeave is called with marked pods that are being deleted, were deleted, or have ended; more than once. It must not
	// block or call the Store.
	OnLeave func(p *Pod)
	// OnLowMemory is called with pods that have LowMemory, as OnLeave is.
	OnLowMemory func(p *Pod)

	keep time.Duration // how long deleted pods are kept
	now  func() time.Time

	mu     sync.RWMutex
	byUID  map[string]*Pod
	byNode map[string][]*Pod
	gone   map[string]*Pod // by UID
	order  []goneAt        // the keys of gone, the oldest first
}

type goneAt struct {
	uid string
	at  time.Time
}

// NewStore makes an empty store that keeps deleted pods for a time.
func NewStore(keep time.Duration) *Store {
	return &Store{
		keep: keep, now: time.Now,
		byUID: map[string]*Pod{}, byNode: map[string][]*Pod{}, gone: map[string]*Pod{},
	}
}

// Len is the number of pods.
func (s *Store) Len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.byUID)
}

// Set adds or replaces a pod, which becomes the Store's.
func (s *Store) Set(p *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if on := s.byNode[p.Node]; len(on) > 0 {
		p.Node = on[0].Node // the pods of a node share its text
	}
	if p.Finished {
		s.leaves(p)
	}
	if before := s.byUID[p.UID]; before != nil {
		if before.Node == p.Node {
			s.replace(before, p)
			return
		}
		s.unlink(before)
	}
	s.byUID[p.UID] = p
	s.byNode[p.Node] = append(s.byNode[p.Node], p)
}

// Patched replaces before, which is the result of Find, with the state after our patch of it. The watch delivers that later. If it has
// delivered anything since Find, the store stays as it is.
func (s *Store) Patched(before, after *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byUID[before.UID] == before && before.UID == after.UID && before.Node == after.Node {
		s.replace(before, after)
	}
}

// replace replaces a pod in the store with another state of it, on the same node.
func (s *Store) replace(before, after *Pod) {
	on := s.byNode[after.Node]
	on[slices.Index(on, before)] = after
	s.byUID[after.UID] = after
}

// Delete moves a pod to the deleted ones. p is its last state.
func (s *Store) Delete(p *Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(p)
}

// Retain deletes all pods except those with these UIDs.
func (s *Store) Retain(uids map[string]struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for uid, p := range s.byUID {
		if _, ok := uids[uid]; !ok {
			s.remove(p)
		}
	}
}

func (s *Store) leaves(p *Pod) {
	if s.OnLeave != nil && p.Mark != nil {
		s.OnLeave(p)
	}
	if s.OnLowMemory != nil && p.LowMemory != nil {
		s.OnLowMemory(p)
	}
}

// Hit lists the pods with the summary of a kill, marked or not.
func (s *Store) Hit() (all []*Pod) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, p := range s.byUID {
		if p.Mark != nil {
			all = append(all, p)
		}
	}
	return all
}

// Has reports whether there is a pod with that UID.
func (s *Store) Has(uid string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.byUID[uid] != nil
}

func (s *Store) remove(p *Pod) {
	s.leaves(p)
	if before := s.byUID[p.UID]; before != nil {
		s.unlink(before)
		delete(s.byUID, p.UID)
	}
	now := s.now()
	if _, again := s.gone[p.UID]; !again {
		s.order = append(s.order, goneAt{p.UID, now})
	}
	s.gone[p.UID] = p
	forget := 0
	for forget < len(s.order) && (len(s.order)-forget > maxGone || now.Sub(s.order[forget].at) > s.keep) {
		delete(s.gone, s.order[forget].uid)
		forget++
	}
	s.order = slices.Delete(s.order, 0, forget)
}

// unlink removes a pod from the list of its node.
func (s *Store) unlink(p *Pod) {
	on := s.byNode[p.Node]
	on = slices.Delete(on, slices.Index(on, p), slices.Index(on, p)+1)
	if len(on) == 0 {
		delete(s.byNode, p.Node)
		return
	}
	s.byNode[p.Node] = on
}

// Found is the pod of a kill.
type Found struct {
	Pod *Pod
	// Gone is set if the pod was deleted.
	Gone bool
}

// Find finds the pod of a kill on a node: by the UID in the cgroup path, or by the container ID if the path names no pod. Both may
// be empty. For a static pod, the UID in the path is the hash of its mirror pod, and not its UID in the API.
//
// It fails with ErrUnknown, ErrOtherNode or ErrAmbiguous.
func (s *Store) Find(node, uid, containerID string) (Found, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if p := s.byUID[uid]; p != nil && uid != "" {
		switch p.Node {
		case node:
			return Found{Pod: p}, nil
		case "": // the watch has not delivered the binding yet
			return Found{}, ErrUnknown
		}
		return Found{}, ErrOtherNode
	}
	matches := func(p *Pod) bool {
		if uid != "" {
			return p.Hash == uid
		}
		return p.Container(containerID) != nil
	}
	p, err := s.only(s.byNode[node], matches, containerID)
	if p != nil || err != nil {
		return Found{Pod: p}, err
	}

	if p := s.gone[uid]; p != nil && uid != "" {
		if p.Node != node {
			return Found{}, ErrOtherNode
		}
		return Found{Pod: p, Gone: true}, nil
	}
	var gone []*Pod
	for _, p := range s.gone {
		if p.Node == node {
			gone = append(gone, p)
		}
	}
	p, err = s.only(gone, matches, containerID)
	if p == nil && err == nil {
		err = ErrUnknown
	}
	return Found{Pod: p, Gone: p != nil}, err
}

// only returns the pod that matches, nil if none does. Of several, it returns the one with the container.
func (s *Store) only(all []*Pod, matches func(*Pod) bool, containerID string) (*Pod, error) {
	var found, exact []*Pod
	for _, p := range all {
		if matches(p) {
			found = append(found, p)
			if p.Container(containerID) != nil {
				exact = append(exact, p)
			}
		}
	}
	switch {
	case len(found) == 0:
		return nil, nil
	case len(found) == 1:
		return found[0], nil
	case len(exact) == 1:
		return exact[0], nil
	}
	return nil, ErrAmbiguous
}
