package fifo

import (
	"fmt"
	"slices"
	"testing"
)

func TestAddNew(t *testing.T) {
	m := New[struct{}](3)
	for i, tt := range []struct {
		key string
		new bool
	}{
		{"a", true}, {"a", false}, {"b", true}, {"c", true}, {"a", false}, {"b", false},
		{"d", true}, // a is forgotten
		{"b", false}, {"c", false}, {"d", false},
		{"a", true}, {"b", true}, {"c", true}, {"c", false}, {"d", true},
	} {
		if got := m.AddNew(tt.key, struct{}{}); got != tt.new {
			t.Errorf("step %d: %s is new: %v", i, tt.key, got)
		}
		if m.Len() > 3 {
			t.Fatalf("%d are kept", m.Len())
		}
	}
}

func TestMap(t *testing.T) {
	m := New[int](3)
	for i := range 3 {
		if _, dropped := m.Add(fmt.Sprint(i), i); dropped {
			t.Errorf("one of %d is dropped", i+1)
		}
	}
	m.Add("1", 10)
	if v, ok := m.Take("2"); v != 2 || !ok {
		t.Errorf("took %d, %t", v, ok)
	}
	if v, ok := m.Get("2"); ok {
		t.Errorf("what was taken is still there: %d", v)
	}
	if oldest, dropped := m.Add("3", 3); oldest != 0 || !dropped {
		t.Errorf("dropped %d, %t", oldest, dropped)
	}
	if got := slices.Collect(m.All()); !slices.Equal(got, []int{10, 3}) || m.Len() != 2 {
		t.Errorf("kept %d", got)
	}
	m.Add("4", 4) // drops 1
	if _, dropped := m.Add("5", 5); dropped {
		t.Error("what was taken is dropped too")
	}
}
