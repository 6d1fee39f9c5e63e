package holders

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A View is the result of one look. Only one goroutine at a time may use it.
type View struct {
	search
	kinds   map[hook.HolderKind]bool
	objects *objects
	before  *records
	after   *records
	why     error // why the iterator did not find the open files
	opened  []int // the links that were open when it did, so that it found them

	open map[hook.HolderRef][]descriptor
	mine map[hook.HolderRef][]descriptor // of this process; these do not count
	pins map[hook.HolderRef][]hook.HolderPin

	processes map[procfs.Task]hook.HolderProcess // those described so far
	hidden    []mount                            // mounts of a bpffs that other mounts cover
	suspects  []suspect                          // nil before they are needed
	actions   bool                               // those of tc were read, see addActions
}

// errNoIterators is the reason for the lack of counts with Options.NoIterators.
var errNoIterators = errors.New("only /proc was looked at, which has no counts of the kernel's")

// Look finds what holds the objects of the given kinds, or of all kinds if none is
// given. It leaves out what vanishes meanwhile and what this process may not read.
// An error means that there is no /proc, or that this process can open no more files.
func (f *Finder) Look(kinds ...hook.HolderKind) (*View, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(kinds) == 0 {
		kinds = []hook.HolderKind{hook.HolderLink, hook.HolderProgram, hook.HolderMap}
	}
	v := &View{
		kinds: map[hook.HolderKind]bool{},
		open:  map[hook.HolderRef][]descriptor{}, mine: map[hook.HolderRef][]descriptor{}, pins: map[hook.HolderRef][]hook.HolderPin{},
		processes: map[procfs.Task]hook.HolderProcess{},
	}
	for _, k := range kinds {
		v.kinds[k] = true
	}
	v.before = f.count(v.kinds)
	v.objects = lookAtObjects(&v.search, v.before, v.kinds)

	all, err := procfs.Tasks()
	if err != nil {
		return nil, fmt.Errorf("look for holders: %w", err)
	}
	spaces := findMountNSs(&v.search, all)
	defer spaces.close()
	mounted := newFilesystems(spaces)
	defer mounted.close()

	opened := f.files(v, all, mounted)
	for _, d := range opened.open {
		list := v.open
		if d.own && (!f.opts.Self || f.own[d.ref] || slices.Contains(v.opened, d.fd)) {
			list = v.mine
		}
		list[d.ref] = append(list[d.ref], d)
	}
	mounted.walkAll(append(opened.doors, mounted.directories(all)...))
	v.pins, v.hidden = mounted.pins()
	v.after = f.count(v.kinds)
	for _, r := range []*records{v.before, v.after} {
		for _, err := range r.failed {
			v.ok(err)
		}
	}
	v.ok(v.why)
	return v, v.err
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
	uncounted := v.kinds[hook.HolderLink] && v.before.failed[hook.HolderLink] != nil
	if uncounted {
		v.opened = openAll(v.objects.known)
		defer closeAll(v.opened)
	}
	found, err := iterateFiles(f.its)
	if v.why = err; err != nil {
		return procFiles(all, mounted)
	}
	if uncounted {
		for ref, n := range found.references {
			v.before.counts[ref] = count{references: n}
		}
	}
	return found
}

// Add adds references that Look does not find: those of something that is no BPF
// object, such as a tc filter. Then by has no Ref.
func (v *View) Add(to hook.HolderRef, by hook.HolderObject) {
	v.objects.refer(to, by.HolderRef, by.How, by.References)
}

// Of returns what holds one object. The object must be of a kind that Look was asked
// for. The error is fs.ErrNotExist if there is no such object.
func (v *View) Of(ref hook.HolderRef) (*hook.Holders, error) {
	if !v.kinds[ref.Kind] {
		return nil, hook.Because(hook.ErrUsage, "holders of %s: %ss were not looked for", ref, ref.Kind)
	}
	h := v.of(ref)
	if ref.Kind == hook.HolderProgram && !h.Verified && v.addActions() {
		h = v.of(ref)
	}
	if v.err != nil {
		return nil, v.err
	}
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
	byTask := map[procfs.Task]*hook.HolderProcess{}
	for _, d := range v.open[ref] {
		open[d.file] = true
		p := byTask[d.task]
		if p == nil {
			described := v.describe(d.task)
			p = &described
			byTask[d.task] = p
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
