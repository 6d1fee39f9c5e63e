package kernel

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Kind is how the kernel identifies a hook.
type Kind struct {
	Program ebpf.ProgramType
	Attach  ebpf.AttachType
	// Needs is the first version of Linux that has links on the hook, for messages.
	Needs string
}

var kinds = map[hook.Hook]Kind{
	hook.XDP:        {ebpf.XDP, ebpf.AttachXDP, "5.9"},
	hook.TCXIngress: {ebpf.SchedCLS, ebpf.AttachTCXIngress, "6.6"},
	hook.TCXEgress:  {ebpf.SchedCLS, ebpf.AttachTCXEgress, "6.6"},
	hook.TCIngress:  {ebpf.SchedCLS, ebpf.AttachTCXIngress, "4.5"},
	hook.TCEgress:   {ebpf.SchedCLS, ebpf.AttachTCXEgress, "4.5"},

	hook.CgroupSKBIngress:      {ebpf.CGroupSKB, ebpf.AttachCGroupInetIngress, "5.7"},
	hook.CgroupSKBEgress:       {ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress, "5.7"},
	hook.CgroupSockCreate:      {ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate, "5.7"},
	hook.CgroupSockRelease:     {ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease, "5.9"},
	hook.CgroupPostBind4:       {ebpf.CGroupSock, ebpf.AttachCGroupInet4PostBind, "5.7"},
	hook.CgroupPostBind6:       {ebpf.CGroupSock, ebpf.AttachCGroupInet6PostBind, "5.7"},
	hook.CgroupBind4:           {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Bind, "5.7"},
	hook.CgroupBind6:           {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Bind, "5.7"},
	hook.CgroupConnect4:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect, "5.7"},
	hook.CgroupConnect6:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect, "5.7"},
	hook.CgroupConnectUnix:     {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixConnect, "6.7"},
	hook.CgroupSendmsg4:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP4Sendmsg, "5.7"},
	hook.CgroupSendmsg6:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP6Sendmsg, "5.7"},
	hook.CgroupSendmsgUnix:     {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixSendmsg, "6.7"},
	hook.CgroupRecvmsg4:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP4Recvmsg, "5.7"},
	hook.CgroupRecvmsg6:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP6Recvmsg, "5.7"},
	hook.CgroupRecvmsgUnix:     {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixRecvmsg, "6.7"},
	hook.CgroupGetpeername4:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetPeername, "5.8"},
	hook.CgroupGetpeername6:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetPeername, "5.8"},
	hook.CgroupGetpeernameUnix: {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixGetpeername, "6.7"},
	hook.CgroupGetsockname4:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetSockname, "5.8"},
	hook.CgroupGetsockname6:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetSockname, "5.8"},
	hook.CgroupGetsocknameUnix: {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixGetsockname, "6.7"},
	hook.CgroupSysctl:          {ebpf.CGroupSysctl, ebpf.AttachCGroupSysctl, "5.7"},
	hook.CgroupGetsockopt:      {ebpf.CGroupSockopt, ebpf.AttachCGroupGetsockopt, "5.7"},
	hook.CgroupSetsockopt:      {ebpf.CGroupSockopt, ebpf.AttachCGroupSetsockopt, "5.7"},
	hook.CgroupDev:             {ebpf.CGroupDevice, ebpf.AttachCGroupDevice, "5.7"},
	hook.CgroupSockOps:         {ebpf.SockOps, ebpf.AttachCGroupSockOps, "5.7"},

	hook.NetkitPrimary: {ebpf.SchedCLS, ebpf.AttachNetkitPrimary, "6.7"},
	hook.NetkitPeer:    {ebpf.SchedCLS, ebpf.AttachNetkitPeer, "6.7"},
	hook.FlowDissector: {ebpf.FlowDissector, ebpf.AttachFlowDissector, "5.7"},
	hook.SKLookup:      {ebpf.SkLookup, ebpf.AttachSkLookup, "5.9"},
	hook.Netfilter:     {ebpf.Netfilter, ebpf.AttachNetfilter, "6.4"},
	hook.LSMCgroup:     {ebpf.LSM, ebpf.AttachLSMCgroup, "6.0"},
}

// KindOf returns how the kernel identifies a hook.
func KindOf(h hook.Hook) Kind { return kinds[h] }

// LinkHook returns the hook of a link of that type and attach type; "" if it is on
// no known hook. The attach type alone is not enough: links without an attach type
// report 0, which is also the attach type of cgroup_skb/ingress.
func LinkHook(t link.Type, attach ebpf.AttachType) hook.Hook {
	for h, k := range kinds {
		if k.Attach == attach && linkType(h) == t {
			return h
		}
	}
	return ""
}

// linkType returns the type of the links on a hook; UnspecifiedType if the hook has
// no links.
func linkType(h hook.Hook) link.Type {
	switch {
	case h.OnCgroup():
		return link.CgroupType
	case h == hook.XDP:
		return link.XDPType
	case h == hook.TCXIngress, h == hook.TCXEgress:
		return link.TCXType
	case h == hook.NetkitPrimary, h == hook.NetkitPeer:
		return link.NetkitType
	case h == hook.FlowDissector, h == hook.SKLookup:
		return link.NetNsType
	case h == hook.Netfilter:
		return link.NetfilterType
	}
	return link.UnspecifiedType
}

// Takes tells whether a program that is not loaded yet is meant for the hook.
func (k Kind) Takes(p *ebpf.ProgramSpec) bool {
	switch {
	case p.Type != k.Program:
		return false
	case k.Program == ebpf.XDP:
		return true // what does not fit gets a specific error later
	case k.Program == ebpf.SchedCLS, k.either(p):
		return p.AttachType == ebpf.AttachNone || p.AttachType == k.Attach
	}
	return p.AttachType == k.Attach
}

// either tells whether the program fits both directions of cgroup_skb.
func (k Kind) either(p *ebpf.ProgramSpec) bool {
	// The attach type cannot tell: in the section cgroup_skb/ingress it is 0 as well.
	return k.Program == ebpf.CGroupSKB && (p.SectionName == "" || p.SectionName == "cgroup/skb")
}

// Fits asks the kernel whether a loaded program can be attached to a cgroup hook.
// An update of a link is no such check: it compares the program type alone
// (cgroup_bpf_replace, kernel/bpf/cgroup.c), although the program may have been
// verified for another hook. The creation of a link checks the attach type first,
// and fails only then because there is no cgroup -1.
func (k Kind) Fits(prog *ebpf.Program) bool {
	_, err := CreateLink(prog, -1, k.Attach, Neighbor{}, 0)
	return !errors.Is(err, unix.EINVAL)
}

// Load returns the attach type to load a program with. Programs of TC are loaded as
// they were written: the kernel accepts any attach type, and SEC("tc") sets none.
func (k Kind) Load(p *ebpf.ProgramSpec) ebpf.AttachType {
	if k.Program == ebpf.SchedCLS {
		return p.AttachType
	}
	return k.Attach
}
