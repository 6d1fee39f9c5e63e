package scan

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cilium/ebpf/link"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// The info of a netfilter link does not tell its namespace. But nfnetlink lists the
// hooks of a namespace, and the programs of those that are BPF, as "nft list hooks"
// shows them (Linux 6.4, CONFIG_NETFILTER_NETLINK_HOOK). Without that, lost shows
// the links without their namespace.

// From linux/netfilter/nfnetlink_hook.h.
const (
	nfnlSubsysHook = 12
	nfnlMsgHookGet = 0

	nfnlaHookNum       = 1
	nfnlaHookPriority  = 2
	nfnlaHookChainInfo = 6

	nfnlaHookInfoDesc = 1
	nfnlaHookInfoType = 2
	nfnlHookTypeBPF   = 2

	nfnlaHookBPFID = 1
)

// A netfilterHook is a program on a netfilter hook.
type netfilterHook struct {
	link.NetfilterInfo
	program uint32
}

// netfilter reads the netfilter programs of a namespace.
func (s *scan) netfilter(ctx context.Context, ns *kernel.NetNS) []hook.Chain {
	isNetfilter := func(l kernel.LinkInfo) bool { return l.Type == link.NetfilterType }
	if !s.Hooks(hook.Netfilter) || s.blind || !slices.ContainsFunc(s.links, isNetfilter) {
		return nil
	}
	c := hook.Chain{Hook: hook.Netfilter, NetNS: ns.ID()}
	c.Err = settle(ctx, func() error {
		var hooks []netfilterHook
		err := ns.Do(func() (err error) {
			hooks, err = netfilterHooks()
			return err
		})
		if err != nil {
			return err
		}
		c.Members = nil
		for _, h := range hooks {
			m, err := member(h.program, s.netfilterLink(h))
			if err != nil {
				return err
			}
			m.Kind = hook.KindForeign // there is no way without a link
			m.Detail = netfilterPlace(&h.NetfilterInfo)
			c.Members = append(c.Members, m)
		}
		return nil
	})
	if errors.Is(c.Err, errors.ErrUnsupported) {
		s.blind = true
		return nil
	}
	return []hook.Chain{c}
}

// netfilterLink returns the link of a hook; 0 if none is known, or if several links
// fit: links of other namespaces look the same.
func (s *scan) netfilterLink(h netfilterHook) uint32 {
	var ids []uint32
	for _, l := range s.links {
		if l.Netfilter == nil || l.Program != h.program {
			continue
		}
		if n := l.Netfilter; n.ProtocolFamily == h.ProtocolFamily && n.Hook == h.Hook && n.Priority == h.Priority {
			ids = append(ids, l.ID)
			s.shown[l.ID] = true
		}
	}
	if len(ids) != 1 {
		return 0
	}
	return ids[0]
}

// netfilterPlace describes a place in words: for a family and hook, netfilter runs
// programs in the order of their priorities.
func netfilterPlace(i *link.NetfilterInfo) string {
	family := fmt.Sprintf("family %d", i.ProtocolFamily)
	switch i.ProtocolFamily {
	case link.NetfilterProtoIPv4:
		family = "ipv4"
	case link.NetfilterProtoIPv6:
		family = "ipv6"
	}
	name := fmt.Sprintf("hook %d", i.Hook)
	if names := []string{"prerouting", "input", "forward", "output", "postrouting"}; int(i.Hook) < len(names) {
		name = names[i.Hook]
	}
	return fmt.Sprintf("%s %s, priority %d", family, name, i.Priority)
}

// netfilterHooks lists the programs on the hooks of the thread's namespace, in run
// order. The error is errors.ErrUnsupported if the kernel cannot list them.
func netfilterHooks() ([]netfilterHook, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if errors.Is(err, unix.EPROTONOSUPPORT) {
		return nil, errors.ErrUnsupported
	}
	if err != nil {
		return nil, kernel.Errno("nfnetlink", err)
	}
	defer conn.Close()
	var hooks []netfilterHook
	// There are links for IPv4 and IPv6 only (bpf_nf_check_pf_and_hooks,
	// net/netfilter/nf_bpf_link.c).
	for _, family := range []link.NetfilterProtocolFamily{link.NetfilterProtoIPv4, link.NetfilterProtoIPv6} {
		for num := link.NetfilterInetPreRouting; num <= link.NetfilterInetPostRouting; num++ {
			ae := netlink.NewAttributeEncoder()
			ae.ByteOrder = binary.BigEndian
			ae.Uint32(nfnlaHookNum, uint32(num))
			header := []byte{byte(family), 0, 0, 0} // struct nfgenmsg
			msgs, err := rtnl.Request(conn, nfnlSubsysHook<<8|nfnlMsgHookGet, netlink.Dump, header, ae)
			// EINVAL means no such subsystem (nfnetlink_rcv_msg,
			// net/netfilter/nfnetlink.c).
			if errors.Is(err, unix.EINVAL) {
				return nil, errors.ErrUnsupported
			}
			if err != nil {
				return nil, kernel.Errno("list netfilter hooks", err)
			}
			for _, m := range msgs {
				h := netfilterHook{NetfilterInfo: link.NetfilterInfo{ProtocolFamily: family, Hook: num}}
				if err := h.parse(m.Data); err != nil {
					return nil, fmt.Errorf("list netfilter hooks: %w", err)
				}
				if h.program != 0 {
					hooks = append(hooks, h)
				}
			}
		}
	}
	return hooks, nil
}

// parse reads priority and program. The program stays 0 if the hook is not BPF.
func (h *netfilterHook) parse(data []byte) error {
	if len(data) < 4 {
		return io.ErrUnexpectedEOF
	}
	ad, err := netlink.NewAttributeDecoder(data[4:])
	if err != nil {
		return err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case nfnlaHookPriority:
			h.Priority = int32(ad.Uint32())
		case nfnlaHookChainInfo:
			ad.Nested(func(info *netlink.AttributeDecoder) error {
				var isBPF bool
				var desc []byte // with other attributes if the hook is not BPF
				for info.Next() {
					switch info.Type() {
					case nfnlaHookInfoType:
						isBPF = info.Uint32() == nfnlHookTypeBPF
					case nfnlaHookInfoDesc:
						desc = info.Bytes()
					}
				}
				if !isBPF {
					return nil
				}
				bpf, err := netlink.NewAttributeDecoder(desc)
				if err != nil {
					return err
				}
				bpf.ByteOrder = binary.BigEndian
				for bpf.Next() {
					if bpf.Type() == nfnlaHookBPFID {
						h.program = bpf.Uint32()
					}
				}
				return bpf.Err()
			})
		}
	}
	return ad.Err()
}
