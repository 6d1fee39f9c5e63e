package holders

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A suspect is a process that has open files without descriptors.
type suspect struct {
	hook.HolderSuspect
	kind hook.HolderKind // of the files; "" if it is not known
}

// suspectsOf returns the processes that may hold objects of a kind by files without
// descriptors. It looks for them once, when they are first needed.
func (v *View) suspectsOf(kind hook.HolderKind) []hook.HolderSuspect {
	if v.suspects == nil {
		v.suspects = []suspect{}
		pids, err := procfs.Numbers("/proc")
		v.ok(err)
		for _, pid := range pids {
			v.suspects = append(v.suspects, v.suspectsIn(pid)...)
		}
	}
	var list []hook.HolderSuspect
	for _, s := range v.suspects {
		if s.kind == kind || s.kind == "" {
			list = append(list, s.HolderSuspect)
		}
	}
	return list
}

// suspectsIn reads what /proc says about the sockets, rings and memory of a process.
func (v *View) suspectsIn(pid int) []suspect {
	dir := "/proc/" + strconv.Itoa(pid)
	fds, err := procfs.Numbers(dir + "/fd")
	if !v.ok(err) || len(fds) == 0 {
		return nil
	}
	var list []suspect
	add := func(kind hook.HolderKind, format string, args ...any) {
		list = append(list, suspect{hook.HolderSuspect{PID: pid, Comm: v.comm(pid), Why: fmt.Sprintf(format, args...)}, kind})
	}
	for _, fd := range fds {
		name := strconv.Itoa(fd)
		target, err := os.Readlink(dir + "/fd/" + name)
		if err != nil {
			continue
		}
		switch {
		case strings.HasPrefix(target, "socket:["):
			_, queued, ok := strings.Cut(v.read(dir+"/fdinfo/"+name), "\nscm_fds:")
			n, _ := strconv.Atoi(strings.TrimSpace(queued))
			if ok && n > 0 {
				add("", "descriptors in the queue of its socket %d: %d", fd, n)
			}
		case target == "anon_inode:[io_uring]":
			registered := map[hook.HolderKind]int{}
			for line := range strings.Lines(v.read(dir + "/fdinfo/" + name)) {
				// "0: anon_inode:bpf-map"; before Linux 6.5 "0: bpf-map"
				name := strings.TrimSpace(line[strings.LastIndexByte(line, ':')+1:])
				if kind, ok := anonymous[name]; ok {
					registered[kind]++
				}
			}
			for kind, n := range registered {
				add(kind, "registered in its io_uring %d: %d", fd, n)
			}
		}
	}
	// A map may stay in memory after its descriptor was closed.
	if strings.Contains(v.read(dir+"/maps"), "anon_inode:bpf-map") {
		add(hook.HolderMap, "maps in its memory")
	}
	return list
}
