package rtnl

import (
	"testing"

	"github.com/go-quicktest/qt"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// message returns a message with a header of the size and the attributes.
func message(t testing.TB, header int, write func(*netlink.AttributeEncoder)) []byte {
	ae := netlink.NewAttributeEncoder()
	write(ae)
	b, err := ae.Encode()
	qt.Assert(t, qt.IsNil(err))
	return append(make([]byte, header), b...)
}

func FuzzParseDevice(f *testing.F) {
	whole := message(f, unix.SizeofIfInfomsg, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.IFLA_IFNAME, "eth0")
		ae.Uint32(unix.IFLA_MTU, 1500)
		ae.Uint32(unix.IFLA_LINK, 3)
		ae.Uint32(unix.IFLA_LINK_NETNSID, 0)
		ae.Uint32(unix.IFLA_MASTER, 4)
		ae.String(unix.IFLA_QDISC, "fq_codel")
		ae.Bytes(unix.IFLA_BROADCAST, make([]byte, 6))
		ae.Nested(unix.IFLA_LINKINFO, func(nae *netlink.AttributeEncoder) error {
			nae.String(unix.IFLA_INFO_KIND, "veth")
			return nil
		})
		ae.Nested(unix.IFLA_XDP, func(nae *netlink.AttributeEncoder) error {
			nae.Uint32(unix.IFLA_XDP_DRV_PROG_ID, 7)
			nae.Uint32(unix.IFLA_XDP_SKB_PROG_ID, 8)
			nae.Uint32(unix.IFLA_XDP_HW_PROG_ID, 9)
			return nil
		})
	})
	d, err := parse(whole)
	qt.Assert(f, qt.IsNil(err))
	qt.Assert(f, qt.Equals(d.Kind+" "+d.Name+" "+d.Qdisc, "veth eth0 fq_codel"))
	qt.Assert(f, qt.HasLen(d.XDP, 3))
	f.Add(whole)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := parse(b)
		if err == nil && len(d.XDP) > len(b)/unix.SizeofNlAttr {
			t.Errorf("%d programs out of %d bytes", len(d.XDP), len(b))
		}
		d.Software()
		d.Begins()
	})
}

func FuzzParseActions(f *testing.F) {
	whole := message(f, sizeofTcamsg, func(ae *netlink.AttributeEncoder) {
		ae.Nested(actTable, func(nae *netlink.AttributeEncoder) error {
			nae.Nested(1, func(nae *netlink.AttributeEncoder) error {
				nae.String(actKind, "bpf")
				nae.Nested(actOptions, func(nae *netlink.AttributeEncoder) error {
					nae.Bytes(actParms, []byte{7: 0, 19: 0})
					nae.Uint32(actBPFID, 9)
					return nil
				})
				return nil
			})
			return nil
		})
	})
	list, err := parseActionMessage(whole)
	qt.Assert(f, qt.IsNil(err))
	qt.Assert(f, qt.DeepEquals(list, []Action{{Kind: "bpf", Program: 9}}))
	f.Add(whole)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		list, err := parseActionMessage(b)
		if err == nil && len(list) > len(b)/unix.SizeofNlAttr {
			t.Errorf("%d actions out of %d bytes", len(list), len(b))
		}
	})
}

func FuzzParseFilter(f *testing.F) {
	whole := message(f, sizeofTcmsg, func(ae *netlink.AttributeEncoder) {
		ae.String(unix.TCA_KIND, "bpf")
		ae.Uint32(unix.TCA_CHAIN, 5)
		ae.Nested(unix.TCA_OPTIONS, func(nae *netlink.AttributeEncoder) error {
			nae.String(bpfName, "name")
			nae.Uint32(bpfFlags, bpfDirectAction)
			nae.Bytes(bpfTag, make([]byte, unix.BPF_TAG_SIZE))
			nae.Uint32(bpfID, 6)
			nae.Nested(actionsAt["bpf"], func(list *netlink.AttributeEncoder) error {
				list.Nested(1, func(action *netlink.AttributeEncoder) error {
					action.String(actKind, "bpf")
					action.Nested(actOptions, func(options *netlink.AttributeEncoder) error {
						options.Bytes(actParms, make([]byte, 20))
						options.Uint32(actBPFID, 9)
						return nil
					})
					return nil
				})
				return nil
			})
			return nil
		})
	})
	filter, err := parseFilter(whole, ClsactIngress)
	qt.Assert(f, qt.IsNil(err))
	qt.Assert(f, qt.Equals(filter.Kind+" "+filter.Name, "bpf name"))
	qt.Assert(f, qt.Equals(filter.Program, 6))
	qt.Assert(f, qt.HasLen(filter.Actions, 1))
	qt.Assert(f, qt.Equals(filter.Actions[0].Program, 9))
	f.Add(whole)
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		filter, err := parseFilter(b, ClsactIngress)
		if err == nil && len(filter.Actions) > len(b)/unix.SizeofNlAttr {
			t.Errorf("%d actions out of %d bytes", len(filter.Actions), len(b))
		}
	})
}
