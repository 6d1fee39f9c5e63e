package observe

import (
	"errors"
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
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// On TCX each program says itself whether the next one runs. The mark goes with the packet.
func TestExplainTCX(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCXEgress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.New(t)
			s = s.OnDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name))
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
			s.Attach(t, testenv.Load(t, marks), dispatcher.Options{Priority: 1})
			s.Attach(t, testenv.Load(t, looks), dispatcher.Options{Priority: 2})
			s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port, testenv.On(h)), dispatcher.Options{Priority: 3})
			s.Attach(t, testenv.VerdictProgram(t, "ldt_pass", testenv.TCPass, testenv.On(h)), dispatcher.Options{Priority: 4})

			e := explainer(t, s, s.Target)
			qt.Assert(t, qt.HasLen(e.Limits(), 0))
			tr := explain(t, e, udpTo(s, scene.Port))
			qt.Assert(t, qt.IsNil(tr.Err))
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"next", "next", "drop", "unreached"}))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
			qt.Assert(t, qt.Equals(tr.By, 2))
			qt.Assert(t, qt.Equals(*tr.Steps[0].Change.Mark, 77))
			qt.Assert(t, qt.IsTrue(tr.Steps[1].Change.IsZero()))
			tr = explain(t, e, udpTo(s, scene.Port+1))
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"next", "next", "next", "pass"}))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))

			arrives := map[hook.Hook]func(testing.TB, int, int) int{hook.TCXIngress: s.Passed, hook.TCXEgress: s.Replied}[h]
			qt.Assert(t, qt.Equals(arrives(t, scene.Port, 3), 0))
			qt.Assert(t, qt.Equals(arrives(t, scene.Port+1, 3), 3))
			s.Clear(t)
		})
	}
}

// On a cgroup all programs run, also what is on the cgroups above, and one that denies is enough.
func TestExplainCgroup(t *testing.T) {
	for _, h := range []hook.Hook{hook.CgroupSKBIngress, hook.CgroupSKBEgress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.New(t)
			above := testenv.NewCgroup(t)
			below := above.Child(t, "below")
			at := s.OnDevice(dispatcher.On(h, above.Path))
			at.Attach(t, testenv.DropUDPPort(t, "ldt_above", scene.Port, testenv.On(h)), dispatcher.Options{})
			in := s.OnDevice(dispatcher.On(h, below.Path))
			in.Attach(t, testenv.VerdictProgram(t, "ldt_allow", testenv.CgroupAllow, testenv.On(h)), dispatcher.Options{Priority: 1})
			in.Attach(t, testenv.DropUDPPort(t, "ldt_deny", scene.Port+1, testenv.On(h)), dispatcher.Options{Priority: 2})

			e, err := dispatcher.Explain(t.Context(), in.Target, dispatcher.ExplainOptions{BPFFS: s.BPFFS})
			if errors.Is(err, ebpf.ErrNotSupported) {
				qt.Assert(t, qt.IsFalse(kernel.Since(6, 18)), qt.Commentf("this kernel should show packets: %v", err))
				qt.Assert(t, qt.ErrorMatches(err, "explain cgroup_skb/.*: a test run shows no packets to programs of .*"))
				return
			}
			qt.Assert(t, qt.IsNil(err))
			defer e.Close()
			packet := udpTo(s, scene.Port)
			tr := explain(t, e, packet)
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"allow", "allow", "deny"}))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
			qt.Assert(t, qt.Equals(e.Chain().Members[tr.Steps[tr.By].Member].Name, "ldt_above"))
			qt.Assert(t, qt.Equals(e.Chain().Members[2].From, above.Path))
			qt.Assert(t, qt.DeepEquals(tr.Packet, packet))
			tr = explain(t, e, udpTo(s, scene.Port+1))
			qt.Assert(t, qt.DeepEquals(said(&tr), []string{"allow", "deny", "allow"}))
			qt.Assert(t, qt.Equals(tr.By, 1))
			tr = explain(t, e, udpTo(s, scene.Port+2))
			qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
			qt.Assert(t, qt.Equals(tr.By, -1))
		})
	}
}

// Behind a dispatcher of libxdp the members run as one. It has no components here, so that this runs on
// kernels without freplace, too.
func TestExplainLibxdpAlone(t *testing.T) {
	s := scene.New(t)
	const name = "xdp_dispatcher"
	config := libxdp.Config{Version: 2, Programs: []libxdp.ProgramConfig{{Priority: 50, Actions: 4}, {Priority: 50, Actions: 4}}}
	data, err := config.MarshalBinary()
	qt.Assert(t, qt.IsNil(err))
	spec := testenv.VerdictSpec(name, testenv.XDPDrop)
	main := scene.Typed(spec).Programs[name]
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
	s.AttachLegacy(t, prog)

	e := explainer(t, s, s.Target)
	qt.Assert(t, qt.Equals(e.Chain().Style, hook.StyleLibxdp))
	qt.Assert(t, qt.Not(qt.Equals(e.Together(), "")))
	qt.Assert(t, qt.HasLen(e.Maps(), 0)) // the dispatcher's own is for reading
	tr := explain(t, e, udpTo(s, scene.Port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.HasLen(tr.Steps, 1))
	qt.Assert(t, qt.Equals(tr.Steps[0].Member, -1))
	qt.Assert(t, qt.Equals(tr.By, 0))
}

func TestExplainLibxdp(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	s.JoinLibxdp(t, 1, testenv.XDPDrop, 10)
	e := explainer(t, s, s.Target)
	tr := explain(t, e, udpTo(s, scene.Port))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.Equals(tr.Steps[0].Member, 0)) // alone, it decides
	qt.Assert(t, qt.Equals(e.Together(), ""))
	e.Close()

	s.JoinLibxdp(t, 2, testenv.XDPPass, 5)
	e = explainer(t, s, s.Target)
	qt.Assert(t, qt.Not(qt.Equals(e.Together(), "")))
	s.Trace.Reset(t)
	tr = explain(t, e, udpTo(s, scene.Port))
	qt.Assert(t, qt.DeepEquals(s.Trace.Last(t), []int{2, 1}))
	qt.Assert(t, qt.Equals(tr.Verdict, hook.Drop))
	qt.Assert(t, qt.Equals(tr.Steps[0].Member, -1))
	s.Clear(t)
}

// A redirect is said to be one, and nothing is sent.
func TestExplainRedirect(t *testing.T) {
	s := scene.New(t)
	prog := testenv.Load(t, &ebpf.ProgramSpec{
		Name: "ldt_redirects", Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL",
		Instructions: asm.Instructions{
			asm.Mov.Imm(asm.R1, int32(s.ServerIfindex)),
			asm.Mov.Imm(asm.R2, 0),
			asm.FnRedirect.Call(),
			asm.Return(),
		},
	})
	s.Attach(t, prog, dispatcher.Options{})
	arrives, count := testenv.CountProgram(t, "ldt_arrives", scene.Port, testenv.XDPPass)
	s.OnDevice(dispatcher.XDP(s.ClientDev).In(s.Client.Name)).Attach(t, arrives, dispatcher.Options{})
	e := explainer(t, s, s.Target)
	for range 5 {
		tr := explain(t, e, udpTo(s, scene.Port))
		qt.Assert(t, qt.Equals(tr.Verdict, hook.Redirect))
	}
	s.Settle(t)
	qt.Assert(t, qt.Equals(count(), 0))
	s.Send(t, scene.Port, 5) // and on the wire it is one
	scene.Soon(t, func() bool { return count() == 5 })
}

// What is said of bpf_clone_redirect: its copies are really sent.
func TestExplainCloneRedirect(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	s := scene.New(t)
	s = s.OnDevice(dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name))
	clones := testenv.VerdictSpec("ldt_clones", testenv.TCNext, testenv.On(hook.TCXIngress))
	clones.Instructions = asm.Instructions{
		asm.Mov.Imm(asm.R2, int32(s.ServerIfindex)),
		asm.Mov.Imm(asm.R3, 0),
		asm.FnCloneRedirect.Call(),
		asm.Mov.Imm(asm.R0, testenv.TCNext),
		asm.Return(),
	}
	s.Attach(t, testenv.Load(t, clones), dispatcher.Options{})
	arrives, count := testenv.CountProgram(t, "ldt_arrives", scene.Port, testenv.XDPPass)
	client := s.OnDevice(dispatcher.XDP(s.ClientDev).In(s.Client.Name))
	client.Attach(t, arrives, dispatcher.Options{})
	e := explainer(t, s, s.Target)
	for range 5 {
		tr := explain(t, e, udpTo(s, scene.Port))
		qt.Assert(t, qt.Equals(tr.Verdict, hook.Pass))
	}
	s.Settle(t)
	qt.Assert(t, qt.Equals(count(), 5))
}
