package holders

import (
	"fmt"
	"sync"
)

// A Kind is a type of BPF object.
type Kind string

// The kinds.
const (
	Link    Kind = "link"
	Program Kind = "program"
	Map     Kind = "map"
)

// A Ref names an object.
type Ref struct {
	Kind Kind
	ID   uint32
}

func (r Ref) String() string { return fmt.Sprintf("%s %d", r.Kind, r.ID) }

// Holders is what keeps an object alive.
type Holders struct {
	Ref
	Processes []Process // by pid and tid
	Pins      []Pin
	Objects   []Object
	Files     int // open files that the descriptors of all processes lead to

	// Counted is the number of references that the kernel counts. Found is how many
	// of them are listed here. Verified is true if that is all of them. Otherwise
	// Missing says what may hold the rest, or why this is not known.
	Counted  int // 0 if not known
	Found    int
	Verified bool
	Missing  string
	Suspects []Suspect // processes that may hold the rest
}

// A Process has the object open.
type Process struct {
	PID       int    // in the pid namespace of the calling process
	TID       int    // a thread with a table of descriptors of its own; 0 for the process
	Comm      string // of the process
	Exe       string
	FDs       []int
	PIDNS     uint64 // inode
	MountNS   uint64 // inode
	Cgroup    string // path below the mount of cgroup v2, or else in systemd's hierarchy
	Unit      string // of systemd, if the cgroup's path has one
	Container string // id or name, if the cgroup's path has one
}

// A Pin is a file of a bpffs. With hard links it has several names. A file that was
// removed while a process has it open (O_PATH) has no name.
type Pin struct {
	Path   string   // for the calling process, if need be through /proc/PID/root; "": see Mounts
	Names  []string // paths from the root of the bpffs
	Mounts []Mount  // mounts that show one of the names; the most useful first
	FS     uint64   // device number of the bpffs
	Inode  uint64
}

// A Mount is a mount of a bpffs or of a part of it.
type Mount struct {
	NS    uint64 // mount namespace; 0 if in none, for example after umount --lazy
	Point string // path in that namespace
	Path  string // path for the calling process; "" if it must enter the namespace
	Enter string // the namespace's file, for nsenter --mount=; "" if no path leads there

	root string // the folder of the bpffs that is mounted
}

// An Object is a BPF object that refers to another one.
type Object struct {
	Ref
	How        string // in words: "carries it", "slot", "uses it", ...
	References int    // how many references it takes
}

// A Suspect may hold references that were not found.
type Suspect struct {
	PID  int
	Comm string
	Why  string
}

// Options change what a Finder looks at. The zero value is right for a command.
type Options struct {
	// NoIterators restricts the Finder to /proc. Then it does not find out either
	// which programs trace or extend others.
	NoIterators bool
	// Self includes what the calling process has open, except what the Finder has
	// open.
	Self bool
}

// A Finder looks for holders. Several goroutines may use it.
type Finder struct {
	opts Options
	mu   sync.Mutex
	its  *iterators // nil with Options.NoIterators
	own  map[Ref]bool
}

// Open loads the iterators, which takes about 25 ms. The Finder works without those
// that fail to load. The caller closes it.
func Open(o Options) *Finder {
	f := &Finder{opts: o}
	if !o.NoIterators {
		f.its = loadAll()
		f.own = f.its.own()
	}
	return f
}

// Close releases the iterators.
func (f *Finder) Close() {
	if f.its != nil {
		f.its.close()
	}
}
