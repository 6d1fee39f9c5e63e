// Package typed is pure: the bytes in a map or a variable as people write them, and back, as
// the type says that BTF has for them. Addresses, prefixes and MAC addresses are known by
// their types: __be32, unsigned bytes (4, 16 or 6 of them), struct in_addr and in6_addr, and
// the keys of LPM tries.
package typed

import (
	"encoding/binary"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// A Type says what bytes of a size mean.
type Type struct {
	btf    btf.Type // nil if nobody knows
	size   int
	prefix bool // the key of an LPM trie that is an address and how many of its bits count
}

// Of returns the type of values of that size. t is nil for what has no BTF.
func Of(t btf.Type, size int) Type { return Type{btf: resolve(t, size), size: size} }

// KeyOf returns the type of the keys of an LPM trie (struct bpf_lpm_trie_key, linux/bpf.h).
func KeyOf(t btf.Type, size int) Type {
	k := Of(t, size)
	k.prefix = size == 4+4 || size == 4+16
	if s, ok := bare(k.btf).(*btf.Struct); ok && k.prefix {
		// Other tries match an interface or a protocol as well, or no address at all.
		k.prefix = len(s.Members) == 2 && s.Members[1].Offset == 32 && (size == 4+4 || meaningOf(s.Members[1].Type) == address)
	}
	return k
}

// resolve returns nil for a type that does not have that size.
func resolve(t btf.Type, size int) btf.Type {
	if t == nil {
		return nil
	}
	if n, err := btf.Sizeof(t); err != nil || n != size {
		return nil
	}
	return t
}

// Size is how many bytes a value has.
func (t Type) Size() int { return t.size }

// Known tells whether there is more to say of the bytes than their values.
func (t Type) Known() bool { return t.btf != nil || t.prefix }

// Scalar tells whether a value is one word.
func (t Type) Scalar() bool {
	return t.prefix || t.btf != nil && t.fields() == nil
}

// String is how the type is called in C, or what its values are.
func (t Type) String() string {
	switch {
	case t.prefix && t.size == 4+4:
		return "IPv4 prefix"
	case t.prefix:
		return "IPv6 prefix"
	case t.btf == nil:
		return plural(t.size, "byte")
	}
	return name(t.btf)
}

func name(t btf.Type) string {
	switch t := t.(type) {
	case *btf.Const:
		return name(t.Type)
	case *btf.Volatile:
		return name(t.Type)
	case *btf.Struct:
		return strings.TrimSpace("struct " + t.Name)
	case *btf.Union:
		return strings.TrimSpace("union " + t.Name)
	case *btf.Enum:
		return strings.TrimSpace("enum " + t.Name)
	case *btf.Datasec:
		return "variables"
	case *btf.Array:
		return name(t.Type) + "[" + itoa(int(t.Nelems)) + "]"
	case *btf.Pointer:
		return "pointer"
	}
	return t.TypeName()
}

// A field is a part of a struct, of a union, or of the variables of a program.
type field struct {
	name     string
	typ      btf.Type
	offset   int // in bytes
	bit, len int // of a bit field: from the start of the field's bytes
}

// fields returns the named parts of a value; nil for what has none.
func (t Type) fields() []field { return fieldsOf(t.btf) }

func fieldsOf(t btf.Type) []field {
	if t == nil || meaningOf(t) != plain {
		return nil
	}
	var list []field
	switch t := bare(t).(type) {
	case *btf.Struct:
		list = membersOf(t.Members, 0)
	case *btf.Union:
		if len(t.Members) > 0 {
			list = membersOf(t.Members[:1], 0) // the others are the same bytes
		}
	case *btf.Datasec:
		for _, v := range t.Vars {
			if variable, ok := v.Type.(*btf.Var); ok {
				list = append(list, field{name: variable.Name, typ: variable.Type, offset: int(v.Offset)})
			}
		}
	}
	return list
}

func membersOf(members []btf.Member, at int) []field {
	var list []field
	for _, m := range members {
		f := field{name: m.Name, typ: m.Type, offset: at + int(m.Offset.Bytes())}
		if m.BitfieldSize > 0 {
			f.bit, f.len = int(m.Offset)%8, int(m.BitfieldSize)
		}
		if inner, ok := bare(m.Type).(*btf.Struct); ok && m.Name == "" {
			list = append(list, membersOf(inner.Members, f.offset)...)
			continue
		}
		if inner, ok := bare(m.Type).(*btf.Union); ok && m.Name == "" && len(inner.Members) > 0 {
			list = append(list, membersOf(inner.Members[:1], f.offset)...)
			continue
		}
		list = append(list, f)
	}
	return list
}

// Fields returns the names of the parts of a value.
func (t Type) Fields() []string {
	var names []string
	for _, f := range t.fields() {
		names = append(names, f.name)
	}
	return names
}

// A meaning is what a type says that its bytes are.
type meaning int

const (
	plain   meaning = iota
	address         // IPv4 or IPv6
	mac
	text // characters that end with a zero
	raw  // bytes
	wire // a number in the order of the wire
)

// meaningOf returns what values of a type mean.
func meaningOf(t btf.Type) meaning {
	switch u := bare(t).(type) {
	case *btf.Int:
		switch {
		case !bigEndian(t):
		case u.Size == 4:
			return address
		default:
			return wire
		}
	case *btf.Array:
		elem, ok := bare(u.Type).(*btf.Int)
		switch {
		case !ok:
		case elem.Size == 4 && u.Nelems == 4 && bigEndian(u.Type):
			return address
		case elem.Size != 1:
		case isChar(elem):
			return text
		case u.Nelems == 4 || u.Nelems == 16:
			return address
		case u.Nelems == 6:
			return mac
		default:
			return raw
		}
	case *btf.Struct:
		return wrapped(u.Members, u.Size)
	case *btf.Union:
		return wrapped(u.Members[:min(1, len(u.Members))], u.Size)
	}
	return plain
}

// wrapped returns what a struct means that is only a name for an address, as in6_addr is.
func wrapped(members []btf.Member, size uint32) meaning {
	if len(members) != 1 {
		return plain
	}
	n, err := btf.Sizeof(members[0].Type)
	if m := meaningOf(members[0].Type); err == nil && n == int(size) && (m == address || m == mac) {
		return m
	}
	return plain
}

func isChar(t *btf.Int) bool { return t.Encoding == btf.Char || t.Name == "char" }

// bare takes off typedefs and qualifiers.
func bare(t btf.Type) btf.Type {
	if t == nil {
		return nil
	}
	return btf.UnderlyingType(t)
}

// bigEndian tells whether a typedef says so (linux/types.h).
func bigEndian(t btf.Type) bool {
	for range 32 { // as btf.UnderlyingType: a type may contain itself
		switch u := t.(type) {
		case *btf.Typedef:
			if u.Name == "__be16" || u.Name == "__be32" || u.Name == "__be64" {
				return true
			}
			t = u.Type
		case *btf.Const:
			t = u.Type
		case *btf.Volatile:
			t = u.Type
		default:
			return false
		}
	}
	return false
}

// order is the byte order of the machine.
var order = binary.NativeEndian

var little = order.Uint16([]byte{1, 0}) == 1
