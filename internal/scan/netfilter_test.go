package scan

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"github.com/mdlayher/netlink"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

func TestNetfilter(t *testing.T) {
	testenv.Need(t, testenv.FeatureNetfilterLink)
	testenv.CheckLeaks(t)
	ns, other := testenv.NewNetNS(t), testenv.NewNetNS(t)
	prog := program(t, "ldt_netfilter", ebpf.Netfilter, ebpf.AttachNetfilter, 1)
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	progID, _ := info.ID()
	attach := func(ns *testenv.NetNS, family link.NetfilterProtocolFamily, num link.NetfilterInetHook, priority int32) (id uint32) {
		ns.Do(t, func() {
			l, err := link.AttachNetfilter(link.NetfilterOptions{Program: prog, ProtocolFamily: family, Hook: num, Priority: priority})
			id = own(t, l, err)
		})
		return id
	}
	forward := attach(ns, link.NetfilterProtoIPv6, link.NetfilterInetForward, 10)
	late := attach(ns, link.NetfilterProtoIPv4, link.NetfilterInetLocalIn, 20)
	early := attach(ns, link.NetfilterProtoIPv4, link.NetfilterInetLocalIn, -20)
	// Two links in two namespaces look the same.
	attach(ns, link.NetfilterProtoIPv6, link.NetfilterInetPostRouting, 7)
	attach(other, link.NetfilterProtoIPv6, link.NetfilterInetPostRouting, 7)

	_, err = netfilterHooks()
	blind := errors.Is(err, errors.ErrUnsupported)
	t.Logf("the kernel tells the namespace: %v", !blind)

	chains := all(t, Options{}, hook.Netfilter)
	got := map[string]uint32{}
	var order []string
	for _, c := range chains {
		qt.Check(t, qt.IsNil(c.Err))
		qt.Check(t, qt.Equals(c.Target, ""))
		for _, m := range c.Members {
			if m.Program.ID != uint32(progID) {
				continue
			}
			qt.Check(t, qt.Equals(m.Kind, hook.KindForeign))
			if blind {
				qt.Check(t, qt.Equals(c.NetNS, hook.NetNS{}))
			}
			if m.Detail != "ipv6 postrouting, priority 7" {
				qt.Check(t, qt.IsTrue(blind || c.NetNS.Name == ns.Name))
			} else if !blind {
				qt.Check(t, qt.Equals(m.LinkID, 0))
			}
			got[m.Detail] = m.LinkID
			order = append(order, m.Detail)
		}
	}
	qt.Check(t, qt.Equals(got["ipv6 forward, priority 10"], forward))
	qt.Check(t, qt.Equals(got["ipv4 input, priority 20"], late))
	qt.Check(t, qt.Equals(got["ipv4 input, priority -20"], early))
	qt.Check(t, qt.HasLen(order, 5), qt.Commentf("%q", order))
	if !blind {
		qt.Check(t, qt.IsTrue(slices.Index(order, "ipv4 input, priority -20") < slices.Index(order, "ipv4 input, priority 20")))
	}
}

// The answer of nfnetlink for a BPF hook, and for one of nftables.
func TestParseNetfilterHook(t *testing.T) {
	encode := func(kind uint32, desc func(*netlink.AttributeEncoder) error) []byte {
		ae := netlink.NewAttributeEncoder()
		ae.ByteOrder = binary.BigEndian
		ae.Uint32(nfnlaHookNum, 1)
		ae.Int32(nfnlaHookPriority, -20)
		ae.Nested(nfnlaHookChainInfo, func(info *netlink.AttributeEncoder) error {
			info.Nested(nfnlaHookInfoDesc, desc)
			info.Uint32(nfnlaHookInfoType, kind)
			return nil
		})
		b, err := ae.Encode()
		qt.Assert(t, qt.IsNil(err))
		return append([]byte{2, 0, 0, 0}, b...)
	}
	var h netfilterHook
	qt.Assert(t, qt.IsNil(h.parse(encode(nfnlHookTypeBPF, func(desc *netlink.AttributeEncoder) error {
		desc.Uint32(nfnlaHookBPFID, 77)
		return nil
	}))))
	qt.Check(t, qt.Equals(h.program, 77))
	qt.Check(t, qt.Equals(h.Priority, -20))

	h = netfilterHook{}
	qt.Assert(t, qt.IsNil(h.parse(encode(1, func(desc *netlink.AttributeEncoder) error {
		desc.String(1, "a table")
		return nil
	}))))
	qt.Check(t, qt.Equals(h.program, 0))
	qt.Check(t, qt.IsNotNil(h.parse(nil)))
}
