package libxdp

import (
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// component is a collection of one program, with types as clang -g makes them.
func component(name string, insns ...asm.Instruction) *ebpf.CollectionSpec {
	insns = testenv.Typed(name, append(slices.Clone(insns), asm.Return()))
	return &ebpf.CollectionSpec{Programs: map[string]*ebpf.ProgramSpec{
		name: {Name: name, Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL", Instructions: insns},
	}}
}

// gives is a component that gives every packet that verdict.
func gives(v hook.Verdict) *ebpf.CollectionSpec {
	return component("ldt_"+v.String(), asm.Mov.Imm(asm.R0, int32(v)))
}

// cuts is a component that removes the first 4 bytes of the packet.
func cuts(v hook.Verdict) *ebpf.CollectionSpec {
	return component("ldt_cut_"+v.String(), asm.Mov.Imm(asm.R2, 4), asm.FnXdpAdjustHead.Call(), asm.Mov.Imm(asm.R0, int32(v)))
}

func dispatcher(t *testing.T, c Config) *ebpf.Program {
	t.Helper()
	prog, err := newDispatcher(c, 0)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	return prog
}

func loadComponent(spec *ebpf.CollectionSpec, name string, dispatcher *ebpf.Program, stub string, opts ebpf.CollectionOptions) (*ebpf.Program, error) {
	src, err := FromSpec(spec, name, opts)
	if err != nil {
		return nil, err
	}
	return src.Load(dispatcher, stub)
}

// loaded loads the only program of a collection as a component.
func loaded(t *testing.T, spec *ebpf.CollectionSpec, dispatcher *ebpf.Program, stub string) *ebpf.Program {
	t.Helper()
	for name := range spec.Programs {
		prog, err := loadComponent(spec, name, dispatcher, stub, ebpf.CollectionOptions{})
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%+v", err))
		t.Cleanup(func() { prog.Close() })
		return prog
	}
	t.Fatal("no program")
	return nil
}

func linked(t *testing.T, prog, dispatcher *ebpf.Program, stub string) link.Link {
	t.Helper()
	l, err := linkComponent(prog, dispatcher, stub)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { l.Close() })
	return l
}

// A chain of real components does what its actions say, for each length.
func TestFreplaceChain(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	for n := 1; n <= MaxMembers; n++ {
		// The last program's TX is the verdict, unless an earlier program ends
		// the chain.
		d := dispatcher(t, configOf(3, slices.Repeat([]uint32{1 << hook.Pass}, n)...))
		for i := range n {
			stub := stubName(i, n)
			v := hook.Pass
			if i == n-1 {
				v = hook.TX
			}
			linked(t, loaded(t, gives(v), d, stub), d, stub)
		}
		qt.Check(t, qt.Equals(run(t, d), uint32(hook.TX)), qt.Commentf("%d programs", n))
	}
}

// The verdict is PASS where the last program's actions let the chain continue,
// but a single program's verdict is always the chain's.
func TestFreplaceLast(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	const all = 1<<hook.Verdicts - 1
	two := dispatcher(t, configOf(3, all, all))
	linked(t, loaded(t, gives(hook.Drop), two, "prog0"), two, "prog0")
	linked(t, loaded(t, gives(hook.TX), two, "prog1"), two, "prog1")
	qt.Check(t, qt.Equals(run(t, two), uint32(hook.Pass)))
	one := dispatcher(t, configOf(3, all))
	linked(t, loaded(t, gives(hook.TX), one, mainFunction), one, mainFunction)
	qt.Check(t, qt.Equals(run(t, one), uint32(hook.TX)))
}

// A chain is built from the programs of another chain, which runs meanwhile.
func TestFreplaceRelink(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	old := dispatcher(t, configOf(2, 1<<hook.Pass, 1<<hook.Pass))
	pass, drop := loaded(t, gives(hook.Pass), old, "prog0"), loaded(t, gives(hook.Drop), old, "prog1")
	first := linked(t, pass, old, "prog0")
	second := linked(t, drop, old, "prog1")
	qt.Assert(t, qt.Equals(run(t, old), uint32(hook.Drop)))

	three := dispatcher(t, configOf(2, 1<<hook.Pass, 1<<hook.Pass, 1<<hook.Pass))
	linked(t, pass, three, "prog0")
	linked(t, loaded(t, gives(hook.TX), three, "prog1"), three, "prog1")
	linked(t, drop, three, "prog2")
	qt.Check(t, qt.Equals(run(t, three), uint32(hook.TX)))
	qt.Check(t, qt.Equals(run(t, old), uint32(hook.Drop)))

	// A program that remains alone replaces another function.
	one := dispatcher(t, configOf(2, 1<<hook.Pass))
	only := linked(t, drop, one, mainFunction)
	qt.Check(t, qt.Equals(run(t, one), uint32(hook.Drop)))

	// The old chain is gone, with the dispatcher that the programs were loaded for.
	for _, l := range []link.Link{first, second, only} {
		l.Close()
	}
	old.Close()
	qt.Check(t, qt.Equals(run(t, three), uint32(hook.TX)))
	again := dispatcher(t, configOf(2, 1<<hook.Pass, 1<<hook.Pass))
	linked(t, drop, again, "prog0")
	qt.Check(t, qt.Equals(run(t, again), uint32(hook.Drop)))
}

// A link that goes leaves a stub, and the chain continues.
func TestFreplaceUnlink(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	d := dispatcher(t, configOf(3, 0, 0))
	l := linked(t, loaded(t, gives(hook.Drop), d, "prog0"), d, "prog0")
	linked(t, loaded(t, gives(hook.TX), d, "prog1"), d, "prog1")
	qt.Check(t, qt.Equals(run(t, d), uint32(hook.Drop)))
	qt.Assert(t, qt.IsNil(l.Close()))
	for range 100 { // the kernel does it some time later
		if run(t, d) == uint32(hook.TX) {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("the program that is linked no more still runs")
}

// A stub accepts one component.
func TestFreplaceTaken(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	d := dispatcher(t, configOf(3, 4, 4))
	linked(t, loaded(t, gives(hook.Pass), d, "prog0"), d, "prog0")
	_, err := linkComponent(loaded(t, gives(hook.Drop), d, "prog0"), d, "prog0")
	qt.Check(t, qt.ErrorIs(err, unix.EBUSY))
	_, err = linkComponent(loaded(t, gives(hook.Drop), d, "prog1"), d, "prog2")
	qt.Check(t, qt.ErrorIs(err, ErrNotDispatcher))
	qt.Check(t, qt.ErrorMatches(err, `the dispatcher has no function prog2`))
}

// On newer kernels a program that changes packets can replace only a function
// that may change packets too.
func TestFreplacePacketChanges(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	length := func(d *ebpf.Program) (uint32, int) {
		t.Helper()
		o := &ebpf.RunOptions{Data: make([]byte, 64), DataOut: make([]byte, 256)}
		v, err := d.Run(o)
		qt.Assert(t, qt.IsNil(err))
		return v, len(o.DataOut)
	}
	two := dispatcher(t, configOf(3, 4, 4))
	linked(t, loaded(t, cuts(hook.Pass), two, "prog0"), two, "prog0")
	linked(t, loaded(t, cuts(hook.TX), two, "prog1"), two, "prog1")
	v, n := length(two)
	qt.Check(t, qt.Equals(v, uint32(hook.TX)))
	qt.Check(t, qt.Equals(n, 56))
	one := dispatcher(t, configOf(3, 4))
	linked(t, loaded(t, cuts(hook.TX), one, mainFunction), one, mainFunction)
	v, n = length(one)
	qt.Check(t, qt.Equals(v, uint32(hook.TX)))
	qt.Check(t, qt.Equals(n, 60))
}

// A component is loaded without the flags that it would have without a
// dispatcher, and fits dispatchers with frags and without.
func TestFreplaceFrags(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	testenv.Need(t, testenv.FeatureFrags)
	c := configOf(3, 4, 4)
	plain := dispatcher(t, c)
	c.Frags = true
	frags := dispatcher(t, c)
	spec := gives(hook.TX)
	spec.Programs["ldt_tx"].Flags = hasFrags | devBoundOnly
	spec.Programs["ldt_tx"].Ifindex = 1
	prog := loaded(t, spec, frags, "prog0")
	linked(t, prog, frags, "prog0")
	linked(t, prog, plain, "prog1")
	qt.Check(t, qt.Equals(run(t, frags), uint32(hook.TX)))
	qt.Check(t, qt.Equals(run(t, plain), uint32(hook.TX)))
}

// Only the programs of a file that the function uses are loaded.
func TestFreplaceOfMany(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	d := dispatcher(t, configOf(3, 4, 4))
	spec := gives(hook.TX)
	spec.Programs["ldt_broken"] = &ebpf.ProgramSpec{Name: "ldt_broken", Type: ebpf.XDP, Instructions: asm.Instructions{asm.Return()}}
	spec.Maps = map[string]*ebpf.MapSpec{"ldt_unused": {Name: "ldt_unused", Type: ebpf.Array, KeySize: 9, ValueSize: 4, MaxEntries: 1}}
	shared, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_shared", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer shared.Close()
	prog, err := loadComponent(spec, "ldt_tx", d, "prog0", ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{"ldt_unused": shared}})
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	linked(t, prog, d, "prog0")
	qt.Check(t, qt.Equals(run(t, d), uint32(hook.TX)))
	// The given spec is unchanged.
	qt.Check(t, qt.HasLen(spec.Programs, 2))
	qt.Check(t, qt.Equals(spec.Programs["ldt_tx"].Type, ebpf.XDP))
}

func TestFreplaceRefused(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	d := dispatcher(t, configOf(3, 4, 4))
	bad := component("ldt_bad", asm.Mov.Reg(asm.R0, asm.R7))
	_, err := loadComponent(bad, "ldt_bad", d, "prog0", ebpf.CollectionOptions{})
	qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
	qt.Check(t, qt.ErrorMatches(err, `load program "ldt_bad" as a component of libxdp's dispatcher: .*R7 !read_ok.*`))
}

// The whole name of a component is found although the kernel cuts it.
func TestFreplaceName(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	d := dispatcher(t, configOf(3, 4, 4))
	const long = "ldt_filter_with_a_long_name"
	prog := loaded(t, component(long, asm.Mov.Imm(asm.R0, 2)), d, "prog0")
	name, err := functionName(prog)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(name, long))
	name, err = functionName(d)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(name, mainFunction))
}

// Where the kernel refuses freplace, the error names freplace.
func TestFreplaceImpossible(t *testing.T) {
	start(t)
	d := dispatcher(t, configOf(3, 4, 4))
	_, err := loadComponent(gives(hook.Pass), "ldt_pass", d, "prog0", ebpf.CollectionOptions{})
	if err == nil {
		t.Skip("this kernel has freplace: runs where it is refused")
	}
	qt.Check(t, qt.ErrorIs(err, unix.EPERM))
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `.*load program "ldt_pass" as a component of libxdp's dispatcher: this kernel refuses freplace .*`))
}

func kernelVersion(t *testing.T) (major, minor int) {
	t.Helper()
	release, err := os.ReadFile("/proc/sys/kernel/osrelease")
	qt.Assert(t, qt.IsNil(err))
	_, err = fmt.Sscanf(string(release), "%d.%d", &major, &minor)
	qt.Assert(t, qt.IsNil(err))
	return major, minor
}

// wrapped wraps loaded programs, on kernels that can.
func wrapped(t *testing.T, callee *ebpf.Program, d *ebpf.Program, stub string) *ebpf.Map {
	t.Helper()
	prog, slot, err := wrapComponent(callee, d, stub)
	if major, minor := kernelVersion(t); major < 6 || major == 6 && minor < 1 {
		qt.Assert(t, qt.ErrorIs(err, hook.ErrIncompatible))
		t.Skip("before Linux 6.1 there are no tail calls from extensions to XDP programs")
	}
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close(); slot.Close() })
	linked(t, prog, d, stub)
	return slot
}

func TestFreplaceWrapper(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	d := dispatcher(t, configOf(3, slices.Repeat([]uint32{1 << hook.Pass}, MaxMembers)...))
	none := testenv.ExpectedAttachType(ebpf.AttachNone)
	pass := testenv.VerdictProgram(t, "ldt_pass", int(hook.Pass), none)
	drop := testenv.VerdictProgram(t, "ldt_drop", int(hook.Drop), none)
	var slots []*ebpf.Map
	for i := range MaxMembers {
		callee := pass
		if i == MaxMembers-1 {
			callee = drop
		}
		slots = append(slots, wrapped(t, callee, d, fmt.Sprintf("prog%d", i)))
	}
	for range 100 { // every time, whatever the kernel has counted before
		qt.Assert(t, qt.Equals(run(t, d), uint32(hook.Drop)))
	}
	// Its program is replaced, and the old one is gone.
	qt.Assert(t, qt.IsNil(slots[3].Put(uint32(0), uint32(drop.FD()))))
	qt.Check(t, qt.Equals(run(t, d), uint32(hook.Drop)))
	qt.Assert(t, qt.IsNil(slots[3].Delete(uint32(0))))
	qt.Assert(t, qt.IsNil(slots[9].Delete(uint32(0))))
	qt.Check(t, qt.Equals(run(t, d), uint32(hook.Pass)))

	one := dispatcher(t, configOf(3, 0))
	slot := wrapped(t, drop, one, mainFunction)
	qt.Check(t, qt.Equals(run(t, one), uint32(hook.Drop)))
	qt.Assert(t, qt.IsNil(slot.Delete(uint32(0))))
	qt.Check(t, qt.Equals(run(t, one), uint32(hook.Pass)))
}

func TestFreplaceWrapperFrags(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	testenv.Need(t, testenv.FeatureFrags)
	for _, frags := range []bool{false, true} {
		c := configOf(3, 4, 4)
		c.Frags = frags
		d := dispatcher(t, c)
		wrapped(t, testenv.VerdictProgram(t, "ldt_tx", int(hook.TX), testenv.ExpectedAttachType(ebpf.AttachNone), testenv.Frags()), d, "prog0")
		qt.Check(t, qt.Equals(run(t, d), uint32(hook.TX)))
	}
}

// A program with the usual expected attach type does not agree with an extension on
// any kernel.
func TestFreplaceWrapperRefused(t *testing.T) {
	start(t)
	testenv.NeedFreplace(t)
	d := dispatcher(t, configOf(3, 4, 4))
	_, _, err := wrapComponent(testenv.VerdictProgram(t, "ldt_xdp", int(hook.TX)), d, "prog0")
	qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
	qt.Check(t, qt.ErrorMatches(err, `program "ldt_xdp" is loaded already, .* attach it from its object file: .*`))
}
