package load

import (
	"encoding/binary"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// setGlobals sets variables to values that are given as text.
func setGlobals(spec *ebpf.CollectionSpec, values map[string]string) error {
	for name, text := range values {
		v := spec.Variables[name]
		if v == nil {
			return hook.Because(hook.ErrUsage, "there is no global %q in the file (it has: %s)", name, list(slices.Sorted(maps.Keys(spec.Variables))))
		}
		if v.Type == nil {
			return hook.Because(hook.ErrUsage, "global %q has no type: compile the file with -g", name)
		}
		b, err := encode(v.Type.Type, text)
		if err == nil && len(b) != int(v.Size()) {
			err = fmt.Errorf("it has %d bytes, the value %d", v.Size(), len(b))
		}
		if err != nil {
			return hook.Because(hook.ErrUsage, "global %q: %w", name, err)
		}
		if err := v.Set(b); err != nil {
			return hook.Because(hook.ErrUsage, "global %q: %w", name, err)
		}
	}
	return nil
}

// encode returns text as a value of the type.
func encode(t btf.Type, text string) ([]byte, error) {
	switch t := btf.UnderlyingType(t).(type) {
	case *btf.Int:
		if t.Encoding == btf.Bool && !slices.Contains([]string{"0", "1", "true", "false"}, text) {
			return nil, fmt.Errorf("%q is neither true nor false", text)
		}
		return encodeInt(t.Size, t.Encoding == btf.Signed || t.Encoding == btf.Char, text)
	case *btf.Enum:
		for _, v := range t.Values {
			if v.Name == text {
				return encodeBits(t.Size, v.Value), nil
			}
		}
		return encodeInt(t.Size, t.Signed, text)
	case *btf.Array:
		elem, ok := btf.UnderlyingType(t.Type).(*btf.Int)
		if !ok || elem.Size != 1 {
			break
		}
		if s, err := strconv.Unquote(text); err == nil {
			text = s
		}
		if len(text) >= int(t.Nelems) {
			return nil, fmt.Errorf("%q does not fit into %d bytes with the closing zero", text, t.Nelems)
		}
		return append([]byte(text), make([]byte, int(t.Nelems)-len(text))...), nil
	}
	return nil, fmt.Errorf("a value of type %v cannot be given as text", t)
}

func encodeInt(size uint32, signed bool, text string) ([]byte, error) {
	if size > 8 {
		return nil, fmt.Errorf("integers of %d bytes cannot be given as text", size)
	}
	switch text {
	case "true":
		return encodeBits(size, 1), nil
	case "false":
		return encodeBits(size, 0), nil
	}
	if strings.HasPrefix(text, "'") {
		s, err := strconv.Unquote(text)
		if err != nil || len(s) != 1 {
			return nil, fmt.Errorf("%s is not a character", text)
		}
		return encodeBits(size, uint64(s[0])), nil
	}
	bits := int(size) * 8
	if n, err := strconv.ParseInt(text, 0, 64); err == nil && (n < 0 || signed) {
		lowest, highest := int64(math.MinInt64)>>(64-bits), int64(math.MaxInt64)>>(64-bits)
		if !signed || n < lowest || n > highest {
			return nil, fmt.Errorf("%s is out of range for %d bits", text, bits)
		}
		return encodeBits(size, uint64(n)), nil
	}
	n, err := strconv.ParseUint(strings.TrimPrefix(text, "+"), 0, 64)
	if err != nil {
		return nil, fmt.Errorf("%q is not a number", text)
	}
	if bits < 64 && n>>bits != 0 || signed && n > math.MaxInt64 {
		return nil, fmt.Errorf("%s is out of range for %d bits", text, bits)
	}
	return encodeBits(size, n), nil
}

func encodeBits(size uint32, n uint64) []byte {
	b := make([]byte, 8)
	binary.LittleEndian.PutUint64(b, n)
	b = b[:size]
	if kernel.ByteOrder == binary.BigEndian {
		slices.Reverse(b)
	}
	return b
}
