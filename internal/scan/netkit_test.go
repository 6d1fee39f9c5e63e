package scan

import (
	"encoding/binary"
	"errors"
	"net"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// addNetkit makes a pair of netkit devices in the thread's namespace, primary0 and
// a peer. It returns the index of primary0. The error is errors.ErrUnsupported if the
// kernel has no netkit.
func addNetkit() (int, error) {
	conn, err := netlink.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.IFLA_IFNAME, "primary0")
	ae.Nested(unix.IFLA_LINKINFO, func(info *netlink.AttributeEncoder) error {
		info.String(unix.IFLA_INFO_KIND, "netkit")
		return nil
	})
	attrs, err := ae.Encode()
	if err != nil {
		return 0, err
	}
	ifinfo := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(ifinfo[4:], 7) // the index
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_NEWLINK, Flags: netlink.Request | netlink.Acknowledge | netlink.Create | netlink.Excl},
		Data:   append(ifinfo, attrs...),
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		return 0, errors.ErrUnsupported
	}
	return 7, err
}

func TestNetkit(t *testing.T) {
	testenv.CheckLeaks(t)
	ns := testenv.NewNetNS(t)
	prog := program(t, "ldt_netkit", ebpf.SchedCLS, ebpf.AttachNone, -1)
	other := program(t, "ldt_other", ebpf.SchedCLS, ebpf.AttachNone, -1)
	var primary, peer uint32
	var unsupported bool
	ns.Do(t, func() {
		index, err := addNetkit()
		if errors.Is(err, errors.ErrUnsupported) {
			unsupported = true
			return
		}
		qt.Assert(t, qt.IsNil(err))
		dev, err := net.InterfaceByIndex(index)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.Equals(dev.Name, "primary0"))
		attach := func(at ebpf.AttachType) uint32 {
			l, err := link.AttachNetkit(link.NetkitOptions{Interface: index, Program: prog, Attach: at})
			return own(t, l, err)
		}
		primary, peer = attach(ebpf.AttachNetkitPrimary), attach(ebpf.AttachNetkitPeer)
		qt.Assert(t, qt.IsNil(link.RawAttachProgram(link.RawAttachProgramOptions{
			Target: index, Program: other, Attach: ebpf.AttachNetkitPrimary, Anchor: link.Head(),
		})))
	})
	chains := all(t, Options{NetNS: ns.Name}, hook.NetkitPrimary, hook.NetkitPeer)
	if unsupported {
		t.Log("this kernel has no netkit: nothing to be shown, and no error")
		qt.Assert(t, qt.HasLen(chains, 0))
		return
	}
	qt.Assert(t, qt.HasLen(chains, 2))
	for _, c := range chains {
		qt.Check(t, qt.IsNil(c.Err))
		qt.Check(t, qt.Equals(c.Target, "primary0"))
		qt.Check(t, qt.Equals(c.Ifindex, 7))
		qt.Check(t, qt.Not(qt.Equals(c.Revision, 0)))
	}
	qt.Check(t, qt.Equals(chains[0].Hook, hook.NetkitPrimary))
	qt.Assert(t, qt.HasLen(chains[0].Members, 2))
	wantMember(t, chains[0].Members[0], other, hook.KindLegacy, 0)
	wantMember(t, chains[0].Members[1], prog, hook.KindForeign, primary)
	qt.Check(t, qt.Equals(chains[1].Hook, hook.NetkitPeer))
	qt.Assert(t, qt.HasLen(chains[1].Members, 1))
	wantMember(t, chains[1].Members[0], prog, hook.KindForeign, peer)
}
