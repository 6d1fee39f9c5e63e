package hook

import (
	"fmt"
	"slices"
	"strings"
)

// A Hook is a place in the kernel where BPF programs run, named as in ELF
// section names.
type Hook string

const (
	// XDP runs in the driver's receive path (native mode) or just after it
	// (generic mode), before the network stack sees the packet.
	XDP Hook = "xdp"

	// TCXIngress and TCXEgress run on packets that a device has received, and on
	// packets that it is about to send (Linux 6.6).
	TCXIngress Hook = "tcx/ingress"
	TCXEgress  Hook = "tcx/egress"

	// TCIngress and TCEgress are the same places through filters of the clsact
	// qdisc (Linux 4.5). They run after all of TCX, and no link owns them.
	TCIngress Hook = "tc/ingress"
	TCEgress  Hook = "tc/egress"

	// The hooks of a cgroup, for the sockets and processes in it and below.
	CgroupSKBIngress      Hook = "cgroup_skb/ingress"      // packets to its sockets
	CgroupSKBEgress       Hook = "cgroup_skb/egress"       // packets from its sockets
	CgroupSockCreate      Hook = "cgroup/sock_create"      // a socket is made
	CgroupSockRelease     Hook = "cgroup/sock_release"     // and released
	CgroupPostBind4       Hook = "cgroup/post_bind4"       // an IPv4 socket has been bound
	CgroupPostBind6       Hook = "cgroup/post_bind6"       // an IPv6 socket
	CgroupBind4           Hook = "cgroup/bind4"            // bind(2)
	CgroupBind6           Hook = "cgroup/bind6"            //
	CgroupConnect4        Hook = "cgroup/connect4"         // connect(2)
	CgroupConnect6        Hook = "cgroup/connect6"         //
	CgroupConnectUnix     Hook = "cgroup/connect_unix"     // (Linux 6.7)
	CgroupSendmsg4        Hook = "cgroup/sendmsg4"         // sendmsg(2) and sendto(2) of UDP
	CgroupSendmsg6        Hook = "cgroup/sendmsg6"         //
	CgroupSendmsgUnix     Hook = "cgroup/sendmsg_unix"     // (Linux 6.7)
	CgroupRecvmsg4        Hook = "cgroup/recvmsg4"         // recvmsg(2) and recvfrom(2) of UDP
	CgroupRecvmsg6        Hook = "cgroup/recvmsg6"         //
	CgroupRecvmsgUnix     Hook = "cgroup/recvmsg_unix"     // (Linux 6.7)
	CgroupGetpeername4    Hook = "cgroup/getpeername4"     // getpeername(2)
	CgroupGetpeername6    Hook = "cgroup/getpeername6"     //
	CgroupGetpeernameUnix Hook = "cgroup/getpeername_unix" // (Linux 6.7)
	CgroupGetsockname4    Hook = "cgroup/getsockname4"     // getsockname(2)
	CgroupGetsockname6    Hook = "cgroup/getsockname6"     //
	CgroupGetsocknameUnix Hook = "cgroup/getsockname_unix" // (Linux 6.7)
	CgroupSysctl          Hook = "cgroup/sysctl"           // a sysctl is read or written
	CgroupGetsockopt      Hook = "cgroup/getsockopt"       // getsockopt(2)
	CgroupSetsockopt      Hook = "cgroup/setsockopt"       // setsockopt(2)
	CgroupDev             Hook = "cgroup/dev"              // a device node is opened or made
	CgroupSockOps         Hook = "sockops"                 // TCP events of its sockets

	// Hooks that are only shown: this library attaches nothing to them.
	TCQdisc       Hook = "tc/qdisc"       // filters of other qdiscs than clsact
	NetkitPrimary Hook = "netkit/primary" // of a netkit device (Linux 6.7)
	NetkitPeer    Hook = "netkit/peer"    //
	Netfilter     Hook = "netfilter"      // of a network namespace (Linux 6.4)
	FlowDissector Hook = "flow_dissector" // of a network namespace
	SKLookup      Hook = "sk_lookup"      // of a network namespace (Linux 5.9)
	LSMCgroup     Hook = "lsm_cgroup"     // of a cgroup (Linux 6.0)
)

// Hooks returns the hooks that this library can attach programs to.
func Hooks() []Hook {
	return append([]Hook{XDP, TCXIngress, TCXEgress, TCIngress, TCEgress}, CgroupHooks()...)
}

// CgroupHooks returns the hooks of a cgroup that this library can attach programs to.
func CgroupHooks() []Hook {
	return []Hook{
		CgroupSKBIngress, CgroupSKBEgress, CgroupSockCreate, CgroupSockRelease, CgroupPostBind4, CgroupPostBind6,
		CgroupBind4, CgroupBind6, CgroupConnect4, CgroupConnect6, CgroupConnectUnix,
		CgroupSendmsg4, CgroupSendmsg6, CgroupSendmsgUnix, CgroupRecvmsg4, CgroupRecvmsg6, CgroupRecvmsgUnix,
		CgroupGetpeername4, CgroupGetpeername6, CgroupGetpeernameUnix,
		CgroupGetsockname4, CgroupGetsockname6, CgroupGetsocknameUnix,
		CgroupSysctl, CgroupGetsockopt, CgroupSetsockopt, CgroupDev, CgroupSockOps,
	}
}

// Shown returns the hooks that are only shown.
func Shown() []Hook {
	return []Hook{TCQdisc, NetkitPrimary, NetkitPeer, Netfilter, FlowDissector, SKLookup, LSMCgroup}
}

// Parse returns the hook of that name. It returns an error for a hook that this library
// cannot attach programs to.
func Parse(s string) (Hook, error) {
	h := Hook(s)
	switch {
	case slices.Contains(Hooks(), h):
		return h, nil
	case slices.Contains(Shown(), h):
		return "", fmt.Errorf("hook %q is only shown: nothing can be attached to it here", s)
	case s == "tcx", s == "tc":
		return "", fmt.Errorf("hook %q has two sides: %s/ingress and %s/egress", s, s, s)
	}
	var known []string
	for _, h := range Hooks() {
		known = append(known, string(h))
	}
	return "", fmt.Errorf("unknown hook %q (known: %s)", s, strings.Join(known, ", "))
}

// Family returns the beginning of the name: xdp, tcx, tc, cgroup, netkit. The
// cgroup family includes cgroup_skb/*, sockops and lsm_cgroup.
func (h Hook) Family() string {
	family, _, _ := strings.Cut(string(h), "/")
	if h.OnCgroup() {
		return "cgroup"
	}
	return family
}

// OnCgroup tells whether the target of the hook is a cgroup.
func (h Hook) OnCgroup() bool {
	return strings.HasPrefix(string(h), "cgroup") || h == CgroupSockOps || h == LSMCgroup
}

// OnNetNS tells whether the target is a whole network namespace.
func (h Hook) OnNetNS() bool { return h == Netfilter || h == FlowDissector || h == SKLookup }

// OnDevice tells whether the target is a network device.
func (h Hook) OnDevice() bool { return !h.OnCgroup() && !h.OnNetNS() }

// A Mode says in which mode an XDP program is attached to a device.
type Mode uint8

const (
	// ModeAuto lets the kernel choose: native where the driver has XDP,
	// generic elsewhere. On joining a chain it means the chain's mode.
	ModeAuto Mode = iota
	// ModeNative runs in the driver (XDP_FLAGS_DRV_MODE).
	ModeNative
	// ModeGeneric runs on socket buffers (XDP_FLAGS_SKB_MODE).
	ModeGeneric
	// ModeOffload runs on the card (XDP_FLAGS_HW_MODE). It is only shown: a
	// dispatcher cannot be offloaded.
	ModeOffload
)

var modeNames = []string{"auto", "native", "generic", "offload"}

// String returns the name of the mode.
func (m Mode) String() string {
	if int(m) < len(modeNames) {
		return modeNames[m]
	}
	return fmt.Sprintf("Mode(%d)", uint8(m))
}

// ParseMode returns the mode of that name. It refuses offload.
func ParseMode(s string) (Mode, error) {
	switch s {
	case "auto", "":
		return ModeAuto, nil
	case "native", "drv":
		return ModeNative, nil
	case "generic", "skb":
		return ModeGeneric, nil
	}
	return 0, fmt.Errorf("unknown mode %q (known: auto, native, generic)", s)
}
