package observe

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/packet"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// tunnel is a device without Ethernet, where datagrams arrive at a socket.
type tunnel struct {
	*scene.Scene
	tun, socket int
}

func newTunnel(t *testing.T) *tunnel {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	s := &tunnel{Scene: &scene.Scene{Pair: &testenv.Pair{Server: ns}, Target: dispatcher.XDP("tun0").In(ns.Name), BPFFS: testenv.BPFFS(t)}}
	s.tun, _ = ns.Tun(t, "tun0")
	ns.IP(t, "address", "add", "10.78.0.1/24", "dev", "tun0")
	ns.Do(t, func() {
		var err error
		s.socket, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { unix.Close(s.socket) })
		qt.Assert(t, qt.IsNil(unix.Bind(s.socket, &unix.SockaddrInet4{Port: scene.Port})))
	})
	return s
}

// datagram is what arrives at the tunnel.
func (s *tunnel) datagram(t *testing.T) []byte {
	p, err := packet.Build(packet.Spec{
		Protocol: packet.UDP, From: netip.MustParseAddr("10.78.0.2"), To: netip.MustParseAddr("10.78.0.1"),
		FromPort: 40000, ToPort: scene.Port, Begins: hook.BeginsIP,
	})
	qt.Assert(t, qt.IsNil(err))
	return p
}

// arrives sends a datagram and tells whether the socket gets it.
func (s *tunnel) arrives(t *testing.T) bool {
	_, err := unix.Write(s.tun, s.datagram(t))
	qt.Assert(t, qt.IsNil(err))
	n, _, err := unix.Recvfrom(s.socket, make([]byte, 100), 0)
	if err != unix.EAGAIN {
		qt.Assert(t, qt.IsNil(err))
	}
	return n >= 0 && err == nil
}

// Built-in programs read packets on a device without Ethernet, on each hook that sees packets, as long as they
// are members; and explain says of them what happens.
func TestWithoutEthernet(t *testing.T) {
	for _, test := range []struct {
		hook hook.Hook
		mode hook.Mode
	}{{hook.XDP, hook.ModeAuto}, {hook.XDP, hook.ModeGeneric}, {hook.TCXIngress, 0}, {hook.TCIngress, 0}} {
		t.Run(string(test.hook)+" "+test.mode.String(), func(t *testing.T) {
			testenv.NeedHook(t, test.hook)
			s := newTunnel(t)
			s.Target.Hook = test.hook
			spec, err := programs.Spec("droplist")
			qt.Assert(t, qt.IsNil(err))
			list, err := ebpf.NewMap(spec.Maps["droplist_v4"])
			qt.Assert(t, qt.IsNil(err))
			defer list.Close()
			function := programs.Function("droplist", test.hook)
			source := func() dispatcher.Source {
				return dispatcher.Spec(spec, dispatcher.LoadOptions{Program: function, Maps: map[string]*ebpf.Map{"droplist_v4": list}})
			}
			link := s.Join(t, source(), dispatcher.Options{Mode: test.mode, Persistent: true})
			defer s.Clear(t)
			qt.Check(t, qt.Equals(s.Read(t).Begins, hook.BeginsIP))

			_, prefix := programs.DropKey(netip.MustParsePrefix("10.78.0.2/32"))
			check := func(what string) {
				t.Helper()
				qt.Assert(t, qt.IsNil(list.Put(prefix, uint64(0))))
				qt.Check(t, qt.IsFalse(s.arrives(t)), qt.Commentf("%s: on the list", what))
				want := hook.Drop
				for range 2 {
					if test.hook.Family() != "tc" {
						got := explain(t, explainer(t, s.Scene, s.Target), s.datagram(t))
						qt.Check(t, qt.IsNil(got.Err))
						qt.Check(t, qt.Equals(got.Verdict, want), qt.Commentf("%s", what))
					}
					if want == hook.Drop {
						qt.Assert(t, qt.IsNil(list.Delete(prefix)))
						want = hook.Pass
					}
				}
				qt.Check(t, qt.IsTrue(s.arrives(t)), qt.Commentf("%s: not on the list", what))
			}
			check("attached")
			qt.Assert(t, qt.IsNil(link.Update(t.Context(), source())))
			check("replaced")
			if test.hook == hook.XDP {
				_, err = dispatcher.Seal(t.Context(), s.Target, dispatcher.SealOptions{BPFFS: s.BPFFS})
				qt.Assert(t, qt.IsNil(err))
				check("sealed")
				qt.Assert(t, qt.IsNil(link.Set(t.Context(), hook.Settings{Priority: 7})))
				check("set")
			}
		})
	}
}

// Where the kernel takes an XDP program and packets do not meet it, it is refused. That it is so is tried with
// packets: if a kernel runs such programs some day, this test fails.
func TestWhereXDPNeverRuns(t *testing.T) {
	for _, kind := range []string{"vrf", "ifb"} {
		t.Run(kind, func(t *testing.T) {
			s := scene.New(t)
			args := map[string][]string{"vrf": {"vrf", "table", "10"}, "ifb": {"ifb"}}[kind]
			index := s.Server.AddDevice(t, "upper", args...)
			there := s.OnDevice(dispatcher.XDP("upper").In(s.Server.Name))
			_, err := there.TryJoin(t, dispatcher.Program(testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)), dispatcher.Options{})
			qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
			qt.Check(t, qt.ErrorMatches(err, "attach xdp upper: .* do not pass XDP programs .*"))
			_, err = dispatcher.Plan(t.Context(), there.Target, dispatcher.Program(testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)), dispatcher.Options{BPFFS: s.BPFFS})
			qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))

			port := 7000
			s.Server.Do(t, func() {
				l, err := link.AttachXDP(link.XDPOptions{Interface: index, Program: testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)})
				qt.Assert(t, qt.IsNil(err))
				t.Cleanup(func() { l.Close() })
			})
			if kind == "vrf" {
				s.Server.IP(t, "link", "set", s.ServerDev, "master", "upper")
				s.Server.IP(t, "address", "replace", testenv.ServerIPv4.String()+"/24", "dev", s.ServerDev)
			} else {
				testenv.NeedHook(t, hook.TCXIngress)
				s.Server.Do(t, func() {
					l, err := link.AttachTCX(link.TCXOptions{Interface: s.ServerIfindex, Attach: ebpf.AttachTCXIngress, Program: testenv.Load(t, &ebpf.ProgramSpec{
						Name: "ldt_to_ifb", Type: ebpf.SchedCLS, License: "Dual BSD/GPL",
						Instructions: asm.Instructions{
							asm.Mov.Imm(asm.R1, int32(index)), asm.Mov.Imm(asm.R2, 0), asm.FnRedirect.Call(), asm.Return(),
						},
					})})
					qt.Assert(t, qt.IsNil(err))
					t.Cleanup(func() { l.Close() })
				})
			}
			qt.Check(t, qt.Equals(s.Passed(t, port, 5), 5))
		})
	}
}
