package holders

import (
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A descriptor leads to a BPF object.
type descriptor struct {
	ref      Ref
	pid, tid int // tid: see Process
	fd       int
	file     uint64 // the open file: the same number is the same file
}

// A door is the path of a descriptor, a working directory or a root that may
// lead to a bpffs or to a namespace.
type door string

// files are what processes have open.
type files struct {
	open  []descriptor
	own   []descriptor // of this process
	doors []door

	references map[Ref]int // of links, as the kernel counts; only by the iterator
}

// fileRecord is struct file_record, bpf/holders.c.
type fileRecord struct {
	Kind, ID, PID, TID, FD, Own uint32
	File, Table, References     uint64
}

// kinds are those of enum kind, bpf/holders.c. What follows are doors.
var kinds = [...]Kind{Link, Program, Map}

// iterateFiles finds open files by an iterator, which passes over threads that
// share the table of their process.
func iterateFiles(its *iterators) (*files, error) {
	found := &files{references: map[Ref]int{}}
	type table struct {
		pid   uint32
		table uint64
	}
	first := map[table]uint32{} // thread that was met with it
	none := func(*fileRecord) uint32 { return 0 }
	err := read(its, "ld_files", none, func(r *fileRecord, _ []uint64) {
		if r.PID == 0 {
			return // outside of the pid namespace
		}
		key := table{r.PID, r.Table}
		tid, known := first[key]
		if !known {
			tid = r.TID
			first[key] = tid
		}
		if tid != r.TID {
			return
		}
		if int(r.Kind) >= len(kinds) {
			if r.Own == 0 {
				dir := procfs.Task{PID: int(r.PID), TID: int(tid)}.Dir()
				found.doors = append(found.doors, door(dir+"/fd/"+strconv.Itoa(int(r.FD))))
			}
			return
		}
		if tid == r.PID {
			tid = 0
		}
		if r.References != 0 {
			found.references[Ref{Link, r.ID}] = int(r.References)
		}
		d := descriptor{Ref{kinds[r.Kind], r.ID}, int(r.PID), int(tid), int(r.FD), r.File}
		if r.Own != 0 {
			found.own = append(found.own, d)
		} else {
			found.open = append(found.open, d)
		}
	})
	return found, err
}

// procFiles finds open files by /proc. What cannot be read is left out: it is
// another user's, or gone.
func procFiles(all []procfs.Task, fs *filesystems) *files {
	found := &files{}
	self := os.Getpid()
	var tables []procfs.Task // threads of the current process, each with another table
	for _, t := range all {
		if t.First() {
			tables = tables[:0]
		}
		if sharesTable(t, tables) {
			continue
		}
		tables = append(tables, t)
		found.read(t, fs, t.PID == self)
	}
	found.identify()
	return found
}

// sharesTable tells whether a thread has the table of one of the others. Where
// kcmp does not tell it is taken to have that of the first.
func sharesTable(t procfs.Task, tables []procfs.Task) bool {
	for _, other := range tables {
		if order, err := kcmp(other.TID, t.TID, kcmpFiles, 0, 0); err != nil || order == 0 {
			return true
		}
	}
	return false
}

// read adds the descriptors of one table.
func (f *files) read(t procfs.Task, fs *filesystems, own bool) {
	dir := t.Dir()
	fds, err := os.Open(dir + "/fd")
	if err != nil {
		return
	}
	defer fds.Close()
	names, _ := fds.Readdirnames(-1)
	buf := make([]byte, 64)
	for _, name := range names {
		n, err := unix.Readlinkat(int(fds.Fd()), name, buf)
		if err != nil {
			continue
		}
		target := string(buf[:n]) // cut, but its beginning says enough
		switch {
		case strings.HasPrefix(target, "anon_inode:bpf"):
			ref, ok := fdinfo(dir + "/fdinfo/" + name)
			fd, _ := strconv.Atoi(name)
			d := descriptor{ref: ref, pid: t.PID, fd: fd}
			if !t.First() {
				d.tid = t.TID
			}
			if ok && own {
				f.own = append(f.own, d)
			} else if ok {
				f.open = append(f.open, d)
			}
		case own:
		case strings.HasPrefix(target, "mnt:["), strings.HasPrefix(target, "/") && fs.leads(int(fds.Fd()), name):
			f.doors = append(f.doors, door(dir+"/fd/"+name))
		}
	}
}

// fdinfo reads which BPF object a descriptor is, if it is one.
func fdinfo(path string) (Ref, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Ref{}, false
	}
	// A link says of its program as well; its own id comes first.
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(line, ":")
		kind := map[string]Kind{"link_id": Link, "prog_id": Program, "map_id": Map}[key]
		if kind == "" {
			continue
		}
		id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
		return Ref{kind, uint32(id)}, err == nil
	}
	return Ref{}, false
}

// identify tells the open files apart. Where the kernel does not say each
// descriptor is taken for a file of its own.
func (f *files) identify() {
	var distinct uint64
	known := map[Ref][]*descriptor{} // one for each open file
	for _, list := range [][]descriptor{f.open, f.own} {
	next:
		for i := range list {
			d := &list[i]
			for _, other := range known[d.ref] {
				if order, err := kcmp(other.task(), d.task(), kcmpFile, other.fd, d.fd); err == nil && order == 0 {
					d.file = other.file
					continue next
				}
			}
			distinct++
			d.file = distinct
			known[d.ref] = append(known[d.ref], d)
		}
	}
}

// task is the id of a thread that has the descriptor.
func (d *descriptor) task() int {
	if d.tid != 0 {
		return d.tid
	}
	return d.pid
}
