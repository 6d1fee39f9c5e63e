package holders

import (
	"encoding/binary"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// commands are the commands of bpf(2) that find and open objects of a kind.
var commands = map[hook.HolderKind]struct{ next, open uintptr }{
	hook.HolderLink:    {unix.BPF_LINK_GET_NEXT_ID, unix.BPF_LINK_GET_FD_BY_ID},
	hook.HolderProgram: {unix.BPF_PROG_GET_NEXT_ID, unix.BPF_PROG_GET_FD_BY_ID},
	hook.HolderMap:     {unix.BPF_MAP_GET_NEXT_ID, unix.BPF_MAP_GET_FD_BY_ID},
}

// ids lists the objects of a kind.
func ids(kind hook.HolderKind) ([]uint32, error) {
	var list []uint32
	attr := struct{ id, next, flags uint32 }{}
	for {
		if _, err := kernel.BPF(commands[kind].next, &attr); err == unix.ENOENT {
			return list, nil
		} else if err != nil {
			return list, kernel.Errno("list "+string(kind)+"s", err)
		}
		list = append(list, attr.next)
		attr.id = attr.next
	}
}

// openID opens an object.
func openID(ref hook.HolderRef) (int, error) {
	attr := struct{ id, next, flags uint32 }{id: ref.ID}
	return kernel.BPF(commands[ref.Kind].open, &attr)
}

// openAll opens links, so that the iterator of files finds them; none if there are more
// than this process can open.
func openAll(known map[hook.HolderRef]bool) (fds []int) {
	for ref := range known {
		if ref.Kind != hook.HolderLink {
			continue
		}
		fd, err := openID(ref)
		if procfs.Exhausted(err) {
			closeAll(fds)
			return nil
		}
		if err == nil {
			fds = append(fds, fd)
		}
	}
	return fds
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// linkInfo is the first words of struct bpf_link_info.
type linkInfo [16]uint32

// linkToMap notes the map that a link refers to. The kernel reports it only for an
// open link.
func (o *objects) linkToMap(link hook.HolderRef, kind uint32) {
	var word int
	var how string
	switch kind {
	case linkIter:
		word, how = 7, "iterates over it"
	case linkStructOps:
		word, how = 4, "registers it"
	case linkSockMap:
		word, how = 4, "attached to it"
	default:
		return
	}
	if info, ok := info[linkInfo](o.search, link); ok && info[word] != 0 {
		o.refer(refTo(hook.HolderMap, info[word]), link, how, 1)
	}
}

// enumerate lists the objects of a kind. If wide is set it also notes what they refer
// to.
func (o *objects) enumerate(kind hook.HolderKind, wide bool) {
	list, err := ids(kind)
	o.unlisted[kind] = err
	for _, id := range list {
		o.known[refTo(kind, id)] = true
		if wide {
			o.look(refTo(kind, id))
		}
	}
}

// look notes what an object refers to.
func (o *objects) look(ref hook.HolderRef) {
	switch ref.Kind {
	case hook.HolderLink:
		info, ok := info[linkInfo](o.search, ref)
		if ok && info[2] != 0 {
			o.carry(ref, info[0], info[2], info[4] != 0)
		}
		if ok {
			o.linkToMap(ref, info[0])
		}
	case hook.HolderProgram:
		for _, m := range o.programMaps(ref.ID) {
			o.refer(refTo(hook.HolderMap, uint32(m)), ref, "uses it", 1)
		}
	case hook.HolderMap:
		if info, ok := info[[1]uint32](o.search, ref); ok {
			o.readMap(ref.ID, info[0])
		}
	}
}

func (o *objects) programMaps(id uint32) []ebpf.MapID {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	if !o.ok(err) {
		return nil
	}
	defer prog.Close()
	maps, _ := kernel.ProgramMaps(prog)
	return maps
}

// readMap notes what the entries of a map refer to, if its type has such entries.
func (o *objects) readMap(id, kind uint32) {
	at, to, how := 0, hook.HolderProgram, "slot"
	switch kind {
	case mapProgArray:
	case mapArrayOfMaps, mapHashOfMaps:
		to, how = hook.HolderMap, "has it as inner map"
	case mapDevMap, mapDevMapHash, mapCPUMap:
		at, how = 4, "runs it for an entry" // struct bpf_devmap_val, bpf_cpumap_val
	default:
		return
	}
	m, err := ebpf.NewMapFromID(ebpf.MapID(id))
	if !o.ok(err) {
		return
	}
	defer m.Close()
	if int(m.ValueSize()) < at+4 {
		return // entries without programs
	}
	for key, err := m.NextKeyBytes(nil); key != nil && err == nil; key, err = m.NextKeyBytes(key) {
		value, err := m.LookupBytes(key)
		if err != nil {
			return
		}
		if value == nil {
			continue // empty
		}
		if held := binary.NativeEndian.Uint32(value[at:]); held != 0 {
			o.refer(refTo(to, held), refTo(hook.HolderMap, id), how, 1)
		}
	}
}

// What kcmp(2) compares.
const (
	kcmpFile  = 0
	kcmpFiles = 2
)

// kcmp compares resources of two tasks. It returns 0 if they are the same, and
// another number if not. Not every kernel has it.
func kcmp(pid1, pid2, what, fd1, fd2 int) (int, error) {
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid1), uintptr(pid2), uintptr(what), uintptr(fd1), uintptr(fd2), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(order), nil
}
