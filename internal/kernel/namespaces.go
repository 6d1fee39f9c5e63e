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

// NetNamespaces returns every network namespace that can be found, each once,
// opened; the caller closes them. The caller's own comes first, and the order
// of the others means nothing.
//
// It looks at the names of "ip netns", at all processes and their threads, at
// the mounts in every mount namespace that one of them lives in, and at what
// processes have open. Where several lead to a namespace the first of these is
// its Name: one for [OpenNetNS], empty for the caller's own. A namespace that
// cannot be entered is returned as well; its Cookie is 0.
//
// Not found is a namespace that is kept only by a socket, by a netfilter link,
// by a descriptor that is on its way through a unix socket or in a thread's own
// table, or by the mount namespace of a thread. Nor is one whose processes
// /proc does not show to the caller: those outside of its pid namespace, and
// without privileges those of others.
//
// What vanishes meanwhile, and processes that cannot be looked at, are left
// out. An error means that no list could be made.
func NetNamespaces() ([]*NetNS, error) {
	w := &walk{known: map[uint64]bool{}, mounts: map[string]bool{}}
	if err := w.all(); err != nil {
		for _, ns := range w.found {
			ns.Close()
		}
		return nil, err
	}
	for _, ns := range w.found[1:] {
		_ = ns.identify() // refused: Do will be as well, and says why
	}
	return w.found, nil
}

// FindNetNS returns the first network namespace for which fn returns true,
// opened; the caller closes it. fs.ErrNotExist when there is none. What it
// finds is what [NetNamespaces] does.
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
		return nil, hook.Because(fs.ErrNotExist, "it is in no network namespace that can be found")
	}
	return found, nil
}

// A walk is on the way through the places where namespaces can be found.
type walk struct {
	found  []*NetNS
	nsfs   uint64          // the file system that namespaces are files of
	known  map[uint64]bool // inodes of it that need not be opened
	view   string          // of the caller, see mountView
	mounts map[string]bool // views whose mounts have been looked at
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

// netnsSpec is what opens the file of that name in netnsDir: the name itself,
// unless OpenNetNS would take it for a process id.
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

// mountTable looks at the mounts that a task sees, unless it has looked at those
// of another task with the same mount namespace and root.
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

// mountView tells processes apart that see other mounts.
func mountView(dir string) (string, error) {
	ns, err := os.Readlink(dir + "/ns/mnt")
	if err != nil {
		return "", err
	}
	root, err := os.Readlink(dir + "/root")
	return ns + root, err
}

// descriptors looks at what a task has open.
func (w *walk) descriptors(dir string) error {
	fds, err := os.Open(dir + "/fd")
	if err != nil {
		return nil
	}
	defer fds.Close()
	names, _ := fds.Readdirnames(-1)
	var st unix.Statx_t
	for _, name := range names {
		// What the link says is no help: of a namespace that is or was mounted it
		// is a path. No file is to be waited for, as on a server that is gone.
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

// open adds the namespace at path. An error is one that will not go away with
// the next path.
func (w *walk) open(path, spec string) error {
	ns, err := openNetNS(path)
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENFILE):
		return fmt.Errorf("network namespaces: %w", err)
	case err != nil:
		return nil
	case w.known[ns.id.Inode]: // another one has taken the place
		ns.Close()
		return nil
	}
	ns.spec, ns.id.Name = spec, spec
	w.known[ns.id.Inode] = true
	w.found = append(w.found, ns)
	return nil
}
