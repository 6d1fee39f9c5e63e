package observe

import (
	"maps"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
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
			args := map[string][]string{"vrf": {"type", "vrf", "table", "10"}, "ifb": {"type", "ifb"}}[kind]
			index := s.Server.AddDevice(t, "upper", args...)
			there := s.OnDevice(dispatcher.XDP("upper").In(s.Server.Name))
			_, err := there.TryJoin(t, dispatcher.Program(testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)), dispatcher.Options{})
			qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
			qt.Check(t, qt.ErrorMatches(err, "attach xdp upper: .* do not pass XDP programs .*"))
			_, err = dispatcher.Plan(t.Context(), there.Target, dispatcher.Program(testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)), dispatcher.Options{BPFFS: s.BPFFS})
			qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))

			s.Server.Do(t, func() {
				l, err := link.AttachXDP(link.XDPOptions{Interface: index, Program: testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)})
				qt.Assert(t, qt.IsNil(err))
				t.Cleanup(func() { l.Close() })
			})
			if kind == "vrf" {
				s.Server.IP(t, "link", "set", s.ServerDev, "master", "upper")
				qt.Check(t, qt.Equals(arriveBehind(t, s, "upper"), 5))
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
			if kind != "vrf" {
				qt.Check(t, qt.Equals(s.Passed(t, scene.Port, 5), 5))
			}
		})
	}
}

// arriveBehind sends 5 datagrams and returns how many arrive at a socket of a VRF.
func arriveBehind(t *testing.T, s *scene.Scene, vrf string) (n int) {
	var fd int
	s.Server.Do(t, func() {
		var err error
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(unix.BindToDevice(fd, vrf)))
		qt.Assert(t, qt.IsNil(unix.Bind(fd, &unix.SockaddrInet4{Port: scene.Port})))
	})
	defer unix.Close(fd)
	s.Send(t, scene.Port, 5)
	for {
		_, _, err := unix.Recvfrom(fd, make([]byte, 100), 0)
		if err == unix.EAGAIN {
			return n
		}
		qt.Assert(t, qt.IsNil(err))
		n++
	}
}

// upperServer and upperClient are the addresses of the devices in TestKindsOfDevices.
var (
	upperServer = netip.MustParseAddr("10.79.0.1")
	upperClient = netip.MustParseAddr("10.79.0.2")
)

// kinds make a device on the server, and what it takes that packets of the client arrive there. Its name is "upper", and so is
// the client's, if that needs another one than the pair's.
var kinds = map[string]func(t *testing.T, s *scene.Scene){
	"bridge": func(t *testing.T, s *scene.Scene) {
		s.Server.AddDevice(t, "upper", "type", "bridge")
		s.Server.IP(t, "link", "set", s.ServerDev, "master", "upper")
	},
	"bond": func(t *testing.T, s *scene.Scene) {
		s.Server.AddDevice(t, "upper", "type", "bond", "mode", "active-backup", "miimon", "10")
		s.Server.IP(t, "link", "set", s.ServerDev, "down")
		s.Server.IP(t, "link", "set", s.ServerDev, "master", "upper")
	},
	"vlan": func(t *testing.T, s *scene.Scene) {
		s.Server.AddDevice(t, "upper", "link", s.ServerDev, "type", "vlan", "id", "5")
		s.Client.AddDevice(t, "upper", "link", s.ClientDev, "type", "vlan", "id", "5")
	},
	"macvlan": func(t *testing.T, s *scene.Scene) {
		const address = "02:00:0a:4f:00:01" // else both devices would answer for the server's address
		s.Server.AddDevice(t, "upper", "link", s.ServerDev, "address", address, "type", "macvlan", "mode", "bridge")
		s.Client.IP(t, "neigh", "add", upperServer.String(), "lladdr", address, "dev", s.ClientDev)
	},
	"ipvlan": func(t *testing.T, s *scene.Scene) {
		s.Server.AddDevice(t, "upper", "link", s.ServerDev, "type", "ipvlan", "mode", "l2")
	},
	"gre":       tunnelOf("gre"),
	"ipip":      tunnelOf("ipip"),
	"netkit":    func(t *testing.T, s *scene.Scene) { s.Server.AddNetkit(t, "upper", s.Client) },
	"ppp":       func(t *testing.T, s *scene.Scene) { s.AddPPP(t, "upper") },
	"wireguard": func(t *testing.T, s *scene.Scene) { s.AddWireGuard(t, "upper") },
}

func tunnelOf(kind string) func(t *testing.T, s *scene.Scene) {
	return func(t *testing.T, s *scene.Scene) {
		s.Server.AddDevice(t, "upper", "type", kind, "local", testenv.ServerIPv4.String(), "remote", testenv.ClientIPv4.String())
		s.Client.AddDevice(t, "upper", "type", kind, "local", testenv.ClientIPv4.String(), "remote", testenv.ServerIPv4.String())
	}
}

// On each kind of device the list drops what explain says it drops, in the mode that auto takes and in generic mode.
func TestKindsOfDevices(t *testing.T) {
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		build := kinds[kind]
		t.Run(kind, func(t *testing.T) {
			if kind != "bond" {
				// Linux 6.1 and 6.12 never release a program that was replaced on a bond in native mode
				// (bond_xdp_set, drivers/net/bonding/bond_main.c); 7.2 does.
				testenv.CheckLeaks(t)
			}
			s := scene.SetUp(t)
			build(t, s)
			there := s.OnDevice(dispatcher.XDP("upper").In(s.Server.Name))
			client := s.ClientDev
			if _, err := s.Client.TryIP("link", "show", "upper"); err == nil {
				client = "upper"
			}
			s.Server.IP(t, "address", "add", upperServer.String()+"/24", "dev", "upper")
			s.Client.IP(t, "address", "add", upperClient.String()+"/24", "dev", client)
			passed := func() int { return there.PassedTo(t, netip.AddrPortFrom(upperServer, scene.Port), 5) }
			if kind == "wireguard" {
				passed = func() int { return passedLater(t, there) }
			}
			scene.Soon(t, func() bool { return passed() == 5 })

			auto := checkKind(t, there, passed, hook.ModeAuto)
			t.Logf("mode auto takes %v", auto)
			if auto != hook.ModeGeneric {
				checkKind(t, there, passed, hook.ModeGeneric)
				return
			}
			// Auto has found that the driver cannot: so it is, and nothing is left of the try.
			_, err := there.TryJoin(t, dispatcher.Program(testenv.VerdictProgram(t, "ldt_drop", testenv.XDPDrop)), dispatcher.Options{Mode: hook.ModeNative})
			qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
			t.Logf("native: %v", err)
			qt.Check(t, qt.Equals(passed(), 5))
		})
	}
}

// passedLater is PassedTo for WireGuard, which decrypts packets in a work queue: it waits for them.
func passedLater(t *testing.T, s *scene.Scene) (n int) {
	t.Helper()
	to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(upperServer, scene.Port))
	var in, out *net.UDPConn
	var err error
	s.Server.Do(t, func() { in, err = net.ListenUDP("udp4", to) })
	qt.Assert(t, qt.IsNil(err))
	defer in.Close()
	s.Client.Do(t, func() { out, err = net.DialUDP("udp4", nil, to) })
	qt.Assert(t, qt.IsNil(err))
	defer out.Close()
	for range 5 {
		_, err := out.Write([]byte("datagram"))
		qt.Assert(t, qt.IsNil(err))
	}
	qt.Assert(t, qt.IsNil(in.SetReadDeadline(time.Now().Add(300*time.Millisecond))))
	for n < 5 {
		if _, err := in.Read(make([]byte, 100)); err != nil {
			break
		}
		n++
	}
	return n
}

// checkKind attaches the list to a device, and takes it through what a user does. It returns the chain's mode.
func checkKind(t *testing.T, s *scene.Scene, passed func() int, mode hook.Mode) hook.Mode {
	t.Helper()
	spec, err := programs.Spec("droplist")
	qt.Assert(t, qt.IsNil(err))
	list, err := ebpf.NewMap(spec.Maps["droplist_v4"])
	qt.Assert(t, qt.IsNil(err))
	defer list.Close()
	from := dispatcher.Spec(spec, dispatcher.LoadOptions{
		Program: programs.Function("droplist", hook.XDP), Maps: map[string]*ebpf.Map{"droplist_v4": list},
	})
	member, err := s.TryJoin(t, from, dispatcher.Options{Mode: mode, Persistent: true})
	if kernel.Since(5, 14) || !strings.HasPrefix(t.Name(), "TestKindsOfDevices/gre") && !strings.HasPrefix(t.Name(), "TestKindsOfDevices/ipip") {
		qt.Assert(t, qt.IsNil(err))
	} else {
		// The program would see the header of the packet around.
		qt.Assert(t, qt.ErrorIs(err, hook.ErrIncompatible))
		return hook.ModeGeneric
	}
	chain := s.Read(t)
	qt.Check(t, qt.Equals(passed(), 5))

	_, prefix := programs.DropKey(netip.PrefixFrom(upperClient, 32))
	qt.Assert(t, qt.IsNil(list.Put(prefix, uint64(0))))
	sent := packet.Spec{
		Protocol: packet.UDP, From: upperClient, To: upperServer, FromPort: 40000, ToPort: scene.Port, Begins: chain.Begins,
	}
	if chain.Begins == "" {
		sent.FromMAC, sent.ToMAC = make(net.HardwareAddr, 6), make(net.HardwareAddr, 6)
	}
	datagram, err := packet.Build(sent)
	qt.Assert(t, qt.IsNil(err))
	check := func(what string) {
		t.Helper()
		qt.Check(t, qt.Equals(passed(), 0), qt.Commentf("%s", what))
		qt.Check(t, qt.Equals(explain(t, explainer(t, s, s.Target), datagram).Verdict, hook.Drop), qt.Commentf("%s", what))
	}
	check("attached")
	qt.Assert(t, qt.IsNil(scene.Second(dispatcher.Seal(t.Context(), s.Target, dispatcher.SealOptions{BPFFS: s.BPFFS}))))
	check("sealed")
	qt.Assert(t, qt.IsNil(member.Set(t.Context(), scene.Priority(7))))
	check("set")
	counted := sample(t, s, s.Target, func() { qt.Check(t, qt.Equals(passed(), 0)) })
	qt.Check(t, qt.Equals(dropped(counted.Entries[0]), 5))
	qt.Assert(t, qt.IsNil(list.Delete(prefix)))
	qt.Check(t, qt.Equals(passed(), 5))
	s.Clear(t)
	return chain.Mode
}
