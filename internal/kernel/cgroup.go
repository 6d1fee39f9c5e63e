package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// CgroupRoot returns where cgroup v2 is mounted. It prefers a mount of the whole
// tree to a mount of a part. The error is fs.ErrNotExist if cgroup v2 is not mounted.
func CgroupRoot() (string, error) {
	list, err := procfs.Mounts("/proc/thread-self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("cgroups: %w", err)
	}
	part := ""
	for _, m := range list {
		// Another file system may be mounted over it.
		if m.Type != "cgroup2" || !isCgroup(m.Point) {
			continue
		}
		if m.Root == "/" {
			return m.Point, nil
		}
		if part == "" {
			part = m.Point
		}
	}
	if part == "" {
		return "", hook.Because(fs.ErrNotExist, "cgroup v2 is not mounted; mount it with \"mount -t cgroup2 cgroup2 FOLDER\"")
	}
	return part, nil
}

func isCgroup(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

// A Cgroup is an open cgroup. It can be removed although it is open.
type Cgroup struct {
	Path string // absolute
	ID   uint64 // inode of the folder, which is the kernel's cgroup id; never used again
	dir  *os.File
}

// OpenCgroup opens a cgroup by its path, which is a path as for any command, or else a
// path below the mount of cgroup v2, with or without a leading slash. The root is "/".
// What begins with "." or ".." is only looked for in the working folder. The caller
// closes the cgroup.
//
// The error is fs.ErrNotExist if there is no such cgroup, and hook.ErrUsage if the
// path leads to something else than a cgroup of version 2.
func OpenCgroup(path string) (*Cgroup, error) {
	if path == "" {
		return nil, hook.Because(hook.ErrUsage, "the cgroup's path is empty; \"/\" is the root cgroup")
	}
	// A path that is a cgroup is meant as it is; "/", for one, is none.
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", path, err)
	}
	c, asIs := openCgroup(abs)
	first, _, _ := strings.Cut(path, "/")
	switch {
	case asIs == nil:
		return c, nil
	case first == "." || first == "..":
		return nil, asIs
	}
	root, err := CgroupRoot()
	if err == nil {
		// The slash keeps ".." from leading out of the mount.
		c, err := openCgroup(filepath.Join(root, filepath.Join("/", path)))
		if !errors.Is(err, fs.ErrNotExist) {
			return c, err
		}
	}
	switch {
	case !errors.Is(asIs, fs.ErrNotExist):
		return nil, asIs
	case err != nil:
		return nil, err
	}
	return nil, hook.Because(fs.ErrNotExist, "there is no cgroup %q (cgroup v2 is mounted at %s)", path, root)
}

// openCgroup opens the cgroup that is the folder at path.
func openCgroup(path string) (*Cgroup, error) {
	dir, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if errors.Is(err, unix.ENOTDIR) {
		return nil, hook.Because(hook.ErrUsage, "%s is not a cgroup but a file; name the cgroup's folder", path)
	}
	if err != nil {
		return nil, fmt.Errorf("cgroup: %w", Explain(err))
	}
	c, err := newCgroup(dir)
	if err != nil {
		dir.Close()
		return nil, err
	}
	return c, nil
}

// newCgroup makes a Cgroup of an open folder, if the folder is a cgroup.
func newCgroup(dir *os.File) (*Cgroup, error) {
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &sfs); err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", dir.Name(), err)
	}
	switch sfs.Type {
	case unix.CGROUP2_SUPER_MAGIC:
	case unix.CGROUP_SUPER_MAGIC:
		return nil, hook.Because(hook.ErrUsage, "%s is a cgroup of version 1, which has no BPF hooks; name one of version 2", dir.Name())
	default:
		return nil, hook.Because(hook.ErrUsage, "%s is not a cgroup; name one by its path below the mount of cgroup v2", dir.Name())
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
		return nil, fmt.Errorf("cgroup %s: %w", dir.Name(), err)
	}
	// The path may lead through a symbolic link. The kernel knows the true path,
	// unless that leads through another mount namespace.
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil || !hasInode(path, st.Ino) {
		path = filepath.Clean(dir.Name())
	}
	if !hasInode(path, st.Ino) {
		return nil, hook.Because(fs.ErrNotExist, "the cgroup %s has been removed", dir.Name())
	}
	return &Cgroup{Path: path, ID: st.Ino, dir: dir}, nil
}

func hasInode(path string, ino uint64) bool {
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Ino == ino
}

// FD is the descriptor of the cgroup's folder. It is valid as long as c is open.
func (c *Cgroup) FD() int { return int(c.dir.Fd()) }

// Close releases the cgroup.
func (c *Cgroup) Close() error { return c.dir.Close() }

// Ancestors opens the cgroup itself and the cgroups that it is in, from the inside
// out, up to the one that is mounted: cgroups above a mount of a part of the tree
// cannot be seen. The caller closes them.
func (c *Cgroup) Ancestors() ([]*Cgroup, error) {
	self, err := openCgroup(c.Path)
	if err != nil {
		return nil, err
	}
	chain := []*Cgroup{self}
	if self.ID != c.ID {
		CloseCgroups(chain)
		return nil, hook.Because(fs.ErrNotExist, "the cgroup %s has been removed", c.Path)
	}
	for path := c.Path; path != "/"; {
		if path = filepath.Dir(path); !isCgroup(path) {
			break
		}
		above, err := openCgroup(path)
		if err != nil {
			CloseCgroups(chain)
			return nil, err
		}
		chain = append(chain, above)
	}
	return chain, nil
}

// CloseCgroups closes them all.
func CloseCgroups(list []*Cgroup) {
	for _, c := range list {
		c.Close()
	}
}

// A CgroupPath is where a cgroup is.
type CgroupPath struct {
	Path string // absolute
	ID   uint64 // as of [Cgroup]
}

// CgroupPaths returns the root cgroup and all cgroups below it, as far as they are
// mounted. A cgroup comes before the cgroups in it; those are in the order of their
// names. Cgroups that vanish meanwhile are left out. The error is fs.ErrNotExist if
// cgroup v2 is not mounted.
func CgroupPaths() ([]CgroupPath, error) {
	root, err := CgroupRoot()
	if err != nil {
		return nil, err
	}
	var list []CgroupPath
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if path == root || procfs.Exhausted(err) {
				return fmt.Errorf("cgroups: %w", Explain(err))
			}
			return nil // gone, or not readable
		}
		if !d.IsDir() {
			return nil
		}
		var st unix.Stat_t
		if unix.Stat(path, &st) != nil {
			return fs.SkipDir
		}
		list = append(list, CgroupPath{path, st.Ino})
		return nil
	})
	if err != nil {
		return nil, err
	}
	return list, nil
}

// OpenCgroupID opens the cgroup with that id. It looks at the path where the cgroup
// was last, and then everywhere, because the cgroup may have another name by now.
func OpenCgroupID(id uint64, path string) (*Cgroup, error) {
	if c, err := OpenCgroup(path); err == nil {
		if c.ID == id {
			return c, nil
		}
		c.Close()
	}
	all, err := CgroupPaths()
	if err != nil {
		return nil, err
	}
	for _, c := range all {
		if c.ID == id {
			return OpenCgroup(c.Path)
		}
	}
	return nil, hook.Because(fs.ErrNotExist, "there is no cgroup with id %d below the mount of cgroup v2", id)
}
