package holders

import (
	"os"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// A task is a thread; the first one of a process stands for it.
type task struct {
	pid, tid int
	dir      string // in /proc
}

func newTask(pid, tid int) task {
	dir := "/proc/" + strconv.Itoa(pid)
	if tid != pid {
		dir += "/task/" + strconv.Itoa(tid)
	}
	return task{pid, tid, dir}
}

// first tells whether the task is its process's first.
func (t task) first() bool { return t.pid == t.tid }

// tasks lists all threads of all processes, by pid and tid.
func tasks() ([]task, error) {
	pids, err := numbers("/proc")
	if err != nil {
		return nil, err
	}
	var list []task
	for _, pid := range pids {
		tids, _ := numbers("/proc/" + strconv.Itoa(pid) + "/task")
		for _, tid := range tids {
			list = append(list, newTask(pid, tid))
		}
	}
	return list, nil
}

// numbers lists the entries of a folder that are numbers, in order.
func numbers(dir string) ([]int, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	var list []int
	for _, name := range names {
		if n, err := strconv.Atoi(name); err == nil {
			list = append(list, n)
		}
	}
	slices.Sort(list)
	return list, err
}

// What kcmp(2) compares.
const (
	kcmpFile  = 0
	kcmpFiles = 2
)

// kcmp returns 0 for the same, 1 and 2 for an order among different ones. An
// error where the kernel was built without it.
func kcmp(pid1, pid2, what, fd1, fd2 int) (int, error) {
	order, _, errno := unix.Syscall6(unix.SYS_KCMP, uintptr(pid1), uintptr(pid2), uintptr(what), uintptr(fd1), uintptr(fd2), 0)
	if errno != 0 {
		return 0, errno
	}
	return int(order), nil
}
