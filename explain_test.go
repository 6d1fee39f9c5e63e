package dispatcher_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// explainer gets ready to explain what is on the scene's hook.
func (s *scene) explainer(t testing.TB, target dispatcher.Target) *dispatcher.Explainer {
	t.Helper()
	e, err := dispatcher.Explain(t.Context(), target, dispatcher.ExplainOptions{BPFFS: s.bpffs})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(e.Close)
	return e
}

// explain takes one packet through.
func explain(t testing.TB, e *dispatcher.Explainer, packet []byte) hook.Trace {
	t.Helper()
	traces, err := e.Run(t.Context(), packet)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(traces, 1))
	return traces[0]
}

// said is what a trace says of each step: "pass", "drop", or the outcome of what did not run.
func said(tr *hook.Trace) (words []string) {
	for _, s := range tr.Steps {
		if s.Outcome == hook.OutcomeRan {
			words = append(words, s.Says)
		} else {
			words = append(words, string(s.Outcome))
		}
	}
	return words
}

// What an XDP program of these tests may do to a packet before it says something.
var deeds = []struct {
	name string
	code asm.Instructions // R6 is the context; jumps to "end" when there is no room
}{
	{"reads", nil},
	{"edits", append(bounds(24),
		asm.LoadMem(asm.R4, asm.R2, 20, asm.Word),
		asm.Add.Imm(asm.R4, 0x01020304),
		asm.StoreMem(asm.R2, 20, asm.R4, asm.Word),
	)},
	{"grows", append(append(adjust(asm.FnXdpAdjustHead, -4), bounds(4)...),
		asm.StoreImm(asm.R2, 0, 0x0a0b0c0d, asm.Word), // what it finds there is not the packet's
	)},
	{"shrinks", adjust(asm.FnXdpAdjustHead, 4)},
	{"cuts", adjust(asm.FnXdpAdjustTail, -3)},
	{"marks", append(adjust(asm.FnXdpAdjustMeta, -4), // writes into the metadata
		asm.LoadMem(asm.R2, asm.R6, 8, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, 0, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 4),
		asm.JGT.Reg(asm.R4, asm.R3, "end"),
		asm.StoreImm(asm.R2, 0, 3, asm.Word),
	)},
	{"looks", asm.Instructions{ // says what is in the metadata, if there is any
		asm.LoadMem(asm.R2, asm.R6, 8, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, 0, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, 4),
		asm.JGT.Reg(asm.R4, asm.R3, "none"),
		asm.LoadMem(asm.R0, asm.R2, 0, asm.Word),
		asm.Return(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("none"),
	}},
}

// bounds finds the packet at R2, with n bytes at the least.
func bounds(n int32) asm.Instructions {
	return asm.Instructions{
		asm.LoadMem(asm.R2, asm.R6, 0, asm.Word),
		asm.LoadMem(asm.R3, asm.R6, 4, asm.Word),
		asm.Mov.Reg(asm.R4, asm.R2),
		asm.Add.Imm(asm.R4, n),
		asm.JGT.Reg(asm.R4, asm.R3, "end"),
	}
}

func adjust(fn asm.BuiltinFunc, by int32) asm.Instructions {
	return asm.Instructions{asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Imm(asm.R2, by), fn.Call()}
}

// doing is an XDP program that does one of the deeds and takes its verdict from the byte of the
// packet at the given offset: any of the five, and one that there is not.
func doing(t testing.TB, deed, at int) *ebpf.Program {
	t.Helper()
	code := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1)}
	code = append(code, deeds[deed].code...)
	code = append(code, bounds(int32(at)+1)...)
	code = append(code,
		asm.LoadMem(asm.R0, asm.R2, int16(at), asm.Byte),
		asm.Mod.Imm(asm.R0, 6),
		asm.Return(),
		asm.Mov.Imm(asm.R0, testenv.XDPPass).WithSymbol("end"),
		asm.Return(),
	)
	return testenv.Load(t, &ebpf.ProgramSpec{
		Name: fmt.Sprintf("ldt_%s_%d", deeds[deed].name, at), Type: ebpf.XDP, AttachType: ebpf.AttachXDP,
		License: "GPL", Instructions: code,
	})
}

// whole is a test run of what is attached to the device, as it is: the truth about a chain.
func (s *scene) whole(t testing.TB, id uint32, packet []byte) (verdict uint32, out []byte) {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	o := ebpf.RunOptions{Data: packet, DataOut: make([]byte, len(packet)+512)}
	md := make([]uint32, 6)
	if hasContext() {
		o.Context, o.ContextOut = []uint32{0, uint32(len(packet)), 0, uint32(s.ServerIfindex), 0, 0}, md
	}
	s.Server.Do(t, func() { verdict, err = prog.Run(&o) })
	qt.Assert(t, qt.IsNil(err))
	return verdict, o.DataOut[md[0]:]
}

// hasContext tells whether a test run of XDP takes a context.
func hasContext() bool { return kernel.Since(5, 15) }

func randomSettings() hook.Settings {
	var on []hook.Verdict
	for v := range hook.Verdict(hook.Verdicts) {
		if v == hook.Pass && rand.N(4) > 0 || rand.N(2) > 0 {
			on = append(on, v)
		}
	}
	return hook.Settings{
		Priority: 1 + rand.N(100), ContinueOn: hook.SetOf(on...),
		OnMissing: []hook.OnMissing{hook.MissingContinue, hook.MissingContinue, hook.MissingDrop, hook.MissingAborted}[rand.N(4)],
	}
}

// Whatever the members do, and whatever their settings are: what is composed of runs of each is what
// the whole chain does, to the byte.
func TestExplainAgreesWithChain(t *testing.T) {
	s := newScene(t)
	for range 12 {
		var links []*dispatcher.Link
		plain := rand.N(3) == 0 // for these the dispatcher has shorter code
		for i := range 1 + rand.N(5) {
			deed := rand.N(len(deeds))
			for !hasContext() && (deeds[deed].name == "marks" || deeds[deed].name == "looks") {
				deed = rand.N(len(deeds)) // metadata is lost between test runs there
			}
			settings := randomSettings()
			if plain {
				settings.ContinueOn = hook.SetOf(hook.Pass)
			}
			links = append(links, s.attach(t, doing(t, deed, 20+rand.N(20)), dispatcher.Options{
				Name: fmt.Sprintf("m%d_%s", i, deeds[deed].name), Settings: settings,
			}))
		}
		gone := 0
		if rand.N(2) == 0 && len(links) > 1 {
			gone = 1
			qt.Assert(t, qt.IsNil(links[rand.N(len(links))].Close()))
		}
		soon(t, func() bool {
			n := 0
			for _, m := range s.read(t).Members {
				if m.State == hook.StateEmpty {
					n++
				}
			}
			return n == gone
		})
		e := s.explainer(t, s.target)
		for range 50 {
			packet := make([]byte, 50+rand.N(200))
			for i := range packet {
				packet[i] = byte(rand.Uint32())
			}
			want, out := s.whole(t, e.Chain().DispatcherID, packet)
			tr := explain(t, e, packet)
			qt.Assert(t, qt.IsNil(tr.Err))
			comment := qt.Commentf("%s: %v of %x", describeSettings(e.Chain()), said(&tr), packet)
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Verdict(want%hook.Verdicts)), comment) // 5 is as good as aborted
			qt.Assert(t, qt.IsTrue(bytes.Equal(tr.Packet, out)), comment)
			if tr.By >= 0 {
				by := tr.Steps[tr.By]
				qt.Assert(t, qt.IsTrue(by.Outcome == hook.OutcomeRan || by.Outcome == hook.OutcomeClosed), comment)
			}
		}
		e.Close()
		s.clear(t)
	}
}

func describeSettings(c *hook.Chain) (words []string) {
	for _, m := range c.Members {
		words = append(words, fmt.Sprintf("%s(%s) on %v missing %v", m.Name, m.State, m.ContinueOn, m.OnMissing))
	}
	return words
}

// udpTo is the packet that [testenv.Pair.Send] has on the wire, but for its payload and checksums,
// which no program of these tests looks at.
func (s *scene) udpTo(port uint16) []byte {
	p := make([]byte, 60)
	copy(p, []byte{2, 0x77, 0, 0, 0, 2, 2, 0x77, 0, 0, 0, 1, 8, 0})
	copy(p[14:], []byte{0x45, 0, 0, 46, 0, 0, 0x40, 0, 64, 17})
	copy(p[26:], testenv.ClientIPv4.AsSlice())
	copy(p[30:], testenv.ServerIPv4.AsSlice())
	p[36], p[37], p[39] = byte(port>>8), byte(port), 26
	return p
}

// What is explained is what happens to packets on the wire.
func TestExplainAgreesWithWire(t *testing.T) {
	s := newScene(t)
	for _, tc := range []struct {
		first, second int // what members say to packets to the port
		on            hook.VerdictSet
		want          hook.Verdict
	}{
		{testenv.XDPPass, testenv.XDPPass, 0, hook.Pass},
		{testenv.XDPPass, testenv.XDPDrop, 0, hook.Drop},
		{testenv.XDPDrop, testenv.XDPPass, 0, hook.Drop},
		{testenv.XDPDrop, testenv.XDPPass, hook.SetOf(hook.Drop), hook.Pass},
		{testenv.XDPTX, testenv.XDPPass, 0, hook.TX},
		{testenv.XDPPass, testenv.XDPTX, hook.Never, hook.Pass},
		{testenv.XDPPass, testenv.XDPAborted, 0, hook.Aborted},
	} {
		first, firstCount := testenv.CountProgram(t, "ldt_first", port, tc.first)
		second, secondCount := testenv.CountProgram(t, "ldt_second", port, tc.second)
		s.attach(t, first, dispatcher.Options{Settings: hook.Settings{Priority: 1, ContinueOn: tc.on}})
		s.attach(t, second, dispatcher.Options{Settings: hook.Settings{Priority: 2}})
		e := s.explainer(t, s.target)
		tr := explain(t, e, s.udpTo(port))
		qt.Assert(t, qt.Equals(tr.Verdict, tc.want))
		// It has run the programs for real, with their own maps.
		ranSecond := 0
		if tr.Steps[1].Outcome == hook.OutcomeRan {
			ranSecond = 1
		}
		qt.Assert(t, qt.Equals(firstCount(), 1))
		qt.Assert(t, qt.Equals(secondCount(), ranSecond))
		qt.Assert(t, qt.HasLen(e.Maps(), 2))
		qt.Assert(t, qt.Equals(e.Maps()[1].Name, "ldt_count"))
		qt.Assert(t, qt.Equals(e.Maps()[1].Member, 1))

		passed, returned := 0, 0
		switch tc.want {
		case hook.Pass:
			passed = 5
		case hook.TX:
			returned = 5
		}
		qt.Assert(t, qt.Equals(s.Passed(t, port, 5), passed))
		qt.Assert(t, qt.Equals(s.Returned(t, port, 5), returned))
		qt.Assert(t, qt.Equals(firstCount(), 11))
		qt.Assert(t, qt.Equals(secondCount(), 11*ranSecond))
		s.clear(t)
	}
}

// A program sees the device and the queue that the packet is said to come in at.
func TestExplainDevice(t *testing.T) {
	s := newScene(t)
	const ingress, queue = 12, 16 // in struct xdp_md
	prog := testenv.Load(t, &ebpf.ProgramSpec{
		Name: "ldt_where", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R2, asm.R1, ingress, asm.Word),
			asm.LoadMem(asm.R3, asm.R1, queue, asm.Word),
			asm.Mov.Imm(asm.R0, testenv.XDPDrop),
			asm.JNE.Imm(asm.R2, int32(s.ServerIfindex), "end"),
			asm.JNE.Imm(asm.R3, 0, "end"),
			asm.Mov.Imm(asm.R0, testenv.XDPPass),
			asm.Return().WithSymbol("end"),
		},
	})
	s.attach(t, prog, dispatcher.Options{})
	e := s.explainer(t, s.target)
	tr := explain(t, e, s.udpTo(port))
	if !hasContext() {
		qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
		qt.Assert(t, qt.HasLen(e.Limits(), 2))
		return
	}
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
	qt.Assert(t, qt.HasLen(e.Limits(), 0))
	qt.Assert(t, qt.Equals(s.Passed(t, port, 1), 1)) // and so it is

	_, err := dispatcher.Explain(t.Context(), s.target, dispatcher.ExplainOptions{BPFFS: s.bpffs, Queue: 1000})
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	qt.Assert(t, qt.ErrorMatches(err, `explain xdp veth1: receive queue 1000: .*`))
	_, err = dispatcher.Explain(t.Context(), s.target, dispatcher.ExplainOptions{BPFFS: s.bpffs, Queue: -1})
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
}

// What is not a chain of ours is explained too; and where there is nothing, all passes.
func TestExplainOthers(t *testing.T) {
	s := newScene(t)
	e := s.explainer(t, s.target)
	tr := explain(t, e, s.udpTo(port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
	qt.Assert(t, qt.Equals(tr.By, -1))
	qt.Assert(t, qt.HasLen(tr.Steps, 0))

	s.attachLegacy(t, testenv.DropUDPPort(t, "ldt_legacy", port))
	e = s.explainer(t, s.target)
	tr = explain(t, e, s.udpTo(port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.Equals(e.Chain().Members[tr.Steps[tr.By].Member].Kind, hook.KindLegacy))
	tr = explain(t, e, s.udpTo(port+1))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
}

// A packet that the kernel does not take is told, and the others are run.
func TestExplainRefusedPackets(t *testing.T) {
	s := newScene(t)
	s.attach(t, testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop), dispatcher.Options{})
	e := s.explainer(t, s.target)
	traces, err := e.Run(t.Context(), []byte("short"), make([]byte, 9000), s.udpTo(port))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.ErrorMatches(traces[0].Err, "it has 5 bytes, and an Ethernet header alone has 14"))
	qt.Check(t, qt.Equals(traces[2].Verdict, hook.Drop))
	if traces[1].Err != nil {
		qt.Check(t, qt.ErrorMatches(traces[1].Err, `"ldt_drop": test run of a packet of 9000 bytes: .*`))
	} else {
		qt.Check(t, qt.Equals(traces[1].Verdict, hook.Drop))
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = e.Run(ctx, s.udpTo(port))
	qt.Assert(t, qt.ErrorIs(err, context.Canceled))
}

// Packets longer than a page go through a chain with frags.
func TestExplainFrags(t *testing.T) {
	testenv.Need(t, testenv.FeatureFrags)
	s := newScene(t)
	s.attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass, testenv.Frags()), dispatcher.Options{})
	s.attach(t, testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop, testenv.Frags()), dispatcher.Options{})
	e := s.explainer(t, s.target)
	long := make([]byte, 9000)
	copy(long, s.udpTo(port))
	for i := 60; i < len(long); i++ {
		long[i] = byte(i * 7)
	}
	tr := explain(t, e, long)
	qt.Assert(t, qt.IsNil(tr.Err))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.DeepEquals(tr.Packet, long))
	qt.Assert(t, qt.IsTrue(tr.Steps[0].Change.IsZero()))
}

// On TCX each program says itself whether the next one runs. The mark goes with the packet.
func TestExplainTCX(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCXEgress} {
		t.Run(string(h), func(t *testing.T) {
			s := newScene(t)
			s = s.onDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name))
			const mark, receiver, device = 8, 36, 40 // in struct __sk_buff
			receivedAt := s.ServerIfindex
			if h == hook.TCXEgress {
				receivedAt = 0
			}
			marks := testenv.VerdictSpec("ldt_marks", testenv.TCNext, testenv.On(h))
			marks.Instructions = asm.Instructions{
				asm.Mov.Imm(asm.R2, 77),
				asm.StoreMem(asm.R1, mark, asm.R2, asm.Word),
				asm.Mov.Imm(asm.R0, testenv.TCNext),
				asm.Return(),
			}
			looks := testenv.VerdictSpec("ldt_looks", testenv.TCNext, testenv.On(h))
			looks.Instructions = asm.Instructions{
				asm.LoadMem(asm.R2, asm.R1, mark, asm.Word),
				asm.LoadMem(asm.R3, asm.R1, receiver, asm.Word),
				asm.LoadMem(asm.R4, asm.R1, device, asm.Word),
				asm.Mov.Imm(asm.R0, testenv.TCPass),
				asm.JNE.Imm(asm.R2, 77, "end"),
				asm.JNE.Imm(asm.R3, int32(receivedAt), "end"),
				asm.JNE.Imm(asm.R4, int32(s.ServerIfindex), "end"),
				asm.Mov.Imm(asm.R0, testenv.TCNext),
				asm.Return().WithSymbol("end"),
			}
			s.attach(t, testenv.Load(t, marks), dispatcher.Options{Settings: priority(1)})
			s.attach(t, testenv.Load(t, looks), dispatcher.Options{Settings: priority(2)})
			s.attach(t, testenv.DropUDPPort(t, "ldt_drop", port, testenv.On(h)), dispatcher.Options{Settings: priority(3)})
			s.attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.TCPass, testenv.On(h)), dispatcher.Options{Settings: priority(4)})

			e := s.explainer(t, s.target)
			qt.Assert(t, qt.HasLen(e.Limits(), 0))
			tr := explain(t, e, s.udpTo(port))
			qt.Assert(t, qt.IsNil(tr.Err))
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"next", "next", "drop", "unreached"}))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
			qt.Assert(t, qt.Equals(tr.By, 2))
			qt.Assert(t, qt.Equals(*tr.Steps[0].Change.Mark, 77))
			qt.Assert(t, qt.IsTrue(tr.Steps[1].Change.IsZero()))
			tr = explain(t, e, s.udpTo(port+1))
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"next", "next", "next", "pass"}))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))

			arrives := map[hook.Hook]func(testing.TB, int, int) int{hook.TCXIngress: s.Passed, hook.TCXEgress: s.Replied}[h]
			qt.Assert(t, qt.Equals(arrives(t, port, 3), 0))
			qt.Assert(t, qt.Equals(arrives(t, port+1, 3), 3))
			s.clear(t)
		})
	}
}

// On a cgroup all programs run, those of the cgroups above too, and one that denies is enough.
func TestExplainCgroup(t *testing.T) {
	for _, h := range []hook.Hook{hook.CgroupSKBIngress, hook.CgroupSKBEgress} {
		t.Run(string(h), func(t *testing.T) {
			s := newScene(t)
			above := testenv.NewCgroup(t)
			below := above.Child(t, "below")
			at := s.onDevice(dispatcher.On(h, above.Path))
			at.attach(t, testenv.DropUDPPort(t, "ldt_above", port, testenv.On(h)), dispatcher.Options{})
			in := s.onDevice(dispatcher.On(h, below.Path))
			in.attach(t, testenv.VerdictProgram(t, "ldt_allow", testenv.CgroupAllow, testenv.On(h)), dispatcher.Options{Settings: priority(1)})
			in.attach(t, testenv.DropUDPPort(t, "ldt_deny", port+1, testenv.On(h)), dispatcher.Options{Settings: priority(2)})

			e, err := dispatcher.Explain(t.Context(), in.target, dispatcher.ExplainOptions{BPFFS: s.bpffs})
			if errors.Is(err, ebpf.ErrNotSupported) {
				qt.Assert(t, qt.IsFalse(kernel.Since(6, 18)), qt.Commentf("this kernel should show packets: %v", err))
				qt.Assert(t, qt.ErrorMatches(err, "explain cgroup_skb/.*: a test run shows no packets to programs of .*"))
				return
			}
			qt.Assert(t, qt.IsNil(err))
			defer e.Close()
			packet := s.udpTo(port)
			tr := explain(t, e, packet)
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"allow", "allow", "deny"}))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
			qt.Assert(t, qt.Equals(e.Chain().Members[tr.Steps[tr.By].Member].Name, "ldt_above"))
			qt.Assert(t, qt.Equals(e.Chain().Members[2].From, above.Path))
			qt.Assert(t, qt.DeepEquals(tr.Packet, packet))
			tr = explain(t, e, s.udpTo(port+1))
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"allow", "deny", "allow"}))
			qt.Assert(t, qt.Equals(tr.By, 1))
			tr = explain(t, e, s.udpTo(port+2))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
			qt.Assert(t, qt.Equals(tr.By, -1))
		})
	}
}

// Behind a dispatcher of libxdp the members run as one. It has no components here, so that this runs on
// kernels without freplace, too.
func TestExplainLibxdpAlone(t *testing.T) {
	s := newScene(t)
	const name = "xdp_dispatcher"
	config := libxdp.Config{Version: 2, Programs: []libxdp.ProgramConfig{{Priority: 50, Actions: 4}, {Priority: 50, Actions: 4}}}
	data, err := config.MarshalBinary()
	qt.Assert(t, qt.IsNil(err))
	spec := testenv.VerdictSpec(name, testenv.XDPDrop)
	main := typed(spec).Programs[name]
	prog, err := ebpf.NewProgram(main)
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	m, err := ebpf.NewMap(&ebpf.MapSpec{
		Name: "ldt_config", Type: ebpf.Array, KeySize: 4, ValueSize: uint32(len(data)), MaxEntries: 1,
		Flags: unix.BPF_F_RDONLY_PROG, Contents: []ebpf.MapKV{{Key: uint32(0), Value: data}},
	})
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	qt.Assert(t, qt.IsNil(prog.BindMap(m)))
	s.attachLegacy(t, prog)

	e := s.explainer(t, s.target)
	qt.Assert(t, qt.Equals(e.Chain().Style, hook.StyleLibxdp))
	qt.Assert(t, qt.Not(qt.Equals(e.Together(), "")))
	qt.Assert(t, qt.HasLen(e.Maps(), 0)) // that of the dispatcher is for reading
	tr := explain(t, e, s.udpTo(port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.HasLen(tr.Steps, 1))
	qt.Assert(t, qt.Equals(tr.Steps[0].Member, -1))
	qt.Assert(t, qt.Equals(tr.By, 0))
}

func TestExplainLibxdp(t *testing.T) {
	testenv.NeedFreplace(t)
	s := newScene(t)
	s.joinLibxdp(t, 1, testenv.XDPDrop, 10)
	e := s.explainer(t, s.target)
	tr := explain(t, e, s.udpTo(port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.Equals(tr.Steps[0].Member, 0)) // alone, it is who says it
	qt.Assert(t, qt.Equals(e.Together(), ""))
	e.Close()

	s.joinLibxdp(t, 2, testenv.XDPPass, 5)
	e = s.explainer(t, s.target)
	qt.Assert(t, qt.Not(qt.Equals(e.Together(), "")))
	s.trace.Reset(t)
	tr = explain(t, e, s.udpTo(port))
	qt.Assert(t, qt.DeepEquals(s.trace.Last(t), []int{2, 1}))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.Equals(tr.Steps[0].Member, -1))
	s.clear(t)
}

// A redirect is said to be one, and nothing is sent.
func TestExplainRedirect(t *testing.T) {
	s := newScene(t)
	prog := testenv.Load(t, &ebpf.ProgramSpec{
		Name: "ldt_redirects", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(s.ServerIfindex)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirect.Call(),
			asm.Return(),
		},
	})
	s.attach(t, prog, dispatcher.Options{})
	arrives, count := testenv.CountProgram(t, "ldt_arrives", port, testenv.XDPPass)
	s.onDevice(dispatcher.XDP(s.ClientDev).In(s.Client.Name)).attach(t, arrives, dispatcher.Options{})
	e := s.explainer(t, s.target)
	for range 5 {
		tr := explain(t, e, s.udpTo(port))
		qt.Assert(t, qt.Equals(tr.Verdict, hook.Redirect))
	}
	s.Settle(t)
	qt.Assert(t, qt.Equals(count(), 0))
	s.Send(t, port, 5) // and on the wire it is one
	soon(t, func() bool { return count() == 5 })
}

// What is said of bpf_clone_redirect: its copies are really sent.
func TestExplainCloneRedirect(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	s := newScene(t)
	s = s.onDevice(dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name))
	clones := testenv.VerdictSpec("ldt_clones", testenv.TCNext, testenv.On(hook.TCXIngress))
	clones.Instructions = asm.Instructions{
		asm.Mov.Imm(asm.R2, int32(s.ServerIfindex)),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnCloneRedirect.Call(),
		asm.Mov.Imm(asm.R0, testenv.TCNext),
		asm.Return(),
	}
	s.attach(t, testenv.Load(t, clones), dispatcher.Options{})
	arrives, count := testenv.CountProgram(t, "ldt_arrives", port, testenv.XDPPass)
	client := s.onDevice(dispatcher.XDP(s.ClientDev).In(s.Client.Name))
	client.attach(t, arrives, dispatcher.Options{})
	e := s.explainer(t, s.target)
	for range 5 {
		tr := explain(t, e, s.udpTo(port))
		qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
	}
	s.Settle(t)
	qt.Assert(t, qt.Equals(count(), 5))
}

// Who explains keeps no member in its chain.
func TestExplainHoldsNothing(t *testing.T) {
	s := newScene(t)
	prog := testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)
	link := s.attach(t, prog, dispatcher.Options{})
	e := s.explainer(t, s.target)
	qt.Assert(t, qt.IsNil(link.Close()))
	s.wantFree(t)
	tr := explain(t, e, s.udpTo(port)) // as it was
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
}

// What cannot be explained is refused, with the reason.
func TestExplainRefuses(t *testing.T) {
	s := newScene(t)
	for h, want := range map[hook.Hook]error{
		hook.CgroupConnect4: ebpf.ErrNotSupported, hook.TCIngress: ebpf.ErrNotSupported, hook.CgroupSockOps: ebpf.ErrNotSupported,
		"xpd": dispatcher.ErrUsage, hook.Netfilter: dispatcher.ErrUsage,
	} {
		_, err := dispatcher.Explain(t.Context(), dispatcher.On(h, "veth1"), dispatcher.ExplainOptions{BPFFS: s.bpffs})
		qt.Check(t, qt.ErrorIs(err, want), qt.Commentf("%s", h))
	}
	_, err := dispatcher.Explain(t.Context(), dispatcher.XDP("nosuch").In(s.Server.Name), dispatcher.ExplainOptions{})
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
}
