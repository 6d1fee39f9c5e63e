package typed

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/cilium/ebpf/btf"
)

// Fields are the parts of a struct, in their order.
type Fields []Field

// A Field is a part of a struct. Value is what [Type.Value] returns.
type Field struct {
	Name  string
	Value any
}

// MarshalJSON writes an object.
func (f Fields) MarshalJSON() ([]byte, error) {
	b := []byte{'{'}
	for i, field := range f {
		if i > 0 {
			b = append(b, ',')
		}
		name, err := json.Marshal(field.Name)
		if err != nil {
			return nil, err
		}
		value, err := json.Marshal(field.Value)
		if err != nil {
			return nil, err
		}
		b = append(append(append(b, name...), ':'), value...)
	}
	return append(b, '}'), nil
}

// Text is a string of a program, which is quoted for people.
type Text string

// Value returns what the bytes say: a number, a bool, a string, a [Text], [Fields], or a
// list of these.
func (t Type) Value(b []byte) any {
	switch {
	case len(b) != t.size || t.btf == nil && !t.prefix:
		return hexWord(b)
	case t.prefix:
		addr, _ := netip.AddrFromSlice(b[4:])
		p := netip.PrefixFrom(addr, int(order.Uint32(b)))
		if p.IsValid() {
			return p.String()
		}
		return fmt.Sprintf("%v/%d", addr, order.Uint32(b))
	}
	return valueOf(t.btf, b)
}

func valueOf(t btf.Type, b []byte) any {
	n, err := btf.Sizeof(t)
	if err != nil || n > len(b) {
		return hexWord(b)
	}
	b = b[:n]
	switch meaningOf(t) {
	case address:
		addr, _ := netip.AddrFromSlice(b)
		return addr.String()
	case mac:
		return net.HardwareAddr(b).String()
	case text:
		s, _, _ := strings.Cut(string(b), "\x00")
		if !utf8.ValidString(s) {
			return hexWord(b)
		}
		return Text(s)
	case raw:
		return hexWord(b)
	case wire:
		return number(b, true)
	}
	if list := fieldsOf(t); list != nil {
		fields := make(Fields, 0, len(list))
		for _, f := range list {
			fields = append(fields, Field{f.name, f.value(b)})
		}
		return fields
	}
	switch u := bare(t).(type) {
	case *btf.Int:
		switch {
		case n > 8:
			return hexWord(b)
		case u.Encoding == btf.Bool:
			return b[0] != 0
		case u.Encoding == btf.Signed:
			return signed(number(b, !little), 8*n)
		}
		return number(b, !little)
	case *btf.Enum:
		v := number(b, !little)
		for _, known := range u.Values {
			if known.Value<<(64-8*n) == v<<(64-8*n) {
				return known.Name
			}
		}
		if u.Signed {
			return signed(v, 8*n)
		}
		return v
	case *btf.Pointer:
		return fmt.Sprintf("%#x", number(b, !little))
	case *btf.Array:
		if u.Nelems == 0 {
			return []any{}
		}
		list := make([]any, 0, min(u.Nelems, 64))
		for i := range int(u.Nelems) {
			size := n / int(u.Nelems)
			list = append(list, valueOf(u.Type, b[i*size:(i+1)*size]))
		}
		return list
	}
	return hexWord(b)
}

// value returns the field's part of the bytes.
func (f field) value(b []byte) any {
	if f.offset > len(b) {
		return ""
	}
	b = b[f.offset:]
	if f.len == 0 {
		return valueOf(f.typ, b)
	}
	bytes := (f.bit + f.len + 7) / 8
	if bytes > min(len(b), 8) {
		return ""
	}
	v := number(b[:bytes], !little)
	if little {
		v >>= f.bit
	} else {
		v >>= 8*bytes - f.bit - f.len
	}
	v &= 1<<f.len - 1
	if i, ok := bare(f.typ).(*btf.Int); ok && i.Encoding == btf.Signed {
		return signed(v, f.len)
	}
	return v
}

// number reads up to 8 bytes.
func number(b []byte, big bool) (n uint64) {
	for i := range b {
		if !big {
			i = len(b) - 1 - i
		}
		n = n<<8 | uint64(b[i])
	}
	return n
}

func signed(n uint64, bits int) int64 { return int64(n<<(64-bits)) >> (64 - bits) }

// Words returns a value as people read it.
func Words(v any) string { return words(v, false) }

func words(v any, inside bool) string {
	switch v := v.(type) {
	case Fields:
		parts := make([]string, len(v))
		for i, f := range v {
			parts[i] = f.Name + "=" + words(f.Value, true)
		}
		if inside {
			return "{" + strings.Join(parts, " ") + "}"
		}
		return strings.Join(parts, " ")
	case []any:
		parts := make([]string, len(v))
		for i, e := range v {
			parts[i] = words(e, true)
		}
		return "[" + strings.Join(parts, " ") + "]"
	case Text:
		return strconv.Quote(string(v))
	}
	return fmt.Sprint(v)
}

// Sum adds up the numbers of the values that the CPUs have. What is no number is the first
// CPU's.
func (t Type) Sum(perCPU [][]byte) []byte {
	if len(perCPU) == 0 {
		return nil
	}
	sum := slices.Clone(perCPU[0])
	for _, b := range perCPU[1:] {
		if t.btf != nil && len(b) == len(sum) {
			add(t.btf, sum, b)
		}
	}
	return sum
}

func add(t btf.Type, sum, b []byte) {
	n, err := btf.Sizeof(t)
	if err != nil || n > len(sum) || meaningOf(t) != plain {
		return
	}
	for _, f := range fieldsOf(t) {
		if f.len == 0 && f.offset <= len(sum) {
			add(f.typ, sum[f.offset:], b[f.offset:])
		}
	}
	switch u := bare(t).(type) {
	case *btf.Int:
		if n <= 8 && u.Encoding != btf.Bool {
			putNumber(sum[:n], number(sum[:n], !little)+number(b[:n], !little), !little)
		}
	case *btf.Array:
		for i := range int(u.Nelems) {
			size := n / int(u.Nelems)
			add(u.Type, sum[i*size:(i+1)*size], b[i*size:(i+1)*size])
		}
	}
}

func putNumber(b []byte, n uint64, big bool) {
	for i := range b {
		if big {
			i = len(b) - 1 - i
		}
		b[i] = byte(n)
		n >>= 8
	}
}

func itoa(n int) string { return strconv.Itoa(n) }

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return itoa(n) + " " + word + "s"
}

// hexWord returns bytes in a way that [Type.Parse] reads.
func hexWord(b []byte) string { return inHex + hex.EncodeToString(b) }
