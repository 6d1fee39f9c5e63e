package typed

import (
	"encoding/hex"
	"fmt"
	"math"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// An UnknownField is the error for a name that no part of a value has.
type UnknownField struct {
	Name  string
	Known []string
}

func (u *UnknownField) Error() string {
	return fmt.Sprintf("there is no field %q (it has: %s)", u.Name, strings.Join(u.Known, ", "))
}

// Parse returns the bytes that the words mean: one word for a scalar, or the parts of a
// struct as NAME=VALUE, or all parts in their order. Parts that are not named are those of
// old, which may be nil: they are zero then.
func (t Type) Parse(list []string, old []byte) ([]byte, error) {
	switch {
	case len(list) == 1 && strings.HasPrefix(list[0], inHex):
		return parseHex(list[0], t.size)
	case t.btf == nil && !t.prefix:
		return t.parseBytes(list)
	case t.Scalar() && len(list) != 1:
		return nil, fmt.Errorf("%v is one word, not %d", t, len(list))
	case t.prefix:
		return parsePrefix(list[0], t.size-4)
	case t.Scalar():
		return Encode(t.btf, list[0])
	}
	b := make([]byte, t.size)
	copy(b, old)
	fields := t.fields()
	named := 0
	for _, word := range list {
		if strings.Contains(word, "=") {
			named++
		}
	}
	switch {
	case named == 0 && len(list) == len(fields):
	case named != len(list) || len(list) == 0:
		return nil, fmt.Errorf("%v has fields, each written as NAME=VALUE (%s)", t, strings.Join(t.Fields(), ", "))
	}
	given := map[string]bool{}
	for i, word := range list {
		f := &fields[min(i, len(fields)-1)]
		value := word
		if named > 0 {
			var name string
			name, value, _ = strings.Cut(word, "=")
			at := slices.IndexFunc(fields, func(f field) bool { return f.name == name })
			if at < 0 {
				return nil, &UnknownField{name, t.Fields()}
			}
			if given[name] {
				return nil, fmt.Errorf("%s is given twice", name)
			}
			given[name] = true
			f = &fields[at]
		}
		if err := f.put(b, value); err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return b, nil
}

func (f field) put(b []byte, word string) error {
	if f.len > 0 {
		return fmt.Errorf("a bit field cannot be set")
	}
	v, err := Encode(f.typ, word)
	if err == nil && f.offset+len(v) > len(b) {
		err = fmt.Errorf("it is not within the %d bytes", len(b))
	}
	if err == nil {
		copy(b[f.offset:], v)
	}
	return err
}

// parseBytes reads bytes as bpftool does: each a word.
func (t Type) parseBytes(list []string) ([]byte, error) {
	if len(list) != t.size {
		return nil, fmt.Errorf("it has no type information (BTF): write its %s, each as a number, or as hex:%s", plural(t.size, "byte"), strings.Repeat("00", min(t.size, 4)))
	}
	b := make([]byte, t.size)
	for i, word := range list {
		n, err := strconv.ParseUint(word, 0, 8)
		if err != nil {
			return nil, fmt.Errorf("%q is not a byte", word)
		}
		b[i] = byte(n)
	}
	return b, nil
}

// inHex begins the bytes of a value of any type.
const inHex = "hex:"

func parseHex(word string, size int) ([]byte, error) {
	b, err := hex.DecodeString(strings.TrimPrefix(word, inHex))
	if err != nil || len(b) != size {
		return nil, fmt.Errorf("%q is not %s in hexadecimal digits", word, plural(size, "byte"))
	}
	return b, nil
}

func parsePrefix(word string, size int) ([]byte, error) {
	p, err := netip.ParsePrefix(word)
	if err != nil {
		addr, addrErr := netip.ParseAddr(word)
		if addrErr != nil || addr.Zone() != "" {
			return nil, fmt.Errorf("%q is not an %s prefix", word, version(size))
		}
		p = netip.PrefixFrom(addr, addr.BitLen())
	}
	if p.Addr().BitLen() != 8*size {
		return nil, fmt.Errorf("%q is not an %s prefix", word, version(size))
	}
	b := make([]byte, 4, 4+size)
	order.PutUint32(b, uint32(p.Bits()))
	return append(b, p.Masked().Addr().AsSlice()...), nil
}

func version(size int) string {
	if size == 4 {
		return "IPv4"
	}
	return "IPv6"
}

// Encode returns the word as a value of the type: a number as in C, a character in single
// quotes, true or false, the name of an enumerator, an address, or text for an array of char.
func Encode(t btf.Type, word string) ([]byte, error) {
	n, err := btf.Sizeof(t)
	if err != nil {
		return nil, err
	}
	m := meaningOf(t)
	if strings.HasPrefix(word, inHex) {
		if b, err := parseHex(word, n); err == nil || m != text {
			return b, err
		}
	}
	switch m {
	case address:
		return encodeAddress(t, word, n)
	case mac:
		if b, err := net.ParseMAC(word); err == nil && len(b) == n {
			return b, nil
		}
		return nil, fmt.Errorf("%q is not a MAC address", word)
	case text, raw:
		return encodeText(word, n)
	case wire:
		b, err := encodeInt(uint32(n), false, word)
		if little {
			slices.Reverse(b)
		}
		return b, err
	}
	switch u := bare(t).(type) {
	case *btf.Int:
		if u.Encoding == btf.Bool && !slices.Contains([]string{"0", "1", "true", "false"}, word) {
			return nil, fmt.Errorf("%q is neither true nor false", word)
		}
		return encodeInt(u.Size, u.Encoding == btf.Signed || isChar(u), word)
	case *btf.Enum:
		for _, v := range u.Values {
			if v.Name == word {
				return encodeBits(u.Size, v.Value), nil
			}
		}
		return encodeInt(u.Size, u.Signed, word)
	}
	return nil, fmt.Errorf("a value of type %v cannot be given as text", t)
}

// encodeAddress accepts a number for an IPv4 address too: 0xc0000201 is 192.0.2.1.
func encodeAddress(t btf.Type, word string, size int) ([]byte, error) {
	addr, err := netip.ParseAddr(word)
	if err == nil && addr.Zone() == "" && addr.BitLen() == 8*size {
		return addr.AsSlice(), nil
	}
	if _, isInt := bare(t).(*btf.Int); isInt && err != nil {
		b, err := encodeInt(uint32(size), false, word)
		if err != nil {
			return nil, fmt.Errorf("%q is neither an IPv4 address nor a number", word)
		}
		if little {
			slices.Reverse(b)
		}
		return b, nil
	}
	return nil, fmt.Errorf("%q is not an %s address", word, version(size))
}

func encodeText(word string, size int) ([]byte, error) {
	if s, err := strconv.Unquote(word); err == nil {
		word = s
	}
	if len(word) >= size {
		return nil, fmt.Errorf("%q does not fit into %d bytes with the closing zero", word, size)
	}
	return append([]byte(word), make([]byte, size-len(word))...), nil
}

func encodeInt(size uint32, signed bool, word string) ([]byte, error) {
	if size > 8 {
		return nil, fmt.Errorf("integers of %d bytes cannot be given as text", size)
	}
	switch word {
	case "true":
		return encodeBits(size, 1), nil
	case "false":
		return encodeBits(size, 0), nil
	}
	if strings.HasPrefix(word, "'") {
		s, err := strconv.Unquote(word)
		if err != nil || len(s) != 1 {
			return nil, fmt.Errorf("%s is not a character", word)
		}
		return encodeBits(size, uint64(s[0])), nil
	}
	bits := int(size) * 8
	if n, err := strconv.ParseInt(word, 0, 64); err == nil && (n < 0 || signed) {
		lowest, highest := int64(math.MinInt64)>>(64-bits), int64(math.MaxInt64)>>(64-bits)
		if !signed || n < lowest || n > highest {
			return nil, fmt.Errorf("%s is out of range for %d bits", word, bits)
		}
		return encodeBits(size, uint64(n)), nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(word, "+"), 0, 64)
	if err != nil {
		return nil, fmt.Errorf("%q is not a number", word)
	}
	if bits < 64 && n>>bits != 0 || signed && n > math.MaxInt64 {
		return nil, fmt.Errorf("%s is out of range for %d bits", word, bits)
	}
	return encodeBits(size, n), nil
}

func encodeBits(size uint32, n uint64) []byte {
	b := make([]byte, size)
	putNumber(b, n, !little)
	return b
}
