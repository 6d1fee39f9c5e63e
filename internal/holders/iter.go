package holders

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// iterators are the programs of bpf/holders.c that this kernel accepts.
type iterators struct {
	colls  []*ebpf.Collection
	links  map[string]*link.Iter
	failed map[string]error
}

// iterated tells what a program iterates over, and the first Linux that can do it.
var iterated = map[string]struct{ over, since string }{
	"ld_files":    {"task_file", "5.8"},
	"ld_maps":     {"bpf_map", "5.8"},
	"ld_programs": {"bpf_prog", "5.9"},
	"ld_links":    {"bpf_link", "5.19"},
}

// loadAll loads all programs at once, because reading the kernel's BTF takes most of
// the time. If one is refused it tries each alone.
func loadAll() *iterators {
	its := &iterators{links: map[string]*link.Iter{}, failed: map[string]error{}}
	spec, err := loadIterators()
	if err == nil {
		err = its.load(spec)
	}
	if err == nil {
		return its
	}
	for name, what := range iterated {
		if spec == nil {
			its.failed[name] = err
			continue
		}
		one := spec.Copy()
		one.Programs = map[string]*ebpf.ProgramSpec{name: one.Programs[name]}
		if err := its.load(one); errors.Is(err, ebpf.ErrNotSupported) {
			its.failed[name] = fmt.Errorf("this kernel has no BPF iterator %s (Linux %s, with BTF)", what.over, what.since)
		} else if err != nil {
			its.failed[name] = fmt.Errorf("BPF iterator %s: %w", what.over, kernel.Explain(err))
		}
	}
	return its
}

func (its *iterators) load(spec *ebpf.CollectionSpec) error {
	coll, err := ebpf.NewCollectionWithOptions(spec, ebpf.CollectionOptions{
		Programs: ebpf.ProgramOptions{LogDisabled: true},
	})
	if err != nil {
		return err
	}
	links := map[string]*link.Iter{}
	for name, prog := range coll.Programs {
		if links[name], err = link.AttachIter(link.IterOptions{Program: prog}); err != nil {
			break
		}
	}
	if files := links["ld_files"]; err == nil && files != nil {
		err = learn(coll, files)
	}
	if err != nil {
		for _, l := range links {
			if l != nil {
				l.Close()
			}
		}
		coll.Close()
		return err
	}
	its.colls = append(its.colls, coll)
	maps.Copy(its.links, links)
	return nil
}

// learn shows ld_files a link, a program and a map, so that it can tell files of
// objects from others.
func learn(coll *ebpf.Collection, files *link.Iter) error {
	fds := [3]int32{
		int32(files.FD()),
		int32(coll.Programs["ld_files"].FD()),
		int32(coll.Maps[".bss"].FD()),
	}
	if err := coll.Variables["own_fds"].Set(fds); err != nil {
		return err
	}
	if _, err := run(files); err != nil {
		return err
	}
	var operations [3]uint64
	if err := coll.Variables["operations"].Get(&operations); err != nil {
		return err
	}
	for _, op := range operations {
		if op == 0 {
			return errors.New("it does not see this process's files")
		}
	}
	return nil
}

// run runs an iterator and returns its output.
func run(l *link.Iter) ([]byte, error) {
	r, err := l.Open()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	var out bytes.Buffer
	out.Grow(1 << 16)
	_, err = out.ReadFrom(r)
	return out.Bytes(), err
}

// read runs the program of that name and passes each record to fn: a T, and the
// pointers that follow it, of which more tells the number.
func read[T any](its *iterators, name string, more func(*T) uint32, fn func(*T, []uint64)) error {
	if err := its.failed[name]; err != nil {
		return err
	}
	out, err := run(its.links[name])
	if err != nil {
		return fmt.Errorf("BPF iterator %s: %w", iterated[name].over, kernel.Explain(err))
	}
	for size := int(unsafe.Sizeof(*new(T))); len(out) >= size; {
		head := (*T)(unsafe.Pointer(&out[0])) // aligned: all sizes are multiples of 8
		out = out[size:]
		n := min(int(more(head)), len(out)/8)
		var pointers []uint64
		if n > 0 {
			pointers = unsafe.Slice((*uint64)(unsafe.Pointer(&out[0])), n)
		}
		out = out[8*n:]
		fn(head, pointers)
	}
	return nil
}

// own returns the iterators' own objects.
func (its *iterators) own() map[hook.HolderRef]bool {
	own := map[hook.HolderRef]bool{}
	for _, l := range its.links {
		if info, err := l.Info(); err == nil {
			own[refTo(hook.HolderLink, uint32(info.ID))] = true
			own[refTo(hook.HolderProgram, uint32(info.Program))] = true
		}
	}
	for _, coll := range its.colls {
		for _, m := range coll.Maps {
			if id, err := kernel.MapID(m); err == nil {
				own[refTo(hook.HolderMap, id)] = true
			}
		}
	}
	return own
}

func (its *iterators) close() {
	for _, l := range its.links {
		l.Close()
	}
	for _, coll := range its.colls {
		coll.Close()
	}
}
