package load

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// A global must get the value that was typed: another value could drop the wrong traffic.
func TestGlobals(t *testing.T) {
	for _, test := range []struct {
		name, text string
		want       int64 // little-endian, extended by zeros
	}{
		{"s8", "-128", 0x80}, {"s8", "127", 127}, {"u8", "255", 255}, {"u8", "0b101", 5},
		{"s16", "-1", 0xffff}, {"u16", "65535", 65535}, {"u16", "0x1f90", 8080},
		{"s32", "-2147483648", 0x80000000}, {"s32", "0x7fffffff", 0x7fffffff}, {"u32", "4294967295", 0xffffffff},
		{"s64", "-9223372036854775808", -1 << 63}, {"s64", "9223372036854775807", 1<<63 - 1}, {"u64", "18446744073709551615", -1},
		{"u32", "0o17", 15}, {"u32", "017", 15}, {"u32", "+5", 5}, {"u32", "1_000", 1000},
		{"flag", "true", 1}, {"flag", "false", 0}, {"flag", "1", 1}, {"flag", "0", 0}, {"u8", "true", 1},
		{"letter", "'x'", 'x'}, {"letter", `'\n'`, '\n'}, {"letter", "65", 'A'}, {"u8", `'\xff'`, 0xff},
		{"colour", "GREEN", 7}, {"colour", "BLUE", 0xfffffffd}, {"colour", "12", 12}, {"colour", "-3", 0xfffffffd},
		{"wide", "WIDE", 0x123456789abc}, {"wide", "NARROW", 0},
		{"label", "", 0}, {"label", "ab", 'b'<<8 | 'a'}, {"label", `"a b"`, 'b'<<16 | ' '<<8 | 'a'}, {"label", `"\x01"`, 1},
		{"label", "1234567", 0x37363534333231},
		{"variable", "7", 7}, {"zeroed", "7", 7}, // .data and .bss
	} {
		spec := parse(t, "globals.o")
		qt.Assert(t, qt.IsNil(setGlobals(spec, map[string]string{test.name: test.text})), qt.Commentf("%s=%s", test.name, test.text))
		v := spec.Variables[test.name]
		got := make([]byte, v.Size())
		qt.Assert(t, qt.IsNil(v.Get(got)))
		want := binary.LittleEndian.AppendUint64(nil, uint64(test.want))
		qt.Check(t, qt.DeepEquals(got, want[:v.Size()]), qt.Commentf("%s=%s", test.name, test.text))
	}
}

func TestGlobalsRefused(t *testing.T) {
	for _, test := range []struct{ name, text, err string }{
		{"s8", "128", `128 is out of range for 8 bits`}, {"s8", "-129", `-129 is out of range for 8 bits`},
		{"u8", "256", `256 is out of range for 8 bits`}, {"u8", "-1", `-1 is out of range for 8 bits`},
		{"s16", "32768", `.* out of range for 16 bits`}, {"u16", "65536", `.* out of range for 16 bits`},
		{"s32", "0xffffffff", `.* out of range for 32 bits`}, {"u32", "4294967296", `.* out of range for 32 bits`},
		{"s64", "9223372036854775808", `.* out of range for 64 bits`}, {"u64", "-1", `.* out of range for 64 bits`},
		{"u64", "18446744073709551616", `.* is not a number`}, {"s64", "-9223372036854775809", `.* is not a number`},
		{"u32", "", `"" is not a number`}, {"u32", "1 ", `.* is not a number`}, {"u32", "1.5", `.* is not a number`},
		{"u32", "1e3", `.* is not a number`}, {"u32", "'ab'", `'ab' is not a character`}, {"u32", "'é'", `'é' is not a character`},
		{"u32", "'", `' is not a character`}, {"u32", "TRUE", `.* is not a number`},
		{"flag", "2", `"2" is neither true nor false`}, {"flag", "yes", `"yes" is neither true nor false`}, {"flag", "", `.*neither.*`},
		{"colour", "PURPLE", `"PURPLE" is not a number`},
		{"label", "12345678", `"12345678" does not fit into 8 bytes with the closing zero`},
		{"s128", "1", `integers of 16 bytes cannot be given as text`},
		{"numbers", "1", `a value of type .* cannot be given as text`},
		{"point", "1", `a value of type .* cannot be given as text`},
		{"pointer", "0", `a value of type .* cannot be given as text`},
	} {
		spec := parse(t, "globals.o")
		err := setGlobals(spec, map[string]string{test.name: test.text})
		qt.Check(t, qt.ErrorMatches(err, `global "`+test.name+`": `+test.err), qt.Commentf("%s=%s", test.name, test.text))
		qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
	}
}

// The error for a misspelt name lists the existing names; without BTF it says what to do.
func TestGlobalsUnknown(t *testing.T) {
	err := setGlobals(parse(t, "filter.o"), map[string]string{"prot": "1"})
	qt.Check(t, qt.ErrorMatches(err, `there is no global "prot" in the file \(it has: left, port, seen\)`))
	err = setGlobals(parse(t, "several.o"), map[string]string{"port": "1"})
	qt.Check(t, qt.ErrorMatches(err, `there is no global "port" in the file \(it has: none\)`))
	err = setGlobals(parse(t, "nobtf.o"), map[string]string{"verdict": "1"})
	qt.Check(t, qt.ErrorMatches(err, `global "verdict" has no type: compile the file with -g`))
	for _, e := range []error{err} {
		qt.Check(t, qt.ErrorIs(e, hook.ErrUsage))
	}
	qt.Check(t, qt.IsNil(setGlobals(&ebpf.CollectionSpec{}, nil)))
}
