package kernel

import (
	"errors"
	"io/fs"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// DefaultBPFFS is the folder where a bpffs is mounted by convention.
const DefaultBPFFS = "/sys/fs/bpf"

// FindBPFFS checks that path is in a bpffs. The error is fs.ErrNotExist if it certainly is
// not.
func FindBPFFS(path string) error {
	var st unix.Statfs_t
	switch err := unix.Statfs(path, &st); {
	case err == nil && st.Type == unix.BPF_FS_MAGIC:
		return nil
	case err == nil:
		return hook.Because(fs.ErrNotExist, "no bpffs at %s", path)
	case errors.Is(err, unix.ENOENT):
		return hook.Because(fs.ErrNotExist, "no bpffs at %s: there is no such folder", path)
	default:
		return PathErrno("stat", path, err)
	}
}

// IsBPFFS tells whether path is seen to be in a bpffs.
func IsBPFFS(path string) bool { return FindBPFFS(path) == nil }

// ReadOnly tells whether the file system at path is mounted read-only.
func ReadOnly(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Flags&unix.ST_RDONLY != 0
}

// MountBPFFS mounts a bpffs at path, which must be a folder, unless a bpffs is
// mounted there already. It returns true if it mounted one.
func MountBPFFS(path string) (bool, error) {
	if err := FindBPFFS(path); err == nil || !errors.Is(err, fs.ErrNotExist) {
		return false, err
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return false, hook.Because(fs.ErrNotExist, "there is no folder %s", path)
	}
	if err := unix.Mount("bpffs", path, "bpf", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700"); err != nil {
		return false, Errno("mount", err)
	}
	return true, nil
}

// A Life is what can be told of how long a bpffs lasts. Its pins last as long as it is
// mounted somewhere, and a mount goes with its mount namespace.
type Life int

const (
	// Lasting is a bpffs that others than this process's container or service have mounted.
	Lasting Life = iota
	// Unknown is the life of a bpffs in a container that may have mounted it itself.
	Unknown
	// Private is a bpffs that process 1 of the machine has not mounted.
	Private
)

// LifeOf tells how long the bpffs at path lasts.
//
// All users may read the mounts of all processes they see (mounts_open_common,
// fs/proc_namespace.c), but only a process in the machine's first pid namespace sees the
// machine's process 1. In another pid namespace no file of /proc has the mounts outside;
// what tells something is a mount that receives from outside.
func LifeOf(path string) Life {
	var st unix.Stat_t
	if unix.Stat(path, &st) != nil {
		return Unknown
	}
	machine := ""
	if procfs.Namespace("/proc/self", "pid") == procfs.InitialPIDNS || procfs.Namespace("/proc/1", "pid") == procfs.InitialPIDNS {
		machine = "/proc/1/mountinfo"
	}
	return lifeOf(st.Dev, "/proc/thread-self/mountinfo", machine)
}

// lifeOf is LifeOf for a file system, by the caller's mounts and those of the machine's
// process 1, if it can be seen.
func lifeOf(dev uint64, own, machine string) Life {
	if machine != "" {
		mounts, err := procfs.Mounts(machine)
		switch {
		case err != nil:
			return Unknown
		case slices.ContainsFunc(mounts, func(m procfs.Mount) bool { return m.Dev == dev }):
			return Lasting
		}
		return Private
	}
	mounts, _ := procfs.Mounts(own)
	for _, m := range mounts {
		inside := func(other procfs.Mount) bool { return other.Peers == m.Master }
		if m.Dev == dev && m.Master != "" && !slices.ContainsFunc(mounts, inside) {
			return Lasting
		}
	}
	return Unknown
}

// String says what a bpffs is or may be, after words for it; empty for a lasting one.
func (l Life) String() string {
	switch l {
	case Private:
		return "is not mounted for the machine's process 1: its pins go when the last mount namespace with it ends, as a container's does"
	case Unknown:
		return "may be mounted in this container only, which cannot be seen from here: its pins then go with the container"
	}
	return ""
}

// LastingHint says how pins outlive a container.
const LastingHint = "pins outlive a container in the machine's own bpffs: let the container have it, as with \"docker run -v /sys/fs/bpf:/sys/fs/bpf\""
