package state_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// code is a program with everything that can be kept: a map, a function, labels, types and a line.
func code() *dispatch.Code {
	number := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	fn := func(name string) *btf.Func {
		return &btf.Func{Name: name, Linkage: btf.StaticFunc, Type: &btf.FuncProto{Return: number}}
	}
	load := asm.LoadMapValue(asm.R1, 0, 8)
	load.Constant = 8<<32 | 1
	return &dispatch.Code{
		Name: "ldt_code", Maps: []uint32{7, 8},
		Insns: asm.Instructions{
			btf.WithFuncMetadata(asm.Mov.Imm(asm.R0, 2), fn("ldt_code")).WithSource(asm.Comment("line")),
			load,
			asm.JEq.Imm(asm.R0, 1, "end"),
			asm.Call.Label("sub"),
			asm.Return().WithSymbol("end"),
			btf.WithFuncMetadata(asm.Mov.Imm(asm.R0, 2).WithSymbol("sub"), fn("sub")),
			asm.Return(),
		},
	}
}

func pack(t testing.TB, c *dispatch.Code) []byte {
	t.Helper()
	b, err := state.MarshalCode(c)
	qt.Assert(t, qt.IsNil(err))
	return b
}

// repack changes the fields of what is kept.
func repack(t testing.TB, b []byte, change func(map[string]any)) []byte {
	t.Helper()
	z, err := gzip.NewReader(bytes.NewReader(b))
	qt.Assert(t, qt.IsNil(err))
	fields := map[string]any{}
	qt.Assert(t, qt.IsNil(json.NewDecoder(z).Decode(&fields)))
	change(fields)
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	qt.Assert(t, qt.IsNil(json.NewEncoder(w).Encode(fields)))
	qt.Assert(t, qt.IsNil(w.Close()))
	return out.Bytes()
}

// The code that is linked later must be what was loaded, and its hash is always the same.
func TestCodeRoundTrip(t *testing.T) {
	for _, c := range []*dispatch.Code{
		code(),
		{Name: "ldt_refused", Refused: "it makes tail calls"},
		{Name: "ldt_bare", Insns: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}},
	} {
		b := pack(t, c)
		qt.Assert(t, qt.DeepEquals(pack(t, c), b))
		got, err := state.UnmarshalCode(b)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(got.Name, c.Name))
		qt.Assert(t, qt.Equals(got.Refused, c.Refused))
		qt.Assert(t, qt.DeepEquals(got.Maps, c.Maps))
		qt.Assert(t, qt.Equals(len(got.Insns), len(c.Insns)))
		again, err := state.UnmarshalCode(pack(t, got))
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(fmt.Sprintf("%v", again.Insns), fmt.Sprintf("%v", got.Insns)))
		for i, ins := range got.Insns {
			qt.Check(t, qt.Equals(ins.OpCode, c.Insns[i].OpCode))
			want, have := btf.FuncMetadata(&c.Insns[i]), btf.FuncMetadata(&ins)
			qt.Check(t, qt.Equals(have != nil, want != nil))
			if want != nil && have != nil {
				qt.Check(t, qt.Equals(have.Name, want.Name))
			}
		}
	}
	got, err := state.UnmarshalCode(pack(t, code()))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(got.Insns[0].Source().String(), "line"))
	qt.Check(t, qt.Equals(got.Insns[1].Constant, 8<<32|1))
	qt.Check(t, qt.Equals(got.Insns[3].Constant, 1)) // past the exit
}

// Damaged code is refused as a whole.
func TestCodeRejects(t *testing.T) {
	good := pack(t, code())
	with := func(field string, value any) []byte {
		return repack(t, good, func(fields map[string]any) {
			if value == nil {
				delete(fields, field)
			} else {
				fields[field] = value
			}
		})
	}
	for name, b := range map[string][]byte{
		"empty":                      nil,
		"not compressed":             []byte(`{"Version":1}`),
		"truncated":                  good[:len(good)/2],
		"a later version":            with("Version", 2),
		"no version":                 with("Version", nil),
		"no instructions":            with("Insns", nil),
		"half an instruction":        with("Insns", make([]byte, 12)),
		"half of a wide instruction": with("Insns", []byte{0x18, 0, 0, 0, 0, 0, 0, 0}),
		"a map that is not there":    with("Maps", []uint32{7}),
		"no types":                   with("BTF", nil),
		"other bytes for types":      with("BTF", make([]byte, 100)),
		"half a function":            with("Funcs", make([]byte, 4)),
		"half a line":                with("Lines", make([]byte, 20)),
		"a function at no place":     with("Funcs", []byte{0xff, 0, 0, 0, 1, 0, 0, 0}),
		"a function of no type":      with("Funcs", []byte{0, 0, 0, 0, 0xff, 0, 0, 0}),
	} {
		_, err := state.UnmarshalCode(b)
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%s", name))
	}
}

// A small map may unpack to more memory than the machine has: unpacking stops in time.
func TestCodeBomb(t *testing.T) {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, err := io.WriteString(z, `{"Version":1,"Insns":"`)
	qt.Assert(t, qt.IsNil(err))
	block := bytes.Repeat([]byte("A"), 1<<20)
	for range 256 {
		_, err := z.Write(block)
		qt.Assert(t, qt.IsNil(err))
	}
	_, err = io.WriteString(z, `"}`)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(z.Close()))
	_, err = state.UnmarshalCode(b.Bytes())
	qt.Assert(t, qt.IsNotNil(err))
}

// patience is more time than any code of a sane size needs, also on a slow machine.
const patience = 5 * time.Second

// Any process with CAP_BPF can make a map that looks like kept code. What is read must be fit to be linked and kept
// again. Whether it is the program's, and whether it is harmless, the kernel tells (see state.Verify).
func FuzzCode(f *testing.F) {
	unpacked := func(c *dispatch.Code) []byte {
		z, err := gzip.NewReader(bytes.NewReader(pack(f, c)))
		qt.Assert(f, qt.IsNil(err))
		b, err := io.ReadAll(z)
		qt.Assert(f, qt.IsNil(err))
		return b
	}
	f.Add(unpacked(code()))
	f.Add(unpacked(&dispatch.Code{Refused: "why"}))
	f.Add(unpacked(&dispatch.Code{Insns: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		// The test packs the bytes, because a fuzzer cannot guess checksums.
		var packed bytes.Buffer
		z := gzip.NewWriter(&packed)
		_, err := z.Write(b)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(z.Close()))
		start := time.Now()
		c, err := state.UnmarshalCode(packed.Bytes())
		if err != nil || c.Refused != "" {
			return
		}
		for _, codes := range [][]*dispatch.Code{{c}, {c, nil}, {nil, c}, {c, c, c}} {
			settings := make([]hook.Settings, len(codes))
			for i := range settings {
				settings[i] = hook.Settings{}.WithDefaults()
			}
			for _, inline := range []bool{false, true} {
				qt.Assert(t, qt.IsTrue(len(dispatch.Link(settings, codes, inline)) > 0))
			}
		}
		if again, err := state.MarshalCode(c); err == nil {
			if _, err := state.UnmarshalCode(again); err != nil {
				t.Errorf("kept again, it is not read: %v", err)
			}
		}
		if took := time.Since(start); took > patience {
			t.Errorf("took %s for %d bytes", took, len(b))
		}
	})
}
