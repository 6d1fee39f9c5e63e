package kernel

import (
	"errors"
	"io/fs"
	"os"

	"github.com/libdispatcher/dispatcher/hook"
	"golang.org/x/sys/unix"
)

// DefaultBPFFS is the folder where a bpffs is mounted by convention.
const DefaultBPFFS = "/sys/fs/bpf"

// IsBPFFS tells whether path is in a bpffs.
func IsBPFFS(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.BPF_FS_MAGIC
}

// MountBPFFS mounts a bpffs at path, which must be a folder, unless a bpffs is
// mounted there already. It returns true if it mounted one.
func MountBPFFS(path string) (bool, error) {
	if IsBPFFS(path) {
		return false, nil
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return false, hook.Because(fs.ErrNotExist, "there is no folder %s", path)
	}
	if err := unix.Mount("bpffs", path, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return false, Errno("mount", err)
	}
	return true, nil
}
