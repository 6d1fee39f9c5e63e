package kernel

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"runtime"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// programInfo is the beginning of struct bpf_prog_info (linux/bpf.h).
type programInfo struct {
	_, id    uint32
	tag      [unix.BPF_TAG_SIZE]byte
	_        [24]byte // the code
	loadTime uint64
	uid      uint32
	maps     uint32
	mapIDs   uint64
	name     [unix.BPF_OBJ_NAME_LEN]byte
}

// BPF makes a call of bpf(2). What attr points to must not be on the stack.
func BPF[T any](command uintptr, attr *T) (int, error) {
	n, _, errno := unix.Syscall(unix.SYS_BPF, command, uintptr(unsafe.Pointer(attr)), unsafe.Sizeof(*attr))
	if errno != 0 {
		return -1, errno
	}
	return int(n), nil
}

// ObjectInfo reads the beginning of struct bpf_{link,prog,map}_info of an open object.
// All three begin with the type and the id. The Info methods of cilium/ebpf open a file
// of /proc as well, and so fail in a process that can open no more.
func ObjectInfo[T any](fd int, info *T) error {
	var pinner runtime.Pinner
	pinner.Pin(info) // it must not move with the stack
	defer pinner.Unpin()
	attr := struct {
		fd, size uint32
		info     uint64
	}{uint32(fd), uint32(unsafe.Sizeof(*info)), uint64(uintptr(unsafe.Pointer(info)))}
	_, err := BPF(unix.BPF_OBJ_GET_INFO_BY_FD, &attr)
	return err
}

// Describe returns what the kernel says about a program; the zero value if it
// says nothing.
func Describe(prog *ebpf.Program) hook.Program {
	var info programInfo
	err := ObjectInfo(prog.FD(), &info)
	runtime.KeepAlive(prog)
	if err != nil {
		return hook.Program{}
	}
	return hook.Program{
		ID: info.id, Name: unix.ByteSliceToString(info.name[:]), Tag: hex.EncodeToString(info.tag[:]),
		LoadedBy: info.uid, LoadedAt: bootTime(time.Duration(info.loadTime)),
	}
}

// ProgramID returns the id of a program; 0 if the kernel does not tell it.
func ProgramID(prog *ebpf.Program) uint32 { return Describe(prog).ID }

// Programs opens all loaded programs, by rising id, each until the loop goes on. After an
// error there are no more.
func Programs() iter.Seq2[*ebpf.Program, error] {
	return func(yield func(*ebpf.Program, error) bool) {
		for id := ebpf.ProgramID(0); ; {
			var err error
			if id, err = ebpf.ProgramGetNextID(id); err != nil {
				if !errors.Is(err, fs.ErrNotExist) {
					yield(nil, Errno("list programs", err))
				}
				return
			}
			prog, err := ebpf.NewProgramFromID(id)
			if errors.Is(err, fs.ErrNotExist) {
				continue // gone meanwhile
			}
			more := yield(prog, Errno(fmt.Sprintf("program id %d", id), err)) && err == nil
			prog.Close()
			if !more {
				return
			}
		}
	}
}

// OpenProgram opens a program by its id; the caller closes it. The error says what the program
// is to the caller, and is ErrAgain when the program is gone: whatever had it has another.
func OpenProgram(id uint32, what string) (*ebpf.Program, error) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(id))
	return prog, Again(Errno(what, err))
}

// ProgramMaps returns the ids of the maps of a program.
func ProgramMaps(prog *ebpf.Program) ([]ebpf.MapID, error) {
	for room := uint32(64); ; { // what the code may use (MAX_USED_MAPS, linux/bpf_verifier.h)
		ids := make([]ebpf.MapID, room)
		info := programInfo{maps: room, mapIDs: uint64(uintptr(unsafe.Pointer(&ids[0])))}
		err := ObjectInfo(prog.FD(), &info)
		runtime.KeepAlive(ids)
		runtime.KeepAlive(prog)
		if err != nil {
			return nil, Errno("maps of a program", err)
		}
		if info.maps <= room {
			return ids[:info.maps], nil
		}
		room = info.maps
	}
}

// OpenMap opens a map by its id, with flags such as BPF_F_RDONLY; the caller closes the
// descriptor. Unlike cilium/ebpf it does not read /proc.
func OpenMap(id ebpf.MapID, flags uint32) (int, error) {
	attr := struct{ id, next, flags uint32 }{id: uint32(id), flags: flags}
	return BPF(unix.BPF_MAP_GET_FD_BY_ID, &attr)
}

// MapID returns the id of a map.
func MapID(m *ebpf.Map) (uint32, error) {
	var info [2]uint32
	err := ObjectInfo(m.FD(), &info)
	runtime.KeepAlive(m)
	return info[1], Errno("map", err)
}

// bootTime converts a time since boot (CLOCK_BOOTTIME). The result is rounded to
// whole seconds: more digits would differ from call to call.
func bootTime(since time.Duration) time.Time {
	var now unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &now) != nil {
		return time.Time{}
	}
	return time.Now().Add(since - time.Duration(now.Nano())).Round(time.Second)
}
