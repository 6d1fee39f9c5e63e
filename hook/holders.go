package hook

import (
	"fmt"
	"strings"
)

// A HolderKind is a kind of BPF object that is kept alive by what refers to it.
type HolderKind string

const (
	HolderLink    HolderKind = "link"
	HolderProgram HolderKind = "program"
	HolderMap     HolderKind = "map"
)

// A HolderRef names a link, a program or a map by its id.
type HolderRef struct {
	Kind HolderKind `json:"object,omitempty"`
	ID   uint32     `json:"id,omitempty"`
}

// String returns the reference in words: "link 12".
func (r HolderRef) String() string { return fmt.Sprintf("%s %d", r.Kind, r.ID) }

// A Held is something that keeps an entry, or a hook, as it is, and its holders.
type Held struct {
	// What it is: "link" attaches the entry, or carries an XDP chain; "slot" owns a
	// member of an XDP chain; "program" runs without a link.
	What string
	// Member is the name of the entry; empty for the link of a chain.
	Member string
	Kind   Kind
	Holders
}

// Holders is what keeps an object alive: processes that have it open, pins, and
// objects in the kernel that refer to it.
type Holders struct {
	// HolderRef is the object.
	HolderRef
	Processes []HolderProcess // by pid and tid
	Pins      []HolderPin
	Objects   []HolderObject
	Files     int // open files that the descriptors of all processes lead to

	// Counted is the number of references that the kernel counts, 0 if it is not
	// known. Found is how many of them are listed here. Verified is true if that is
	// all of them. Otherwise Missing says what may hold the rest, or why this is not
	// known, and Suspects are processes that may hold it.
	Counted  int
	Found    int
	Verified bool
	Missing  string
	Suspects []HolderSuspect
}

// A HolderProcess has the object open.
type HolderProcess struct {
	PID       int    `json:"pid"`            // in the pid namespace of the calling process
	TID       int    `json:"tid,omitempty"`  // a thread with a table of descriptors of its own; 0 for the process
	Comm      string `json:"comm,omitempty"` // of the process
	Exe       string `json:"exe,omitempty"`  // for the calling process, if need be through /proc/PID/root
	FDs       []int  `json:"fd,omitempty"`
	PIDNS     uint64 `json:"pid_ns,omitempty"`    // inode
	MountNS   uint64 `json:"mount_ns,omitempty"`  // inode
	Cgroup    string `json:"cgroup,omitempty"`    // path below the mount of cgroup v2, or else in systemd's hierarchy
	Unit      string `json:"unit,omitempty"`      // of systemd, if the cgroup's path has one
	Container string `json:"container,omitempty"` // id or name, if the cgroup's path has one
}

// A HolderPin is a file of a bpffs. With hard links it has several names. A file that
// was removed while a process has it open (O_PATH) has no name.
type HolderPin struct {
	Path   string        `json:"path,omitempty"`  // for the calling process, if need be through /proc/PID/root; "": see Mounts
	Names  []string      `json:"names,omitempty"` // paths from the root of the bpffs
	Mounts []HolderMount `json:"-"`               // mounts that show one of the names; the most useful first
	FS     uint64        `json:"-"`               // device number of the bpffs
	Inode  uint64        `json:"-"`
}

// String says where the pin is, and how to reach one that no path leads to.
func (p HolderPin) String() string {
	name := strings.Join(p.Names, " = ")
	switch {
	case p.Path != "":
		return p.Path
	case len(p.Mounts) == 0:
		return name + " in a bpffs that is mounted nowhere"
	case p.Mounts[0].Enter != "":
		return fmt.Sprintf("%s at %s in the mount namespace %s", name, p.Mounts[0].Point, p.Mounts[0].Enter)
	}
	return fmt.Sprintf("%s at %s in the mount namespace %d", name, p.Mounts[0].Point, p.Mounts[0].NS)
}

// A HolderMount is a mount of a bpffs or of a part of it.
type HolderMount struct {
	NS    uint64 // mount namespace; 0 if in none, for example after umount --lazy
	Point string // path in that namespace
	Path  string // path for the calling process; "" if it must enter the namespace
	Enter string // the namespace's file, for nsenter --mount=; "" if no path leads there
}

// A HolderObject is an object in the kernel that refers to another one.
type HolderObject struct {
	HolderRef         // zero for what is no BPF object
	How        string `json:"how,omitempty"`        // in words: "carries it", "slot", "uses it", ...
	References int    `json:"references,omitempty"` // how many references it takes
}

// A HolderSuspect is a process that may hold references that were not found.
type HolderSuspect struct {
	PID  int    `json:"pid"`
	Comm string `json:"comm"`
	Why  string `json:"why"` // in words
}
