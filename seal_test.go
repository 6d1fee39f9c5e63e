package dispatcher_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
)

// newSealScene is newScene with tracers that can be sealed.
func newSealScene(t testing.TB) *scene {
	t.Helper()
	s := newScene(t)
	s.coded = true
	return s
}

// alone is a program in a collection of its own.
func alone(prog *ebpf.ProgramSpec) *ebpf.CollectionSpec {
	return &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{prog.Name: prog}}
}

// coded is a program that was loaded from what the library has seen, so that its code is kept.
func coded(t testing.TB, prog *ebpf.ProgramSpec) *ebpf.Program {
	t.Helper()
	loaded, err := load.Spec{Collection: alone(prog)}.Load(load.Want{Hook: hook.XDP})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(loaded.Close)
	return loaded.Program
}

// persistent are the options of a member that can be sealed.
func persistent(name string, prio int) dispatcher.Options {
	return dispatcher.Options{Name: name, Settings: priority(prio), Persistent: true}
}

// keep makes a tracer a persistent member that nobody has open, called by its number.
func (s *scene) keep(t testing.TB, number, verdict, prio int) {
	t.Helper()
	qt.Assert(t, qt.IsNil(s.attach(t, s.tracer(t, number, verdict), persistent(fmt.Sprint(number), prio)).Close()))
}

// seal seals the chain and compares what became of the members: "1 2(reason)", reasons being patterns.
func (s *scene) seal(t testing.TB, want string, reasons ...string) {
	t.Helper()
	report, err := dispatcher.Seal(t.Context(), s.target, dispatcher.SealOptions{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	wantSealing(t, report, want, reasons...)
	var sealed []string
	for _, r := range report {
		if r.Sealed {
			sealed = append(sealed, r.Member)
		}
	}
	s.wantSealed(t, sealed...)
}

// wantSealing compares a report: the members in order, with an exclamation mark those that stay in their slots, for
// the reasons given in order.
func wantSealing(t testing.TB, report []hook.Sealing, want string, reasons ...string) {
	t.Helper()
	var words, why []string
	for _, r := range report {
		word := r.Member
		if !r.Sealed {
			word += "!"
			why = append(why, r.Reason)
		}
		qt.Check(t, qt.Equals(r.Sealed, r.Reason == ""), qt.Commentf("%+v", r))
		words = append(words, word)
	}
	qt.Assert(t, qt.Equals(strings.Join(words, " "), want), qt.Commentf("%q", why))
	qt.Assert(t, qt.HasLen(why, len(reasons)))
	for i, reason := range reasons {
		qt.Check(t, qt.Matches(why[i], reason))
	}
}

func (s *scene) unseal(t testing.TB) {
	t.Helper()
	qt.Assert(t, qt.IsNil(dispatcher.Unseal(t.Context(), s.target, dispatcher.UnsealOptions{BPFFS: s.bpffs})))
	s.wantSealed(t)
}

// wantSealed compares which members are linked into the dispatcher, by what Read says.
func (s *scene) wantSealed(t testing.TB, names ...string) {
	t.Helper()
	var sealed []string
	for _, m := range s.read(t).Members {
		if m.Sealed {
			sealed = append(sealed, m.Name)
		}
	}
	qt.Assert(t, qt.DeepEquals(sealed, names))
}

// slot opens a member's slot, which packets of a sealed member do not come by.
func (s *scene) slot(t testing.TB, name string) *ebpf.Map {
	t.Helper()
	m := s.read(t).Member(name)
	qt.Assert(t, qt.IsNotNil(m))
	slot, err := ebpf.NewMapFromID(ebpf.MapID(m.SlotID))
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { slot.Close() })
	return slot
}

// A sealed chain does what it did, in one program; and unsealed it is what it was.
func TestSeal(t *testing.T) {
	eachMode(t, func(t *testing.T, s *scene, mode hook.Mode) {
		s.coded = true
		o := persistent("1", 10)
		o.Mode = mode
		qt.Assert(t, qt.IsNil(s.attach(t, s.tracer(t, 1, pass), o).Close()))
		qt.Assert(t, qt.IsNil(s.attach(t, s.tracer(t, 2, testenv.XDPTX), dispatcher.Options{
			Name: "2", Settings: hook.Settings{Priority: 20, ContinueOn: hook.SetOf(hook.TX), OnMissing: hook.MissingDrop}, Persistent: true,
		}).Close()))
		s.keep(t, 3, pass, 30)
		s.keep(t, 4, drop, 40)
		s.keep(t, 5, pass, 50)
		s.wantRun(t, 1, 2, 3, 4)
		open := s.read(t)

		report, err := dispatcher.Seal(t.Context(), s.target, dispatcher.SealOptions{DryRun: true, BPFFS: s.bpffs})
		qt.Assert(t, qt.IsNil(err))
		wantSealing(t, report, "1 2 3 4 5")
		qt.Assert(t, qt.DeepEquals(s.read(t), open))

		s.seal(t, "1 2 3 4 5")
		s.wantRun(t, 1, 2, 3, 4)
		qt.Assert(t, qt.IsTrue(s.drops(t)))
		sealed := s.read(t)
		qt.Assert(t, qt.Not(qt.Equals(sealed.DispatcherID, open.DispatcherID)))

		// What else there is to say of the members is the same.
		for i := range sealed.Members {
			sealed.Members[i].Sealed = false
		}
		sealed.DispatcherID = open.DispatcherID
		qt.Assert(t, qt.DeepEquals(sealed, open))

		// No packet comes by a slot.
		other := s.trace.Program(t, 9, pass)
		slot := s.slot(t, "3")
		qt.Assert(t, qt.IsNil(state.Fill(slot, other)))
		s.wantRun(t, 1, 2, 3, 4)
		s.unseal(t)
		s.wantRun(t, 1, 2, 9, 4)
		qt.Assert(t, qt.IsTrue(s.drops(t)))

		// Neither is done twice.
		unsealed := s.read(t)
		s.unseal(t)
		qt.Assert(t, qt.DeepEquals(s.read(t), unsealed))
		s.seal(t, "1 2 3! 4 5", `its object code is not at hand: .*`)
		once := s.read(t)
		s.seal(t, "1 2 3! 4 5", `its object code is not at hand: .*`)
		qt.Assert(t, qt.DeepEquals(s.read(t), once))
		s.wantRun(t, 1, 2, 9, 4)
		s.clear(t)
		s.wantFree(t)
	})
}

// A sealed program goes on with the maps that it had: what it has counted, what it was told, what others write there, and
// its variables and constants.
func TestSealKeepsMaps(t *testing.T) {
	s := newScene(t)
	from := dispatcher.File("testdata/filter.o", dispatcher.LoadOptions{Globals: map[string]string{"port": "7003", "left": "1000"}})
	filter := s.join(t, from, persistent("filter", 10))
	list, err := programs.Spec("droplist")
	qt.Assert(t, qt.IsNil(err))
	s.join(t, dispatcher.Spec(list, dispatcher.LoadOptions{Program: programs.Function("droplist", hook.XDP)}), persistent("list", 20))
	pin := func(member, name string) *ebpf.Map {
		paths := s.read(t).Pins
		i := slices.IndexFunc(paths, func(path string) bool { return strings.HasSuffix(path, "/member_"+member+"/map_"+name) })
		qt.Assert(t, qt.IsTrue(i >= 0), qt.Commentf("%s in %q", name, paths))
		m, err := ebpf.LoadPinnedMap(paths[i], nil)
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { m.Close() })
		return m
	}
	number := func(m *ebpf.Map) (n uint64) {
		t.Helper()
		qt.Assert(t, qt.IsNil(m.Lookup(uint32(0), &n)))
		return n
	}
	dropped, seen, left := pin("filter", "ldt_dropped"), pin("filter", "%2Ebss"), pin("filter", "%2Edata")
	listed := pin("list", "droplist_v4")
	_, key := programs.DropKey(netip.PrefixFrom(testenv.ClientIPv4, 32))

	count := uint64(0)
	check := func(note string) {
		t.Helper()
		comment := qt.Commentf("%s", note)
		s.wantDropped(t, port+3)
		count += 5
		qt.Assert(t, qt.Equals(number(dropped), count), comment)
		qt.Assert(t, qt.Equals(number(seen)+number(left), 1000), comment) // each packet takes one of these to that
		qt.Assert(t, qt.IsTrue(number(seen) >= 8*count), comment)

		qt.Assert(t, qt.IsNil(listed.Put(key, uint64(0))))
		qt.Assert(t, qt.Equals(s.Passed(t, port, 5), 0), comment)
		qt.Assert(t, qt.IsNil(listed.Delete(key)))
		qt.Assert(t, qt.Equals(s.Passed(t, port, 5), 5), comment)
	}
	check("open")
	s.seal(t, "filter list")
	check("sealed")
	qt.Assert(t, qt.IsNil(filter.Close()))
	check("its handle closed")

	// Others come and go, and the maps stay.
	s.join(t, file("several.o", "ldt_second"), persistent("second", 5))
	s.detach(t, "second")
	check("after others")
	s.unseal(t)
	check("unsealed")
	s.clear(t)
	s.wantFree(t)
}

// busy is a tracer that has most of the functions that a program may have: 256 (BPF_MAX_SUBPROGS).
func (s *scene) busy(number int) *ebpf.ProgramSpec {
	const functions = 200
	spec := s.trace.Spec(number, pass)
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
func (s *scene) deep(number int) *ebpf.ProgramSpec {
	spec := s.trace.Spec(number, pass)
	for i := range int16(63) {
		spec.Instructions = append(asm.Instructions{asm.StoreImm(asm.R10, -8*(i+1), 1, asm.Word)}, spec.Instructions...)
	}
	spec.Instructions = append(asm.Instructions{asm.Mov.Imm(asm.R8, 8), asm.Mov.Imm(asm.R9, 9)}, spec.Instructions...)
	return spec
}

// greedy is a tracer that takes all registers and little of the stack, where it leaves a number.
func (s *scene) greedy(number, verdict int) *ebpf.ProgramSpec {
	spec := s.trace.Spec(number, verdict)
	spec.Instructions = append(asm.Instructions{
		asm.Mov.Imm(asm.R8, 8), asm.Mov.Imm(asm.R9, 9),
		asm.StoreMem(asm.R10, -8, asm.R8, asm.DWord), asm.StoreMem(asm.R10, -16, asm.R9, asm.DWord),
	}, spec.Instructions...)
	return spec
}

// What cannot be sealed stays in its slot, with a reason; it runs as before, in its place, and belongs to whom it did.
func TestSealLeavesInSlots(t *testing.T) {
	s := newSealScene(t)
	s.keep(t, 1, pass, 1)
	qt.Assert(t, qt.IsNil(s.attach(t, s.trace.Program(t, 2, pass), persistent("bare", 2)).Close()))
	owner := s.attachIn(t, s.tracer(t, 3, pass), dispatcher.Options{Name: "owned", Settings: priority(3)})
	s.keep(t, 4, pass, 4)
	secret := s.trace.Spec(5, pass)
	secret.License = "Proprietary"
	s.attach(t, coded(t, secret), persistent("secret", 5))
	for number, name := range map[int]string{6: "busy", 7: "busier"} {
		qt.Assert(t, qt.IsNil(s.join(t, dispatcher.Spec(alone(s.busy(number)), dispatcher.LoadOptions{}), persistent(name, number)).Close()))
	}
	mine := s.attach(t, s.tracer(t, 8, pass), dispatcher.Options{Name: "mine", Settings: priority(8)})
	s.join(t, file("tailcall.o", "ldt_entry"), persistent("tail", 9))
	s.wantRun(t, 1, 2, 3, 4, 5, 6, 7, 8)
	qt.Assert(t, qt.IsTrue(s.drops(t))) // the last one does

	notMine := `it is not pinned: it belongs to a process, .*`
	s.seal(t, "1 bare! owned! 4 secret! busy busier! mine! tail!",
		`its object code is not at hand: it was loaded elsewhere; .*`, notMine,
		`its license "Proprietary" is not one .*compatible with the GPL.*`,
		`together with the others: .*libdispatcher.*too many subprog.*`, notMine, `it makes tail calls`)
	s.wantRun(t, 1, 2, 3, 4, 5, 6, 7, 8)
	qt.Assert(t, qt.IsTrue(s.drops(t)))

	owner.Kill()
	s.wantRunSoon(t, 1, 2, 4, 5, 6, 7, 8)
	qt.Assert(t, qt.IsNil(mine.Close()))
	s.wantRunSoon(t, 1, 2, 4, 5, 6, 7)
	s.wantSealed(t, "1", "4", "busy")
	qt.Assert(t, qt.IsTrue(s.drops(t)))

	// What goes on with its slot is not in the way of the next one.
	s.detach(t, "busy")
	s.seal(t, "1 bare! 4 secret! busier tail!", `.*`, `.*`, `.*`)
	s.wantRun(t, 1, 2, 4, 5, 7)
	s.clear(t)
	s.wantFree(t)
}

// Members that take all that a program has: registers, and the stack. How much of that is left for the dispatcher's own
// function differs from kernel to kernel; alone they can be sealed on all.
func TestSealDeepStack(t *testing.T) {
	s := newSealScene(t)
	goOn := func(name string, prio int) dispatcher.Options {
		o := persistent(name, prio)
		o.Settings.ContinueOn = hook.SetOf(hook.Pass, hook.Drop) // so that the verdict has to be kept
		return o
	}
	join := func(spec *ebpf.ProgramSpec, o dispatcher.Options) {
		t.Helper()
		qt.Assert(t, qt.IsNil(s.join(t, dispatcher.Spec(alone(spec), dispatcher.LoadOptions{}), o).Close()))
	}
	join(s.deep(6), goOn("deep", 6))
	s.seal(t, "deep")
	s.wantRun(t, 6)

	// It is not in the way of one that joins: it is called through its slot again, if need be.
	s.keep(t, 1, pass, 1)
	s.wantRun(t, 1, 6)
	join(s.greedy(7, drop), goOn("greedy", 7))
	s.wantRun(t, 1, 6, 7)
	qt.Assert(t, qt.IsNil(s.attach(t, s.trace.Program(t, 8, pass), goOn("bare", 8)).Close()))
	qt.Assert(t, qt.IsFalse(s.drops(t))) // the last one passes

	report, err := dispatcher.Seal(t.Context(), s.target, dispatcher.SealOptions{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	if report[1].Sealed {
		wantSealing(t, report, "1 deep greedy bare!", `its object code is not at hand: .*`)
	} else {
		wantSealing(t, report, "1 deep! greedy bare!",
			`together with the others: the verifier refused program "libdispatcher": .*stack.*`, `its object code is not at hand: .*`)
	}
	s.wantRun(t, 1, 6, 7, 8)
	qt.Assert(t, qt.IsFalse(s.drops(t)))

	// The verdict that counts is the greedy one's when nothing runs after it.
	s.detach(t, "bare")
	s.wantRun(t, 1, 6, 7)
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	qt.Assert(t, qt.IsNil(s.attach(t, s.tracer(t, 8, pass), dispatcher.Options{
		Name: "door", Settings: hook.Settings{Priority: 90, OnMissing: hook.MissingContinue},
	}).Close()))
	s.wantRunSoon(t, 1, 6, 7)
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	s.clear(t)
	s.wantFree(t)
}

// A chain of which nothing can be sealed is left as it is, and what is no chain of ours is refused.
func TestSealNothing(t *testing.T) {
	s := newScene(t)
	seal := func(target dispatcher.Target) error {
		_, err := dispatcher.Seal(t.Context(), target, dispatcher.SealOptions{BPFFS: s.bpffs})
		_, dry := dispatcher.Seal(t.Context(), target, dispatcher.SealOptions{BPFFS: s.bpffs, DryRun: true})
		qt.Assert(t, qt.Equals(fmt.Sprint(dry), fmt.Sprint(err)))
		return err
	}
	unseal := func(target dispatcher.Target) error {
		return dispatcher.Unseal(t.Context(), target, dispatcher.UnsealOptions{BPFFS: s.bpffs})
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

	refused(s.target, fs.ErrNotExist, `xdp veth1: nothing is attached`)
	refused(dispatcher.XDP("nodevice").In(s.Server.Name), fs.ErrNotExist, `xdp nodevice: .*there is no device.*`)
	tcx := s.target
	tcx.Hook = hook.TCXIngress
	refused(tcx, dispatcher.ErrUsage, `tcx/ingress veth1: tcx/ingress has no dispatcher: .*; only chains of xdp can be sealed`)
	refused(dispatcher.On(hook.CgroupConnect4, testenv.NewCgroup(t).Path), dispatcher.ErrUsage, `cgroup/connect4 .*; only chains of xdp can be sealed`)

	// Programs of others.
	s.attachLegacy(t, s.tracer(t, 1, pass))
	refused(s.target, dispatcher.ErrBusy, `xdp veth1: .*`)
	s.wantRun(t, 1)
	s.free(t)
	foreign, _ := s.foreignLink(t, s.tracer(t, 2, pass))
	refused(s.target, dispatcher.ErrBusy, `xdp veth1: held by .*`)
	s.wantRun(t, 2)
	qt.Assert(t, qt.IsNil(foreign.Close()))

	// A chain without a member that can be.
	link := s.attach(t, s.tracer(t, 1, pass), dispatcher.Options{Name: "1"})
	before := s.read(t)
	s.seal(t, "1!", `it is not pinned: .*`)
	s.unseal(t)
	qt.Assert(t, qt.DeepEquals(s.read(t), before))
	s.wantRun(t, 1)

	// Whoever sees no pins, sees nobody who is pinned.
	qt.Assert(t, qt.IsNil(link.Pin(t.Context())))
	report, err := dispatcher.Seal(t.Context(), s.target, dispatcher.SealOptions{BPFFS: t.TempDir()})
	qt.Assert(t, qt.IsNil(err))
	wantSealing(t, report, "1!", `it is not pinned in .*`)
	s.clear(t)
	s.wantFree(t)
}

// A chain of libxdp has its programs linked by the kernel already, and is shared.
func TestSealLibxdp(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	s.joinLibxdp(t, 1, pass, 10)
	_, err := dispatcher.Seal(t.Context(), s.target, dispatcher.SealOptions{BPFFS: s.bpffs})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	qt.Check(t, qt.ErrorMatches(err, `seal xdp veth1: the chain is one of libxdp's, and cannot be sealed.*convert xdp veth1 --style owned.*`))
	err = dispatcher.Unseal(t.Context(), s.target, dispatcher.UnsealOptions{BPFFS: s.bpffs})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	s.wantRun(t, 1)

	// Converted to an owned one, it can be.
	s.convert(t, hook.StyleOwned, 1)
	s.seal(t, tracerRef(1))
	s.wantRun(t, 1)
	s.convert(t, hook.StyleLibxdp, 1)
	s.wantRun(t, 1)
	s.clear(t)
	s.wantFree(t)
	s.wantNoDispatchers(t)
}

// A sealed chain can be changed as any other.
func TestChangesWhileSealed(t *testing.T) {
	s := newSealScene(t)
	ctx := t.Context()
	s.keep(t, 1, pass, 10)
	s.keep(t, 2, pass, 20)
	s.keep(t, 3, pass, 30)
	s.seal(t, "1 2 3")

	// Join, for good and for a while, and leave.
	s.keep(t, 4, pass, 15)
	guest := s.attach(t, s.tracer(t, 5, pass), dispatcher.Options{Name: "5", Settings: priority(40)})
	s.wantSealed(t, "1", "2", "3")
	s.wantRun(t, 1, 4, 2, 3, 5)
	s.seal(t, "1 4 2 3 5!", `it is not pinned: .*`)
	s.wantRun(t, 1, 4, 2, 3, 5)
	qt.Assert(t, qt.IsNil(guest.Close()))
	s.wantRunSoon(t, 1, 4, 2, 3)
	s.detach(t, "4")
	s.wantSealed(t, "1", "2", "3")
	s.wantRun(t, 1, 2, 3)

	// Set and move. A handle that was open all the time, and one of another process.
	two, other := s.open(t, "2"), newApp(t)
	qt.Assert(t, qt.IsNil(other.do(t, s.command(command{Op: "open", Member: "1"}))))
	qt.Assert(t, qt.IsNil(two.Set(ctx, hook.Settings{Priority: 50, ContinueOn: hook.SetOf(hook.Drop)})))
	s.wantRun(t, 1, 3, 2)
	qt.Assert(t, qt.IsNil(other.do(t, s.command(command{Op: "move", Position: hook.Position{Last: true}}))))
	s.wantRun(t, 3, 2) // which goes on for what is dropped only
	s.wantSealed(t, "3", "2", "1")
	qt.Assert(t, qt.IsNil(two.Set(ctx, hook.Settings{ContinueOn: hook.SetOf(hook.Pass)})))
	s.wantRun(t, 3, 2, 1)
	info, err := two.Info(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(info.Sealed))
	chain, err := two.Chain(ctx)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(chain.Member("2").Sealed))

	// Replace by code that can be sealed: from here, from another process.
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Spec(alone(s.trace.Spec(12, pass)), dispatcher.LoadOptions{}))))
	s.wantRun(t, 3, 12, 1)
	qt.Assert(t, qt.IsNil(other.do(t, s.command(command{Op: "update", Program: idOf(t, s.tracer(t, 11, pass))}))))
	s.wantRun(t, 3, 12, 11)
	s.wantSealed(t, "3", "2", "1")

	// By a program without code: it runs at once, from its slot, and so does what comes after it.
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(s.trace.Program(t, 22, pass)))))
	s.wantRun(t, 3, 22, 11)
	s.wantSealed(t, "3", "1")
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(s.tracer(t, 32, pass)))))
	s.wantRun(t, 3, 32, 11)
	s.wantSealed(t, "3", "1")
	s.seal(t, "3 2 1")
	s.wantRun(t, 3, 32, 11)
	qt.Assert(t, qt.IsNil(two.Update(ctx, file("tailcall.o", "ldt_entry"))))
	s.wantRun(t, 3)
	qt.Assert(t, qt.IsTrue(s.drops(t)))
	s.wantSealed(t, "3", "1")
	qt.Assert(t, qt.IsNil(two.Update(ctx, dispatcher.Program(s.tracer(t, 2, pass)))))
	s.seal(t, "3 2 1")

	// What is refused changes nothing.
	sealed := s.read(t)
	qt.Assert(t, qt.IsNotNil(two.Update(ctx, file("refused.o", ""))))
	qt.Assert(t, qt.DeepEquals(s.read(t), sealed))

	// A handle goes, the member stays.
	qt.Assert(t, qt.IsNil(two.Close()))
	qt.Assert(t, qt.IsNil(other.Stop()))
	s.wantRun(t, 3, 2, 11)
	s.wantSealed(t, "3", "2", "1")

	// A member that is made its owner's is in its slot from then on, and leaves with it.
	two = s.open(t, "2")
	qt.Assert(t, qt.IsNil(two.Unpin(ctx)))
	s.wantRun(t, 3, 2, 11)
	s.wantSealed(t, "3", "1")
	qt.Assert(t, qt.IsNil(two.Close()))
	s.wantRunSoon(t, 3, 11)

	// The chain goes on a device that is renamed, and all of it can be taken off.
	qt.Assert(t, qt.DeepEquals(sealedNames(s.read(t)), []string{"3", "1"}))
	s.clear(t)
	s.wantFree(t)
}

func sealedNames(c *hook.Chain) (names []string) {
	for _, m := range c.Members {
		if m.Sealed {
			names = append(names, m.Name)
		}
	}
	return names
}

// A program of several versions, replaced while it is sealed, goes on with its maps.
func TestReplaceKeepsMapsWhileSealed(t *testing.T) {
	s := newScene(t)
	link := s.join(t, file("filter.o", ""), persistent("filter", 10))
	s.join(t, file("several.o", "ldt_second"), persistent("second", 20))
	s.seal(t, "filter second")
	pins := s.read(t).Pins
	path := filepath.Dir(pins[slices.IndexFunc(pins, func(p string) bool { return strings.Contains(p, "member_filter") })]) + "/map_ldt_dropped"
	count := uint64(0)
	for round := range 3 {
		s.wantDropped(t, port, port+1)
		count += 5
		qt.Assert(t, qt.Equals(pinnedCount(t, path), count))
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), file("other.o", ""))), qt.Commentf("round %d", round))
		s.wantDropped(t, port+1)
		qt.Assert(t, qt.Equals(pinnedCount(t, path), count))
		qt.Assert(t, qt.DeepEquals(s.memberPins(t, "filter"), []string{"map_ldt_dropped", "map_ldt_passed", "slot"}))
		s.wantSealed(t, "filter", "second")
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), file("filter.o", ""))))
		s.wantSealed(t, "filter", "second")
	}
	s.clear(t)
	s.wantFree(t)
}

// A pin that is removed by hand: packets go on to run what was linked, and the member leaves with the next change of the
// chain; one that leaves a closed door behind, closes it then.
func TestSealedPinRemovedByHand(t *testing.T) {
	for missing, after := range map[hook.OnMissing][]int{hook.MissingContinue: {1, 3, 4}, hook.MissingDrop: {1}} {
		t.Run(missing.String(), func(t *testing.T) {
			s := newSealScene(t)
			s.keep(t, 1, pass, 1)
			qt.Assert(t, qt.IsNil(s.attach(t, s.tracer(t, 2, pass), dispatcher.Options{
				Name: "2", Settings: hook.Settings{Priority: 2, OnMissing: missing}, Persistent: true,
			}).Close()))
			s.keep(t, 3, pass, 3)
			s.seal(t, "1 2 3")
			for _, path := range s.read(t).Pins {
				if strings.Contains(path, "/member_2/") {
					qt.Assert(t, qt.IsNil(os.Remove(path)))
				}
			}
			// The kernel empties the slot. Packets do not see that, and it is not shown either.
			linked := s.read(t).Member("2")
			soon(t, func() bool { return s.read(t).Member("2").Program.Name == "" })
			s.wantRun(t, 1, 2, 3)
			shown := s.read(t).Member("2")
			qt.Check(t, qt.Equals(shown.State, hook.StateRunning))
			qt.Check(t, qt.Equals(shown.Program.ID, linked.Program.ID))
			s.keep(t, 4, pass, 4)
			s.wantRun(t, after...)
			if missing == hook.MissingDrop {
				qt.Assert(t, qt.IsTrue(s.drops(t)))
			}
			s.wantSealed(t, "1", "3")
			s.clear(t)
			s.wantFree(t)
		})
	}
}

// Anyone who may bind a map to a program can say that this is its code. It is not believed.
func TestSealForgedCode(t *testing.T) {
	s := newSealScene(t)
	s.keep(t, 1, pass, 10)
	forge := func(c *dispatch.Code) *ebpf.Program {
		t.Helper()
		prog := s.trace.Program(t, 2, pass)
		qt.Assert(t, qt.IsNil(state.KeepCode(prog, c)))
		return prog
	}
	other := s.tracer(t, 9, pass)
	code, _, err := state.CodeOf(other)
	qt.Assert(t, qt.IsNil(err))
	link := s.attach(t, forge(code), persistent("2", 20))
	s.seal(t, "1 2!", `its object code is not that of the program \(tag [0-9a-f]+, not [0-9a-f]+\)`)
	s.wantRun(t, 1, 2)

	// The right instructions with the maps of others.
	own, _, err := state.CodeOf(s.tracer(t, 2, pass))
	qt.Assert(t, qt.IsNil(err))
	foreign, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_foreign", Type: ebpf.Array, KeySize: 4, ValueSize: 16 + 64*4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer foreign.Close()
	info, err := foreign.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	own.Maps = []uint32{uint32(id)}
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(forge(own)))))
	s.seal(t, "1 2!", `its object code is not that of the program \(it uses map `+regexp.QuoteMeta(fmt.Sprint(id))+`.*\)`)

	// What is no code at all, and what was of a program that is not there any more.
	for _, value := range [][]byte{{0}, []byte("no code")} {
		prog := s.trace.Program(t, 2, pass)
		m, err := ebpf.NewMap(&ebpf.MapSpec{
			Name: "ld_code", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(value)), MaxEntries: 1,
			Contents: []ebpf.MapKV{{Key: uint32(0), Value: value}},
		})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(errors.Join(m.Freeze(), prog.BindMap(m), m.Close())))
		qt.Assert(t, qt.IsNil(link.Update(t.Context(), dispatcher.Program(prog))))
		s.seal(t, "1 2!", `object code of program "ldt_trace_2": .*`)
		s.wantRun(t, 1, 2)
	}
	s.clear(t)
	s.wantFree(t)
}

// Between two who cannot see each other's lock: whatever the one is at when the other comes, in the end packets run what
// is in the slots.
func TestSealAgainstOthers(t *testing.T) {
	s := newSealScene(t)
	bare := map[int]*ebpf.Program{}
	for n := 20; n < 30; n++ {
		bare[n] = s.trace.Program(t, n, pass)
	}
	ctx := t.Context()
	second := 0
	// next is another program for the member each time.
	next := func(programs ...*ebpf.Program) *ebpf.Program {
		second++
		return programs[second%len(programs)]
	}
	withCode := []*ebpf.Program{s.tracer(t, 10, pass), s.tracer(t, 11, pass), s.tracer(t, 12, pass)}
	without := []*ebpf.Program{bare[20], bare[21], bare[22]}

	for what, first := range map[string]func(*dispatcher.Link) error{
		"seal": func(*dispatcher.Link) error {
			_, err := dispatcher.Seal(ctx, s.target, dispatcher.SealOptions{BPFFS: s.bpffs})
			return err
		},
		"unseal": func(*dispatcher.Link) error {
			return dispatcher.Unseal(ctx, s.target, dispatcher.UnsealOptions{BPFFS: s.bpffs})
		},
		"replace":              func(l *dispatcher.Link) error { return l.Update(ctx, dispatcher.Program(next(withCode...))) },
		"replace without code": func(l *dispatcher.Link) error { return l.Update(ctx, dispatcher.Program(next(without...))) },
		"set":                  func(l *dispatcher.Link) error { return l.Set(ctx, priority(40+second%2)) },
		"detach another":       func(*dispatcher.Link) error { return dispatcher.Detach(ctx, s.target, "3", s.leave()) },
	} {
		for with, programs := range map[string][]*ebpf.Program{"with code": withCode, "without": without} {
			for _, sealed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s and replace %s, sealed %v", what, with, sealed), func(t *testing.T) {
					t.Cleanup(func() { dispatcher.DetachAll(context.Background(), s.target, s.leave()) })
					// The step of the first at which the second replaces the program.
					for at := 1; ; at++ {
						s.keep(t, 1, pass, 10)
						qt.Assert(t, qt.IsNil(s.attach(t, next(withCode...), persistent("2", 20)).Close()))
						s.keep(t, 3, pass, 30)
						if sealed {
							s.seal(t, "1 2 3")
						}
						link := s.open(t, "2")
						other := newApp(t)
						blind := s.command(command{Op: "open", Member: "2"})
						blind.BPFFS = t.TempDir()
						qt.Assert(t, qt.IsNil(other.do(t, blind)))

						n, name := 0, ""
						err := atEachStep(func() error { return first(link) }, func(step string) {
							if n++; n != at {
								return
							}
							name = step
							blind.Op, blind.Program = "update", idOf(t, next(programs...))
							qt.Assert(t, qt.IsNil(other.do(t, blind)))
						})
						qt.Assert(t, qt.IsNil(err))
						got := s.ran(t)
						qt.Assert(t, qt.DeepEquals(got, running(s.read(t))), qt.Commentf("replaced at step %d, %q", at, name))
						s.unseal(t)
						s.wantRun(t, got...)
						qt.Assert(t, qt.IsNil(link.Close()))
						other.Kill()
						s.clear(t)
						if name == "" {
							break
						}
					}
				})
			}
		}
	}
	s.wantFree(t)
}
