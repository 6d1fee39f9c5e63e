package testenv

import (
	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// kinds are the program type of each hook, and the attach type that names the hook.
var kinds = map[hook.Hook]struct {
	program ebpf.ProgramType
	attach  ebpf.AttachType
}{
	hook.XDP:        {ebpf.XDP, ebpf.AttachXDP},
	hook.TCXIngress: {ebpf.SchedCLS, ebpf.AttachTCXIngress},
	hook.TCXEgress:  {ebpf.SchedCLS, ebpf.AttachTCXEgress},
	hook.TCIngress:  {ebpf.SchedCLS, ebpf.AttachNone},
	hook.TCEgress:   {ebpf.SchedCLS, ebpf.AttachNone},

	hook.CgroupSKBIngress:      {ebpf.CGroupSKB, ebpf.AttachCGroupInetIngress},
	hook.CgroupSKBEgress:       {ebpf.CGroupSKB, ebpf.AttachCGroupInetEgress},
	hook.CgroupSockCreate:      {ebpf.CGroupSock, ebpf.AttachCGroupInetSockCreate},
	hook.CgroupSockRelease:     {ebpf.CGroupSock, ebpf.AttachCgroupInetSockRelease},
	hook.CgroupPostBind4:       {ebpf.CGroupSock, ebpf.AttachCGroupInet4PostBind},
	hook.CgroupPostBind6:       {ebpf.CGroupSock, ebpf.AttachCGroupInet6PostBind},
	hook.CgroupBind4:           {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Bind},
	hook.CgroupBind6:           {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Bind},
	hook.CgroupConnect4:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet4Connect},
	hook.CgroupConnect6:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupInet6Connect},
	hook.CgroupConnectUnix:     {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixConnect},
	hook.CgroupSendmsg4:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP4Sendmsg},
	hook.CgroupSendmsg6:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP6Sendmsg},
	hook.CgroupSendmsgUnix:     {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixSendmsg},
	hook.CgroupRecvmsg4:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP4Recvmsg},
	hook.CgroupRecvmsg6:        {ebpf.CGroupSockAddr, ebpf.AttachCGroupUDP6Recvmsg},
	hook.CgroupRecvmsgUnix:     {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixRecvmsg},
	hook.CgroupGetpeername4:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetPeername},
	hook.CgroupGetpeername6:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetPeername},
	hook.CgroupGetpeernameUnix: {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixGetpeername},
	hook.CgroupGetsockname4:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet4GetSockname},
	hook.CgroupGetsockname6:    {ebpf.CGroupSockAddr, ebpf.AttachCgroupInet6GetSockname},
	hook.CgroupGetsocknameUnix: {ebpf.CGroupSockAddr, ebpf.AttachCgroupUnixGetsockname},
	hook.CgroupSysctl:          {ebpf.CGroupSysctl, ebpf.AttachCGroupSysctl},
	hook.CgroupGetsockopt:      {ebpf.CGroupSockopt, ebpf.AttachCGroupGetsockopt},
	hook.CgroupSetsockopt:      {ebpf.CGroupSockopt, ebpf.AttachCGroupSetsockopt},
	hook.CgroupDev:             {ebpf.CGroupDevice, ebpf.AttachCGroupDevice},
	hook.CgroupSockOps:         {ebpf.SockOps, ebpf.AttachCGroupSockOps},
}

// AttachType returns the kernel's number of a hook, by which programs are attached. It is 0 for
// clsact's hooks, to which bpf(2) does not attach.
func AttachType(h hook.Hook) ebpf.AttachType { return kinds[h].attach }

// On makes the program one for a hook. Programs of TCX and clsact have no expected attach type, like
// programs from SEC("tc"), so that they fit all four hooks.
func On(h hook.Hook) ProgramOption {
	kind, known := kinds[h]
	if !known {
		panic("testenv: no programs for hook " + h)
	}
	return func(spec *ebpf.ProgramSpec) {
		spec.Type, spec.AttachType = kind.program, kind.attach
		if spec.Type == ebpf.SchedCLS {
			spec.AttachType = ebpf.AttachNone
		}
	}
}

// CanDeny tells whether the kernel loads a program with [CgroupDeny] for a hook of a cgroup
// (check_return_code, kernel/bpf/verifier.c).
func CanDeny(h hook.Hook) bool {
	switch h {
	case hook.CgroupRecvmsg4, hook.CgroupRecvmsg6, hook.CgroupRecvmsgUnix,
		hook.CgroupGetpeername4, hook.CgroupGetpeername6, hook.CgroupGetpeernameUnix,
		hook.CgroupGetsockname4, hook.CgroupGetsockname6, hook.CgroupGetsocknameUnix:
		return false
	}
	return true
}

// Denied returns the error of [Resident.Exercise] when a program denies. It is nil on hooks
// where the kernel ignores that verdict.
func Denied(h hook.Hook) error {
	switch h {
	case hook.CgroupSockRelease, hook.CgroupSockOps:
		return nil
	case hook.CgroupSKBIngress:
		return unix.EAGAIN
	}
	return unix.EPERM
}
