package demo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
)

const (
	// cli begins the commands for the server's devices.
	cli = "dispatcher -n $NS --bpffs $BPFFS "

	// With --map-pins the list outlives the program, and the next program gets
	// it.
	attachDroplist  = cli + "attach xdp veth1 builtin:droplist --priority 20 --map-pins $BPFFS/maps"
	replaceDroplist = cli + "replace xdp veth1 droplist builtin:droplist --map-pins $BPFFS/maps"

	// replacementTime bounds the replacements on a slow machine.
	replacementTime = 10 * time.Second
)

// replacements is how often a member is replaced under the flood.
var replacements uint64 = 100

func (s *stage) attachThree(ctx context.Context) error {
	s.say("With --hold a member belongs to its process. Members run by priority, not in the order in which they came.")
	attach := []struct{ name, line string }{
		{sample, cli + "attach xdp veth1 builtin:sample --priority 50 --global every=1 --hold"},
		{droplist, attachDroplist + " --hold"},
		{count, cli + "attach xdp veth1 builtin:count --priority 10 --hold"},
	}
	for _, a := range attach {
		o, err := s.hold(ctx, a.line)
		if err != nil {
			return err
		}
		s.owners[a.name] = o
	}
	s.say("This puts %s on the droplist, through its pinned map:", badAddr)
	if err := s.drop(); err != nil {
		return err
	}
	c, err := s.list(ctx, hook.XDP)
	if err != nil {
		return err
	}
	if err := s.equal(order(c), "count, droplist, sample", "they run in the order %s", order(c)); err != nil {
		return err
	}
	return s.sees(ctx, 2*packets)
}

// drop puts the bad address on the droplist.
func (s *stage) drop() error {
	name, key := badPrefix()
	s.show("bpftool map update pinned $BPFFS/maps/droplist_v4 key 32 0 0 0 10 66 0 66 value 0 0 0 0 0 0 0 0")
	for _, pin := range pinned(s.expand("$BPFFS/maps")) {
		s.made.pins[pin] = true
	}
	m, err := ebpf.LoadPinnedMap(s.expand("$BPFFS/maps/")+name, nil)
	if err != nil {
		return err
	}
	defer m.Close()
	return m.Put(key, uint64(0))
}

func (s *stage) refuse(ctx context.Context) error {
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
			return s.check(false, "the kernel refuses %q (%v)", s.expand(line), err)
		}
	}
	if err := s.check(true, "the kernel refused all of them (EBUSY)"); err != nil {
		return err
	}
	return s.arrive(packets, 0)
}

func (s *stage) killOwner(ctx context.Context) error {
	o := s.owners[droplist]
	s.say("Process %d holds droplist. It gets no chance to clean up.", o.cmd.Process.Pid)
	s.show(fmt.Sprintf("kill -9 %d", o.cmd.Process.Pid))
	_ = o.kill()
	// The kernel empties the slot some milliseconds later.
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		c, err := s.chain(ctx, hook.XDP)
		if err != nil {
			return err
		}
		if m := c.Member(droplist); m == nil || m.State == hook.StateEmpty || time.Since(start) > patience {
			break
		}
	}
	c, err := s.list(ctx, hook.XDP)
	if err != nil {
		return err
	}
	states := map[string]hook.State{}
	for _, m := range c.Members {
		states[m.Name] = m.State
	}
	want := [...]hook.State{hook.StateRunning, hook.StateEmpty, hook.StateRunning}
	if err := s.equal([...]hook.State{states[count], states[droplist], states[sample]}, want,
		"count is %s, droplist is %s, sample is %s", states[count], states[droplist], states[sample]); err != nil {
		return err
	}
	return s.arrive(packets, packets)
}

func (s *stage) replaceUnderFlood(ctx context.Context) error {
	s.say("droplist comes back, pinned this time, so no process holds it. The new program shares the map of the")
	s.say("old one, so the list is the same.")
	if err := s.run(ctx, attachDroplist); err != nil {
		return err
	}
	before, err := s.chain(ctx, hook.XDP)
	if err != nil {
		return err
	}
	if err := s.arrive(packets, 0); err != nil {
		return err
	}

	s.say("Now %s sends as fast as it can, while the program is replaced by a new copy %d times.", badAddr, replacements)
	s.show(fmt.Sprintf("for i in $(seq %d); do %s; done", replacements, replaceDroplist))
	done := uint64(0)
	bad, good, err := s.net.underFlood(func() error {
		for start := time.Now(); done < replacements && time.Since(start) < replacementTime; done++ {
			if _, err := s.quietly(ctx, replaceDroplist); err != nil {
				return err
			}
			if _, err := s.chain(ctx, hook.XDP); err != nil { // for the ledger
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	after, err := s.chain(ctx, hook.XDP)
	if err != nil {
		return err
	}
	was, is := programID(before, droplist), programID(after, droplist)
	if err := s.check(was != 0 && is != 0 && was != is, "after %d replacements the program, once id %d, is id %d", done, was, is); err != nil {
		return err
	}
	if err := s.check(bad.sent > done && bad.arrived == 0 && good.arrived > 0,
		"meanwhile, of %s packets from %s, %s arrived; of %s from %s, %s", grouped(bad.sent), badAddr, grouped(bad.arrived),
		grouped(good.sent), goodAddr, grouped(good.arrived)); err != nil {
		return err
	}

	s.say("Would a packet that slips through be seen? The same flood, while droplist is away for a moment.")
	bad, _, err = s.net.underFlood(func() error { return s.run(ctx, cli+"detach xdp veth1 droplist", attachDroplist) })
	if err != nil {
		return err
	}
	return s.check(bad.arrived > 0, "of %s packets from %s, %s arrived in that moment", grouped(bad.sent), badAddr, grouped(bad.arrived))
}

func (s *stage) reorder(ctx context.Context) error {
	s.say("count runs before droplist and sees everything. Then it moves behind droplist.")
	if err := s.sees(ctx, 2*packets); err != nil {
		return err
	}
	if err := s.run(ctx, cli+"set xdp veth1 count --priority 30"); err != nil {
		return err
	}
	c, err := s.list(ctx, hook.XDP)
	if err != nil {
		return err
	}
	if err := s.equal(order(c), "droplist, count, sample", "they run in the order %s", order(c)); err != nil {
		return err
	}
	return s.sees(ctx, packets)
}

func (s *stage) seal(ctx context.Context) error {
	s.say("droplist was loaded from a file, and no process holds it, so its code can be linked into the dispatcher.")
	s.say("Packets then skip the way through its slot. The other members still belong to their processes.")
	if err := s.run(ctx, cli+"seal xdp veth1"); err != nil {
		return err
	}
	if err := s.wantSealed(ctx, droplist); err != nil {
		return err
	}
	if err := s.sees(ctx, packets); err != nil {
		return err
	}
	s.say("A sealed member can be replaced, too.")
	if err := s.run(ctx, replaceDroplist); err != nil {
		return err
	}
	if err := s.wantSealed(ctx, droplist); err != nil {
		return err
	}
	if err := s.sees(ctx, packets); err != nil {
		return err
	}
	if err := s.run(ctx, cli+"unseal xdp veth1"); err != nil {
		return err
	}
	return s.wantSealed(ctx)
}

// wantSealed checks which members are linked.
func (s *stage) wantSealed(ctx context.Context, want ...string) error {
	c, err := s.list(ctx, hook.XDP)
	if err != nil {
		return err
	}
	var sealed []string
	for _, m := range c.Members {
		if m.Sealed {
			sealed = append(sealed, m.Name)
		}
	}
	words := "no member is sealed"
	if len(sealed) > 0 {
		words = "sealed: " + strings.Join(sealed, ", ")
	}
	return s.check(slices.Equal(sealed, want), "%s", words)
}

// sees sends packets while the bad ones are dropped, and checks what the
// members saw of them. How many count sees depends on its position.
func (s *stage) sees(ctx context.Context, counted uint64) error {
	before, err := s.readMaps(ctx)
	if err != nil {
		return err
	}
	if err := s.arrive(packets, 0); err != nil {
		return err
	}
	after, err := s.readMaps(ctx)
	if err != nil {
		return err
	}
	saw, dropped := after.counted-before.counted, after.dropped-before.dropped
	good, bad := after.sampled[goodAddr], after.sampled[badAddr]
	return s.equal([...]uint64{saw, dropped, good, bad}, [...]uint64{counted, packets, packets, 0},
		"the members' maps say: count saw %d, droplist dropped %d, sample got %d from %s and %d from %s", saw, dropped, good, goodAddr, bad, badAddr)
}
