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

	// movingTime bounds the moves on a slow machine.
	movingTime = 10 * time.Second
)

// rounds is how often a member is moved to and fro under the flood.
var rounds = 25

// withoutTCX makes the demo play as on a kernel without TCX, for the test.
var withoutTCX = false

// chooseTC finds out which hooks of TC can have members.
func (s *stage) chooseTC(ctx context.Context) error {
	_, err := s.chain(ctx, hook.TCXIngress)
	switch {
	case err == nil && !withoutTCX:
		return nil
	case err != nil && !errors.Is(err, ebpf.ErrNotSupported):
		return err
	}
	s.tc = hook.TCIngress
	s.notHere("TCX, which came with Linux 6.6. Members are filters of clsact instead, in order and with names. But no")
	s.say("link holds a filter, so tc can remove it, and the protection from tc cannot be shown.")
	return nil
}

// tcx tells whether members on TC have links.
func (s *stage) tcx() bool { return s.tc == hook.TCXIngress }

func (s *stage) joinFilter(ctx context.Context) error {
	if err := s.chooseTC(ctx); err != nil {
		return err
	}
	s.say("Another tool has a filter on veth1 already: $BPFFS/watch counts packets.")
	if err := s.pinWatch(); err != nil {
		return err
	}
	if err := s.run(ctx, addClsact, addFilter); err != nil {
		return err
	}
	s.say("count and droplist are attached. This droplist shares its list with the one on XDP, which then leaves.")
	droplistTo, countTo := "--priority 20", "--priority 10"
	if !s.tcx() { // a filter goes behind existing ones unless a position is given
		droplistTo, countTo = "--first", "--before droplist"
	}
	err := s.run(ctx,
		fmt.Sprintf(cli+"attach %s veth1 builtin:droplist %s --map-pins $BPFFS/maps", s.tc, droplistTo),
		fmt.Sprintf(cli+"attach %s veth1 builtin:count %s", s.tc, countTo),
		cli+"detach xdp veth1 droplist",
	)
	if err != nil {
		return err
	}
	members, err := s.list(ctx, s.tc)
	if err != nil {
		return err
	}
	legacy := members
	if s.tcx() {
		if legacy, err = s.list(ctx, hook.TCIngress); err != nil {
			return err
		}
	}
	watching := len(legacy.Members) > 0 && legacy.Members[len(legacy.Members)-1].Kind == hook.KindLegacy
	if err := s.check(watching && within(members, count, droplist), "they run before the filter, which is \"legacy\""); err != nil {
		return err
	}
	if err := s.watches(ctx); err != nil || !s.tcx() {
		return err
	}
	return s.removeFilter(ctx)
}

func (s *stage) removeFilter(ctx context.Context) error {
	s.say("tc removes its own filter, and then all of clsact. It does not even see the members.")
	if err := s.run(ctx, "tc -n $NS filter del dev veth1 ingress", dropClsact); err != nil {
		return err
	}
	members, err := s.chain(ctx, s.tc)
	if err != nil {
		return err
	}
	if err := s.check(members.Protected() && within(members, count, droplist), "count and droplist are still there, and protected"); err != nil {
		return err
	}
	return s.arrive(packets, 0)
}

// watches sends packets while the bad ones are dropped. It checks what the
// members on TC saw of them, and what tc's filter saw, which gets the rest.
func (s *stage) watches(ctx context.Context) error {
	type saw struct{ counted, dropped, watched uint64 }
	look := func() (now saw, err error) {
		if now.counted, now.dropped, err = s.tally(ctx, s.tc); err == nil {
			now.watched, err = s.watched()
		}
		return now, err
	}
	before, err := look()
	if err != nil {
		return err
	}
	if err := s.arrive(packets, 0); err != nil {
		return err
	}
	after, err := look()
	if err != nil {
		return err
	}
	got := saw{after.counted - before.counted, after.dropped - before.dropped, after.watched - before.watched}
	return s.equal(got, saw{2 * packets, packets, packets},
		"count saw %d, droplist dropped %d, watch saw %d", got.counted, got.dropped, got.watched)
}

func (s *stage) moveUnderFlood(ctx context.Context) error {
	move := fmt.Sprintf(cli+"set %s veth1 droplist ", s.tc)
	s.say("While %s sends as fast as it can, droplist moves before count and behind it again, %d times.", badAddr, rounds)
	s.show(fmt.Sprintf("for i in $(seq %d); do for to in before after; do %s--$to count; done; done", rounds, move))
	before, err := s.chain(ctx, s.tc)
	if err != nil {
		return err
	}
	moves := uint64(0)
	bad, good, err := s.net.underFlood(func() error {
		for start := time.Now(); moves < uint64(2*rounds) && time.Since(start) < movingTime; {
			for _, to := range []struct {
				place string
				order []string
			}{{"--before count", []string{droplist, count}}, {"--after count", []string{count, droplist}}} {
				if _, err := s.quietly(ctx, move+to.place); err != nil {
					return err
				}
				c, err := s.chain(ctx, s.tc)
				if err != nil {
					return err
				}
				if !within(c, to.order...) {
					return fmt.Errorf("they run in the order %s after %s", order(c), to.place)
				}
				moves++
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := s.list(ctx, s.tc)
	if err != nil {
		return err
	}
	if err := s.check(programID(before, droplist) == programID(after, droplist),
		"after %d moves the program is the same, id %d", moves, programID(after, droplist)); err != nil {
		return err
	}
	return s.check(bad.sent > moves && bad.arrived == 0 && good.arrived > 0,
		"meanwhile, of %s packets from %s, %s arrived; of %s from %s, %s", grouped(bad.sent), badAddr, grouped(bad.arrived),
		grouped(good.sent), goodAddr, grouped(good.arrived))
}

func (s *stage) adoptFilter(ctx context.Context) error {
	if !s.tcx() {
		return notHere("TCX; adopting on clsact would only give the filter a name")
	}
	s.say("tc attaches its filter again. adopt makes it a member with a link: the same program, behind the others,")
	s.say("and tc can no longer remove it.")
	if err := s.run(ctx, addClsact, addFilter, cli+"adopt tc/ingress veth1 --name watch", dropClsact); err != nil {
		return err
	}
	c, err := s.list(ctx, s.tc)
	if err != nil {
		return err
	}
	if err := s.check(programID(c, watch) == s.watcher && order(c) == "count, droplist, watch",
		"it runs behind the others, and is the same program, id %d", programID(c, watch)); err != nil {
		return err
	}
	return s.watches(ctx)
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
