package kernel

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// OpenFolder makes the folder unless it exists, and opens it. Its error is that of
// [Guarded] for a folder that others can change. The caller closes the result.
func OpenFolder(path string) (*os.File, error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, Errno("make the folder "+path, err)
	}
	if err := Guarded(path); err != nil {
		return nil, err
	}
	// In a guarded folder's place nobody else can put another one.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	return f, Errno("open "+path, err)
}

// Guarded checks that nobody but root and the calling user can rename, remove or replace
// what is in a folder: pins that another user moves away are lost, and pins that he makes
// are not what their names say. The error is fs.ErrPermission for such a folder, and
// fs.ErrNotExist if there is none.
//
// In a folder with the sticky bit, such as a bpffs that was mounted without a mode,
// others can add names but not change those of the calling user (may_delete_dentry,
// fs/namei.c). So the bit is enough on the way to the folder, but not in the folder.
func Guarded(path string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	if err := ours(path, false); err != nil {
		return err
	}
	for path != "/" {
		path = filepath.Dir(path)
		if err := ours(path, true); err != nil {
			return err
		}
	}
	return nil
}

// ours checks one folder, or with way also a symbolic link to a guarded folder.
func ours(path string, way bool) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return PathErrno("stat", path, err)
	}
	mode, owned := st.Mode&0o7777, st.Uid == 0 || int(st.Uid) == os.Geteuid()
	switch kind := st.Mode & unix.S_IFMT; {
	case !owned:
		return hook.Because(fs.ErrPermission, "%s belongs to user %d, who can change what is in it", path, st.Uid).
			Hint("look at what is in it; then \"%s\" removes it, or \"%s\" makes it yours", Shell("rm", "-r", path), Shell("chown", "root:root", path))
	case way && kind == unix.S_IFLNK:
		to, err := filepath.EvalSymlinks(path)
		if err != nil {
			return Errno(path, err)
		}
		return Guarded(to)
	case kind != unix.S_IFDIR:
		return hook.Because(fs.ErrPermission, "%s is not a folder", path).Hint("\"%s\" removes it", Shell("rm", path))
	case mode&0o022 != 0 && (!way || mode&unix.S_ISVTX == 0):
		return hook.Because(fs.ErrPermission, "other users may change what is in %s: its mode is %04o", path, mode).
			Hint("look at what is in it; then \"%s\"", Shell("chmod", "go-w", path))
	}
	return nil
}
