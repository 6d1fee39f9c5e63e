package kernel

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// InPrivateMounts tells whether the process runs in a mount namespace that one of its
// ancestors does not share. "ip netns exec", with its own /sys, and services with private
// mounts are like that. A bpffs that is mounted there ends with the namespace, and the
// members with it.
func InPrivateMounts() bool {
	own := procfs.Namespace("/proc/self", "mnt")
	if own == 0 {
		return false
	}
	for pid := os.Getppid(); pid > 0; pid = parent(pid) {
		// It cannot be read for some processes, such as init in a sandbox.
		ns := procfs.Namespace(fmt.Sprintf("/proc/%d", pid), "mnt")
		if ns != 0 && ns != own {
			return true
		}
	}
	return false
}

// parent returns the parent of a process, or 0 when it is not known.
func parent(pid int) (ppid int) {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	// pid (name) state parent ...: the name may contain any characters.
	var state string
	_, _ = fmt.Sscan(string(stat[bytes.LastIndexByte(stat, ')')+1:]), &state, &ppid)
	return ppid
}

// NetNSName returns the name that "ip netns" gave to the network namespace of the process;
// empty if it has none.
func NetNSName() string {
	own := procfs.Namespace("/proc/self", "net")
	for range 3 { // a folder that others change meanwhile may be read with gaps
		names, _ := os.ReadDir(NetNSDir)
		for _, name := range names {
			var st unix.Stat_t
			if unix.Stat(filepath.Join(NetNSDir, name.Name()), &st) == nil && st.Ino == own {
				return name.Name()
			}
		}
	}
	return ""
}

// MountHint says how to get the bpffs that is missing at path.
func MountHint(path string) string {
	if !InPrivateMounts() {
		return fmt.Sprintf("mount one with \"%s\"", MountCommand(path))
	}
	return "one that is mounted here goes with this mount namespace: " + OutsideHint()
}

// OutsideHint says how to do the same outside of a private mount namespace.
func OutsideHint() string {
	if name := NetNSName(); name != "" {
		return "work from outside of it, in the network namespace " + Shell(name)
	}
	return "work from outside of it"
}
