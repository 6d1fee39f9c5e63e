package procfs

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// A Lock is who has the lock of a file (flock), and who waits for it, by process id.
type Lock struct {
	Holder  int // 0 when nobody has it, or a process outside of this pid namespace
	Waiting []int
}

// LockOf returns the lock of the file at path. Before Linux 5.13 /proc/locks shows only the
// first of those who wait.
func LockOf(path string) (Lock, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return Lock{}, err
	}
	text, err := os.ReadFile("/proc/locks")
	return parseLocks(string(text), fmt.Sprintf("%02x:%02x:%d", unix.Major(st.Dev), unix.Minor(st.Dev), st.Ino)), err
}

// parseLocks reads the lock of a file, see lock_get_status, fs/locks.c:
//
//	1: FLOCK  ADVISORY  WRITE 812 00:2a:77 0 EOF
//	1: -> FLOCK  ADVISORY  WRITE 813 00:2a:77 0 EOF
func parseLocks(text, file string) (l Lock) {
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		waits := slices.Contains(words, "->") // after blanks, in the order of the queue
		words = slices.DeleteFunc(words, func(w string) bool { return w == "->" })
		if len(words) < 6 || words[1] != "FLOCK" || words[5] != file {
			continue
		}
		pid, err := strconv.Atoi(words[4])
		switch {
		case err != nil || pid <= 0:
		case waits:
			l.Waiting = append(l.Waiting, pid)
		default:
			l.Holder = pid
		}
	}
	return l
}

// Command returns the name of a process, empty if it is gone.
func Command(pid int) string {
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSuffix(string(comm), "\n")
}
