package demo

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
)

const (
	addFilter  = "tc -n $NS filter add dev veth1 ingress bpf da object-pinned $BPFFS/watch"
	addClsact  = "tc -n $NS qdisc add dev veth1 clsact"
	dropClsact = "tc -n $NS qdisc del dev veth1 clsact"
)

// rounds is how often a member is moved to and fro under the flood.
var rounds = 25

// withoutTCX makes the demo play as on a kernel without TCX, for the test.
var withoutTCX = false

// chooseTC finds out which hooks of TC can have members.
func (s *stage) chooseTC(ctx context.Context) {
	err := attempt(func() { s.chain(ctx, hook.TCXIngress) })
	if err == nil && !withoutTCX {
		return
	}
	if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
		must(err)
	}
	s.tc = hook.TCIngress
	s.notHere("TCX, which came with Linux 6.6. Members are filters of clsact instead, in order and with names. But no")
	s.say("link holds a filter, so tc can remove it, and the protection from tc cannot be shown.")
}

// tcx tells whether members on TC have links.
func (s *stage) tcx() bool { return s.tc == hook.TCXIngress }

func (s *stage) joinFilter(ctx context.Context) {
	s.chooseTC(ctx)
	s.say("Another tool has a filter on veth1 already: $BPFFS/watch counts packets.")
	s.pinWatch()
	s.run(ctx, addClsact, addFilter)
	s.say("count and droplist are attached. This droplist shares its list with the one on XDP, which then leaves.")
	droplistTo, countTo := "--priority 20", "--priority 10"
	if !s.tcx() { // a filter goes behind existing ones unless a position is given
		droplistTo, countTo = "--first", "--before droplist"
	}
	s.run(ctx,
		fmt.Sprintf(cli+"attach %s veth1 builtin:droplist %s --map-pins $BPFFS/maps", s.tc, droplistTo),
		fmt.Sprintf(cli+"attach %s veth1 builtin:count %s", s.tc, countTo),
		cli+"detach xdp veth1 droplist",
	)
	members := s.list(ctx, s.tc)
	legacy := members
	if s.tcx() {
		legacy = s.list(ctx, hook.TCIngress)
	}
	watching := len(legacy.Members) > 0 && legacy.Members[len(legacy.Members)-1].Kind == hook.KindLegacy
	s.check(watching && within(members, count, droplist), "they run before the filter, which is \"legacy\"")
	s.watches(ctx)
	if !s.tcx() {
		return
	}

	s.say("tc removes its own filter, and then all of clsact. It does not even see the members.")
	s.run(ctx, "tc -n $NS filter del dev veth1 ingress", dropClsact)
	members = s.chain(ctx, s.tc)
	s.check(members.Protected() && within(members, count, droplist), "count and droplist are still there, and protected")
	s.arrive(s.net, packets, 0)
}

// watches sends packets while the bad ones are dropped. It checks what the
// members on TC saw of them, and what tc's filter saw, which gets the rest.
func (s *stage) watches(ctx context.Context) {
	saw := s.rise(s.net, func() []uint64 { return append(s.tally(ctx, s.tc), s.watched()) })
	s.equal(saw, []uint64{2 * packets, packets, packets},
		"count saw %d, droplist dropped %d, watch saw %d", saw[0], saw[1], saw[2])
}

func (s *stage) moveUnderFlood(ctx context.Context) {
	move := fmt.Sprintf(cli+"set %s veth1 droplist ", s.tc)
	s.say("While %s sends as fast as it can, droplist moves before count and behind it again, %d times.", badAddr, rounds)
	s.show(fmt.Sprintf("for i in $(seq %d); do for to in before after; do %s--$to count; done; done", rounds, move))
	was := programID(s.chain(ctx, s.tc), droplist)
	moves := uint64(0)
	bad, good := s.net.underFlood(func() {
		for start := time.Now(); moves < uint64(2*rounds) && time.Since(start) < changingTime; {
			for _, to := range []struct {
				place string
				order []string
			}{{"--before count", []string{droplist, count}}, {"--after count", []string{count, droplist}}} {
				value(s.quietly(ctx, move+to.place))
				if c := s.chain(ctx, s.tc); !within(c, to.order...) {
					s.check(false, "they run in the order %s after %s", order(c), to.place)
				}
				moves++
			}
		}
	})
	is := programID(s.list(ctx, s.tc), droplist)
	s.check(was == is, "after %d moves the program is the same, id %d", moves, is)
	s.heldBack(s.net.at, bad, good, moves)
}

func (s *stage) adoptFilter(ctx context.Context) {
	if !s.tcx() {
		must(notHere("TCX; adopting on clsact would only give the filter a name"))
	}
	s.say("tc attaches its filter again. adopt makes it a member with a link: the same program, behind the others,")
	s.say("and tc can no longer remove it.")
	s.run(ctx, addClsact, addFilter, cli+"adopt tc/ingress veth1 --name watch", dropClsact)
	c := s.list(ctx, s.tc)
	id := programID(c, watch)
	s.check(id == s.watcher && order(c) == "count, droplist, watch", "it runs behind the others, and is the same program, id %d", id)
	s.watches(ctx)
}

// within tells whether these members run in this order.
func within(c *hook.Chain, names ...string) bool {
	for _, m := range c.Members {
		if len(names) > 0 && m.Kind == hook.KindMember && m.Name == names[0] {
			names = names[1:]
		}
	}
	return len(names) == 0
}
