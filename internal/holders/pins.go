package holders

import (
	"errors"
	iofs "io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
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
			fs.walk(b, fd, "/")
			continue
		}
		for root, fd := range b.roots {
			fs.walk(b, fd, root)
		}
	}
	for _, d := range doors {
		fs.enter(d)
	}
}

// enter reads what a door leads to, unless that was read already.
func (fs *filesystems) enter(d door) {
	fd, ok := fs.open(unix.AT_FDCWD, string(d), unix.O_PATH)
	if !ok {
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
			if ref, ok := fs.pinned(string(d)); ok {
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
		up, ok := fs.open(fd, "..", unix.O_PATH|unix.O_DIRECTORY)
		dev, ino := identity(up)
		if !ok || dev != st.Dev || ino == st.Ino {
			unix.Close(up)
			break
		}
		unix.Close(fd)
		fd, st.Ino, way = up, ino, way+"/.."
	}
	if b.walked[st.Ino] {
		return
	}
	b.mounts = append(b.mounts, mount{hook.HolderMount{Path: way}, "/"})
	fs.walk(b, fd, "/")
}

// walk reads a folder and the folders below, or a single pin that is mounted.
func (fs *filesystems) walk(b *bpffs, fd int, root string) {
	top := "/proc/self/fd/" + strconv.Itoa(fd)
	if _, err := os.Lstat(top + "/."); errors.Is(err, unix.ENOTDIR) {
		_, ino := identity(fd)
		fs.found(b, top, root, ino)
		return
	}
	_ = filepath.WalkDir(top+"/.", func(at string, d iofs.DirEntry, err error) error {
		if !fs.ok(err) {
			return nil
		}
		var st unix.Stat_t
		switch {
		case unix.Lstat(at, &st) != nil: // gone
		case d.IsDir():
			if st.Dev != b.dev || b.walked[st.Ino] { // else another file system is mounted on it
				return iofs.SkipDir
			}
			b.walked[st.Ino] = true
		case d.Type().IsRegular():
			fs.found(b, at, path.Join(root, strings.TrimPrefix(at, top)), st.Ino)
		}
		return nil
	})
}

// found adds a pin, or another name of a known pin.
func (fs *filesystems) found(b *bpffs, at, name string, ino uint64) {
	p := b.files[ino]
	if p == nil {
		ref, ok := fs.pinned(at)
		if !ok {
			return
		}
		p = &pinFile{ref: ref, inode: ino}
		b.files[ino] = p
	}
	p.names = append(p.names, name)
}

// pinned returns the object that the file pins; false if the file is no pin.
func (s *search) pinned(path string) (ref hook.HolderRef, ok bool) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return ref, false
	}
	attr := struct {
		path      uint64
		fd, flags uint32
		_         uint64
	}{path: uint64(uintptr(unsafe.Pointer(name)))}
	fd, err := kernel.BPF(unix.BPF_OBJ_GET, &attr)
	if err != nil { // a map may be read-only
		attr.flags = unix.BPF_F_RDONLY
		fd, err = kernel.BPF(unix.BPF_OBJ_GET, &attr)
	}
	runtime.KeepAlive(name)
	if !s.ok(err) {
		return ref, false
	}
	defer unix.Close(fd)
	target, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	kind, ok := anonymous[strings.TrimPrefix(target, "anon_inode:")]
	var info [2]uint32
	ok = ok && kernel.ObjectInfo(fd, &info) == nil
	return refTo(kind, info[1]), ok
}

// anonymous are the kernel's names of objects' files.
var anonymous = map[string]hook.HolderKind{
	"bpf_link": hook.HolderLink, // opened by who created it
	"bpf-link": hook.HolderLink, // opened later
	"bpf-prog": hook.HolderProgram,
	"bpf-map":  hook.HolderMap,
}
