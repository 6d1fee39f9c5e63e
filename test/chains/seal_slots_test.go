package chains

import (
	"fmt"
	"io/fs"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// busy is a tracer that has most of the functions that a program may have: 256 (BPF_MAX_SUBPROGS).
func busy(s *scene.Scene, number int) *ebpf.ProgramSpec {
	const functions = 200
	spec := s.Trace.Spec(number, scene.Pass)
	name := func(i int) string { return fmt.Sprintf("function_%d", i) }
	begin := asm.Instructions{asm.Mov.Reg(asm.R8, asm.R1)}
	end := asm.Instructions{}
	for i := range functions {
		begin = append(begin, asm.Call.Label(name(i)))
		end = append(end, asm.Mov.Imm(asm.R0, 0).WithSymbol(name(i)), asm.Return())
	}
	spec.Instructions = slices.Concat(begin, asm.Instructions{asm.Mov.Reg(asm.R1, asm.R8)}, spec.Instructions, end)
	return spec
}

// deep is a tracer that takes most of what programs have of a stack, 512 bytes (MAX_BPF_STACK), and all registers: what is to
// be kept while it runs there is no place for beside it.
func deep(s *scene.Scene, number int) *ebpf.ProgramSpec {
	spec := s.Trace.Spec(number, scene.Pass)
	for i := range int16(63) {
		spec.Instructions = append(asm.Instructions{asm.StoreImm(asm.R10, -8*(i+1), 1, asm.Word)}, spec.Instructions...)
	}
	spec.Instructions = append(asm.Instructions{asm.Mov.Imm(asm.R8, 8), asm.Mov.Imm(asm.R9, 9)}, spec.Instructions...)
	return spec
}

// greedy is a tracer that takes all registers and little of the stack, where it leaves a number.
func greedy(s *scene.Scene, number, verdict int) *ebpf.ProgramSpec {
	spec := s.Trace.Spec(number, verdict)
	spec.Instructions = append(asm.Instructions{
		asm.Mov.Imm(asm.R8, 8), asm.Mov.Imm(asm.R9, 9),
		asm.StoreMem(asm.R10, -8, asm.R8, asm.DWord), asm.StoreMem(asm.R10, -16, asm.R9, asm.DWord),
	}, spec.Instructions...)
	return spec
}

// What cannot be sealed stays in its slot, with a reason; it runs as before, in its place, and belongs to whom it did.
func TestSealLeavesInSlots(t *testing.T) {
	s := scene.NewSealScene(t)
	s.Member(t, 1, 1)
	qt.Assert(t, qt.IsNil(s.Attach(t, s.Trace.Program(t, 2, scene.Pass), scene.Persistent("bare", 2)).Close()))
	owner := s.AttachIn(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "owned", Priority: 3})
	s.Member(t, 4, 4)
	secret := s.Trace.Spec(5, scene.Pass)
	secret.License = "Proprietary"
	s.Attach(t, scene.Coded(t, secret), scene.Persistent("secret", 5))
	for number, name := range map[int]string{6: "busy", 7: "busier"} {
		qt.Assert(t, qt.IsNil(s.Join(t, dispatcher.Spec(scene.Alone(busy(s, number)), dispatcher.LoadOptions{}), scene.Persistent(name, number)).Close()))
	}
	mine := s.Attach(t, s.Tracer(t, 8, scene.Pass), dispatcher.Options{Name: "mine", Priority: 8})
	s.Join(t, scene.File("tailcall.o", "ldt_entry"), scene.Persistent("tail", 9))
	s.WantRun(t, 1, 2, 3, 4, 5, 6, 7, 8)
	qt.Assert(t, qt.IsTrue(s.Drops(t))) // the last one does

	notMine := `it is not pinned: it belongs to a process, .*`
	s.Seal(t, "1 bare! owned! 4 secret! busy busier! mine! tail!",
		`its object code is not at hand: it was loaded elsewhere; .*`, notMine,
		`its license "Proprietary" is not one .*compatible with the GPL.*`,
		`together with the others: .*libdispatcher.*too many subprog.*`, notMine, `it makes tail calls`)
	s.WantRun(t, 1, 2, 3, 4, 5, 6, 7, 8)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))

	owner.Kill()
	s.WantRunSoon(t, 1, 2, 4, 5, 6, 7, 8)
	qt.Assert(t, qt.IsNil(mine.Close()))
	s.WantRunSoon(t, 1, 2, 4, 5, 6, 7)
	s.WantSealed(t, "1", "4", "busy")
	qt.Assert(t, qt.IsTrue(s.Drops(t)))

	// Nor does what has lost its owner belong to a process.
	door := s.Attach(t, s.Tracer(t, 9, scene.Pass), dispatcher.Options{Name: "door", OnMissing: hook.MissingDrop, Priority: 7})
	qt.Assert(t, qt.IsNil(door.Close()))
	scene.Soon(t, func() bool { return s.Read(t).Member("door").State == hook.StateEmpty })
	s.Seal(t, "1 bare! 4 secret! busy busier! door! tail!", `.*`, `.*`, `.*`, `its slot is empty: its owner is gone`, `.*`)
	s.Detach(t, "door")

	// What goes on with its slot is not in the way of the next one.
	s.Detach(t, "busy")
	s.Seal(t, "1 bare! 4 secret! busier tail!", `.*`, `.*`, `.*`)
	s.WantRun(t, 1, 2, 4, 5, 7)
	s.Clear(t)
	s.WantFree(t)
}

// Members that take all that a program has: registers, and the stack. How much of that is left for the dispatcher's own
// function differs from kernel to kernel; alone they can be sealed on all.
func TestSealDeepStack(t *testing.T) {
	s := scene.NewSealScene(t)
	goOn := func(name string, prio int) dispatcher.Options {
		o := scene.Persistent(name, prio)
		o.ContinueOn = hook.SetOf(hook.Pass, hook.Drop) // so that the verdict has to be kept
		return o
	}
	join := func(spec *ebpf.ProgramSpec, o dispatcher.Options) {
		t.Helper()
		qt.Assert(t, qt.IsNil(s.Join(t, dispatcher.Spec(scene.Alone(spec), dispatcher.LoadOptions{}), o).Close()))
	}
	join(deep(s, 6), goOn("deep", 6))
	s.Seal(t, "deep")
	s.WantRun(t, 6)

	// It is not in the way of one that joins: it is called through its slot again, if need be.
	s.Member(t, 1, 1)
	s.WantRun(t, 1, 6)
	join(greedy(s, 7, scene.Drop), goOn("greedy", 7))
	s.WantRun(t, 1, 6, 7)
	qt.Assert(t, qt.IsNil(s.Attach(t, s.Trace.Program(t, 8, scene.Pass), goOn("bare", 8)).Close()))
	qt.Assert(t, qt.IsFalse(s.Drops(t))) // the last one passes

	report, err := dispatcher.Seal(t.Context(), s.Target, dispatcher.SealOptions{BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	if report[1].Sealed {
		scene.WantSealing(t, report, "1 deep greedy bare!", `its object code is not at hand: .*`)
	} else {
		scene.WantSealing(t, report, "1 deep! greedy bare!",
			`together with the others: the verifier refused program "libdispatcher": .*stack.*`, `its object code is not at hand: .*`)
	}
	s.WantRun(t, 1, 6, 7, 8)
	qt.Assert(t, qt.IsFalse(s.Drops(t)))

	// The verdict that counts is the greedy one's when nothing runs after it.
	s.Detach(t, "bare")
	s.WantRun(t, 1, 6, 7)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	qt.Assert(t, qt.IsNil(s.Attach(t, s.Tracer(t, 8, scene.Pass), dispatcher.Options{
		Name: "door", Priority: 90, OnMissing: hook.MissingContinue,
	}).Close()))
	s.WantRunSoon(t, 1, 6, 7)
	qt.Assert(t, qt.IsTrue(s.Drops(t)))
	s.Clear(t)
	s.WantFree(t)
}

// A chain of which nothing can be sealed is left as it is, and what is no chain of ours is refused.
func TestSealNothing(t *testing.T) {
	s := scene.New(t)
	seal := func(target dispatcher.Target) error {
		_, err := dispatcher.Seal(t.Context(), target, dispatcher.SealOptions{BPFFS: s.BPFFS})
		_, dry := dispatcher.Seal(t.Context(), target, dispatcher.SealOptions{BPFFS: s.BPFFS, DryRun: true})
		qt.Assert(t, qt.Equals(fmt.Sprint(dry), fmt.Sprint(err)))
		return err
	}
	unseal := func(target dispatcher.Target) error {
		return dispatcher.Unseal(t.Context(), target, dispatcher.ReadOptions{BPFFS: s.BPFFS})
	}
	refused := func(target dispatcher.Target, cause error, text string) {
		t.Helper()
		err := seal(target)
		qt.Check(t, qt.ErrorIs(err, cause))
		qt.Check(t, qt.ErrorMatches(err, "seal "+text))
		err = unseal(target)
		qt.Check(t, qt.ErrorIs(err, cause))
		qt.Check(t, qt.ErrorMatches(err, "unseal "+text))
	}

	refused(s.Target, fs.ErrNotExist, `xdp veth1: nothing is attached`)
	refused(dispatcher.XDP("nodevice").In(s.Server.Name), fs.ErrNotExist, `xdp nodevice: .*there is no device.*`)
	tcx := s.Target
	tcx.Hook = hook.TCXIngress
	refused(tcx, dispatcher.ErrUsage, `tcx/ingress veth1: tcx/ingress has no dispatcher: .*; only chains of xdp can be sealed`)
	refused(dispatcher.On(hook.CgroupConnect4, testenv.NewCgroup(t).Path), dispatcher.ErrUsage, `cgroup/connect4 .*; only chains of xdp can be sealed`)

	// Programs of others.
	s.AttachLegacy(t, s.Tracer(t, 1, scene.Pass))
	refused(s.Target, dispatcher.ErrBusy, `xdp veth1: .*`)
	s.WantRun(t, 1)
	s.Free(t)
	foreign, _ := s.Foreign(t, s.Tracer(t, 2, scene.Pass))
	refused(s.Target, dispatcher.ErrBusy, `xdp veth1: held by .*`)
	s.WantRun(t, 2)
	qt.Assert(t, qt.IsNil(foreign.Close()))

	// A chain without a member that can be.
	link := s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "1"})
	before := s.Read(t)
	s.Seal(t, "1!", `it is not pinned: .*`)
	s.Unseal(t)
	qt.Assert(t, qt.DeepEquals(s.Read(t), before))
	s.WantRun(t, 1)

	// A process that sees no pins takes no member for pinned.
	qt.Assert(t, qt.IsNil(scene.Second(link.Pin(t.Context()))))
	report, err := dispatcher.Seal(t.Context(), s.Target, dispatcher.SealOptions{BPFFS: t.TempDir()})
	qt.Assert(t, qt.IsNil(err))
	scene.WantSealing(t, report, "1!", `it is not pinned in .*`)
	s.Clear(t)
	s.WantFree(t)
}

// A chain of libxdp has its programs linked by the kernel already, and is shared.
func TestSealLibxdp(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	s.JoinLibxdp(t, 1, scene.Pass, 10)
	_, err := dispatcher.Seal(t.Context(), s.Target, dispatcher.SealOptions{BPFFS: s.BPFFS})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	qt.Check(t, qt.ErrorMatches(err, `seal xdp veth1: the chain is one of libxdp's, and cannot be sealed.*convert xdp veth1 --style owned.*`))
	err = dispatcher.Unseal(t.Context(), s.Target, dispatcher.ReadOptions{BPFFS: s.BPFFS})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	s.WantRun(t, 1)

	// Converted to an owned one, it can be.
	convert(t, s, hook.StyleOwned, 1)
	s.Seal(t, scene.TracerRef(1))
	s.WantRun(t, 1)
	convert(t, s, hook.StyleLibxdp, 1)
	s.WantRun(t, 1)
	s.Clear(t)
	s.WantFree(t)
	s.WantNoDispatchers(t)
}
