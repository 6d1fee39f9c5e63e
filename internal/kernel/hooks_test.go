package kernel_test

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// The type and the attach type of a link together tell its hook: tracing links
// report attach type 0, which is also that of cgroup_skb/ingress.
func TestLinkHook(t *testing.T) {
	for _, c := range []struct {
		link   link.Type
		attach ebpf.AttachType
		want   hook.Hook
	}{
		{link.CgroupType, ebpf.AttachCGroupInetIngress, hook.CgroupSKBIngress},
		{link.CgroupType, ebpf.AttachLSMCgroup, hook.LSMCgroup},
		{link.XDPType, ebpf.AttachXDP, hook.XDP},
		{link.TCXType, ebpf.AttachTCXIngress, hook.TCXIngress},
		{link.NetkitType, ebpf.AttachNetkitPeer, hook.NetkitPeer},
		{link.NetNsType, ebpf.AttachSkLookup, hook.SKLookup},
		{link.NetfilterType, ebpf.AttachNetfilter, hook.Netfilter},
		{link.TracingType, ebpf.AttachNone, ""},
		{link.RawTracepointType, ebpf.AttachNone, ""},
		{link.CgroupType, ebpf.AttachXDP, ""},
		{link.TCXType, ebpf.AttachCGroupInetIngress, ""},
	} {
		qt.Check(t, qt.Equals(kernel.LinkHook(c.link, c.attach), c.want), qt.Commentf("link type %d, attach type %v", c.link, c.attach))
	}
}
