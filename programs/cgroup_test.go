package programs_test

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
)

// attachCgroup loads a program for a hook and attaches it to a cgroup.
func attachCgroup(t *testing.T, cgroup *testenv.Cgroup, h hook.Hook, name string, constants constants) *ebpf.Collection {
	t.Helper()
	coll := loadFor(t, h, name, constants)
	l, err := link.AttachCgroup(link.CgroupOptions{
		Path: cgroup.Path, Attach: kernel.KindOf(h).Attach, Program: coll.Programs[programs.Function(name, h)],
	})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { l.Close() })
	return coll
}

// Packets of the cgroup's sockets are counted, in both directions, and pass.
func TestCountCgroup(t *testing.T) {
	testenv.CheckLeaks(t)
	pair := testenv.NewPair(t)
	cgroup := testenv.NewCgroup(t)
	in := attachCgroup(t, cgroup, hook.CgroupSKBIngress, "count", nil)
	out := attachCgroup(t, cgroup, hook.CgroupSKBEgress, "count", nil)
	client := cgroup.Enter(t, pair.Client)

	pair.Send(t, 7000, 10) // not from the cgroup
	_, arrived := client.Passed(t, pair.Server, netip.AddrPortFrom(testenv.ServerIPv4, 7000), 10)
	qt.Check(t, qt.Equals(arrived, 10))
	_, arrived = client.Passed(t, pair.Server, netip.AddrPortFrom(testenv.ServerIPv6, 7000), 5)
	qt.Check(t, qt.Equals(arrived, 5))
	qt.Check(t, qt.DeepEquals(counted(t, out), map[programs.Protocol]programs.Traffic{
		{EtherType: typeIPv4, Protocol: protoUDP}: {Packets: 10, Bytes: 10 * (datagram - 14)},
		{EtherType: typeIPv6, Protocol: protoUDP}: {Packets: 5, Bytes: 5 * (datagram - 14 + 20)},
	}))

	qt.Check(t, qt.Equals(client.Received(t, pair.Server, netip.AddrPortFrom(testenv.ClientIPv4, 7000), 3), 3))
	qt.Check(t, qt.DeepEquals(counted(t, in), map[programs.Protocol]programs.Traffic{
		{EtherType: typeIPv4, Protocol: protoUDP}: {Packets: 3, Bytes: 3 * (datagram - 14)},
	}))
}
