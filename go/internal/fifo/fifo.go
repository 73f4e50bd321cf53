// Package fifo keeps the last values of a stream, by their keys.
package fifo

import "iter"

// Map holds as many values as its size. One too many drops the oldest.
type Map[V any] struct {
	size   int
	values map[string]V
	order  []string // of the keys, also of those that were taken
}

// New makes an empty one.
func New[V any](size int) *Map[V] { return &Map[V]{size: size, values: map[string]V{}} }

// Add sets the value of a key. It returns the value that had to go, if there was one.
func (m *Map[V]) Add(key string, value V) (oldest V, dropped bool) {
	if _, ok := m.values[key]; !ok {
		m.order = append(m.order, key)
	}
	m.values[key] = value
	if len(m.order) > m.size {
		oldest, dropped = m.Take(m.order[0])
		m.order = m.order[1:]
	}
	return oldest, dropped
}

// AddNew sets the value of a key that has none, and reports whether that was so.
func (m *Map[V]) AddNew(key string, value V) bool {
	_, ok := m.values[key]
	if !ok {
		m.Add(key, value)
	}
	return !ok
}

// Get returns the value of a key.
func (m *Map[V]) Get(key string) (value V, ok bool) {
	value, ok = m.values[key]
	return value, ok
}

// Take returns the value of a key and removes it.
func (m *Map[V]) Take(key string) (value V, ok bool) {
	value, ok = m.values[key]
	delete(m.values, key)
	return value, ok
}

// Len is how many values there are.
func (m *Map[V]) Len() int { return len(m.values) }

// All are the values, the oldest first.
func (m *Map[V]) All() iter.Seq[V] {
	return func(yield func(V) bool) {
		for _, key := range m.order {
			if value, ok := m.values[key]; ok && !yield(value) {
				return
			}
		}
	}
}
