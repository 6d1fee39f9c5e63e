package holders

import (
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// describe describes a process, once. What cannot be read stays empty.
func (v *View) describe(t procfs.Task) hook.HolderProcess {
	p, known := v.processes[t]
	if known {
		return p
	}
	p = hook.HolderProcess{PID: t.PID, Comm: v.comm(t.PID)}
	if !t.First() {
		p.TID = t.TID
	}
	at := t.Dir() // each thread has namespaces and a cgroup of its own
	p.PIDNS = procfs.Namespace(at, "pid")
	p.MountNS = procfs.Namespace(at, "mnt")
	p.Exe = executable(at, p.MountNS)
	p.Cgroup = procfs.ParseCgroup(v.read(at + "/cgroup"))
	p.Unit, p.Container = owner(p.Cgroup)
	v.processes[t] = p
	return p
}

// executable returns the path of a task's executable for this process. In another mount
// namespace the kernel tells the path there (d_path, fs/d_path.c), where another file or
// none may be here.
func executable(at string, mountNS uint64) string {
	exe, _ := os.Readlink(at + "/exe")
	if mountNS == procfs.Namespace("/proc/thread-self", "mnt") || same(exe, at+"/exe") {
		return exe
	}
	if there := at + "/root" + exe; same(there, at+"/exe") {
		return there
	}
	return exe // it was removed, or only its own namespace has it
}

// same tells whether two paths lead to one file.
func same(a, b string) bool {
	var x, y unix.Stat_t
	return unix.Stat(a, &x) == nil && unix.Stat(b, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
}

func (v *View) comm(pid int) string {
	return strings.TrimSuffix(v.read("/proc/"+strconv.Itoa(pid)+"/comm"), "\n")
}

var (
	// A container's cgroup has the container's id as its name, of 64 digits. If
	// systemd made the cgroup the runtime comes before the id: docker-<id>.scope,
	// cri-containerd-<id>.scope, crio-<id>.scope, libpod-<id>.scope.
	containerID = regexp.MustCompile(`^(?:[a-z-]+-)?([0-9a-f]{64})(?:\.scope)?$`)
	// lxc.payload.<name>, machine-<name>.scope
	containerName = regexp.MustCompile(`^(?:lxc\.payload\.(.+)|machine-(.+)\.scope)$`)
)

// owner finds the innermost systemd unit and the innermost container in a cgroup's
// path.
func owner(cgroup string) (unit, container string) {
	for dir := cgroup; len(dir) > 1 && (unit == "" || container == ""); dir = path.Dir(dir) {
		name := path.Base(dir)
		if container == "" {
			if m := containerID.FindStringSubmatch(name); m != nil {
				container = m[1]
			} else if m := containerName.FindStringSubmatch(name); m != nil {
				container = m[1] + m[2]
			}
		}
		if unit == "" {
			switch path.Ext(name) {
			case ".service", ".scope", ".socket", ".mount", ".swap":
				unit = name
			}
		}
	}
	return unit, container
}
