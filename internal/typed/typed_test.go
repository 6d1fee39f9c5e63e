package typed

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"github.com/go-quicktest/qt"
)

var (
	u8     = &btf.Typedef{Name: "__u8", Type: &btf.Int{Name: "unsigned char", Size: 1}}
	u16    = &btf.Typedef{Name: "__u16", Type: &btf.Int{Name: "unsigned short", Size: 2}}
	u32    = &btf.Typedef{Name: "__u32", Type: &btf.Int{Name: "unsigned int", Size: 4}}
	u64    = &btf.Typedef{Name: "__u64", Type: &btf.Int{Name: "unsigned long long", Size: 8}}
	s32    = &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	char   = &btf.Int{Name: "char", Size: 1, Encoding: btf.Signed}
	be16   = &btf.Const{Type: &btf.Typedef{Name: "__be16", Type: u16}}
	be32   = &btf.Volatile{Type: &btf.Const{Type: &btf.Typedef{Name: "__be32", Type: u32}}}
	addr4  = &btf.Array{Type: u8, Nelems: 4}
	addr16 = &btf.Array{Type: u8, Nelems: 16}
	in6    = &btf.Struct{Name: "in6_addr", Size: 16, Members: []btf.Member{{Name: "in6_u", Type: &btf.Union{Size: 16, Members: []btf.Member{
		{Name: "u6_addr8", Type: addr16}, {Name: "u6_addr32", Type: &btf.Array{Type: be32, Nelems: 4}},
	}}}}}
	colour = &btf.Enum{Name: "colour", Size: 4, Signed: true, Values: []btf.EnumValue{{Name: "RED", Value: 0}, {Name: "BLUE", Value: 1<<64 - 3}}}
	flow   = structOf("flow", 16, field{name: "addr", typ: addr4}, field{name: "port", typ: be16, offset: 4}, field{name: "pad", typ: u16, offset: 6}, field{name: "packets", typ: u64, offset: 8})
)

func structOf(name string, size uint32, fields ...field) *btf.Struct {
	s := &btf.Struct{Name: name, Size: size}
	for _, f := range fields {
		s.Members = append(s.Members, btf.Member{Name: f.name, Type: f.typ, Offset: btf.Bits(8*f.offset + f.bit), BitfieldSize: btf.Bits(f.len)})
	}
	return s
}

func prefixOf(data btf.Type, size uint32) btf.Type {
	return structOf("prefix", 4+size, field{name: "len", typ: u32}, field{name: "addr", typ: data, offset: 4})
}

// What is written is what is read back, in the words of the type. The bytes are those of a little-endian machine.
func TestWords(t *testing.T) {
	for _, test := range []struct {
		typ   Type
		words string
		bytes string
		shown string // empty: as it was written
	}{
		{Of(u16, 2), "0x1f90", "\x90\x1f", "8080"},
		{Of(s32, 4), "-2", "\xfe\xff\xff\xff", ""},
		{Of(be16, 2), "80", "\x00\x50", ""},
		{Of(be32, 4), "192.0.2.1", "\xc0\x00\x02\x01", ""},
		{Of(be32, 4), "0xc0_00_02_01", "\xc0\x00\x02\x01", "192.0.2.1"},
		{Of(addr4, 4), "192.0.2.1", "\xc0\x00\x02\x01", ""},
		{Of(in6, 16), "2001:db8::1", "\x20\x01\x0d\xb8\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01", ""},
		{Of(&btf.Array{Type: be32, Nelems: 4}, 16), "::1", strings.Repeat("\x00", 15) + "\x01", ""},
		{Of(structOf("source", 16, field{name: "addr", typ: addr16}), 16), "::ffff:192.0.2.1", strings.Repeat("\x00", 10) + "\xff\xff\xc0\x00\x02\x01", ""},
		{Of(&btf.Array{Type: u8, Nelems: 6}, 6), "02:00:00:00:00:01", "\x02\x00\x00\x00\x00\x01", ""},
		{Of(&btf.Array{Type: char, Nelems: 4}, 4), "eth", "eth\x00", `"eth"`},
		{Of(&btf.Array{Type: u8, Nelems: 3}, 3), "hex:00ff01", "\x00\xff\x01", ""},
		{Of(colour, 4), "BLUE", "\xfd\xff\xff\xff", ""},
		{Of(colour, 4), "7", "\x07\x00\x00\x00", ""},
		{Of(flow, 16), "addr=192.0.2.1 port=80", "\xc0\x00\x02\x01\x00\x50\x00\x00" + strings.Repeat("\x00", 8), "addr=192.0.2.1 port=80 pad=0 packets=0"},
		{Of(flow, 16), "192.0.2.1 80 0 3", "\xc0\x00\x02\x01\x00\x50\x00\x00\x03" + strings.Repeat("\x00", 7), "addr=192.0.2.1 port=80 pad=0 packets=3"},
		{Of(nil, 2), "0x10 255", "\x10\xff", "hex:10ff"},
		{Of(u64, 2), "1 2", "\x01\x02", "hex:0102"}, // the type is not that of these bytes
		{KeyOf(prefixOf(addr4, 4), 8), "192.0.2.77/24", "\x18\x00\x00\x00\xc0\x00\x02\x00", "192.0.2.0/24"},
		{KeyOf(prefixOf(u32, 4), 8), "192.0.2.1", "\x20\x00\x00\x00\xc0\x00\x02\x01", "192.0.2.1/32"},
		{KeyOf(nil, 20), "2001:db8::/32", "\x20\x00\x00\x00\x20\x01\x0d\xb8" + strings.Repeat("\x00", 12), ""},
		{KeyOf(structOf("k", 12, field{name: "len", typ: u32}, field{name: "ifindex", typ: u32, offset: 4}, field{name: "addr", typ: be32, offset: 8}), 12), "len=64 ifindex=2 addr=192.0.2.1", "\x40\x00\x00\x00\x02\x00\x00\x00\xc0\x00\x02\x01", ""},
	} {
		b, err := test.typ.Parse(strings.Fields(test.words), nil)
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s as %v", test.words, test.typ))
		if little {
			qt.Check(t, qt.Equals(string(b), test.bytes), qt.Commentf("%s as %v", test.words, test.typ))
		}
		shown := test.shown
		if shown == "" {
			shown = test.words
		}
		qt.Check(t, qt.Equals(Words(test.typ.Value(b)), shown))
	}
}

// A field that is not named keeps its value.
func TestParseOver(t *testing.T) {
	old, err := Of(flow, 16).Parse([]string{"addr=192.0.2.1", "packets=9"}, nil)
	qt.Assert(t, qt.IsNil(err))
	b, err := Of(flow, 16).Parse([]string{"port=443"}, old)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(Words(Of(flow, 16).Value(b)), "addr=192.0.2.1 port=443 pad=0 packets=9"))
}

func TestRefused(t *testing.T) {
	for _, test := range []struct {
		typ   Type
		words string
		err   string
	}{
		{Of(be32, 4), "2001:db8::1", `"2001:db8::1" is not an IPv4 address`},
		{Of(be32, 4), "192.0.2", `"192.0.2" is neither an IPv4 address nor a number`},
		{Of(in6, 16), "192.0.2.1", `"192.0.2.1" is not an IPv6 address`},
		{Of(in6, 16), "fe80::1%eth0", `.* is not an IPv6 address`},
		{Of(&btf.Array{Type: u8, Nelems: 6}, 6), "02:00:00:00:00:01:02:03", `.* is not a MAC address`},
		{Of(be16, 2), "65536", `65536 is out of range for 16 bits`},
		{Of(u32, 4), "1 2", `__u32 is one word, not 2`},
		{Of(u32, 4), "hex:0011", `"hex:0011" is not 4 bytes in hexadecimal digits`},
		{Of(flow, 16), "adr=192.0.2.1", `there is no field "adr" \(it has: addr, port, pad, packets\)`},
		{Of(flow, 16), "port=1 port=2", `port is given twice`},
		{Of(flow, 16), "192.0.2.1 port=1", `struct flow has fields, each written as NAME=VALUE \(addr, port, pad, packets\)`},
		{Of(flow, 16), "addr=300.0.2.1", `addr: "300.0.2.1" is not an IPv4 address`},
		{Of(nil, 2), "1", `it has no type information \(BTF\): .*`},
		{Of(nil, 1), "256", `"256" is not a byte`},
		{KeyOf(nil, 8), "192.0.2.0/33", `.* is not an IPv4 prefix`},
		{KeyOf(nil, 8), "::/0", `"::/0" is not an IPv4 prefix`},
	} {
		_, err := test.typ.Parse(strings.Fields(test.words), nil)
		qt.Check(t, qt.ErrorMatches(err, test.err), qt.Commentf("%s as %v", test.words, test.typ))
	}
}

// The numbers of all CPUs are added up, and what is no number is not.
func TestSum(t *testing.T) {
	typ := Of(flow, 16)
	var perCPU [][]byte
	for _, words := range []string{"addr=192.0.2.1 packets=3", "addr=192.0.2.1 packets=4"} {
		b, err := typ.Parse(strings.Fields(words), nil)
		qt.Assert(t, qt.IsNil(err))
		perCPU = append(perCPU, b)
	}
	qt.Check(t, qt.Equals(Words(typ.Value(typ.Sum(perCPU))), "addr=192.0.2.1 port=0 pad=0 packets=7"))
	qt.Check(t, qt.Equals(Words(typ.Value(perCPU[0])), "addr=192.0.2.1 port=0 pad=0 packets=3"))
}

// Bit fields, structs within structs, arrays and the variables of a program.
func TestValue(t *testing.T) {
	nested := structOf("nested", 12, field{name: "low", typ: u32, len: 4}, field{name: "high", typ: u32, bit: 4, len: 4},
		field{name: "list", typ: &btf.Array{Type: u16, Nelems: 2}, offset: 4}, field{name: "in", typ: structOf("in", 4, field{name: "a", typ: u16}, field{name: "b", typ: u16, offset: 2}), offset: 8})
	typ := Of(nested, 12)
	b := []byte("\x21\x00\x00\x00\x01\x00\x02\x00\x03\x00\x04\x00")
	if little {
		qt.Check(t, qt.Equals(Words(typ.Value(b)), "low=1 high=2 list=[1 2] in={a=3 b=4}"))
		j, err := json.Marshal(typ.Value(b))
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(string(j), `{"low":1,"high":2,"list":[1,2],"in":{"a":3,"b":4}}`))
	}
	section := Of(&btf.Datasec{Name: ".bss", Size: 4, Vars: []btf.VarSecinfo{{Type: &btf.Var{Name: "seen", Type: u32}, Size: 4}}}, 4)
	qt.Check(t, qt.Equals(Words(section.Value([]byte{0, 0, 0, 0})), "seen=0"))
	qt.Check(t, qt.Equals(fmt.Sprint(section), "variables"))
}

// A value of any type and any bytes can be shown; and what is written is shown in words that mean the same bytes.
func FuzzValue(f *testing.F) {
	types := []btf.Type{flow, in6, colour, be32, s32, addr16, prefixOf(addr4, 4), &btf.Array{Type: u8, Nelems: 3}, &btf.Pointer{Target: u8},
		&btf.Array{Type: flow, Nelems: 2}, &btf.Union{Size: 4, Members: []btf.Member{{Name: "a", Type: u32}}}, &btf.Float{Size: 8}}
	f.Add(uint8(0), []byte("\xc0\x00\x02\x01\x00\x50\x00\x00\x03"), "addr=192.0.2.1 packets=3")
	f.Add(uint8(6), []byte("\x18\x00\x00\x00\xc0\x00\x02\x00"), "192.0.2.0/24")
	f.Fuzz(func(t *testing.T, which uint8, data []byte, text string) {
		for _, make := range []func(btf.Type, int) Type{Of, KeyOf} {
			size, err := btf.Sizeof(types[int(which)%len(types)])
			if err != nil {
				t.Fatal(err)
			}
			typ := make(types[int(which)%len(types)], size)
			Words(typ.Value(data))
			typ.Sum([][]byte{data, data})
			b, err := typ.Parse(strings.Fields(text), nil)
			if err != nil {
				continue
			}
			again, err := typ.Parse(strings.Fields(Words(typ.Value(b))), nil)
			if len(b) != size || err == nil && string(again) != string(b) {
				t.Errorf("%q as %v is %x, and again %x", text, typ, b, again)
			}
		}
	})
}

// For any text and type, Encode returns as many bytes as the type has, or an error.
func FuzzEncode(f *testing.F) {
	integer := func(size uint32, encoding btf.IntEncoding) btf.Type { return &btf.Int{Size: size, Encoding: encoding} }
	types := []btf.Type{
		integer(1, btf.Bool), integer(1, btf.Char), integer(1, btf.Signed), integer(16, btf.Unsigned),
		&btf.Enum{Size: 4, Signed: true, Values: []btf.EnumValue{{Name: "A", Value: 1<<64 - 1}}},
		&btf.Array{Type: integer(1, btf.Char), Nelems: 8}, &btf.Array{Type: integer(1, btf.Char)},
		&btf.Array{Type: integer(4, btf.Signed), Nelems: 2}, be32, addr4, &btf.Array{Type: u8, Nelems: 6}, &btf.Struct{}, &btf.Float{Size: 8},
	}
	for _, size := range []uint32{1, 2, 4, 8} {
		types = append(types, integer(size, btf.Signed), integer(size, btf.Unsigned))
	}
	for i := range types {
		for _, text := range []string{"", "0", "-1", "true", "'x'", `"x"`, "A", "0x8000000000000000", "'", `"`, "192.0.2.1", "hex:c0000201", strings.Repeat("9", 30)} {
			f.Add(uint8(i), text)
		}
	}
	f.Fuzz(func(t *testing.T, which uint8, text string) {
		typ := types[int(which)%len(types)]
		b, err := Encode(typ, text)
		if err != nil {
			return
		}
		size, err := btf.Sizeof(typ)
		if err != nil || len(b) != size {
			t.Errorf("%q as %v gives %d bytes, not %d (%v)", text, typ, len(b), size, err)
		}
	})
}
