package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// NetNamespaces opens every network namespace that it can find, each once. The
// caller closes them. The caller's own namespace comes first; the order of the
// others means nothing.
//
// It looks at the names of "ip netns", at all processes and their threads, at
// the mounts in the mount namespaces of the processes, and at the descriptors of
// the processes. The first of these that leads to a namespace becomes its Name,
// which [OpenNetNS] accepts; the Name of the caller's own namespace is empty. A
// namespace that cannot be entered is returned as well; its Cookie is 0.
//
// It does not find a namespace that exists only through a socket, a netfilter
// link, a descriptor in a unix socket's queue, a thread's own table of
// descriptors, or a mount namespace that only a thread is in. Nor does it find a
// namespace all of whose processes /proc hides from the caller: processes outside
// the caller's pid namespace, and without privileges other users' processes.
//
// It leaves out what vanishes meanwhile, and processes that it cannot read. An
// error means that there is no list at all.
func NetNamespaces() ([]*NetNS, error) {
	w := &walk{known: map[uint64]bool{}, mounts: map[string]bool{}}
	if err := w.all(); err != nil {
		for _, ns := range w.found {
			ns.Close()
		}
		return nil, err
	}
	for _, ns := range w.found[1:] {
		_ = ns.identify() // if this is refused, Do is refused too, and says why
	}
	return w.found, nil
}

// FindNetNS opens the first network namespace for which fn returns true. The caller
// closes it. The error is fs.ErrNotExist if there is none among what
// [NetNamespaces] finds.
func FindNetNS(fn func(*NetNS) bool) (*NetNS, error) {
	all, err := NetNamespaces()
	if err != nil {
		return nil, err
	}
	var found *NetNS
	for _, ns := range all {
		if found == nil && fn(ns) {
			found = ns
		} else {
			ns.Close()
		}
	}
	if found == nil {
		return nil, hook.Because(fs.ErrNotExist, "it was found in no network namespace")
	}
	return found, nil
}

// A walk goes through the places where namespaces can be found.
type walk struct {
	found  []*NetNS
	nsfs   uint64          // device number of the file system of namespaces
	known  map[uint64]bool // inodes on nsfs that need not be opened
	view   string          // the caller's, see mountView
	mounts map[string]bool // views whose mounts have been read
}

func (w *walk) all() error {
	own, err := OpenNetNS("")
	if err != nil {
		return err
	}
	w.found = append(w.found, own)
	w.known[own.id.Inode] = true
	var st unix.Stat_t
	if err := unix.Fstat(own.FD(), &st); err != nil {
		return fmt.Errorf("network namespace: %w", err)
	}
	w.nsfs = st.Dev
	if w.view, err = mountView("/proc/thread-self"); err != nil {
		return fmt.Errorf("own mounts: %w", err)
	}

	names, err := os.ReadDir(netnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("network namespaces: %w", Explain(err))
	}
	for _, name := range names {
		if err := w.file(netnsDir+"/"+name.Name(), netnsSpec(name.Name())); err != nil {
			return err
		}
	}
	// Usually the same folder; ip uses this name.
	names, _ = os.ReadDir("/var/run/netns")
	for _, name := range names {
		path := "/var/run/netns/" + name.Name()
		if err := w.file(path, path); err != nil {
			return err
		}
	}

	all, err := procfs.Tasks()
	if err != nil {
		return fmt.Errorf("network namespaces: %w", err)
	}
	processes := procfs.Living(all)
	for _, pass := range []struct {
		tasks []procfs.Task
		look  func(dir string) error
	}{{processes, w.namespace}, {all, w.namespace}, {processes, w.mountTable}, {processes, w.descriptors}} {
		for _, t := range pass.tasks {
			if err := pass.look(t.Dir()); err != nil {
				return err
			}
		}
	}
	return nil
}

// netnsSpec returns what OpenNetNS needs for the file of that name in netnsDir: the
// name itself, unless OpenNetNS would take it for a process id.
func netnsSpec(name string) string {
	if _, err := strconv.Atoi(name); err == nil {
		return netnsDir + "/" + name
	}
	return name
}

// namespace opens the namespace of a task, if it is not known yet.
func (w *walk) namespace(dir string) error {
	if ino := procfs.Namespace(dir, "net"); ino == 0 || w.known[ino] {
		return nil
	}
	path := dir + "/ns/net"
	return w.open(path, path)
}

// mountTable reads the mounts that a task sees, unless it has read the mounts of
// another task with the same mount namespace and root.
func (w *walk) mountTable(dir string) error {
	view, err := mountView(dir)
	if err != nil || w.mounts[view] {
		return nil
	}
	list, err := procfs.Mounts(dir + "/mountinfo")
	if err != nil {
		return nil
	}
	w.mounts[view] = true
	root := dir + "/root"
	if view == w.view {
		root = ""
	}
	for _, m := range list {
		if ino := procfs.NamespaceInode(m.Root, "net"); m.Type != "nsfs" || ino == 0 || w.known[ino] {
			continue
		}
		path := root + m.Point
		if err := w.file(path, path); err != nil {
			return err
		}
	}
	return nil
}

// mountView identifies what mounts a task sees, by its mount namespace and root.
func mountView(dir string) (string, error) {
	ns, err := os.Readlink(dir + "/ns/mnt")
	if err != nil {
		return "", err
	}
	root, err := os.Readlink(dir + "/root")
	return ns + root, err
}

// descriptors opens the namespaces that a task has open.
func (w *walk) descriptors(dir string) error {
	fds, err := os.Open(dir + "/fd")
	if err != nil {
		return nil
	}
	defer fds.Close()
	names, _ := fds.Readdirnames(-1)
	var st unix.Statx_t
	for _, name := range names {
		// The link's text does not help: for a namespace that is or was mounted it is
		// a path. AT_STATX_DONT_SYNC, because a file's server may be gone.
		err := unix.Statx(int(fds.Fd()), name, unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st)
		if err != nil || unix.Mkdev(st.Dev_major, st.Dev_minor) != w.nsfs || w.known[st.Ino] {
			continue
		}
		path := fds.Name() + "/" + name
		if err := w.open(path, path); err != nil {
			return err
		}
	}
	return nil
}

// file opens a file that may be a namespace, if it is not known yet.
func (w *walk) file(path, spec string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Dev != w.nsfs || w.known[st.Ino] {
		return nil
	}
	return w.open(path, spec)
}

// open adds the namespace at path. It returns only errors that the next path would
// get as well.
func (w *walk) open(path, spec string) error {
	ns, err := openNetNS(path)
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("network namespaces: %w", err)
	case err != nil:
		return nil
	case w.known[ns.id.Inode]: // the path leads to another one by now
		ns.Close()
		return nil
	}
	ns.spec, ns.id.Name = spec, spec
	w.known[ns.id.Inode] = true
	w.found = append(w.found, ns)
	return nil
}
