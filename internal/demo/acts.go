package demo

import (
	"context"
	"fmt"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
)

// packets is how many packets each source sends when the demo counts arrivals.
const packets = 20

var acts = []act{
	{"Two network namespaces, joined by a veth pair", (*stage).setUp},
	{"Three processes put three members on one device", (*stage).attachThree},
	{"ip cannot throw them out", (*stage).refuse},
	{"An owner is killed: only its member leaves", (*stage).killOwner},
	{"A member is replaced under a flood, and nothing slips through", (*stage).replaceUnderFlood},
	{"The order is changed", (*stage).reorder},
	{"A member is sealed into the dispatcher, and replaced there", (*stage).seal},
	{"Which member drops a packet, and how many", (*stage).explain},
	{"TC: members beside a filter of tc, which cannot remove them", (*stage).joinFilter},
	{"A member is moved under a flood, and nothing slips through", (*stage).moveUnderFlood},
	{"A filter of tc becomes a member", (*stage).adoptFilter},
	{"A cgroup: its connections are redirected, and its packets are counted", (*stage).redirectCgroup},
	{"The owner is killed: connections are no longer redirected", (*stage).killRedirect},
	{"Everything in one view: members, and programs of others", (*stage).view},
	{"Another app came first and keeps its link", (*stage).adoptKept},
	{"All of it is detached", (*stage).detachAll},
}

func (s *stage) setUp(ctx context.Context) {
	s.say("Packets go from the client to veth1 of the server; the programs are on veth1.")
	s.show(fmt.Sprintf("CLIENT=%s NS=%s BPFFS=%s", s.vars["CLIENT"], s.vars["NS"], s.vars["BPFFS"]))
	s.mountBPFFS()
	s.addNetNS(ctx, "$CLIENT")
	s.addNetNS(ctx, "$NS")
	s.net = s.join(ctx, "veth0", device, ends{goodAddr, badAddr, serverAddr})
	s.arrive(s.net, packets, packets)

	s.say("The old way: the last program to come replaces the others, and anybody can remove it. $BPFFS/rival")
	s.say("drops everything; ip attaches and removes it without asking.")
	s.pinRival()
	s.run(ctx, "ip -n $NS link set dev veth1 xdp pinned $BPFFS/rival")
	c := s.list(ctx, hook.XDP)
	s.run(ctx, "ip -n $NS link set dev veth1 xdp off")
	s.check(!c.Protected() && len(c.Members) == 1 && c.Members[0].Kind == hook.KindLegacy,
		"a program without a link is \"legacy\" and not protected")
}

// join joins the namespaces by a veth pair and waits until packets travel on it.
func (s *stage) join(ctx context.Context, client, server string, at ends) *network {
	s.run(ctx,
		fmt.Sprintf("ip -n $CLIENT link add %s type veth peer name %s netns $NS", client, server),
		fmt.Sprintf("ip -n $CLIENT address add %s/24 dev %s", at.good, client),
		fmt.Sprintf("ip -n $CLIENT address add %s/24 dev %s", at.bad, client),
		fmt.Sprintf("ip -n $NS address add %s/24 dev %s", at.server, server),
		fmt.Sprintf("ip -n $CLIENT link set dev %s up", client),
		fmt.Sprintf("ip -n $NS link set dev %s up", server),
	)
	n := value(openNetwork(s.vars["CLIENT"], s.vars["NS"], at))
	s.later(n.close)
	must(n.warmUp())
	return n
}

// arrive sends packets from both addresses and checks how many arrive.
func (s *stage) arrive(n *network, wantGood, wantBad int) {
	good, bad, err := n.sendAndCount(packets)
	must(err)
	s.equal([...]int{good, bad}, [...]int{wantGood, wantBad},
		"each address sent %d packets: %d arrived from %s and %d from %s", packets, good, n.at.good, bad, n.at.bad)
}

// rise returns by how much numbers rise while packets are sent, of which the bad ones
// are dropped.
func (s *stage) rise(n *network, read func() []uint64) []uint64 {
	before := read()
	s.arrive(n, packets, 0)
	after := read()
	for i := range after {
		after[i] -= before[i]
	}
	return after
}

// heldBack checks what happened to the packets of a flood during some changes.
func (s *stage) heldBack(at ends, bad, good traffic, changes uint64) {
	s.check(bad.sent > changes && bad.arrived == 0 && good.arrived > 0,
		"meanwhile, of %s packets from %s, %s arrived; of %s from %s, %s", grouped(bad.sent), at.bad, grouped(bad.arrived),
		grouped(good.sent), at.good, grouped(good.arrived))
}

// order returns the members' names in run order.
func order(c *hook.Chain) string {
	var names []string
	for _, m := range c.Members {
		names = append(names, m.Name)
	}
	return strings.Join(names, ", ")
}

// programID returns the id of a member's program, 0 if there is none.
func programID(c *hook.Chain, member string) uint32 {
	if m := c.Member(member); m != nil {
		return m.Program.ID
	}
	return 0
}
