package procfs

import (
	"os"
	"strconv"
	"strings"
)

// The inodes of the namespaces that the kernel begins with (linux/proc_ns.h).
const (
	InitialPIDNS  = 0xEFFFFFFC
	InitialUserNS = 0xEFFFFFFD
)

// Namespace returns the inode of a task's namespace of a kind: "mnt", "net",
// "pid". The task is named by its folder in /proc. 0 if it cannot be read.
func Namespace(task, kind string) uint64 {
	target, _ := os.Readlink(task + "/ns/" + kind)
	return NamespaceInode(target, kind)
}

// NamespaceInode returns N of "net:[N]", which is what links and mounts call a
// namespace. 0 if s is no namespace of that kind.
func NamespaceInode(s, kind string) uint64 {
	s, ok := strings.CutPrefix(s, kind+":[")
	if !ok {
		return 0
	}
	ino, _ := strconv.ParseUint(strings.TrimSuffix(s, "]"), 10, 64)
	return ino
}
