package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// PathErrno is [Errno] for what was tried with a path, such as a pin: then Explain can tell
// who may not do what to which folder.
func PathErrno(op, path string, err error) error {
	if err == nil {
		return nil
	}
	return Explain(&fs.PathError{Op: op, Path: path, Err: err})
}

// denied says which folder or file on a path in err refuses the caller by its mode and
// owner; empty if none does.
func denied(err error) string {
	var one *fs.PathError
	var two *os.LinkError
	paths, op := []string{}, ""
	switch {
	case errors.As(err, &one):
		paths, op = []string{one.Path}, one.Op
	case errors.As(err, &two):
		paths, op = []string{two.Old, two.New}, two.Op
	}
	for _, path := range paths {
		abs, err := filepath.Abs(path)
		if err != nil {
			continue
		}
		if why := onTheWay(filepath.Dir(abs), 0); why != "" {
			return why
		}
		if why := atTheEnd(op, abs); why != "" {
			return why
		}
	}
	return ""
}

// onTheWay looks for a folder that the caller may not search, from the root to the folder.
func onTheWay(folder string, links int) string {
	if folder != "/" {
		if why := onTheWay(filepath.Dir(folder), links); why != "" {
			return why
		}
	}
	// The kernel follows at most 40 links (MAXSYMLINKS, linux/namei.h).
	if to, err := os.Readlink(folder); err == nil && links < 40 {
		if !filepath.IsAbs(to) {
			to = filepath.Join(filepath.Dir(folder), to)
		}
		return onTheWay(filepath.Clean(to), links+1)
	}
	return byMode(folder, unix.X_OK, "look into the folder")
}

// atTheEnd looks at what the operation needs of the path itself.
func atTheEnd(op, path string) string {
	folder := filepath.Dir(path)
	switch op {
	case "pin", "mkdir", "symlink", "rename", "remove", "unlinkat", "rmdir":
		if why := byMode(folder, unix.W_OK, "change what is in the folder"); why != "" {
			return why
		}
		// may_delete_dentry, fs/namei.c.
		var at, in unix.Stat_t
		if user := fsuid(); unix.Stat(folder, &in) == nil && in.Mode&unix.S_ISVTX != 0 && int(in.Uid) != user &&
			unix.Lstat(path, &at) == nil && int(at.Uid) != user {
			return fmt.Sprintf("may not rename or remove %s in a folder with the sticky bit: %s", path, whose(at))
		}
		return ""
	}
	want, what := uint32(unix.R_OK), "read"
	if at, err := os.Stat(path); err == nil && !at.IsDir() && IsBPFFS(path) {
		want, what = unix.R_OK|unix.W_OK, "open the pin" // bpf_obj_do_get, kernel/bpf/inode.c
	}
	if why := byMode(path, want, what); why != "" || !strings.HasPrefix(op, "open the pin") {
		return why
	}
	// bpf_inode_type, kernel/bpf/inode.c.
	switch at, err := os.Stat(path); {
	case err == nil && at.IsDir():
		return path + " is a folder, not a pin"
	case err == nil && !IsBPFFS(path):
		return path + " is not in a bpffs, so it is not a pin"
	}
	return ""
}

// byMode says that the caller may not do what it wants with the path, if the mode and the
// owner are why.
func byMode(path string, want uint32, what string) string {
	var st unix.Stat_t
	if !errors.Is(unix.Faccessat(unix.AT_FDCWD, path, want, unix.AT_EACCESS), unix.EACCES) || unix.Stat(path, &st) != nil {
		return ""
	}
	// The caller's class alone counts (acl_permission_check, fs/namei.c).
	shift := 0
	if gids, _ := os.Getgroups(); int(st.Uid) == fsuid() {
		shift = 6
	} else if gid, _ := unix.SetfsgidRetGid(-1); slices.Contains(append(gids, gid), int(st.Gid)) {
		shift = 3
	}
	if st.Mode>>shift&want == want {
		return "" // the mode allows it, so something else does not
	}
	return fmt.Sprintf("may not %s %s: %s", what, path, whose(st))
}

// whose says whose a file is and who asks.
func whose(st unix.Stat_t) string {
	who := fmt.Sprintf("its mode is %04o and its owner user %d, group %d; this process is user %d", st.Mode&0o7777, st.Uid, st.Gid, fsuid())
	if InUserNS() {
		// privileged_wrt_inode_uidgid, kernel/capability.c.
		return who + " in a user namespace, whose capabilities do not count for the files of others; run it as root outside of it"
	}
	return who + " without CAP_DAC_OVERRIDE; run it as root"
}

// fsuid is the user whom the kernel's checks of files see: that of the thread.
func fsuid() int {
	uid, _ := unix.SetfsuidRetUid(-1)
	return uid
}

// InUserNS tells whether the calling thread is in a user namespace of its own.
func InUserNS() bool {
	ns := procfs.Namespace("/proc/thread-self", "user")
	return ns != 0 && ns != procfs.InitialUserNS
}
