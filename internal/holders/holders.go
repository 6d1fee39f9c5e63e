package holders

import (
	"fmt"
	"sync"
)

// A Kind of BPF object.
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

	// Counted are the references that the kernel counts, and Found those of
	// them that are listed here. Verified if that is all. Otherwise Missing says
	// why it is not known, or what may hold the rest.
	Counted  int // 0 if it is not known
	Found    int
	Verified bool
	Missing  string
	Suspects []Suspect // processes that may hold the rest
}

// A Process has the object open.
type Process struct {
	PID       int    // as the pid namespace of this process has it
	TID       int    // of a thread that has descriptors of its own (CLONE_FILES); 0 for the process
	Comm      string // of the process
	Exe       string
	FDs       []int
	PIDNS     uint64 // inode
	MountNS   uint64 // inode
	Cgroup    string // path below the mount of cgroup v2, else of systemd's hierarchy
	Unit      string // of systemd, if the cgroup's path has one
	Container string // its id or name, if the cgroup's path has one
}

// A Pin is a file of a bpffs, which has several names if it is linked hard. A
// file that was removed while somebody has it open by O_PATH has none.
type Pin struct {
	Path   string   // for this process to open, by /proc/PID/root if need be; "": see Mounts
	Names  []string // in the bpffs, from its root
	Mounts []Mount  // where one of the names can be seen, the best to use first
	FS     uint64   // device number of the bpffs
	Inode  uint64
}

// A Mount is where a bpffs can be seen, or a part of it.
type Mount struct {
	NS    uint64 // mount namespace; 0 if it is in none, as after umount --lazy
	Point string // in that namespace
	Path  string // for this process; "" if the namespace must be entered
	Enter string // the namespace, for nsenter --mount=; "" if nothing leads there

	root string // what of the bpffs is mounted
}

// An Object refers to another one.
type Object struct {
	Ref
	How        string // in words: "carries it", "slot", "uses it", ...
	References int    // how many it takes
}

// A Suspect may hold references that were not found.
type Suspect struct {
	PID  int
	Comm string
	Why  string
}

// Options change how a Finder looks. The zero value is for a command.
type Options struct {
	// NoIterators makes it look in /proc only. Then it is not known either
	// which programs are traced or extended by others.
	NoIterators bool
	// Self counts what this process has open as well, but for what the Finder
	// itself has.
	Self bool
}

// A Finder can look. It may be used by several goroutines.
type Finder struct {
	opts Options
	mu   sync.Mutex
	its  *iterators // nil: not to be used
	own  map[Ref]bool
}

// Open loads the iterators, which takes some 25 ms; where that fails the
// Finder does without. The caller closes it.
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
