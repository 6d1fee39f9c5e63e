package chains

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A program that throws an exception ends. Linked, it would end the dispatcher, and the members behind it would not run: a filter
// among them would filter nothing.
func TestSealExceptions(t *testing.T) {
	testenv.Need(t, testenv.FeatureExceptions)
	for _, function := range []string{"ldt_throw", "ldt_throw_below"} {
		t.Run(function, func(t *testing.T) {
			s := scene.NewSealScene(t)
			s.Join(t, scene.File("throw.o", function), scene.Persistent("thrower", 10))
			s.Attach(t, scene.Coded(t, testenv.DropUDPPortSpec("ldt_drop", scene.Port)), scene.Persistent("filter", 20))
			qt.Check(t, qt.IsTrue(s.Drops(t)))
			s.Seal(t, "thrower! filter", `it can end by an exception \(bpf_throw\), which would end the whole chain`)
			qt.Check(t, qt.IsTrue(s.Drops(t)))
			s.Clear(t)
		})
	}
}

// rounds is a program that drops what it does not find the time for: it passes a packet when its loop, which the kernel would end
// at some time, has made n rounds. With 0 it goes on until the kernel ends the loop.
func rounds(name string, n int32) *ebpf.ProgramSpec {
	mayGoto := func(label string) asm.Instruction {
		return asm.Instruction{OpCode: asm.OpCode(asm.JumpClass).SetJumpOp(asm.JCOND), Offset: -1}.WithReference(label)
	}
	spec := testenv.VerdictSpec(name, scene.Pass)
	spec.Instructions = asm.Instructions{
		asm.Mov.Imm(asm.R6, 0),
		mayGoto("ended").WithSymbol("again"),
		asm.Ja.Label("again"),
	}
	if n != 0 {
		spec.Instructions = append(spec.Instructions[:2],
			asm.Add.Imm(asm.R6, 1), asm.JNE.Imm(asm.R6, n, "again"),
			asm.Mov.Imm(asm.R0, scene.Pass), asm.Return())
	}
	spec.Instructions = append(spec.Instructions, asm.Mov.Imm(asm.R0, scene.Drop).WithSymbol("ended"), asm.Return())
	return spec
}

// The kernel bounds the loops of a function together (may_goto). A member that uses up its own share takes none of the others'.
func TestSealLoops(t *testing.T) {
	testenv.Need(t, testenv.FeatureMayGoto)
	s := scene.NewSealScene(t)
	for i, n := range []int32{0, 10} {
		o := scene.Persistent(fmt.Sprintf("m%d", i), 10+i)
		o.ContinueOn = hook.SetOf(hook.Drop)
		s.Join(t, dispatcher.Spec(scene.Alone(rounds("ldt_rounds", n)), dispatcher.LoadOptions{}), o)
	}
	packet := [][]byte{make([]byte, 64)}
	open := verdicts(t, s, packet)
	qt.Check(t, qt.Equals(open[0], scene.Pass))
	s.Seal(t, "m0 m1")
	qt.Check(t, qt.DeepEquals(verdicts(t, s, packet), open))
	s.Clear(t)
}

// A writer of programs that are valid, and else as random as it can make them.
type writer struct {
	*rand.Rand
	insns  asm.Instructions
	labels int
}

// zooPacket is the size of the packets for such programs, which leave shorter ones alone.
const zooPacket = 96

// emit adds instructions, the first as the target of a jump that waits for one.
func (w *writer) emit(label *string, insns ...asm.Instruction) {
	if *label != "" {
		insns[0] = insns[0].WithSymbol(*label)
		*label = ""
	}
	w.insns = append(w.insns, insns...)
}

// random is a program that computes with registers, its stack and the packet, writes to all of them, calls functions of its own,
// and ends at several places.
func random(r *rand.Rand, name string) *ebpf.ProgramSpec {
	w := &writer{Rand: r}
	regs := []asm.Register{asm.R0, asm.R3, asm.R4, asm.R5, asm.R7, asm.R8, asm.R9}
	reg := func() asm.Register { return regs[w.IntN(len(regs))] }
	alu := []asm.ALUOp{asm.Add, asm.Sub, asm.Mul, asm.Or, asm.And, asm.Xor}
	sizes := []asm.Size{asm.Byte, asm.Half, asm.Word, asm.DWord}
	begin := func(short string) {
		w.insns = append(w.insns,
			asm.LoadMem(asm.R6, asm.R1, 0, asm.Word), // xdp_md.data
			asm.LoadMem(asm.R2, asm.R1, 4, asm.Word), // xdp_md.data_end
			asm.Mov.Reg(asm.R3, asm.R6),
			asm.Add.Imm(asm.R3, zooPacket),
			asm.JGT.Reg(asm.R3, asm.R2, short),
		)
		for i, at := range regs {
			w.insns = append(w.insns, asm.LoadMem(at, asm.R6, int16(8*i), asm.DWord))
		}
		for at := int16(-64); at < 0; at += 8 {
			w.insns = append(w.insns, asm.StoreMem(asm.R10, at, reg(), asm.DWord))
		}
	}
	// steps end with all jumps bound; R6 is the packet.
	steps := func(n int, ends bool) {
		var label string
		for range n {
			size := sizes[w.IntN(len(sizes))]
			within := func(length int) int16 { return int16(w.IntN(length/8)*8 + w.IntN(8/size.Sizeof())*size.Sizeof()) }
			switch w.IntN(8) {
			case 0:
				w.emit(&label, alu[w.IntN(len(alu))].Reg(reg(), reg()))
			case 1:
				w.emit(&label, alu[w.IntN(len(alu))].Imm32(reg(), int32(w.Uint32())))
			case 2:
				w.emit(&label, asm.LoadMem(reg(), asm.R6, within(zooPacket), size))
			case 3:
				w.emit(&label, asm.StoreMem(asm.R6, within(zooPacket), reg(), size))
			case 4:
				w.emit(&label, asm.LoadMem(reg(), asm.R10, within(64)-64, size))
			case 5:
				w.emit(&label, asm.StoreMem(asm.R10, within(64)-64, reg(), size))
			case 6:
				if label == "" {
					w.labels++
					label = fmt.Sprintf("%s_%d", name, w.labels)
					w.insns = append(w.insns, asm.JSet.Imm32(reg(), int32(1<<w.IntN(8)), label), asm.Xor.Imm32(reg(), int32(w.Uint32())))
				}
			case 7:
				if ends && w.IntN(3) == 0 {
					w.labels++
					on := fmt.Sprintf("%s_%d", name, w.labels)
					w.emit(&label, asm.JSet.Imm32(reg(), int32(3<<w.IntN(6)), on))
					w.insns = append(w.insns, asm.Mov.Imm(asm.R0, int32(w.IntN(4))), asm.Return(), asm.Xor.Imm(reg(), 5).WithSymbol(on))
				}
			}
		}
		w.emit(&label, asm.Mov.Reg(asm.R0, reg()))
	}
	w.insns = append(w.insns, asm.StoreMem(asm.R10, -72, asm.R1, asm.DWord))
	begin("short")
	steps(4+w.IntN(40), true)
	calls := w.IntN(2) == 0
	if calls {
		w.insns = append(w.insns,
			asm.LoadMem(asm.R1, asm.R10, -72, asm.DWord), asm.Mov.Reg(asm.R7, asm.R0),
			asm.Call.Label("below"), asm.Xor.Reg(asm.R0, asm.R7))
	}
	w.insns = append(w.insns, asm.And.Imm32(asm.R0, 3), asm.Return(),
		asm.Mov.Imm(asm.R0, int32(w.IntN(4))).WithSymbol("short"), asm.Return())
	if calls {
		w.insns = append(w.insns, asm.Mov.Reg(asm.R1, asm.R1).WithSymbol("below"))
		begin("nothing")
		steps(4+w.IntN(20), true)
		w.insns = append(w.insns, asm.Return(), asm.Mov.Imm(asm.R0, 0).WithSymbol("nothing"), asm.Return())
	}
	spec := testenv.VerdictSpec(name, scene.Pass)
	spec.Instructions = w.insns
	return spec
}

// What a packet meets is the same in slots and sealed, for programs that nobody wrote: the verdict, and the bytes afterwards.
func TestSealRandomPrograms(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := rand.New(rand.NewPCG(seed, 0))
	s := scene.NewSealScene(t)
	results := func(packets [][]byte) (results []string) {
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.Read(t).DispatcherID))
		qt.Assert(t, qt.IsNil(err))
		defer prog.Close()
		for _, p := range packets {
			o := ebpf.RunOptions{Data: p, DataOut: make([]byte, 256)}
			v, err := prog.Run(&o)
			qt.Assert(t, qt.IsNil(err))
			results = append(results, fmt.Sprintf("%d %x", v, o.DataOut))
		}
		return results
	}
	packets := make([][]byte, 64)
	for i := range packets {
		packets[i] = make([]byte, 64+r.IntN(100))
		for j := range packets[i] {
			packets[i][j] = byte(r.Uint32())
		}
	}
	for range 10 {
		var names []string
		for i := range 2 + r.IntN(5) {
			o := scene.Persistent(fmt.Sprintf("m%d", i), 10+i)
			o.ContinueOn = hook.SetOf(hook.Pass, hook.Verdict(r.IntN(4)), hook.Verdict(r.IntN(4)))
			spec := random(r, fmt.Sprintf("ldt_random_%d", i))
			qt.Assert(t, qt.IsNil(s.Join(t, dispatcher.Spec(scene.Alone(spec), dispatcher.LoadOptions{}), o).Close()))
			names = append(names, o.Name)
		}
		open := results(packets)
		s.Seal(t, strings.Join(names, " "))
		qt.Assert(t, qt.DeepEquals(results(packets), open))
		s.Clear(t)
	}
}
