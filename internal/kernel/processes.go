package kernel

import (
	"fmt"
	"os"
	"slices"
	"strconv"
)

// A task is a process in /proc.
type task struct {
	dir     string   // of the process, or of a thread that is left when the first one has ended
	threads []string // folders of the other threads
}

// processes lists the processes, lowest id first.
func processes() ([]task, error) {
	pids, err := numbers("/proc")
	if err != nil {
		return nil, err
	}
	var tasks []task
	for _, pid := range pids {
		t := task{dir: "/proc/" + strconv.Itoa(pid)}
		tids, err := numbers(t.dir + "/task")
		if err != nil {
			continue
		}
		for _, tid := range tids {
			if tid != pid {
				t.threads = append(t.threads, fmt.Sprintf("%s/task/%d", t.dir, tid))
			}
		}
		// A first thread that has ended is a zombie, without files and
		// namespaces, until the others end as well.
		if len(t.threads) > 0 {
			if _, err := os.Readlink(t.dir + "/ns/net"); err != nil {
				t.dir = t.threads[0]
			}
		}
		tasks = append(tasks, t)
	}
	return tasks, nil
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
