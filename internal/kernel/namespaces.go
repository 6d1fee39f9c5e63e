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
	err := w.all()
	for i := 1; i < len(w.found) && err == nil; i++ {
		// If this is refused, Do is refused too, and says why.
		if refused := w.found[i].identify(); procfs.Exhausted(refused) {
			err = refused
		}
	}
	if err != nil {
		for _, ns := range w.found {
			ns.Close()
		}
		return nil, err
	}
	return w.found, nil
}

// FindNetNS opens the first network namespace for which fn returns nil. The caller
// closes it. For other namespaces fn returns fs.ErrNotExist, and so does FindNetNS
// if there is none among what [NetNamespaces] finds. Any other error of fn means
// that it is not known; FindNetNS returns that error if it finds no namespace.
func FindNetNS(fn func(*NetNS) error) (*NetNS, error) {
	all, err := NetNamespaces()
	if err != nil {
		return nil, err
	}
	var found *NetNS
	var unknown error
	for _, ns := range all {
		if found == nil {
			switch err := fn(ns); {
			case err == nil:
				found = ns
				continue
			case !errors.Is(err, fs.ErrNotExist):
				unknown = err
			}
		}
		ns.Close()
	}
	switch {
	case found != nil:
		return found, nil
	case unknown != nil:
		return nil, unknown
	}
	return nil, hook.Because(fs.ErrNotExist, "it was found in no network namespace")
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

	// Usually both are the same folder; ip uses the second name.
	for _, dir := range []string{NetNSDir, "/var/run/netns"} {
		names, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("network namespaces: %w", Explain(err))
		}
		for _, name := range names {
			path := dir + "/" + name.Name()
			spec := path
			if dir == NetNSDir {
				spec = netnsSpec(name.Name())
			}
			if err := w.file(path, spec); err != nil {
				return err
			}
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

// netnsSpec returns what OpenNetNS needs for the file of that name in NetNSDir: the
// name itself, unless OpenNetNS would take it for a process id.
func netnsSpec(name string) string {
	if _, err := strconv.Atoi(name); err == nil {
		return NetNSDir + "/" + name
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
		return lasting(err)
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
		return lasting(err)
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

// lasting returns an error that will not go away with the next path.
func lasting(err error) error {
	if procfs.Exhausted(err) {
		return fmt.Errorf("network namespaces: %w", err)
	}
	return nil
}

// open adds the namespace at path.
func (w *walk) open(path, spec string) error {
	ns, err := openNetNS(path)
	switch {
	case err != nil:
		return lasting(err)
	case w.known[ns.id.Inode]: // another one has taken the place
		ns.Close()
		return nil
	}
	ns.spec, ns.id.Name = spec, spec
	w.known[ns.id.Inode] = true
	w.found = append(w.found, ns)
	return nil
}
