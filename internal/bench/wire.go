package main

import (
	"encoding/binary"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/internal/testenv"
)

const (
	wireRounds  = 15
	wireMembers = 10
	wireTime    = 100 * time.Millisecond // of each sample
)

// wireSection counts the packets that pass a veth pair and a chain in a second.
func wireSection(b *bench, s *Section) {
	s.Title = "Packets a second"
	s.About = []string{
		"The kernel sends frames into a veth pair (BPF_PROG_TEST_RUN with BPF_F_TEST_XDP_LIVE_FRAMES, Linux 5.18). They " +
			"arrive at a chain in native mode on the other end. The last member counts and drops them, and the figure is its " +
			"count. Sender and receiver share one CPU, so the figure includes the cost of both, and of the veth pair.",
	}
	t := s.table(Table{Name: "veth", Title: "Through a veth pair, ten members, nine of them empty", Unit: "million packets a second"})
	w := newWorkshop(b.scope)
	pair := testenv.NewPair(b.scope)
	sender := b.sender()
	chains := []*subject{{row: alone, prog: w.alone("wire", 0, 1)}}
	for _, way := range ways {
		if way.Name != "tail calls" {
			chains = append(chains, &subject{row: way.Name, prog: way.build(w, "wire", wireMembers)})
		}
	}
	var root link.Link
	pair.Server.Do(b.scope, func() {
		var err error
		root, err = link.AttachXDP(link.XDPOptions{Program: chains[0].prog, Interface: pair.ServerIfindex, Flags: link.XDPDriverMode})
		b.must(err)
	})
	b.Cleanup(func() { root.Close() })
	onOneCPU(b.scope, func() {
		repeat := 10_000
		rounds := b.rounds(wireRounds)
		for round := range rounds {
			b.progress("round %d of %d", round+1, rounds)
			for _, c := range chains {
				b.must(root.Update(c.prog))
				before := w.packets()
				took := elapsed(func() { pair.Client.Do(b.scope, func() { b.send(sender, pair.ClientIfindex, repeat) }) })
				seen := float64(w.packets() - before)
				if round > 0 { // the first round finds out how many to send
					c.samples = append(c.samples, seen/took.Seconds()/1e6)
				} else if seen > 0 {
					repeat = max(repeat, int(seen*float64(wireTime)/float64(took)))
				}
			}
		}
	})
	for _, c := range chains {
		t.put(c.row, 0, statOf(c.samples))
	}
}

// sender returns a program that sends its frames out of the device on which they seem to arrive.
func (b *bench) sender() *ebpf.Program {
	const tx = 3
	return testenv.VerdictProgram(b.scope, "ldt_sender", tx)
}

// send runs the sender for a number of frames, which seem to have arrived on a device of this
// namespace.
func (b *bench) send(sender *ebpf.Program, ifindex, frames int) {
	const liveFrames = 1 << 1 // BPF_F_TEST_XDP_LIVE_FRAMES
	data := packet()
	ctx := make([]byte, 24) // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
	binary.NativeEndian.PutUint32(ctx[4:], uint32(len(data)))
	binary.NativeEndian.PutUint32(ctx[12:], uint32(ifindex))
	_, err := sender.Run(&ebpf.RunOptions{Data: data, Context: ctx, Repeat: uint32(frames), Flags: liveFrames})
	b.must(err)
}

// packets returns how many packets the last members have seen.
func (w *workshop) packets() uint64 {
	var all []uint64
	w.must(w.dropped.Lookup(uint32(0), &all))
	sum := uint64(0)
	for _, n := range all {
		sum += n
	}
	return sum
}
