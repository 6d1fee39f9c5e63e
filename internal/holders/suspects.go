package holders

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A suspect is a process that has open files without descriptors.
type suspect struct {
	Suspect
	kind Kind // of the files; "" if it is not known
}

// suspectsOf returns the processes that may hold objects of a kind by files without
// descriptors. It looks for them once, when they are first needed.
func (v *View) suspectsOf(kind Kind) []Suspect {
	if v.suspects == nil {
		v.suspects = []suspect{}
		pids, _ := procfs.Numbers("/proc")
		for _, pid := range pids {
			v.suspects = append(v.suspects, suspectsIn(pid)...)
		}
	}
	var list []Suspect
	for _, s := range v.suspects {
		if s.kind == kind || s.kind == "" {
			list = append(list, s.Suspect)
		}
	}
	return list
}

// suspectsIn reads what /proc says about the sockets, rings and memory of a process.
func suspectsIn(pid int) []suspect {
	dir := "/proc/" + strconv.Itoa(pid)
	fds, err := procfs.Numbers(dir + "/fd")
	if err != nil || len(fds) == 0 {
		return nil
	}
	var list []suspect
	add := func(kind Kind, format string, args ...any) {
		list = append(list, suspect{Suspect{pid, comm(pid), fmt.Sprintf(format, args...)}, kind})
	}
	for _, fd := range fds {
		name := strconv.Itoa(fd)
		target, err := os.Readlink(dir + "/fd/" + name)
		if err != nil {
			continue
		}
		switch {
		case strings.HasPrefix(target, "socket:["):
			info, _ := os.ReadFile(dir + "/fdinfo/" + name)
			_, queued, ok := strings.Cut(string(info), "\nscm_fds:")
			n, _ := strconv.Atoi(strings.TrimSpace(queued))
			if ok && n > 0 {
				add("", "descriptors in the queue of its socket %d: %d", fd, n)
			}
		case target == "anon_inode:[io_uring]":
			info, _ := os.ReadFile(dir + "/fdinfo/" + name)
			registered := map[Kind]int{}
			for line := range strings.Lines(string(info)) {
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
	if memory, _ := os.ReadFile(dir + "/maps"); strings.Contains(string(memory), "anon_inode:bpf-map") {
		add(Map, "maps in its memory")
	}
	return list
}
