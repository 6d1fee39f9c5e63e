package holders

import (
	"bytes"
	"encoding/binary"
	"os"
	"path"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// walkAll reads every bpffs. Doors lead to a bpffs, or to a part of one, that is
// mounted nowhere.
func (fs *filesystems) walkAll(doors []door) {
	for _, d := range doors {
		fs.spaces.add(string(d), "") // if the door leads to a namespace
	}
	fs.visit()
	for _, b := range fs.bpf {
		if fd, ok := b.roots["/"]; ok {
			b.walk(fd, "/")
			continue
		}
		for root, fd := range b.roots {
			b.walk(fd, root)
		}
	}
	for _, d := range doors {
		fs.enter(d)
	}
}

// enter reads what a door leads to, unless that was read already.
func (fs *filesystems) enter(d door) {
	fd, err := unix.Open(string(d), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer func() { unix.Close(fd) }()
	var st unix.Stat_t
	var sfs unix.Statfs_t
	if unix.Fstat(fd, &st) != nil || unix.Fstatfs(fd, &sfs) != nil || sfs.Type != unix.BPF_FS_MAGIC {
		return
	}
	b := fs.instance(st.Dev)
	if st.Mode&unix.S_IFMT == unix.S_IFREG {
		if b.files[st.Ino] == nil { // the file was removed, or its folder was not found
			if ref, ok := pinned(string(d)); ok {
				b.files[st.Ino] = &pinFile{ref: ref, inode: st.Ino, door: d}
			}
		}
		return
	}
	if _, whole := b.roots["/"]; whole || st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return
	}
	// Go up to the root of what is or was mounted.
	way := string(d)
	for {
		up, err := unix.Openat(fd, "..", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			break
		}
		if dev, ino := identity(up); dev != st.Dev || ino == st.Ino {
			unix.Close(up)
			break
		} else {
			st.Ino = ino
		}
		unix.Close(fd)
		fd = up
		way += "/.."
	}
	if b.walked[st.Ino] {
		return
	}
	b.mounts = append(b.mounts, mount{hook.HolderMount{Path: way}, "/"})
	b.walk(fd, "/")
}

// walk reads a folder and the folders below, or a single pin that is mounted.
func (b *bpffs) walk(fd int, name string) {
	_, ino := identity(fd)
	dir, err := unix.Openat(fd, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == unix.ENOTDIR {
		b.found("/proc/self/fd/"+strconv.Itoa(fd), name, ino)
	}
	if err != nil || b.walked[ino] {
		return
	}
	defer unix.Close(dir)
	b.walked[ino] = true
	at := "/proc/self/fd/" + strconv.Itoa(dir) + "/"
	buf := make([]byte, 1<<15)
	for {
		n, err := unix.Getdents(dir, buf)
		if err != nil || n == 0 {
			return
		}
		for rest := buf[:n]; len(rest) > 0; {
			var e dirent
			e, rest = nextDirent(rest)
			switch {
			case e.name == "." || e.name == "..":
			case e.kind == unix.DT_REG:
				b.found(at+e.name, path.Join(name, e.name), e.ino)
			case e.kind == unix.DT_DIR:
				sub, err := unix.Openat(dir, e.name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
				if err != nil {
					continue
				}
				if dev, _ := identity(sub); dev == b.dev { // else another file system is mounted on it
					b.walk(sub, path.Join(name, e.name))
				}
				unix.Close(sub)
			}
		}
	}
}

// found adds a pin, or another name of a known pin.
func (b *bpffs) found(at, name string, ino uint64) {
	p := b.files[ino]
	if p == nil {
		ref, ok := pinned(at)
		if !ok {
			return
		}
		p = &pinFile{ref: ref, inode: ino}
		b.files[ino] = p
	}
	p.names = append(p.names, name)
}

// dirent has the useful part of struct linux_dirent64.
type dirent struct {
	ino  uint64
	kind byte
	name string
}

func nextDirent(buf []byte) (dirent, []byte) {
	e := dirent{ino: binary.NativeEndian.Uint64(buf), kind: buf[18]}
	size := binary.NativeEndian.Uint16(buf[16:])
	name, _, _ := bytes.Cut(buf[19:size], []byte{0})
	e.name = string(name)
	return e, buf[size:]
}

// pinned returns the object that the file pins; false if the file is no pin.
func pinned(path string) (hook.HolderRef, bool) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return hook.HolderRef{}, false
	}
	attr := struct {
		path      uint64
		fd, flags uint32
		_         uint64
	}{path: uint64(uintptr(unsafe.Pointer(name)))}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 { // a map may be read-only
		attr.flags = unix.BPF_F_RDONLY
		fd, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	}
	runtime.KeepAlive(name)
	if errno != 0 {
		return hook.HolderRef{}, false
	}
	defer unix.Close(int(fd))
	target, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(int(fd)))
	if err != nil {
		return hook.HolderRef{}, false
	}
	kind, ok := anonymous[strings.TrimPrefix(target, "anon_inode:")]
	var info [2]uint32
	if !ok || objInfo(int(fd), info[:]) != nil {
		return hook.HolderRef{}, false
	}
	return refTo(kind, info[1]), true
}

// anonymous are the kernel's names of objects' files.
var anonymous = map[string]hook.HolderKind{
	"bpf_link": hook.HolderLink, // opened by who created it
	"bpf-link": hook.HolderLink, // opened later
	"bpf-prog": hook.HolderProgram,
	"bpf-map":  hook.HolderMap,
}

// objInfo reads the beginning of struct bpf_{link,prog,map}_info. All three begin
// with the type and the id.
func objInfo(fd int, info []uint32) error {
	attr := struct {
		fd, size uint32
		info     uint64
	}{uint32(fd), uint32(len(info) * 4), uint64(uintptr(unsafe.Pointer(&info[0])))}
	_, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET_INFO_BY_FD, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	runtime.KeepAlive(info)
	if errno != 0 {
		return errno
	}
	return nil
}
