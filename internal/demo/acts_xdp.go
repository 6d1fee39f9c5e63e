package demo

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
)

const (
	// cli begins the commands for the server's devices.
	cli = "dispatcher -n $NS --bpffs $BPFFS "

	// With --map-pins the list outlives the program, and the next program gets
	// it.
	attachDroplist  = cli + "attach xdp veth1 builtin:droplist --priority 20 --map-pins $BPFFS/maps"
	replaceDroplist = cli + "replace xdp veth1 droplist builtin:droplist --map-pins $BPFFS/maps"

	// changingTime bounds the changes under a flood on a slow machine.
	changingTime = 10 * time.Second
)

// replacements is how often a member is replaced under the flood.
var replacements uint64 = 100

func (s *stage) attachThree(ctx context.Context) {
	s.say("With --hold a member belongs to its process. Members run by priority, not in the order in which they came.")
	s.owners[sample] = s.hold(ctx, cli+"attach xdp veth1 builtin:sample --priority 50 --global every=1 --hold")
	s.owners[droplist] = s.hold(ctx, attachDroplist+" --hold")
	s.owners[count] = s.hold(ctx, cli+"attach xdp veth1 builtin:count --priority 10 --hold")
	s.run(ctx, cli+"map xdp veth1 droplist add "+badAddr.String())
	for _, pin := range pinned(s.expand("$BPFFS/maps")) {
		s.made.pins[pin] = true
	}
	s.runIn(s.list(ctx, hook.XDP), "count, droplist, sample")
	s.sees(ctx, 2*packets)
}

func (s *stage) refuse(ctx context.Context) {
	s.say("A link holds the device now. What worked in act 1 no longer works, not even with -force.")
	for _, line := range []string{
		"ip -n $NS link set dev veth1 xdp off",
		"ip -n $NS link set dev veth1 xdp pinned $BPFFS/rival",
		"ip -force -n $NS link set dev veth1 xdp pinned $BPFFS/rival",
	} {
		out, err := s.try(ctx, line)
		// An ip without libmnl prints the second message.
		busy := strings.Contains(out, "Can't replace active BPF XDP link") || strings.Contains(out, "Device or resource busy")
		if err == nil || !busy {
			s.check(false, "the kernel refuses %q (%v)", s.expand(line), err)
		}
	}
	s.check(true, "the kernel refused all of them (EBUSY)")
	s.arrive(s.net, packets, 0)
}

func (s *stage) killOwner(ctx context.Context) {
	s.say("Process %d holds droplist. It gets no chance to clean up.", s.owners[droplist].Process.Pid)
	s.kill(ctx, droplist, hook.XDP)
	states := map[string]hook.State{}
	for _, m := range s.list(ctx, hook.XDP).Members {
		states[m.Name] = m.State
	}
	s.equal(states, map[string]hook.State{count: hook.StateRunning, droplist: hook.StateEmpty, sample: hook.StateRunning},
		"count is %s, droplist is %s, sample is %s", states[count], states[droplist], states[sample])
	s.arrive(s.net, packets, packets)
}

// kill kills the owner of a member, and waits until the kernel has noticed, some
// milliseconds later.
func (s *stage) kill(ctx context.Context, member string, h hook.Hook) {
	o := s.owners[member]
	s.show(fmt.Sprintf("kill -9 %d", o.Process.Pid))
	o.kill()
	for start := time.Now(); time.Since(start) < patience; time.Sleep(10 * time.Millisecond) {
		if m := s.chain(ctx, h).Member(member); m == nil || m.State == hook.StateEmpty {
			return
		}
	}
}

func (s *stage) replaceUnderFlood(ctx context.Context) {
	s.say("droplist comes back, pinned this time, so no process holds it. The new program shares the map of the")
	s.say("old one, so the list is the same.")
	s.run(ctx, attachDroplist)
	was := programID(s.chain(ctx, hook.XDP), droplist)
	s.arrive(s.net, packets, 0)

	s.say("Now %s sends as fast as it can, while the program is replaced by a new copy %d times.", badAddr, replacements)
	s.show(fmt.Sprintf("for i in $(seq %d); do %s; done", replacements, replaceDroplist))
	done := uint64(0)
	bad, good := s.net.underFlood(func() {
		for start := time.Now(); done < replacements && time.Since(start) < changingTime; done++ {
			value(s.quietly(ctx, replaceDroplist))
			s.chain(ctx, hook.XDP) // for the ledger
		}
	})
	is := programID(s.chain(ctx, hook.XDP), droplist)
	s.check(was != 0 && is != 0 && was != is, "after %d replacements the program, once id %d, is id %d", done, was, is)
	s.heldBack(s.net.at, bad, good, done)

	s.say("Would a packet that slips through be seen? The same flood, while droplist is away for a moment.")
	bad.arrived = 0
	for tries := 0; bad.arrived == 0 && tries < 5; tries++ { // on a busy machine the flood may not have had its turn
		bad, _ = s.net.underFlood(func() { s.run(ctx, cli+"detach xdp veth1 droplist", attachDroplist) })
	}
	s.check(bad.arrived > 0, "of %s packets from %s, %s arrived in that moment", grouped(bad.sent), badAddr, grouped(bad.arrived))
}

func (s *stage) reorder(ctx context.Context) {
	s.say("count runs before droplist and sees everything. Then it moves behind droplist.")
	s.sees(ctx, 2*packets)
	s.run(ctx, cli+"set xdp veth1 count --priority 30")
	s.runIn(s.list(ctx, hook.XDP), "droplist, count, sample")
	s.sees(ctx, packets)
}

// runIn checks the order of a chain.
func (s *stage) runIn(c *hook.Chain, want string) {
	s.equal(order(c), want, "they run in the order %s", order(c))
}

func (s *stage) seal(ctx context.Context) {
	s.say("droplist was loaded from a file, and no process holds it, so its code can be linked into the dispatcher.")
	s.say("Packets then skip the way through its slot. The other members still belong to their processes.")
	s.run(ctx, cli+"seal xdp veth1")
	s.wantSealed(ctx, "sealed: droplist")
	s.sees(ctx, packets)
	s.say("A sealed member can be replaced, too.")
	s.run(ctx, replaceDroplist)
	s.wantSealed(ctx, "sealed: droplist")
	s.sees(ctx, packets)
	s.run(ctx, cli+"unseal xdp veth1")
	s.wantSealed(ctx, "no member is sealed")
}

// wantSealed checks which members are linked.
func (s *stage) wantSealed(ctx context.Context, want string) {
	var sealed []string
	for _, m := range s.list(ctx, hook.XDP).Members {
		if m.Sealed {
			sealed = append(sealed, m.Name)
		}
	}
	words := "no member is sealed"
	if len(sealed) > 0 {
		words = "sealed: " + strings.Join(sealed, ", ")
	}
	s.equal(words, want, "%s", words)
}

// sees sends packets while the bad ones are dropped, and checks what the
// members saw of them. How many count sees depends on its position.
func (s *stage) sees(ctx context.Context, counted uint64) {
	s.samples(ctx) // of earlier packets
	saw := s.rise(s.net, func() []uint64 { return s.tally(ctx, hook.XDP) })
	sampled := s.samples(ctx)
	saw = append(saw, sampled[goodAddr], sampled[badAddr])
	s.equal(saw, []uint64{counted, packets, packets, 0},
		"the members' maps say: count saw %d, droplist dropped %d, sample got %d from %s and %d from %s",
		saw[0], saw[1], saw[2], goodAddr, saw[3], badAddr)
}

func (s *stage) explain(ctx context.Context) {
	const line = cli + "%sexplain xdp veth1 --udp %s %s %d"
	s.say("explain builds packets and runs them through the members without sending them. Which member drops them?")
	out := value(s.try(ctx, fmt.Sprintf(line, "", badAddr, serverAddr, port)))
	s.check(strings.Contains(out, "=> drop by droplist"), "droplist drops a packet from %s", badAddr)
	out = value(s.try(ctx, fmt.Sprintf(line, "-q ", goodAddr, serverAddr, port)))
	s.check(strings.Contains(out, "1 packet: 1 passed"), "a packet from %s passes all members", goodAddr)

	s.say("And live: %s sends as fast as it can, and top counts for half a second.", badAddr)
	bad, good := s.net.underFlood(func() { out = value(s.try(ctx, cli+"top xdp veth1 --count 1 --interval 500ms")) })
	dropped := false
	for line := range strings.Lines(out) {
		words := strings.Fields(line)
		dropped = dropped || len(words) > 1 && words[1] == droplist && strings.Contains(line, "drop ")
	}
	s.check(dropped, "top shows that droplist drops")
	s.heldBack(s.net.at, bad, good, 0)
}
