package holders

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A View is the result of one look. Only one goroutine at a time may use it.
type View struct {
	kinds   map[hook.HolderKind]bool
	own     map[hook.HolderRef]bool // the Finder's objects
	objects *objects
	before  *records
	after   *records
	why     error // why the iterator did not find the open files

	open map[hook.HolderRef][]descriptor
	mine map[hook.HolderRef][]descriptor // of this process; these do not count
	pins map[hook.HolderRef][]hook.HolderPin

	processes map[[2]int]hook.HolderProcess // those described so far, by pid and tid
	hidden    []mount                       // mounts of a bpffs that other mounts cover
	suspects  []suspect                     // nil before they are needed
}

// errNoIterators is the reason for the lack of counts with Options.NoIterators.
var errNoIterators = errors.New("only /proc was looked at, which has no counts of the kernel's")

// Look finds what holds the objects of the given kinds, or of all kinds if none is
// given. It leaves out what vanishes meanwhile and what this process may not read.
// An error means that there is no /proc.
func (f *Finder) Look(kinds ...hook.HolderKind) (*View, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(kinds) == 0 {
		kinds = []hook.HolderKind{hook.HolderLink, hook.HolderProgram, hook.HolderMap}
	}
	v := &View{
		kinds: map[hook.HolderKind]bool{}, own: f.own,
		open: map[hook.HolderRef][]descriptor{}, mine: map[hook.HolderRef][]descriptor{}, pins: map[hook.HolderRef][]hook.HolderPin{},
		processes: map[[2]int]hook.HolderProcess{},
	}
	for _, k := range kinds {
		v.kinds[k] = true
	}
	v.before = f.count(v.kinds)
	v.objects = lookAtObjects(v.before, v.kinds)

	all, err := procfs.Tasks()
	if err != nil {
		return nil, fmt.Errorf("look for holders: %w", err)
	}
	spaces := findMountNSs(all)
	defer spaces.close()
	mounted := newFilesystems(spaces)
	defer mounted.close()

	opened := f.files(v, all, mounted)
	for _, d := range opened.open {
		v.open[d.ref] = append(v.open[d.ref], d)
	}
	for _, d := range opened.own {
		list := v.mine
		if f.opts.Self && !f.own[d.ref] {
			list = v.open
		}
		list[d.ref] = append(list[d.ref], d)
	}
	mounted.walkAll(append(opened.doors, mounted.directories(all)...))
	v.pins, v.hidden = mounted.pins()
	v.after = f.count(v.kinds)
	return v, nil
}

// count reads what the kernel counts.
func (f *Finder) count(kinds map[hook.HolderKind]bool) *records {
	if f.its != nil {
		return f.its.iterate(kinds)
	}
	return &records{failed: map[hook.HolderKind]error{hook.HolderLink: errNoIterators, hook.HolderProgram: errNoIterators, hook.HolderMap: errNoIterators}}
}

// files finds open files by the iterator, or else through /proc. Then v.why says why.
func (f *Finder) files(v *View, all []procfs.Task, mounted *filesystems) *files {
	v.why = errNoIterators
	if f.its == nil {
		return procFiles(all, mounted)
	}
	var own []int
	uncounted := v.kinds[hook.HolderLink] && v.before.failed[hook.HolderLink] != nil
	if uncounted {
		own = openAll(v.objects.known)
		defer closeAll(own)
	}
	found, err := iterateFiles(f.its)
	if v.why = err; err != nil {
		return procFiles(all, mounted)
	}
	if uncounted {
		for ref, n := range found.references {
			v.before.counts[ref] = count{references: n}
		}
		found.own = slices.DeleteFunc(found.own, func(d descriptor) bool {
			if slices.Contains(own, d.fd) {
				v.mine[d.ref] = append(v.mine[d.ref], d)
				return true
			}
			return false
		})
	}
	return found
}

// Add adds references that Look does not find: those of something that is no BPF
// object, such as a tc filter. Then by has no Ref.
func (v *View) Add(to hook.HolderRef, by hook.HolderObject) {
	v.objects.refer(to, by.HolderRef, by.How, by.References)
}

// All returns the holders of every object of the kinds that Look was asked for, in
// the order of kind and id. It leaves out the Finder's own objects.
func (v *View) All() []*hook.Holders {
	refs := map[hook.HolderRef]bool{}
	maps.Copy(refs, v.objects.known)
	for ref := range v.open { // objects may not be listed
		refs[ref] = true
	}
	for ref := range v.pins {
		refs[ref] = true
	}
	maps.DeleteFunc(refs, func(ref hook.HolderRef, _ bool) bool { return !v.kinds[ref.Kind] || v.own[ref] })
	order := slices.SortedFunc(maps.Keys(refs), func(a, b hook.HolderRef) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID))
	})
	all := make([]*hook.Holders, len(order))
	for i, ref := range order {
		all[i] = v.of(ref)
	}
	return all
}

// Of returns what holds one object. The object must be of a kind that Look was asked
// for. The error is fs.ErrNotExist if there is no such object.
func (v *View) Of(ref hook.HolderRef) (*hook.Holders, error) {
	if !v.kinds[ref.Kind] {
		return nil, hook.Because(hook.ErrUsage, "holders of %s: %ss were not looked for", ref, ref.Kind)
	}
	h := v.of(ref)
	if !v.objects.known[ref] && v.objects.unlisted[ref.Kind] == nil && h.Found == 0 {
		return nil, hook.Because(fs.ErrNotExist, "there is no %s", ref)
	}
	return h, nil
}

func (v *View) of(ref hook.HolderRef) *hook.Holders {
	h := &hook.Holders{HolderRef: ref, Pins: v.pins[ref], Objects: slices.Clone(v.objects.refers[ref])}
	slices.SortFunc(h.Objects, func(a, b hook.HolderObject) int {
		return cmp.Or(cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.ID, b.ID), cmp.Compare(a.How, b.How))
	})
	open := map[uint64]bool{}
	byTask := map[[2]int]*hook.HolderProcess{}
	for _, d := range v.open[ref] {
		open[d.file] = true
		key := [2]int{d.pid, d.tid}
		p := byTask[key]
		if p == nil {
			described := v.describe(d.pid, d.tid)
			p = &described
			byTask[key] = p
		}
		p.FDs = append(p.FDs, d.fd)
	}
	for _, p := range byTask {
		slices.Sort(p.FDs)
		h.Processes = append(h.Processes, *p)
	}
	slices.SortFunc(h.Processes, func(a, b hook.HolderProcess) int {
		return cmp.Or(cmp.Compare(a.PID, b.PID), cmp.Compare(a.TID, b.TID))
	})
	h.Files = len(open)
	v.account(h, open)
	return h
}

func (v *View) describe(pid, tid int) hook.HolderProcess {
	key := [2]int{pid, tid}
	p, known := v.processes[key]
	if !known {
		p = describe(pid, tid)
		v.processes[key] = p
	}
	return p
}
