package loader

import (
	"fmt"
	"reflect"

	"github.com/cilium/ebpf/btf"

	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

// CheckLayout proves that the Go side reads what the embedded object writes: name, offset and size of
// every field, from the object's own BTF. It fails with the first field that differs.
func CheckLayout() error {
	spec, err := objectSpec()
	if err != nil {
		return err
	}
	for _, pair := range []struct {
		c      string
		goType reflect.Type
		last   bool // the C struct ends where the Go struct does
	}{
		{"oom_event", reflect.TypeFor[wire.Header](), false},
		{"oom_segment", reflect.TypeFor[segment](), false},
		{"oom_stats", reflect.TypeFor[Stats](), true},
		{"oom_state", reflect.TypeFor[state](), true},
		{"oom_symbol", reflect.TypeFor[symbol](), true},
	} {
		var c *btf.Struct
		if err := spec.TypeByName(pair.c, &c); err != nil {
			return fmt.Errorf("check layout: find struct %s: %w", pair.c, err)
		}
		if err := sameStruct(c, pair.goType, pair.last); err != nil {
			return fmt.Errorf("check layout: %w", err)
		}
	}
	return nil
}

// sameStruct compares a C struct with a Go struct. Unless whole is set, the C struct may have one
// more member behind the Go struct's end: the variable part of a record.
func sameStruct(c *btf.Struct, g reflect.Type, whole bool) error {
	extra := len(c.Members) - g.NumField()
	if extra < 0 || extra > 1 || (whole && extra != 0) {
		return fmt.Errorf("struct %s has %d members, %s has %d", c.Name, len(c.Members), g, g.NumField())
	}
	if extra == 1 && uintptr(c.Members[g.NumField()].Offset.Bytes()) != g.Size() {
		return fmt.Errorf("struct %s: %s is at %d, %s ends at %d",
			c.Name, c.Members[g.NumField()].Name, c.Members[g.NumField()].Offset.Bytes(), g, g.Size())
	}
	if extra == 0 && uintptr(c.Size) != g.Size() {
		return fmt.Errorf("struct %s has %d bytes, %s has %d", c.Name, c.Size, g, g.Size())
	}
	for i := range g.NumField() {
		member, field := c.Members[i], g.Field(i)
		name := fmt.Sprintf("struct %s: %s", c.Name, member.Name)
		if tag := field.Tag.Get("abi"); tag != member.Name {
			return fmt.Errorf("%s is field %s of %s, tagged %q", name, field.Name, g, tag)
		}
		if uintptr(member.Offset.Bytes()) != field.Offset {
			return fmt.Errorf("%s is at %d, %s.%s at %d", name, member.Offset.Bytes(), g, field.Name, field.Offset)
		}
		if err := sameType(name, member.Type, field.Type); err != nil {
			return err
		}
	}
	return nil
}

func sameType(name string, c btf.Type, g reflect.Type) error {
	switch c := btf.UnderlyingType(c).(type) {
	case *btf.Struct:
		if g.Kind() != reflect.Struct {
			return fmt.Errorf("%s is a struct, %s is not", name, g)
		}
		return sameStruct(c, g, true)
	case *btf.Array:
		if g.Kind() != reflect.Array || int(c.Nelems) != g.Len() {
			return fmt.Errorf("%s is an array of %d, %s is not", name, c.Nelems, g)
		}
		return sameType(name, c.Type, g.Elem())
	case *btf.Int:
		signed := g.Kind() >= reflect.Int && g.Kind() <= reflect.Int64
		unsigned := g.Kind() >= reflect.Uint && g.Kind() <= reflect.Uint64
		// A char of a name has a sign in C that means nothing.
		if uintptr(c.Size) != g.Size() || !signed && !unsigned || c.Size > 1 && (c.Encoding&btf.Signed != 0) != signed {
			return fmt.Errorf("%s is %v, %s is not", name, c, g)
		}
		return nil
	}
	return fmt.Errorf("%s is %v, which the ABI does not use", name, c)
}
