package kernel

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A noMemory is an ENOMEM that was explained.
type noMemory struct {
	error
	limit string
}

func (e *noMemory) Error() string { return e.error.Error() + ": " + e.limit }
func (e *noMemory) Unwrap() error { return e.error }

// explainMemory adds to ENOMEM which limit of its cgroup this process has come to. From Linux 5.11 on,
// BPF memory is charged to the cgroup of the process that asks for it.
func explainMemory(err error) error {
	var explained *noMemory
	if errors.As(err, &explained) {
		return err
	}
	own, readErr := os.ReadFile("/proc/thread-self/cgroup")
	root, rootErr := CgroupRoot()
	if readErr != nil || rootErr != nil {
		return err
	}
	limit := memoryLimit(procfs.ParseCgroup(string(own)), func(cgroup, file string) string {
		text, _ := os.ReadFile(path.Join(root, cgroup, file))
		return strings.TrimSpace(string(text))
	})
	if limit == "" {
		return err
	}
	return &noMemory{err, limit}
}

// memoryLimit says which cgroup, of this one and those around it, has come to its limit; the kernel counts
// that at the one whose limit it is and at those around it (mem_over_limit, mm/memcontrol.c). It is empty
// if none has.
func memoryLimit(cgroup string, read func(cgroup, file string) string) string {
	for ; len(cgroup) > 1; cgroup = path.Dir(cgroup) {
		most, err := strconv.ParseUint(read(cgroup, "memory.max"), 10, 64)
		if err != nil { // "max": it has none
			continue
		}
		for line := range strings.Lines(read(cgroup, "memory.events")) {
			if name, times, _ := strings.Cut(strings.TrimSpace(line), " "); name == "max" && times != "0" {
				return fmt.Sprintf("out of memory: cgroup %s, in which this process is, uses %s of %d bytes and has come to that limit %s times; raise its memory.max",
					cgroup, read(cgroup, "memory.current"), most, times)
			}
		}
	}
	return ""
}
