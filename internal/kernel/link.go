package kernel

import (
	"runtime"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// A Neighbor is the entry of a hook next to which the kernel puts a new link, in the
// form that BPF_LINK_CREATE takes. The zero value puts the link at the end.
type Neighbor struct {
	Flags uint32 // BPF_F_BEFORE, BPF_F_AFTER, with BPF_F_ID and BPF_F_LINK
	ID    uint32 // of the link or the program; 0 stands for all entries
}

// Before is the place before a link (isLink) or a program; for id 0 before all.
func Before(id uint32, isLink bool) Neighbor { return neighbor(unix.BPF_F_BEFORE, id, isLink) }

// After is the place after a link (isLink) or a program; for id 0 after all.
func After(id uint32, isLink bool) Neighbor { return neighbor(unix.BPF_F_AFTER, id, isLink) }

func neighbor(side, id uint32, isLink bool) Neighbor {
	if id != 0 {
		side |= unix.BPF_F_ID
		if isLink {
			side |= unix.BPF_F_LINK
		}
	}
	return Neighbor{side, id}
}

// linkCreate is the part of union bpf_attr that TCX and cgroup links use. Kernels
// without neighbors want zeros where those stand.
type linkCreate struct {
	prog, target, attach, flags uint32
	relative                    uint32
	_                           uint32
	revision                    uint64
	_                           [32]byte
}

// CreateLink attaches a program by BPF_LINK_CREATE. Unlike cilium/ebpf it never
// attaches without a link instead. target is an ifindex in the thread's namespace or
// the descriptor of a cgroup. If revision is not 0 and the hook has another
// revision, the error is ESTALE.
func CreateLink(prog *ebpf.Program, target int, attach ebpf.AttachType, at Neighbor, revision uint64) (link.Link, error) {
	attr := linkCreate{
		prog: uint32(prog.FD()), target: uint32(target), attach: uint32(attach),
		flags: at.Flags, relative: at.ID, revision: revision,
	}
	fd, err := BPF(unix.BPF_LINK_CREATE, &attr)
	runtime.KeepAlive(prog)
	if err != nil {
		return nil, err
	}
	return link.NewFromFD(fd)
}

// A Query is the answer to BPF_PROG_QUERY.
type Query struct {
	Programs []uint32
	Links    []uint32 // 0 for a program without a link; only TCX and netkit report links
	Revision uint64   // 0 where the kernel does not count
	Flags    uint32   // BPF_F_ALLOW_* of a cgroup
}

type progQuery struct {
	target, attach, query, flags uint32
	ids                          uint64
	count                        uint32
	_                            uint32
	_                            uint64 // prog_attach_flags
	links                        uint64
	_                            uint64
	revision                     uint64
}

// QueryPrograms returns what is attached, in run order. target is as for
// CreateLink, or the descriptor of a network namespace.
func QueryPrograms(target int, attach ebpf.AttachType, flags uint32) (*Query, error) {
	for room := uint32(64); ; room *= 2 {
		ids, links := make([]uint32, room), make([]uint32, room)
		attr := progQuery{
			target: uint32(target), attach: uint32(attach), query: flags, count: room,
			ids: uint64(uintptr(unsafe.Pointer(&ids[0]))),
		}
		if withLinks(attach) {
			attr.links = uint64(uintptr(unsafe.Pointer(&links[0])))
		}
		_, err := BPF(unix.BPF_PROG_QUERY, &attr)
		runtime.KeepAlive(ids)
		runtime.KeepAlive(links)
		switch {
		case err == unix.ENOSPC && room < 1<<16:
			continue
		case err != nil:
			return nil, err
		}
		n := min(attr.count, room)
		return &Query{ids[:n], links[:n], attr.revision, attr.flags}, nil
	}
}

// withLinks tells whether the kernel fills in link ids for an attach type.
func withLinks(t ebpf.AttachType) bool {
	switch t {
	case ebpf.AttachTCXIngress, ebpf.AttachTCXEgress, ebpf.AttachNetkitPrimary, ebpf.AttachNetkitPeer:
		return true
	}
	return false
}

// Settled waits until every run of a program that had begun before the call has
// ended: programs run in an RCU read-side section, and MEMBARRIER_CMD_GLOBAL waits
// for those (synchronize_rcu, kernel/sched/membarrier.c).
func Settled() error {
	const global = 1
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// LinkMayExist tells whether there is a link with that id, without opening it; true if
// that cannot be told.
func LinkMayExist(id uint32) bool { return mayExist(unix.BPF_LINK_GET_NEXT_ID, id) }

// MapMayExist is LinkMayExist for a map. Other than opening the map, it takes no reference.
func MapMayExist(id uint32) bool { return mayExist(unix.BPF_MAP_GET_NEXT_ID, id) }

func mayExist(cmd uintptr, id uint32) bool {
	attr := struct{ start, next, flags uint32 }{start: id - 1}
	_, err := BPF(cmd, &attr)
	return err == nil && attr.next == id || err != nil && err != unix.ENOENT
}

// AttachProgram attaches a program without a link. flags are BPF_F_*. If old is not
// nil the program replaces old.
func AttachProgram(prog *ebpf.Program, target int, attach ebpf.AttachType, flags uint32, old *ebpf.Program) error {
	attr := struct{ target, prog, attach, flags, replace, relative, _, _ uint32 }{
		target: uint32(target), prog: uint32(prog.FD()), attach: uint32(attach), flags: flags,
	}
	if old != nil {
		attr.flags |= unix.BPF_F_REPLACE
		attr.replace = uint32(old.FD())
	}
	_, err := BPF(unix.BPF_PROG_ATTACH, &attr)
	runtime.KeepAlive(prog)
	runtime.KeepAlive(old)
	return err
}

// DetachProgram detaches a program that was attached without a link.
func DetachProgram(prog *ebpf.Program, target int, attach ebpf.AttachType) error {
	attr := struct{ target, prog, attach, flags uint32 }{target: uint32(target), prog: uint32(prog.FD()), attach: uint32(attach)}
	_, err := BPF(unix.BPF_PROG_DETACH, &attr)
	runtime.KeepAlive(prog)
	return err
}

// XDPLinks returns the links that carry a program on a device with that index. A
// link reports the index but not the namespace, and a program can be on devices of
// the same index in several namespaces.
func XDPLinks(prog uint32, ifindex int) ([]uint32, error) {
	all, err := AllLinks()
	var ids []uint32
	for _, l := range all {
		if l.Type == link.XDPType && l.Program == prog && l.Ifindex == ifindex {
			ids = append(ids, l.ID)
		}
	}
	return ids, err
}
