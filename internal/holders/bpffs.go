package holders

import (
	"cmp"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// filesystems are all bpffs that were found, and the types of all other file
// systems.
type filesystems struct {
	*search
	spaces  *mountNSs
	visited int               // how many of spaces were visited
	types   map[uint64]string // of file systems, by device number
	bpf     map[uint64]*bpffs
}

// A bpffs is one instance of the file system, however often it is mounted.
type bpffs struct {
	dev    uint64
	mounts []mount
	roots  map[string]int      // descriptors of the folders that are mounted, by path
	walked map[uint64]bool     // folders that were read, by inode
	files  map[uint64]*pinFile // by inode
	hidden *mount              // a mount that another one covers
}

// A mount is a mount of a bpffs or of a part of it.
type mount struct {
	hook.HolderMount
	root string // the folder of the bpffs that is mounted
}

// A pinFile is a pin: an inode that holds an object.
type pinFile struct {
	ref   hook.HolderRef
	inode uint64
	names []string
	door  door // what leads to it if it has no name
}

// newFilesystems reads the mounts in all namespaces.
func newFilesystems(spaces *mountNSs) *filesystems {
	fs := &filesystems{search: spaces.search, spaces: spaces, types: map[uint64]string{}, bpf: map[uint64]*bpffs{}}
	fs.visit()
	return fs
}

// visit reads the mounts in the namespaces that were not visited yet.
func (fs *filesystems) visit() {
	for ; fs.visited < len(fs.spaces.list); fs.visited++ { // the list grows meanwhile
		fs.readMounts(fs.spaces.list[fs.visited])
	}
}

// readMounts adds the mounts of a namespace, and the namespaces that are mounted in
// it.
func (fs *filesystems) readMounts(ns *mountNS) {
	var doors []string
	fs.visitMounts(ns, func(prefix string, m procfs.Mount) {
		fs.types[m.Dev] = m.Type
		switch m.Type {
		case "bpf":
			fs.add(m, ns, prefix)
		case "nsfs":
			if procfs.NamespaceInode(m.Root, "mnt") != 0 {
				doors = append(doors, m.Point)
			}
		}
	})
	for i := range fs.bpf {
		fs.bpf[i].reach(ns)
	}
	for _, point := range doors {
		for _, task := range ns.tasks {
			if fs.spaces.add(rootOf(task)+point, "") != nil {
				break
			}
		}
	}
}

// rootOf is the prefix that leads this process to the root of a task.
func rootOf(task string) string {
	if task == self {
		return ""
	}
	return task + "/root"
}

// add notes a mount, and opens the folder that is mounted unless it is open.
func (fs *filesystems) add(m procfs.Mount, ns *mountNS, prefix string) {
	b := fs.instance(m.Dev)
	mount := mount{hook.HolderMount{NS: ns.inode, Point: m.Point}, m.Root}
	fd, ok := fs.open(unix.AT_FDCWD, prefix+m.Point, unix.O_PATH|unix.O_NOFOLLOW)
	if dev, _ := identity(fd); !ok || dev != m.Dev {
		unix.Close(fd)
		b.hidden = &mount
		return
	}
	b.mounts = append(b.mounts, mount)
	if _, known := b.roots[m.Root]; known {
		unix.Close(fd)
		return
	}
	b.roots[m.Root] = fd
}

func (fs *filesystems) instance(dev uint64) *bpffs {
	b := fs.bpf[dev]
	if b == nil {
		b = &bpffs{dev: dev, roots: map[string]int{}, walked: map[uint64]bool{}, files: map[uint64]*pinFile{}}
		fs.bpf[dev] = b
	}
	return b
}

// reach finds the paths by which this process can reach the mounts of a namespace.
func (b *bpffs) reach(ns *mountNS) {
	for i := range b.mounts {
		m := &b.mounts[i]
		if m.NS != ns.inode || m.Path != "" {
			continue
		}
		_, ino := identity(b.roots[m.root])
		for _, task := range ns.tasks {
			var st unix.Stat_t
			if path := rootOf(task) + m.Point; unix.Lstat(path, &st) == nil && st.Dev == b.dev && st.Ino == ino {
				m.Path = path
				break
			}
		}
	}
}

// identity returns the device and inode of an open file; 0 if that fails.
func identity(fd int) (dev, ino uint64) {
	var st unix.Stat_t
	if unix.Fstat(fd, &st) != nil {
		return 0, 0
	}
	return st.Dev, st.Ino
}

// leads tells whether a magic link of /proc may lead to a bpffs or to a namespace.
// It waits for no file: a file's server may be gone.
func (fs *filesystems) leads(dir int, name string) bool {
	var st unix.Statx_t
	if unix.Statx(dir, name, unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st) != nil {
		return false
	}
	dev := unix.Mkdev(st.Dev_major, st.Dev_minor)
	kind, known := fs.types[dev]
	if dev == fs.spaces.nsfs {
		kind = "nsfs"
	} else if !known {
		// The file system is mounted nowhere. Only a file that looks as in a bpffs is
		// asked for its type, because a server may have to answer.
		if st.Dev_major != 0 || st.Size != 0 || st.Blocks != 0 {
			return false
		}
		kind = "?"
		fd, ok := fs.open(dir, name, unix.O_PATH)
		if !ok {
			return false
		}
		defer unix.Close(fd)
		var sfs unix.Statfs_t
		if unix.Fstatfs(fd, &sfs) == nil && sfs.Type == unix.BPF_FS_MAGIC {
			kind = "bpf"
		}
		fs.types[dev] = kind
	}
	return kind == "bpf" || kind == "nsfs"
}

// sortMounts puts the most useful mounts first: those in the own namespace, then
// those that this process can reach, then those of larger parts.
func (b *bpffs) sortMounts(own uint64) {
	rank := func(m mount) int {
		switch {
		case m.NS == own && m.Path != "":
			return 0
		case m.Path != "":
			return 1
		}
		return 2
	}
	slices.SortStableFunc(b.mounts, func(x, y mount) int {
		return cmp.Or(cmp.Compare(rank(x), rank(y)), cmp.Compare(len(x.root), len(y.root)))
	})
}

// pin returns what is known about a pin.
func (b *bpffs) pin(p *pinFile) hook.HolderPin {
	slices.Sort(p.names)
	pin := hook.HolderPin{Names: p.names, FS: b.dev, Inode: p.inode}
	if p.door != "" {
		pin.Path = string(p.door)
		pin.Mounts = []hook.HolderMount{{Path: pin.Path}}
	}
	for _, m := range b.mounts {
		for _, name := range p.names {
			rest, ok := below(name, m.root)
			if !ok {
				continue
			}
			pin.Mounts = append(pin.Mounts, m.HolderMount)
			if pin.Path == "" && m.Path != "" {
				pin.Path = path.Join(m.Path, rest)
				// path.Join would drop the "cwd/.." of a working directory.
				if strings.Contains(m.Path, "..") {
					pin.Path = m.Path + rest
				}
			}
			break
		}
	}
	return pin
}

// pins returns all pins, and the bpffs that other mounts cover.
func (fs *filesystems) pins() (map[hook.HolderRef][]hook.HolderPin, []mount) {
	pins := map[hook.HolderRef][]hook.HolderPin{}
	var hidden []mount
	own := fs.spaces.list[0].inode
	for _, b := range fs.bpf {
		b.sortMounts(own)
		for i := range b.mounts {
			if ns := fs.spaces.known[b.mounts[i].NS]; ns != nil {
				b.mounts[i].Enter = ns.enter
			}
		}
		for _, p := range b.files {
			pins[p.ref] = append(pins[p.ref], b.pin(p))
		}
		if b.hidden != nil && len(b.walked) == 0 {
			hidden = append(hidden, *b.hidden)
		}
	}
	for _, list := range pins {
		slices.SortFunc(list, func(x, y hook.HolderPin) int {
			return cmp.Or(cmp.Compare(x.FS, y.FS), slices.Compare(x.Names, y.Names), cmp.Compare(x.Inode, y.Inode))
		})
	}
	return pins, hidden
}

// below returns the rest of name below root; false if name is not below root.
func below(name, root string) (string, bool) {
	if root == "/" {
		return name, true
	}
	rest, ok := strings.CutPrefix(name, root)
	return rest, ok && (rest == "" || rest[0] == '/')
}

// directories are the working directories and roots of tasks, as far as they may lead
// to a bpffs.
func (fs *filesystems) directories(all []procfs.Task) []door {
	var list []door
	for _, t := range all {
		for _, name := range []string{"/cwd", "/root"} {
			if path := t.Dir() + name; fs.leads(unix.AT_FDCWD, path) {
				list = append(list, door(path))
			}
		}
	}
	return list
}

func (fs *filesystems) close() {
	for _, b := range fs.bpf {
		for _, fd := range b.roots {
			unix.Close(fd)
		}
	}
}
