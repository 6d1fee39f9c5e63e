package testenv

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// Addresses of every [Pair]. Pairs do not see each other.
var (
	ClientIPv4 = netip.MustParseAddr("10.77.0.1")
	ServerIPv4 = netip.MustParseAddr("10.77.0.2")
	ClientIPv6 = netip.MustParseAddr("fd77::1")
	ServerIPv6 = netip.MustParseAddr("fd77::2")
)

const (
	clientMAC = "02:77:00:00:00:01"
	serverMAC = "02:77:00:00:00:02"

	discardPort = 9
)

// Pair is two namespaces joined by a veth pair. Packets go from Client to Server, unless a method says
// otherwise; programs under test are attached to the device in Server.
type Pair struct {
	Client, Server               *NetNS
	ClientDev, ServerDev         string
	ClientIfindex, ServerIfindex int

	settler settler
}

// PairOptions are options of [NewPairOpts]. With zero the kernel chooses.
type PairOptions struct {
	ClientIfindex, ServerIfindex int
}

// NewPair creates a pair, which ends with the test.
//
// The link is nearly silent: addresses are static, neighbours permanent, and IPv6 does not look for
// routers. Only a few multicast reports remain, in the first milliseconds.
func NewPair(t testing.TB) *Pair {
	t.Helper()
	return NewPairOpts(t, PairOptions{})
}

// NewPairOpts is [NewPair] with options.
func NewPairOpts(t testing.TB, opts PairOptions) *Pair {
	t.Helper()
	p := &Pair{
		Client: NewNetNS(t), ClientDev: "veth0",
		Server: NewNetNS(t), ServerDev: "veth1",
	}
	quiet(t, p.Client)
	quiet(t, p.Server)
	p.Client.Do(t, func() { p.settler.openSocket(t) })
	p.Connect(t, opts)
	return p
}

// Connect puts in the devices, where there are none or none any more, and waits until packets pass.
func (p *Pair) Connect(t testing.TB, opts PairOptions) {
	t.Helper()
	index := func(n int) string {
		if n == 0 {
			return ""
		}
		return fmt.Sprintf("index %d", n)
	}
	p.Client.batch(t, fmt.Sprintf("link add name %s %s address %s type veth peer name %s %s address %s netns %s",
		p.ClientDev, index(opts.ClientIfindex), clientMAC,
		p.ServerDev, index(opts.ServerIfindex), serverMAC, p.Server.Name))
	p.Client.batch(t, configure(p.ClientDev, ClientIPv4, ClientIPv6, ServerIPv4, ServerIPv6, serverMAC)...)
	p.Server.batch(t, configure(p.ServerDev, ServerIPv4, ServerIPv6, ClientIPv4, ClientIPv6, clientMAC)...)
	p.Client.Do(t, func() { p.ClientIfindex = ifindex(t, p.ClientDev) })
	p.Server.Do(t, func() { p.ServerIfindex = ifindex(t, p.ServerDev) })
	p.waitUntilReady(t)
}

// configure returns the ip commands that set a device's addresses and its only neighbour.
func configure(dev string, own4, own6, peer4, peer6 netip.Addr, peerMAC string) []string {
	return []string{
		fmt.Sprintf("link set %s addrgenmode none up", dev),
		fmt.Sprintf("address add %s/24 dev %s", own4, dev),
		fmt.Sprintf("address add %s/64 dev %s nodad", own6, dev),
		fmt.Sprintf("neighbour add %s lladdr %s nud permanent dev %s", peer4, peerMAC, dev),
		fmt.Sprintf("neighbour add %s lladdr %s nud permanent dev %s", peer6, peerMAC, dev),
	}
}

// quiet turns off what IPv6 would send on devices that are created later.
// Multicast reports cannot be turned off, so quiet makes them come at once.
func quiet(t testing.TB, ns *NetNS) {
	t.Helper()
	ns.Do(t, func() {
		for file, value := range map[string]string{
			"accept_ra":                         "0",
			"router_solicitations":              "0",
			"mldv2_unsolicited_report_interval": "1", // ms
		} {
			// /proc/sys/net shows the namespace of the thread that opens it.
			if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/"+file, []byte(value), 0); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// waitUntilReady waits for what the kernel finishes some time after a device comes up: the carrier, the
// queue, the IPv6 address.
func (p *Pair) waitUntilReady(t testing.TB) {
	t.Helper()
	for start := time.Now(); p.Passed(t, discardPort, 1) != 1 || p.Passed6(t, discardPort, 1) != 1; time.Sleep(time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Fatal("no packets pass between the namespaces of a new pair")
		}
	}
}

func ifindex(t testing.TB, dev string) int {
	t.Helper()
	found, err := net.InterfaceByName(dev)
	if err != nil {
		t.Fatalf("find %s: %v", dev, err)
	}
	return found.Index
}
