package chains

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// probes are packets to compare two dispatchers by: UDP datagrams to the ports that the programs of these tests look for,
// whole and cut off, and noise.
func probes(t testing.TB, n int) [][]byte {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	noise := func(n int) []byte {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(random.Uint32())
		}
		return b
	}
	var packets [][]byte
	for i := range n {
		b := noise(64 + random.IntN(200))
		if i%4 != 0 {
			ip := b[14:]
			binary.BigEndian.PutUint16(b[12:], 0x0800)
			ip[0], ip[9] = 0x45, 17
			udp := ip[20:]
			if i%4 == 2 {
				binary.BigEndian.PutUint16(b[12:], 0x86dd)
				ip[0], ip[6] = 0x60, 17
				udp = ip[40:]
			}
			binary.BigEndian.PutUint16(udp[2:], uint16(scene.Port+random.IntN(4)))
			if i%16 == 1 {
				b = b[:14+random.IntN(40)] // at least a header: the kernel refuses less
			}
		}
		packets = append(packets, b)
	}
	return packets
}

// verdicts runs the dispatcher on packets without sending them.
func verdicts(t testing.TB, s *scene.Scene, packets [][]byte) []uint32 {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.Read(t).DispatcherID))
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	var verdicts []uint32
	for _, p := range packets {
		v, err := prog.Run(&ebpf.RunOptions{Data: p})
		qt.Assert(t, qt.IsNil(err))
		verdicts = append(verdicts, v)
	}
	return verdicts
}

// pinnedMap opens a map that is pinned beside a member.
func pinnedMap(t testing.TB, s *scene.Scene, member, name string) *ebpf.Map {
	t.Helper()
	for _, path := range s.Read(t).Pins {
		if strings.HasSuffix(path, "/member_"+member+"/map_"+name) {
			m, err := ebpf.LoadPinnedMap(path, nil)
			qt.Assert(t, qt.IsNil(err))
			t.Cleanup(func() { m.Close() })
			return m
		}
	}
	t.Fatalf("no map %q of %q in %q", name, member, s.Read(t).Pins)
	return nil
}

// numbersIn are the numbers of a map's only value.
func numbersIn(t testing.TB, m *ebpf.Map) (numbers []uint64) {
	t.Helper()
	b, err := m.LookupBytes(uint32(0))
	qt.Assert(t, qt.IsNil(err))
	for ; len(b) >= 8; b = b[8:] {
		numbers = append(numbers, binary.NativeEndian.Uint64(b))
	}
	return numbers
}

// coarse is a program with many instructions. Its verdict depends on all of them and on the packet.
func coarse(name string, instructions int) *ebpf.ProgramSpec {
	spec := testenv.VerdictSpec(name, scene.Pass)
	insns := asm.Instructions{
		asm.LoadMem(asm.R2, asm.R1, 0, asm.Word), // xdp_md.data
		asm.LoadMem(asm.R3, asm.R1, 4, asm.Word), // xdp_md.data_end
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 14),
		asm.Mov.Imm(asm.R0, scene.Pass),
		asm.JGT.Reg(asm.R4, asm.R3, "end"),
		asm.LoadMem(asm.R0, asm.R2, 0, asm.Word),
		asm.LoadMem(asm.R5, asm.R2, 4, asm.Word),
	}
	for i := len(insns); i < instructions-2; i++ {
		switch i % 5 {
		case 0:
			insns = append(insns, asm.Mul.Imm32(asm.R0, int32(2*i+1)))
		case 1:
			insns = append(insns, asm.Xor.Reg32(asm.R0, asm.R5))
		case 2:
			insns = append(insns, asm.Add.Imm32(asm.R5, int32(i)))
		case 3:
			insns = append(insns, asm.Add.Reg32(asm.R0, asm.R5))
		case 4:
			insns = append(insns, asm.RSh.Imm32(asm.R5, 1))
		}
	}
	spec.Instructions = append(insns, asm.And.Imm32(asm.R0, 3), asm.Return().WithSymbol("end"))
	return spec
}

// Programs of all kinds are the same program when they are sealed: they give each packet the same verdict, and do with
// their maps what they did.
func TestSealPrograms(t *testing.T) {
	spec := func(prog *ebpf.ProgramSpec) dispatcher.Source {
		return dispatcher.Spec(scene.Alone(prog), dispatcher.LoadOptions{})
	}
	builtin := func(name string) dispatcher.Source {
		c, err := programs.Spec(name)
		qt.Assert(t, qt.IsNil(err))
		return dispatcher.Spec(c, dispatcher.LoadOptions{Program: programs.Function(name, hook.XDP)})
	}
	atomics := testenv.VerdictSpec("ldt_atomics", scene.Pass)
	atomics.Instructions = asm.Instructions{
		asm.StoreImm(asm.R10, -8, 7, asm.Word),
		asm.StoreImm(asm.R10, -4, 0, asm.Word),
		asm.Mov.Imm(asm.R2, 2),
		asm.AddAtomic.Mem(asm.R10, asm.R2, asm.DWord, -8),
		asm.LoadMem(asm.R0, asm.R10, -8, asm.DWord),
		asm.JEq.Imm(asm.R0, 9, "right"),
		asm.Mov.Imm(asm.R0, scene.Drop),
		asm.Return(),
		asm.Mov.Imm(asm.R0, scene.Pass).WithSymbol("right"),
		asm.Return(),
	}
	// Functions and labels of the same names as others have, and no types at all.
	byHand := testenv.VerdictSpec("ldt_by_hand", scene.Pass)
	byHand.Instructions = asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.Call.Label("member_0"),
		asm.JEq.Imm(asm.R0, 0, "exit"),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.Call.Label("libdispatcher"),
		asm.Mov.Imm(asm.R0, scene.Pass).WithSymbol("exit"),
		asm.Return(),
		asm.LoadMem(asm.R0, asm.R1, 0, asm.Word).WithSymbol("member_0"),
		asm.LoadMem(asm.R1, asm.R1, 4, asm.Word),
		asm.Sub.Reg(asm.R1, asm.R0),
		asm.Mov.Imm(asm.R0, 0),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("libdispatcher"),
		asm.Return(),
	}
	for _, test := range []struct {
		name    string
		need    testenv.Feature
		members []dispatcher.Source
	}{
		{"one verdict", "", []dispatcher.Source{spec(testenv.VerdictSpec("ldt_drop", scene.Drop))}},
		{"global data", "", []dispatcher.Source{scene.File("filter.o", ""), scene.File("globals.o", "")}},
		{"the kernel's types", "", []dispatcher.Source{scene.File("linked.o", "ldt_core")}},
		{"functions", "", []dispatcher.Source{scene.File("linked.o", "ldt_functions"), scene.File("linked.o", "ldt_functions"), scene.File("linked.o", "ldt_functions")}},
		{"callbacks", testenv.FeatureCallbacks, []dispatcher.Source{scene.File("linked.o", "ldt_callback"), scene.File("linked.o", "ldt_callback")}},
		{"functions of the kernel's", testenv.FeatureXDPKfuncs, []dispatcher.Source{scene.File("externs.o", "ldt_kfunc"), scene.File("externs.o", "ldt_kfunc")}},
		{"a map in a map", "", []dispatcher.Source{scene.File("mapinmap.o", "")}},
		{"changed packets", "", []dispatcher.Source{scene.File("adjust.o", "ldt_grow"), scene.File("adjust.o", "ldt_shrink"), scene.File("adjust.o", "ldt_mark"), scene.File("adjust.o", "ldt_marked")}},
		{"without types", "", []dispatcher.Source{scene.File("nobtf.o", ""), scene.File("nobtf.o", "")}},
		{"with types and without", "", []dispatcher.Source{scene.File("nobtf.o", ""), scene.File("filter.o", ""), spec(byHand), scene.File("linked.o", "ldt_functions"), scene.File("nobtf.o", "")}},
		{"without types and with", "", []dispatcher.Source{spec(byHand), spec(atomics), scene.File("several.o", "ldt_second"), spec(byHand)}},
		{"4,000 instructions", "", []dispatcher.Source{spec(coarse("ldt_coarse", 4000)), spec(coarse("ldt_coarser", 4001)), spec(coarse("ldt_last", 4002))}},
		{"what is shipped", "", []dispatcher.Source{builtin("count"), builtin("droplist"), builtin("ratelimit"), builtin("sample")}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if test.need != "" {
				testenv.Need(t, test.need)
			}
			s := scene.NewSealScene(t)
			packets := probes(t, 400)
			// Something comes before and after, so that they are not alone.
			var names []string
			for i := range len(test.members) + 2 {
				from := spec(testenv.DropUDPPortSpec("ldt_port", scene.Port+1))
				if i == 0 {
					from = spec(coarse("ldt_coarse", 40))
				} else if i <= len(test.members) {
					from = test.members[i-1]
				}
				o := scene.Persistent(fmt.Sprintf("m%02d", i), 10+i)
				o.ContinueOn = hook.SetOf(hook.Pass, []hook.Verdict{hook.Pass, hook.Drop, hook.TX, hook.Aborted}[i%4])
				qt.Assert(t, qt.IsNil(s.Join(t, from, o).Close()))
				names = append(names, o.Name)
			}
			open := verdicts(t, s, packets)
			dropped := s.Drops(t)
			s.Seal(t, strings.Join(names, " "))
			qt.Check(t, qt.DeepEquals(verdicts(t, s, packets), open))
			qt.Check(t, qt.Equals(s.Drops(t), dropped))
			seen := map[uint32]bool{}
			for _, v := range open {
				seen[v] = true
			}
			qt.Check(t, qt.IsTrue(len(seen) > 1), qt.Commentf("all packets have the same verdict: %v", seen))

			// Alone it is inlined.
			for _, name := range names {
				if name != "m01" {
					s.Detach(t, name)
				}
			}
			s.WantSealed(t, "m01")
			only := verdicts(t, s, packets)
			s.Unseal(t)
			qt.Check(t, qt.DeepEquals(only, verdicts(t, s, packets)))
			s.Clear(t)
			s.WantFree(t)
		})
	}
}

// What a program found out about the kernel it finds out when it is sealed as well, and its functions are its own.
func TestSealedProgramsFind(t *testing.T) {
	s := scene.New(t)
	types, err := btf.LoadKernelSpec()
	qt.Assert(t, qt.IsNil(err))
	var task *btf.Struct
	qt.Assert(t, qt.IsNil(types.TypeByName("task_struct", &task)))
	var pid uint64
	for _, m := range task.Members {
		if m.Name == "pid" {
			pid = uint64(m.Offset.Bytes())
		}
	}
	qt.Assert(t, qt.IsTrue(pid > 0))

	functions := func(step string) dispatcher.Source {
		return dispatcher.File("../testdata/linked.o", dispatcher.LoadOptions{
			Program: "ldt_functions", Globals: map[string]string{"step": step, "port": "7007"},
		})
	}
	s.Join(t, scene.File("linked.o", "ldt_core"), dispatcher.Options{
		Name: "core", Priority: 1, ContinueOn: hook.SetOf(hook.Pass, hook.Drop), Persistent: true,
	})
	s.Join(t, functions("3"), scene.Persistent("three", 2))
	s.Join(t, functions("5"), scene.Persistent("five", 3))
	names := []string{"core", "three", "five"}
	callbacks, kfuncs := testenv.Has(t, testenv.FeatureCallbacks), testenv.Has(t, testenv.FeatureXDPKfuncs)
	if callbacks {
		s.Join(t, dispatcher.File("../testdata/linked.o", dispatcher.LoadOptions{Program: "ldt_callback", Globals: map[string]string{"port": "7007"}}), scene.Persistent("callback", 4))
		numbers := pinnedMap(t, s, "callback", "ldt_numbers")
		for i := range uint32(4) {
			qt.Assert(t, qt.IsNil(numbers.Put(i, uint64(100*i))))
		}
		names = append(names, "callback")
	}
	if kfuncs {
		s.Join(t, scene.File("externs.o", "ldt_kfunc"), scene.Persistent("kfunc", 5))
		names = append(names, "kfunc")
	}
	s.Seal(t, strings.Join(names, " "))

	core, three, five := pinnedMap(t, s, "core", "%2Ebss"), pinnedMap(t, s, "three", "%2Ebss"), pinnedMap(t, s, "five", "%2Ebss")
	qt.Assert(t, qt.DeepEquals(numbersIn(t, core), make([]uint64, 4))) // nothing yet
	before := numbersIn(t, three)[0] / 3
	qt.Assert(t, qt.Equals(numbersIn(t, five)[0]/5, before))
	qt.Assert(t, qt.Equals(s.Drops(t), kfuncs))
	qt.Check(t, qt.DeepEquals(numbersIn(t, core), []uint64{pid, uint64(task.Size), 0, 2}))
	qt.Check(t, qt.IsTrue(numbersIn(t, three)[0] >= 3*(before+10)), qt.Commentf("%v", numbersIn(t, three)))
	qt.Check(t, qt.Equals(numbersIn(t, five)[0]/5, numbersIn(t, three)[0]/3))
	qt.Check(t, qt.Equals(numbersIn(t, three)[0]%3, 0))
	if callbacks {
		qt.Check(t, qt.Equals(numbersIn(t, pinnedMap(t, s, "callback", "%2Ebss"))[0], 0+100+200+300+0+1+2+3))
	}
	if kfuncs {
		qt.Check(t, qt.IsTrue(numbersIn(t, pinnedMap(t, s, "kfunc", "%2Ebss"))[0] >= 10))
	}
	s.Clear(t)
	s.WantFree(t)
}

// What is not in the code itself, but in the kernel's configuration, is refused by name.
func TestSealKconfig(t *testing.T) {
	s := scene.New(t)
	s.Join(t, scene.File("externs.o", "ldt_kconfig"), scene.Persistent("kconfig", 10))
	s.Join(t, scene.File("filter.o", ""), scene.Persistent("filter", 20))
	s.Seal(t, "kconfig! filter", `it reads the kernel's configuration \(.kconfig\)`)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	s.Clear(t)
	s.WantFree(t)
}

// A chain that is full can be sealed as a whole.
func TestSealFullChain(t *testing.T) {
	s := scene.New(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var names []string
	for i := range hook.MaxMembers {
		// The verdict of each is in a byte of the packet.
		prog := testenv.VerdictSpec(fmt.Sprintf("ldt_byte_%d", i), scene.Pass)
		prog.Instructions = asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, 0, asm.Word),
			asm.LoadMem(asm.R3, asm.R1, 4, asm.Word),
			asm.Mov.Reg(asm.R4, asm.R2),
			asm.Add.Imm(asm.R4, int32(i+1)),
			asm.Mov.Imm(asm.R0, scene.Drop),
			asm.JGT.Reg(asm.R4, asm.R3, "end"),
			asm.LoadMem(asm.R0, asm.R2, int16(i), asm.Byte),
			asm.Return().WithSymbol("end"),
		}
		o := scene.Persistent(fmt.Sprintf("m%02d", i), 10+i)
		o.ContinueOn = hook.SetOf(hook.Pass)
		if random.IntN(2) == 0 {
			o.ContinueOn = hook.SetOf(hook.Pass, hook.Verdict(random.IntN(5)))
		}
		qt.Assert(t, qt.IsNil(s.Join(t, dispatcher.Spec(scene.Alone(prog), dispatcher.LoadOptions{}), o).Close()))
		names = append(names, o.Name)
	}
	var packets [][]byte
	for range 2000 {
		b := make([]byte, 64)
		for i := range b {
			b[i] = scene.Pass
			if random.IntN(20) == 0 {
				b[i] = byte(random.IntN(5))
			}
		}
		packets = append(packets, b)
	}
	open := verdicts(t, s, packets)
	s.Seal(t, strings.Join(names, " "))
	qt.Check(t, qt.DeepEquals(verdicts(t, s, packets), open))
	s.Clear(t)
	s.WantFree(t)
}

// Frags are of the chain: what was loaded for packets in fragments is sealed for them.
func TestSealFrags(t *testing.T) {
	testenv.Need(t, testenv.FeatureFrags)
	s := scene.New(t)
	s.Jumbo(t)
	s.Join(t, scene.File("several.o", "ldt_frags"), scene.Persistent("frags", 10))
	s.Seal(t, "frags")
	s.WantDropped(t, scene.Port+2)
	qt.Assert(t, qt.IsTrue(s.Read(t).Frags))
	s.Clear(t)
	s.WantFree(t)
}
