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

func (s *stage) setUp(ctx context.Context) error {
	s.say("Packets go from the client to veth1 of the server; the programs are on veth1.")
	s.show(fmt.Sprintf("CLIENT=%s NS=%s BPFFS=%s", s.vars["CLIENT"], s.vars["NS"], s.vars["BPFFS"]))
	if err := s.mountBPFFS(); err != nil {
		return err
	}
	for _, name := range []string{"$CLIENT", "$NS"} {
		if err := s.addNetNS(ctx, name); err != nil {
			return err
		}
	}
	err := s.run(ctx,
		"ip -n $CLIENT link add veth0 type veth peer name veth1 netns $NS",
		fmt.Sprintf("ip -n $CLIENT address add %s/24 dev veth0", goodAddr),
		fmt.Sprintf("ip -n $CLIENT address add %s/24 dev veth0", badAddr),
		fmt.Sprintf("ip -n $NS address add %s/24 dev veth1", serverAddr),
		"ip -n $CLIENT link set dev veth0 up",
		"ip -n $NS link set dev veth1 up",
	)
	if err != nil {
		return err
	}
	if s.net, err = s.openNetwork(ends{goodAddr, badAddr, serverAddr}); err != nil {
		return err
	}
	if err := s.arrive(packets, packets); err != nil {
		return err
	}

	s.say("The old way: the last program to come replaces the others, and anybody can remove it. $BPFFS/rival")
	s.say("drops everything; ip attaches and removes it without asking.")
	if err := s.pinRival(); err != nil {
		return err
	}
	if err := s.run(ctx, "ip -n $NS link set dev veth1 xdp pinned $BPFFS/rival"); err != nil {
		return err
	}
	c, err := s.list(ctx, hook.XDP)
	if err != nil {
		return err
	}
	if err := s.run(ctx, "ip -n $NS link set dev veth1 xdp off"); err != nil {
		return err
	}
	return s.check(!c.Protected() && len(c.Members) == 1 && c.Members[0].Kind == hook.KindLegacy,
		"a program without a link is \"legacy\" and not protected")
}

// openNetwork opens a network and waits until packets travel on it.
func (s *stage) openNetwork(at ends) (*network, error) {
	n, err := openNetwork(s.vars["CLIENT"], s.vars["NS"], at)
	if err != nil {
		return nil, err
	}
	s.later(n.close)
	return n, n.warmUp()
}

// arrive sends packets from both addresses and checks how many arrive.
func (s *stage) arrive(wantGood, wantBad int) error { return s.arriveOn(s.net, wantGood, wantBad) }

func (s *stage) arriveOn(n *network, wantGood, wantBad int) error {
	good, bad, err := n.sendAndCount(packets)
	if err != nil {
		return err
	}
	return s.equal([...]int{good, bad}, [...]int{wantGood, wantBad},
		"each address sent %d packets: %d arrived from %s and %d from %s", packets, good, n.at.good, bad, n.at.bad)
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
