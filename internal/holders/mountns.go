package holders

import (
	"cmp"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A mountNS is a mount namespace.
type mountNS struct {
	inode uint64
	fd    int      // of its file; -1 if it could not be opened
	tasks []string // folders in /proc of some tasks in it
	enter string   // a file by which it can be entered
}

// mountNSs are the mount namespaces that were found; the caller's comes first.
type mountNSs struct {
	*search
	list  []*mountNS
	known map[uint64]*mountNS // by inode; nil for a namespace of another type
	nsfs  uint64              // device number of the file system of namespaces
}

// self is the folder of this process in /proc.
const self = "/proc/self"

// someTasks is how many tasks of a namespace are kept: one may be gone, or have
// another root than the namespace.
const someTasks = 4

// findMountNSs finds the namespaces that tasks are in, and since Linux 6.12 all
// others. The caller closes the result.
func findMountNSs(s *search, all []procfs.Task) *mountNSs {
	found := &mountNSs{search: s, known: map[uint64]*mountNS{}}
	if found.add("/proc/thread-self/ns/mnt", self) == nil {
		found.list = []*mountNS{{fd: -1, tasks: []string{self}}}
	}
	for _, t := range all {
		dir := t.Dir()
		ino := procfs.Namespace(dir, "mnt")
		ns := found.known[ino]
		switch {
		case ino == 0: // not readable, or gone
		case ns == nil:
			found.add(dir+"/ns/mnt", dir)
		case len(ns.tasks) < someTasks:
			ns.tasks = append(ns.tasks, dir)
		}
	}
	found.next(nsMntGetPrev)
	found.next(nsMntGetNext)
	return found
}

// add opens the namespace at path. task is the folder of a task in it, or empty. It
// returns nil if the file is no mount namespace.
func (f *mountNSs) add(path, task string) *mountNS {
	var ns *mountNS
	if fd, ok := f.open(unix.AT_FDCWD, path, unix.O_RDONLY|unix.O_NONBLOCK); ok {
		ns = f.take(fd)
	} else if ino := procfs.Namespace(task, "mnt"); ino != 0 { // its tasks may still show its mounts
		ns = f.keep(ino, -1)
	}
	if ns == nil {
		return nil
	}
	ns.enter = cmp.Or(ns.enter, path)
	if task != "" {
		ns.tasks = append(ns.tasks, task)
	}
	return ns
}

func (f *mountNSs) keep(inode uint64, fd int) *mountNS {
	ns := &mountNS{inode: inode, fd: fd}
	f.known[inode] = ns
	f.list = append(f.list, ns)
	return ns
}

// take adds an open namespace, or closes what is none or known already.
func (f *mountNSs) take(fd int) *mountNS {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil || f.nsfs != 0 && st.Dev != f.nsfs {
		unix.Close(fd)
		return nil
	}
	if ns, known := f.known[st.Ino]; known {
		unix.Close(fd)
		return ns
	}
	if kind, err := unix.IoctlRetInt(fd, unix.NS_GET_NSTYPE); err != nil || kind != unix.CLONE_NEWNS {
		f.known[st.Ino] = nil
		unix.Close(fd)
		return nil
	}
	f.nsfs = st.Dev
	return f.keep(st.Ino, fd)
}

// mntNSInfo is struct mnt_ns_info, linux/nsfs.h.
type mntNSInfo struct {
	size, mounts uint32
	id           uint64
}

const (
	nsMntGetNext = 2<<30 | 16<<16 | 0xb7<<8 | 11 // _IOR(NSIO, 11, struct mnt_ns_info)
	nsMntGetPrev = 2<<30 | 16<<16 | 0xb7<<8 | 12
)

// next adds all namespaces after the caller's, or before it, also those without a
// process.
func (f *mountNSs) next(direction uintptr) {
	fd := f.list[0].fd
	for fd >= 0 {
		info := mntNSInfo{size: uint32(unsafe.Sizeof(mntNSInfo{}))}
		next, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), direction, uintptr(unsafe.Pointer(&info)))
		if errno != 0 { // ENOENT: the last; ENOTTY: an older kernel
			f.ok(errno)
			return
		}
		ns := f.take(int(next))
		if ns == nil {
			return
		}
		fd = ns.fd
	}
}

func (f *mountNSs) close() {
	for _, ns := range f.list {
		if ns.fd >= 0 {
			unix.Close(ns.fd)
		}
	}
}
