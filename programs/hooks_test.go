package programs_test

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// onHook is how packets look on a hook, and what verdicts mean there.
type onHook struct {
	hook       hook.Hook
	pass, drop uint32 // the same where nothing is dropped
	link       int    // bytes that the program does not see of a packet
}

const tcNext = 0xffffffff // -1

// hooks has one for each kind that programs for packets are for.
var hooks = []onHook{
	{hook: hook.XDP, pass: pass, drop: drop},
	{hook: hook.TCXIngress, pass: tcNext, drop: 2},
	{hook: hook.CgroupSKBIngress, pass: 1, drop: 1, link: 14},
}

// shortest is the length of the shortest packet of that kind that BPF_PROG_TEST_RUN takes, on any kernel: some
// make no socket buffers that are cut off in the IP header.
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

// sees tells whether such a packet ever comes there: to sockets, only IP does.
func (o onHook) sees(packet []byte) bool {
	etherType := binary.BigEndian.Uint16(packet[12:])
	return len(packet) >= o.shortest(packet) && (o.link == 0 || etherType == typeIPv4 || etherType == typeIPv6)
}

// length is that of the packet as the program sees it.
func (o onHook) length(packet []byte) int { return len(packet) - o.link }

// runSegments has a program judge a packet that is several on the wire.
func runSegments(t *testing.T, coll *ebpf.Collection, function string, packet []byte, segments uint32) {
	t.Helper()
	var skb [176]byte // a struct __sk_buff up to and without what is behind gso_segs, and padding
	binary.NativeEndian.PutUint32(skb[164:], segments)
	_, err := coll.Programs[function].Run(&ebpf.RunOptions{Data: packet, Context: skb[:]})
	qt.Assert(t, qt.IsNil(err))
}
