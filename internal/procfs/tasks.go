package procfs

import (
	"os"
	"slices"
	"strconv"
)

// A Task is a thread of a process.
type Task struct{ PID, TID int }

// Dir is the task's folder in /proc.
func (t Task) Dir() string {
	dir := "/proc/" + strconv.Itoa(t.PID)
	if !t.First() {
		dir += "/task/" + strconv.Itoa(t.TID)
	}
	return dir
}

// First tells whether the task is the first of its process.
func (t Task) First() bool { return t.PID == t.TID }

// Tasks lists all tasks of all processes that /proc shows. Processes are in the
// order of their ids. The first task of a process comes first, and the others
// are in the order of theirs.
func Tasks() ([]Task, error) {
	pids, err := Numbers("/proc")
	if err != nil {
		return nil, err
	}
	var list []Task
	for _, pid := range pids {
		tids, err := Numbers("/proc/" + strconv.Itoa(pid) + "/task")
		if Exhausted(err) {
			return nil, err
		}
		list = append(list, tasksOf(pid, tids)...)
	}
	return list, nil
}

// tasksOf lists the tasks of one process. A thread may have a lower id than the
// first one: ids start again from the lowest when the highest is reached.
func tasksOf(pid int, tids []int) []Task {
	var list []Task
	for _, tid := range tids {
		if tid == pid {
			list = slices.Insert(list, 0, Task{pid, tid})
		} else {
			list = append(list, Task{pid, tid})
		}
	}
	return list
}

// Living lists of each process the first task that has not ended. A first task
// that has ended is a zombie, without files and namespaces, until the others end
// as well.
func Living(tasks []Task) []Task {
	var list []Task
	for i, t := range tasks {
		if i > 0 && tasks[i-1].PID == t.PID {
			continue
		}
		if i+1 < len(tasks) && tasks[i+1].PID == t.PID && Namespace(t.Dir(), "net") == 0 {
			t = tasks[i+1]
		}
		list = append(list, t)
	}
	return list
}

// Numbers lists the entries of a folder that are numbers, in their order.
func Numbers(dir string) ([]int, error) {
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
