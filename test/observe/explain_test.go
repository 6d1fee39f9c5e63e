package observe

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// explainer gets ready to explain what is on the scene's hook.
func explainer(t testing.TB, s *scene.Scene, target dispatcher.Target) *dispatcher.Explainer {
	t.Helper()
	e, err := dispatcher.Explain(t.Context(), target, dispatcher.ExplainOptions{BPFFS: s.BPFFS})
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
func whole(t testing.TB, s *scene.Scene, id uint32, packet []byte) (verdict uint32, out []byte) {
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
	s := scene.New(t)
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
			links = append(links, s.Attach(t, doing(t, deed, 20+rand.N(20)), dispatcher.Options{
				Name: fmt.Sprintf("m%d_%s", i, deeds[deed].name), Priority: settings.Priority, ContinueOn: settings.ContinueOn, OnMissing: settings.OnMissing,
			}))
		}
		gone := 0
		if rand.N(2) == 0 && len(links) > 1 {
			gone = 1
			qt.Assert(t, qt.IsNil(links[rand.N(len(links))].Close()))
		}
		scene.Soon(t, func() bool {
			n := 0
			for _, m := range s.Read(t).Members {
				if m.State == hook.StateEmpty {
					n++
				}
			}
			return n == gone
		})
		e := explainer(t, s, s.Target)
		for range 50 {
			packet := make([]byte, 50+rand.N(200))
			for i := range packet {
				packet[i] = byte(rand.Uint32())
			}
			want, out := whole(t, s, e.Chain().DispatcherID, packet)
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
		s.Clear(t)
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
func udpTo(s *scene.Scene, port uint16) []byte {
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
	s := scene.New(t)
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
		first, firstCount := testenv.CountProgram(t, "ldt_first", scene.Port, tc.first)
		second, secondCount := testenv.CountProgram(t, "ldt_second", scene.Port, tc.second)
		s.Attach(t, first, dispatcher.Options{Priority: 1, ContinueOn: tc.on})
		s.Attach(t, second, dispatcher.Options{Priority: 2})
		e := explainer(t, s, s.Target)
		tr := explain(t, e, udpTo(s, scene.Port))
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
		qt.Assert(t, qt.Equals(s.Passed(t, scene.Port, 5), passed))
		qt.Assert(t, qt.Equals(s.Returned(t, scene.Port, 5), returned))
		qt.Assert(t, qt.Equals(firstCount(), 11))
		qt.Assert(t, qt.Equals(secondCount(), 11*ranSecond))
		s.Clear(t)
	}
}

// A program sees the device and the queue that the packet is said to come in at.
func TestExplainDevice(t *testing.T) {
	s := scene.New(t)
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
	s.Attach(t, prog, dispatcher.Options{})
	e := explainer(t, s, s.Target)
	tr := explain(t, e, udpTo(s, scene.Port))
	if !hasContext() {
		qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
		qt.Assert(t, qt.HasLen(e.Limits(), 2))
		return
	}
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
	qt.Assert(t, qt.HasLen(e.Limits(), 0))
	qt.Assert(t, qt.Equals(s.Passed(t, scene.Port, 1), 1)) // and so it is

	_, err := dispatcher.Explain(t.Context(), s.Target, dispatcher.ExplainOptions{BPFFS: s.BPFFS, Queue: 1000})
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	qt.Assert(t, qt.ErrorMatches(err, `explain xdp veth1: receive queue 1000: .*`))
	_, err = dispatcher.Explain(t.Context(), s.Target, dispatcher.ExplainOptions{BPFFS: s.BPFFS, Queue: -1})
	qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrUsage))
}

// What is not a chain of ours is explained too; and where there is nothing, all passes.
func TestExplainOthers(t *testing.T) {
	s := scene.New(t)
	e := explainer(t, s, s.Target)
	tr := explain(t, e, udpTo(s, scene.Port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
	qt.Assert(t, qt.Equals(tr.By, -1))
	qt.Assert(t, qt.HasLen(tr.Steps, 0))

	s.AttachLegacy(t, testenv.DropUDPPort(t, "ldt_legacy", scene.Port))
	e = explainer(t, s, s.Target)
	tr = explain(t, e, udpTo(s, scene.Port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.Equals(e.Chain().Members[tr.Steps[tr.By].Member].Kind, hook.KindLegacy))
	tr = explain(t, e, udpTo(s, scene.Port+1))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
}

// A packet that the kernel does not take is told, and the others are run.
func TestExplainRefusedPackets(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop), dispatcher.Options{})
	e := explainer(t, s, s.Target)
	traces, err := e.Run(t.Context(), []byte("short"), make([]byte, 9000), udpTo(s, scene.Port))
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
	_, err = e.Run(ctx, udpTo(s, scene.Port))
	qt.Assert(t, qt.ErrorIs(err, context.Canceled))
}

// Packets longer than a page go through a chain with frags.
func TestExplainFrags(t *testing.T) {
	testenv.Need(t, testenv.FeatureFrags)
	s := scene.New(t)
	s.Attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.XDPPass, testenv.Frags()), dispatcher.Options{})
	s.Attach(t, testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop, testenv.Frags()), dispatcher.Options{})
	e := explainer(t, s, s.Target)
	long := make([]byte, 9000)
	copy(long, udpTo(s, scene.Port))
	for i := 60; i < len(long); i++ {
		long[i] = byte(i * 7)
	}
	tr := explain(t, e, long)
	qt.Assert(t, qt.IsNil(tr.Err))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.DeepEquals(tr.Packet, long))
	qt.Assert(t, qt.IsTrue(tr.Steps[0].Change.IsZero()))
}

// Explaining keeps no member in its chain.
func TestExplainHoldsNothing(t *testing.T) {
	s := scene.New(t)
	prog := testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)
	link := s.Attach(t, prog, dispatcher.Options{})
	e := explainer(t, s, s.Target)
	qt.Assert(t, qt.IsNil(link.Close()))
	s.WantFree(t)
	tr := explain(t, e, udpTo(s, scene.Port)) // as it was
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
}

// What cannot be explained is refused, with the reason.
func TestExplainRefuses(t *testing.T) {
	s := scene.New(t)
	for h, want := range map[hook.Hook]error{
		hook.CgroupConnect4: ebpf.ErrNotSupported, hook.TCIngress: ebpf.ErrNotSupported, hook.CgroupSockOps: ebpf.ErrNotSupported,
		"xpd": dispatcher.ErrUsage, hook.Netfilter: dispatcher.ErrUsage,
	} {
		_, err := dispatcher.Explain(t.Context(), dispatcher.On(h, "veth1"), dispatcher.ExplainOptions{BPFFS: s.BPFFS})
		qt.Check(t, qt.ErrorIs(err, want), qt.Commentf("%s", h))
	}
	_, err := dispatcher.Explain(t.Context(), dispatcher.XDP("nosuch").In(s.Server.Name), dispatcher.ExplainOptions{})
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
}
