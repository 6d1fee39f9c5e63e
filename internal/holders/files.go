package holders

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A descriptor is an open descriptor of a BPF object.
type descriptor struct {
	ref  hook.HolderRef
	task procfs.Task
	fd   int
	file uint64 // identifies the open file
	own  bool   // of this process
}

// A door is a path in /proc that may lead to a bpffs or to a namespace: a
// descriptor, a working directory or a root.
type door string

// files is what processes have open.
type files struct {
	open  []descriptor
	doors []door

	references map[hook.HolderRef]int // of links, as the kernel counts them; only from the iterator
}

// fileRecord is struct file_record, bpf/holders.c.
type fileRecord struct {
	Kind, ID, PID, TID, FD, Own uint32
	File, Table, References     uint64
}

// kinds are the first values of enum kind, bpf/holders.c. The others are doors.
var kinds = [...]hook.HolderKind{hook.HolderLink, hook.HolderProgram, hook.HolderMap}

// iterateFiles finds open files by an iterator. The iterator skips threads that
// share the table of their process.
func iterateFiles(its *iterators) (*files, error) {
	found := &files{references: map[hook.HolderRef]int{}}
	type table struct {
		pid   uint32
		table uint64
	}
	first := map[table]uint32{} // the first thread with the table
	none := func(*fileRecord) uint32 { return 0 }
	err := read(its, "ld_files", none, func(r *fileRecord, _ []uint64) {
		if r.PID == 0 {
			return // outside this pid namespace
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
		task := procfs.Task{PID: int(r.PID), TID: int(tid)}
		if int(r.Kind) >= len(kinds) {
			if r.Own == 0 {
				found.doors = append(found.doors, door(fmt.Sprintf("%s/fd/%d", task.Dir(), r.FD)))
			}
			return
		}
		if r.References != 0 {
			found.references[refTo(hook.HolderLink, r.ID)] = int(r.References)
		}
		found.open = append(found.open, descriptor{refTo(kinds[r.Kind], r.ID), task, int(r.FD), r.File, r.Own != 0})
	})
	return found, err
}

// procFiles finds open files through /proc. It leaves out what it cannot read: the
// process is another user's, or gone.
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

// sharesTable tells whether a thread shares the table of one of the others. Without
// an answer of kcmp all threads of a process count as sharing one table.
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
	if !fs.ok(err) {
		return
	}
	defer fds.Close()
	names, err := fds.Readdirnames(-1)
	fs.ok(err)
	buf := make([]byte, 64)
	for _, name := range names {
		n, err := unix.Readlinkat(int(fds.Fd()), name, buf)
		if err != nil {
			continue
		}
		target := string(buf[:n]) // perhaps cut, but the beginning is enough
		switch {
		case strings.HasPrefix(target, "anon_inode:bpf"):
			fd, _ := strconv.Atoi(name)
			if ref, ok := fdinfo(fs.search.read(dir + "/fdinfo/" + name)); ok {
				f.open = append(f.open, descriptor{ref: ref, task: t, fd: fd, own: own})
			}
		case own:
		case strings.HasPrefix(target, "mnt:["), strings.HasPrefix(target, "/") && fs.leads(int(fds.Fd()), name):
			f.doors = append(f.doors, door(dir+"/fd/"+name))
		}
	}
}

// fdinfo finds in the fdinfo of a descriptor which BPF object it leads to; false if
// none.
func fdinfo(text string) (hook.HolderRef, bool) {
	// The file of a link also has the id of its program, after its own.
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		kind := map[string]hook.HolderKind{"link_id": hook.HolderLink, "prog_id": hook.HolderProgram, "map_id": hook.HolderMap}[key]
		if kind == "" {
			continue
		}
		id, err := strconv.ParseUint(strings.TrimSpace(value), 10, 32)
		return refTo(kind, uint32(id)), err == nil
	}
	return hook.HolderRef{}, false
}

// identify finds out which descriptors share an open file. Where the kernel does not
// tell, each descriptor counts as a file of its own.
func (f *files) identify() {
	var distinct uint64
	known := map[hook.HolderRef][]*descriptor{} // one descriptor for each open file
next:
	for i := range f.open {
		d := &f.open[i]
		for _, other := range known[d.ref] {
			if order, err := kcmp(other.task.TID, d.task.TID, kcmpFile, other.fd, d.fd); err == nil && order == 0 {
				d.file = other.file
				continue next
			}
		}
		distinct++
		d.file = distinct
		known[d.ref] = append(known[d.ref], d)
	}
}
