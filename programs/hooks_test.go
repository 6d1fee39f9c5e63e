package programs_test

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// onHook describes how packets look on a hook, and what verdicts mean there.
type onHook struct {
	hook       hook.Hook
	pass, drop uint32 // the same where the program never drops
	link       int    // bytes that the program does not see of a packet
}

const tcNext = 0xffffffff // -1

// hooks has one entry for each kind of hook that sees packets.
var hooks = []onHook{
	{hook: hook.XDP, pass: pass, drop: drop},
	{hook: hook.TCXIngress, pass: tcNext, drop: 2},
	{hook: hook.CgroupSKBIngress, pass: 1, drop: 1, link: 14},
}

// shortest is the length of the shortest packet of that kind that BPF_PROG_TEST_RUN takes on all kernels. Some
// kernels make no socket buffers that are cut off in the IP header.
func (o onHook) shortest(packet []byte) int {
	switch etherType := binary.BigEndian.Uint16(packet[12:]); {
	case o.hook == hook.XDP:
		return minPacket
	case etherType == typeIPv4:
		return minPacket + 20
	case etherType == typeIPv6:
		return minPacket + 40
	}
	return minPacket + 1
}

// sees tells whether such a packet ever comes to the hook: only IP comes to sockets.
func (o onHook) sees(packet []byte) bool {
	etherType := binary.BigEndian.Uint16(packet[12:])
	return len(packet) >= o.shortest(packet) && (o.link == 0 || etherType == typeIPv4 || etherType == typeIPv6)
}

// runs tells whether BPF_PROG_TEST_RUN shows a program the packet. Old kernels (5.10) do not show it to a cgroup's
// program; cgroup_test.go tests such programs with packets of sockets.
func (o onHook) runs(t *testing.T) bool {
	t.Helper()
	if o.hook != hook.CgroupSKBIngress {
		return true
	}
	shown := testenv.Load(t, &ebpf.ProgramSpec{
		Name: "ldt_shown", Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetIngress, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{ // are there bytes between data and data_end of struct __sk_buff?
			asm.LoadMem(asm.R2, asm.R1, 76, asm.Word),
			asm.LoadMem(asm.R3, asm.R1, 80, asm.Word),
			asm.Mov.Imm(asm.R0, 0),
			asm.Add.Imm(asm.R2, 20),
			asm.JGT.Reg(asm.R2, asm.R3, "exit"),
			asm.Mov.Imm(asm.R0, 1),
			asm.Return().WithSymbol("exit"),
		},
	})
	ret, err := shown.Run(&ebpf.RunOptions{Data: packet(eth(typeIPv4), ipv4("192.0.2.1", protoUDP), payload(8))})
	qt.Assert(t, qt.IsNil(err))
	if ret == 0 {
		// The kernel shows it on 6.18 and 7.2, and not on 5.10 and 6.12.
		qt.Assert(t, qt.IsFalse(kernel.Since(6, 18)), qt.Commentf("this kernel should show it"))
		t.Logf("%s: BPF_PROG_TEST_RUN shows no packets on this kernel", o.hook)
	}
	return ret == 1
}

// length is the length of the packet as the program sees it.
func (o onHook) length(packet []byte) int { return len(packet) - o.link }

// runSegments runs a program on a packet that is several on the wire.
func runSegments(t *testing.T, coll *ebpf.Collection, function string, packet []byte, segments uint32) {
	t.Helper()
	var skb [176]byte // a struct __sk_buff up to gso_segs, and padding
	binary.NativeEndian.PutUint32(skb[164:], segments)
	_, err := coll.Programs[function].Run(&ebpf.RunOptions{Data: packet, Context: skb[:]})
	qt.Assert(t, qt.IsNil(err))
}
