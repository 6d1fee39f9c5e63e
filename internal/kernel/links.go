package kernel

import (
	"fmt"
	"runtime"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// A LinkInfo is what the kernel says of a link on a hook of the network.
type LinkInfo struct {
	ID      uint32
	Type    link.Type
	Program uint32
	Attach  ebpf.AttachType
	// Where it is: of these those that belong to the type; zero once that is gone.
	Ifindex  int
	CgroupID uint64
	NetNS    uint64 // inode
	// Of netfilter.
	Netfilter *link.NetfilterInfo
	// Of freplace: the program whose function it replaces, and the function in that
	// program's types. Zero before Linux 5.13 (bpf_tracing_link_fill_link_info,
	// kernel/bpf/syscall.c), and for all other links.
	Extends  uint32
	Function btf.TypeID
}

// Gone tells whether the device or cgroup of the link is gone. Of netfilter the
// kernel does not tell.
func (l *LinkInfo) Gone() bool {
	switch l.Type {
	case link.XDPType, link.TCXType, link.NetkitType:
		return l.Ifindex == 0
	case link.CgroupType:
		return l.CgroupID == 0
	case link.NetNsType:
		return l.NetNS == 0
	}
	return false
}

// Hook returns the hook of the link; "" when it is on none that is known here.
func (l *LinkInfo) Hook() hook.Hook { return LinkHook(l.Type, l.Attach) }

// NoHook is the refusal of a link that is on no hook.
func (l *LinkInfo) NoHook() error {
	return hook.Because(ebpf.ErrNotSupported, "link %d is of type %v, on no hook that members can be on", l.ID, l.TypeName())
}

// TypeName is the type of the link in words.
func (l *LinkInfo) TypeName() string {
	names := map[link.Type]string{
		link.RawTracepointType: "raw tracepoint", link.TracingType: "tracing", link.IterType: "iterator",
		link.PerfEventType: "perf event", link.KprobeMultiType: "kprobe multi", link.UprobeMultiType: "uprobe multi",
	}
	if n := names[l.Type]; n != "" {
		return n
	}
	return fmt.Sprint(l.Type)
}

// LinkInfoOf asks the kernel about a link.
func LinkInfoOf(l link.Link) (*LinkInfo, error) {
	info, err := l.Info()
	if err != nil {
		return nil, Errno("link", err)
	}
	li := &LinkInfo{ID: uint32(info.ID), Type: info.Type, Program: uint32(info.Program)}
	switch info.Type {
	case link.XDPType:
		li.Ifindex, li.Attach = int(info.XDP().Ifindex), ebpf.AttachXDP
	case link.TCXType:
		li.Ifindex, li.Attach = int(info.TCX().Ifindex), ebpf.AttachType(info.TCX().AttachType)
	case link.NetkitType:
		li.Ifindex, li.Attach = int(info.Netkit().Ifindex), ebpf.AttachType(info.Netkit().AttachType)
	case link.CgroupType:
		li.CgroupID, li.Attach = info.Cgroup().CgroupId, ebpf.AttachType(info.Cgroup().AttachType)
	case link.NetNsType:
		li.NetNS, li.Attach = uint64(info.NetNs().NetnsInode), ebpf.AttachType(info.NetNs().AttachType)
	case link.NetfilterType:
		li.Netfilter, li.Attach = info.Netfilter(), ebpf.AttachNetfilter
	case link.TracingType:
		// Only programs of freplace have no attach type.
		if t := info.Tracing(); t != nil && ebpf.AttachType(t.AttachType) == ebpf.AttachNone {
			li.Extends, li.Function = t.TargetObjectId, t.TargetBtfId
		}
	}
	return li, nil
}

// AllLinks returns the links on hooks of the network, and those of freplace. Those
// that come and go meanwhile may be missing.
func AllLinks() ([]LinkInfo, error) {
	var list []LinkInfo
	var it link.Iterator
	defer it.Close()
	for it.Next() {
		li, err := LinkInfoOf(it.Link)
		if err != nil {
			continue // of another kind, of which some cannot be described
		}
		switch li.Type {
		case link.XDPType, link.TCXType, link.NetkitType, link.CgroupType, link.NetNsType, link.NetfilterType:
			list = append(list, *li)
		case link.TracingType:
			if li.Extends != 0 {
				list = append(list, *li)
			}
		}
	}
	if err := it.Err(); err != nil {
		return nil, Again(Errno("list links", err))
	}
	return list, nil
}

// RawLink is what the links of cilium/ebpf can do.
type RawLink interface {
	link.Link
	UpdateArgs(link.RawLinkUpdateOptions) error
	FD() int
}

// OpenLink opens a link by its id.
func OpenLink(id uint32) (RawLink, error) {
	l, err := link.NewFromID(link.ID(id))
	if err != nil {
		return nil, Errno(fmt.Sprintf("link %d", id), err)
	}
	return AsRaw(l)
}

// Twin opens a link once more, for a pin: cilium/ebpf moves the pin of a link that it has
// pinned, and does not close it. Unlike the way by the id it needs no CAP_SYS_ADMIN.
func Twin(l RawLink) (RawLink, error) {
	fd, err := unix.FcntlInt(uintptr(l.FD()), unix.F_DUPFD_CLOEXEC, 0)
	runtime.KeepAlive(l)
	if err != nil {
		return nil, Errno("the link", err)
	}
	twin, err := link.NewFromFD(fd)
	if err != nil {
		return nil, Errno("the link", err)
	}
	return AsRaw(twin)
}

// AsRaw returns what the links of cilium/ebpf can do. It closes a link that cannot.
func AsRaw(l link.Link) (RawLink, error) {
	raw, ok := l.(RawLink)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("link of type %T cannot be updated", l)
	}
	return raw, nil
}

// LoadPinnedLink opens a link by its pin.
func LoadPinnedLink(path string) (RawLink, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if err != nil {
		return nil, PathErrno("open the pin", path, err)
	}
	return AsRaw(l)
}

// Needs is the error for a hook that this kernel does not have.
func Needs(h hook.Hook, err error) error {
	return fmt.Errorf("%s needs Linux %s: %w: %w", h, KindOf(h).Needs, ebpf.ErrNotSupported, err)
}
