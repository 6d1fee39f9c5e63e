package programs_test

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
)

func putRedirect(t *testing.T, coll *ebpf.Collection, from, to string) {
	t.Helper()
	name, key, value, err := programs.RedirectEntry(netip.MustParseAddrPort(from), netip.MustParseAddrPort(to))
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(coll.Maps[name].Put(key, value)))
}

// connects says how often an entry was used.
func connects(t *testing.T, coll *ebpf.Collection, from string) uint64 {
	t.Helper()
	addr := netip.MustParseAddrPort(from)
	name, key, _, err := programs.RedirectEntry(addr, addr)
	qt.Assert(t, qt.IsNil(err))
	if name == "redirect_v4" {
		var v programs.TargetV4
		qt.Assert(t, qt.IsNil(coll.Maps[name].Lookup(key, &v)))
		return v.Connects
	}
	var v programs.TargetV6
	qt.Assert(t, qt.IsNil(coll.Maps[name].Lookup(key, &v)))
	return v.Connects
}

// connectHook is the hook for connect(2) to an address.
func connectHook(to netip.Addr) hook.Hook {
	if to.Is4() {
		return hook.CgroupConnect4
	}
	return hook.CgroupConnect6
}

func dial(t *testing.T, client *testenv.Resident, network, to string) string {
	t.Helper()
	reached, err := client.Dial(t, network, netip.MustParseAddrPort(to))
	if err != nil {
		return ""
	}
	// There is no program for getpeername(2), so it tells where the connection went.
	peer := netip.AddrPortFrom(reached.Peer.Addr().Unmap(), reached.Peer.Port())
	qt.Check(t, qt.Equals(peer, reached.Answer))
	return reached.Answer.String()
}

// The namespace has only a few listeners on its loopback device. connect(2) to any other address
// fails.
func TestRedirect(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	cgroup := testenv.NewCgroup(t)
	client := cgroup.Enter(t, ns)
	for _, addr := range []string{"127.0.0.1:8080", "127.0.0.2:8080", "127.0.0.1:80", "[::1]:8080", "[::1]:80"} {
		ns.Listen(t, netip.MustParseAddrPort(addr))
	}

	type entry struct{ from, to string }
	for _, test := range []struct {
		name    string
		entries []entry // the first one is used if there is an answer
		dial    string
		want    string // the answer's sender; empty: no answer
	}{
		{"no entries", nil, "127.0.0.1:80", "127.0.0.1:80"},
		{"no entries, elsewhere", nil, "192.0.2.1:80", ""},
		{"no entries, v6", nil, "[::1]:80", "[::1]:80"},
		{"no entries, v6 elsewhere", nil, "[2001:db8::1]:80", ""},

		{"address and port", []entry{{"192.0.2.1:80", "127.0.0.1:8080"}}, "192.0.2.1:80", "127.0.0.1:8080"},
		{"other address", []entry{{"192.0.2.1:80", "127.0.0.1:8080"}}, "192.0.2.2:80", ""},
		{"other port", []entry{{"192.0.2.1:80", "127.0.0.1:8080"}}, "192.0.2.1:8080", ""},
		{"away from one that answers", []entry{{"127.0.0.1:80", "127.0.0.2:8080"}}, "127.0.0.1:80", "127.0.0.2:8080"},
		{"same port", []entry{{"192.0.2.1:80", "127.0.0.1:0"}}, "192.0.2.1:80", "127.0.0.1:80"},
		{"same address", []entry{{"127.0.0.2:80", "0.0.0.0:8080"}}, "127.0.0.2:80", "127.0.0.2:8080"},
		{"any port", []entry{{"192.0.2.1:0", "127.0.0.1:0"}}, "192.0.2.1:8080", "127.0.0.1:8080"},
		{"any address", []entry{{"0.0.0.0:80", "127.0.0.2:8080"}}, "198.51.100.1:80", "127.0.0.2:8080"},
		{"any", []entry{{"0.0.0.0:0", "127.0.0.2:8080"}}, "198.51.100.1:443", "127.0.0.2:8080"},
		{
			"the exact one of all",
			[]entry{{"192.0.2.1:80", "127.0.0.1:8080"}, {"192.0.2.1:0", "127.0.0.2:0"}, {"0.0.0.0:80", "127.0.0.2:0"}, {"0.0.0.0:0", "127.0.0.2:0"}},
			"192.0.2.1:80", "127.0.0.1:8080",
		},
		{
			"address before port",
			[]entry{{"192.0.2.1:0", "127.0.0.1:8080"}, {"0.0.0.0:80", "127.0.0.2:0"}, {"0.0.0.0:0", "127.0.0.2:0"}},
			"192.0.2.1:80", "127.0.0.1:8080",
		},
		{"port before nothing", []entry{{"0.0.0.0:80", "127.0.0.1:8080"}, {"0.0.0.0:0", "127.0.0.2:0"}}, "192.0.2.1:80", "127.0.0.1:8080"},
		{"as it was", []entry{{"127.0.0.1:80", "0.0.0.0:0"}, {"0.0.0.0:0", "127.0.0.2:8080"}}, "127.0.0.1:80", "127.0.0.1:80"},
		{"targets are not redirected", []entry{{"192.0.2.1:80", "127.0.0.1:80"}, {"127.0.0.1:80", "127.0.0.2:8080"}}, "192.0.2.1:80", "127.0.0.1:80"},

		{"v6 address and port", []entry{{"[2001:db8::1]:80", "[::1]:8080"}}, "[2001:db8::1]:80", "[::1]:8080"},
		{"v6 other address", []entry{{"[2001:db8::1]:80", "[::1]:8080"}}, "[2001:db8:1::1]:80", ""},
		{"v6 other port", []entry{{"[2001:db8::1]:80", "[::1]:8080"}}, "[2001:db8::1]:81", ""},
		{"v6 same port", []entry{{"[2001:db8::1]:80", "[::1]:0"}}, "[2001:db8::1]:80", "[::1]:80"},
		{"v6 same address", []entry{{"[::1]:443", "[::]:8080"}}, "[::1]:443", "[::1]:8080"},
		{"v6 any port", []entry{{"[2001:db8::1]:0", "[::1]:8080"}, {"[::]:80", "[::1]:80"}}, "[2001:db8::1]:80", "[::1]:8080"},
		{"v6 any address", []entry{{"[::]:80", "[::1]:8080"}, {"[::]:0", "[::1]:80"}}, "[2001:db8::1]:80", "[::1]:8080"},
		{"v6 any", []entry{{"[::]:0", "[::1]:8080"}}, "[2001:db8::1]:443", "[::1]:8080"},

		{"v4 over a v6 socket", []entry{{"192.0.2.1:80", "127.0.0.1:8080"}, {"[::]:0", "[::1]:8080"}}, "[::ffff:192.0.2.1]:80", "127.0.0.1:8080"},
		{"v4 over a v6 socket, elsewhere", []entry{{"[::]:0", "[::1]:8080"}}, "[::ffff:192.0.2.1]:80", ""},
	} {
		for _, network := range []string{"tcp", "udp"} {
			t.Run(test.name+", "+network, func(t *testing.T) {
				both := attachRedirect(t, cgroup, nil)
				for _, coll := range both {
					for _, e := range test.entries {
						putRedirect(t, coll, e.from, e.to)
					}
				}
				qt.Check(t, qt.Equals(dial(t, client, network, test.dial), test.want))

				coll := both[connectHook(netip.MustParseAddrPort(test.dial).Addr())]
				for i, e := range test.entries {
					var want uint64
					if i == 0 && test.want != "" {
						want = 1
					}
					qt.Check(t, qt.Equals(connects(t, coll, e.from), want), qt.Commentf("%s", e.from))
				}
			})
		}
	}
}

// attachRedirect attaches redirect to both hooks.
func attachRedirect(t *testing.T, cgroup *testenv.Cgroup, constants constants) map[hook.Hook]*ebpf.Collection {
	t.Helper()
	both := map[hook.Hook]*ebpf.Collection{}
	for _, h := range programs.Hooks("redirect") {
		both[h] = attachCgroup(t, cgroup, h, "redirect", constants)
	}
	return both
}

func TestRedirectConstants(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	cgroup := testenv.NewCgroup(t)
	client := cgroup.Enter(t, ns)
	for _, addr := range []string{"127.0.0.1:8080", "127.0.0.1:80", "[::1]:8080", "[::1]:80"} {
		ns.Listen(t, netip.MustParseAddrPort(addr))
	}

	v4 := constants{"from_ip": "192.0.2.1", "from_port": 80, "to_ip": "127.0.0.1", "to_port": 8080}
	v6 := constants{"from_ip6": "2001:db8::1", "from_port": 80, "to_ip6": "::1", "to_port": 8080}
	ports := constants{"from_port": 443, "to_port": 8080}
	for _, test := range []struct {
		name    string
		set     constants
		network string
		dial    string
		want    string
	}{
		{"v4", v4, "tcp", "192.0.2.1:80", "127.0.0.1:8080"},
		{"v4, UDP", v4, "udp", "192.0.2.1:80", "127.0.0.1:8080"},
		{"v4, other address", v4, "tcp", "127.0.0.1:80", "127.0.0.1:80"},
		{"v4, other port", v4, "tcp", "192.0.2.1:81", ""},
		{"v4 over a v6 socket", v4, "tcp", "[::ffff:192.0.2.1]:80", "127.0.0.1:8080"},
		{"v4 is not about v6", v4, "tcp", "[::1]:80", "[::1]:80"},
		{"v4 to an address only", constants{"from_ip": "192.0.2.1", "to_ip": "127.0.0.1"}, "tcp", "192.0.2.1:80", "127.0.0.1:80"},
		{"v4 to a port only", constants{"from_ip": "127.0.0.1", "to_port": 8080}, "tcp", "127.0.0.1:80", "127.0.0.1:8080"},
		{"v4 to a port only is not about v6", constants{"from_ip": "127.0.0.1", "to_port": 8080}, "tcp", "[::1]:80", "[::1]:80"},
		{"v4 from any", constants{"to_ip": "127.0.0.1"}, "tcp", "198.51.100.7:80", "127.0.0.1:80"},
		{"v6", v6, "tcp", "[2001:db8::1]:80", "[::1]:8080"},
		{"v6, other address", v6, "tcp", "[::1]:80", "[::1]:80"},
		{"v6, other port", v6, "tcp", "[2001:db8::1]:81", ""},
		{"v6 is not about v4", v6, "tcp", "127.0.0.1:80", "127.0.0.1:80"},
		{"v6 is not about v4 over a v6 socket", v6, "tcp", "[::ffff:127.0.0.1]:80", "127.0.0.1:80"},
		{"v6 from any", constants{"to_ip6": "::1"}, "tcp", "[2001:db8::7]:80", "[::1]:80"},
		{"ports", ports, "tcp", "127.0.0.1:443", "127.0.0.1:8080"},
		{"ports, v6", ports, "tcp", "[::1]:443", "[::1]:8080"},
		{"ports, other", ports, "tcp", "127.0.0.1:80", "127.0.0.1:80"},
		{"to nowhere", constants{"from_ip": "127.0.0.1", "from_port": 80}, "tcp", "127.0.0.1:80", "127.0.0.1:80"},
		{"TCP of TCP only", constants{"protocol": protoTCP, "to_port": 8080}, "tcp", "127.0.0.1:80", "127.0.0.1:8080"},
		{"UDP of TCP only", constants{"protocol": protoTCP, "to_port": 8080}, "udp", "127.0.0.1:80", "127.0.0.1:80"},
		{"UDP of UDP only", constants{"protocol": protoUDP, "to_port": 8080}, "udp", "[::1]:80", "[::1]:8080"},
		{"TCP of UDP only", constants{"protocol": protoUDP, "to_port": 8080}, "tcp", "[::1]:80", "[::1]:80"},
	} {
		t.Run(test.name, func(t *testing.T) {
			attachRedirect(t, cgroup, test.set)
			qt.Check(t, qt.Equals(dial(t, client, test.network, test.dial), test.want))
		})
	}

	t.Run("entries go before constants", func(t *testing.T) {
		for _, coll := range attachRedirect(t, cgroup, constants{"from_port": 443, "to_port": 8080}) {
			putRedirect(t, coll, "127.0.0.1:443", "127.0.0.1:80")
			putRedirect(t, coll, "[::1]:443", "[::1]:80")
		}
		qt.Check(t, qt.Equals(dial(t, client, "tcp", "127.0.0.1:443"), "127.0.0.1:80"))
		qt.Check(t, qt.Equals(dial(t, client, "tcp", "[::1]:443"), "[::1]:80"))
	})
}

func TestRedirectEntry(t *testing.T) {
	for _, test := range []struct {
		from, to, mapName string
		key, value        any
	}{
		{
			"192.0.2.1:80", "127.0.0.1:8080", "redirect_v4",
			programs.DestinationV4{Addr: [4]byte{192, 0, 2, 1}, Port: 80},
			programs.TargetV4{Addr: [4]byte{127, 0, 0, 1}, Port: 8080},
		},
		{"0.0.0.0:0", "0.0.0.0:53", "redirect_v4", programs.DestinationV4{}, programs.TargetV4{Port: 53}},
		{
			"[2001:db8::1]:80", "[::1]:8080", "redirect_v6",
			programs.DestinationV6{Addr: [16]byte{0x20, 0x01, 0x0d, 0xb8, 15: 1}, Port: 80},
			programs.TargetV6{Addr: [16]byte{15: 1}, Port: 8080},
		},
	} {
		from, to := netip.MustParseAddrPort(test.from), netip.MustParseAddrPort(test.to)
		name, key, value, err := programs.RedirectEntry(from, to)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(name, test.mapName))
		qt.Check(t, qt.Equals(key, test.key))
		qt.Check(t, qt.Equals(value, test.value))
		type hasAddrPort interface{ AddrPort() netip.AddrPort }
		qt.Check(t, qt.Equals(key.(hasAddrPort).AddrPort(), from))
		qt.Check(t, qt.Equals(value.(hasAddrPort).AddrPort(), to))
	}

	mapped := netip.MustParseAddrPort("[::ffff:192.0.2.1]:80")
	name, key, _, err := programs.RedirectEntry(mapped, mapped)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(name, "redirect_v4"))
	qt.Check(t, qt.Equals(key, any(programs.DestinationV4{Addr: [4]byte{192, 0, 2, 1}, Port: 80})))

	for _, test := range []struct {
		from, to netip.AddrPort
		message  string
	}{
		{netip.AddrPort{}, mapped, "redirect: an address is missing"},
		{mapped, netip.AddrPort{}, "redirect: an address is missing"},
		{mapped, netip.MustParseAddrPort("[::1]:80"), `redirect .* to \[::1\]:80: IPv4 and IPv6 cannot be mixed`},
		{netip.MustParseAddrPort("[fe80::1%eth0]:80"), netip.MustParseAddrPort("[::1]:80"), "redirect .*: addresses with a zone cannot be redirected"},
	} {
		_, _, _, err := programs.RedirectEntry(test.from, test.to)
		qt.Check(t, qt.ErrorMatches(err, test.message))
	}
}
