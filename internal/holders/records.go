package holders

import (
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
)

// A count is what the kernel counts for an object.
type count struct {
	references int // without the iterator's own
	users      int // of a map: open files, pins, and some links
}

// records is what the iterators tell about all objects.
type records struct {
	links    []linkRecord
	programs []programRecord
	used     [][]uint64 // the addresses of each program's maps
	maps     []mapRecord
	slots    [][]uint64 // the addresses of the programs in each map
	counts   map[hook.HolderRef]count
	failed   map[hook.HolderKind]error // why there are no records of a kind
}

// linkRecord is struct link_record, bpf/holders.c.
type linkRecord struct {
	ID, Type, Program, Attached uint32
	Target, References          uint64
}

// programRecord is struct program_record.
type programRecord struct {
	ID, Maps                   uint32
	Object, Target, References uint64
}

// mapRecord is struct map_record.
type mapRecord struct {
	ID, Type, Entries, Slots  uint32
	Object, References, Users uint64
}

// iterate runs the iterators that are needed for some kinds. Programs and maps need
// all of them, because objects of all kinds may refer to them.
func (its *iterators) iterate(kinds map[hook.HolderKind]bool) *records {
	r := &records{counts: map[hook.HolderRef]count{}, failed: map[hook.HolderKind]error{}}
	r.failed[hook.HolderLink] = read(its, "ld_links", func(*linkRecord) uint32 { return 0 }, func(l *linkRecord, _ []uint64) {
		if l.ID != 0 { // else the link is being made or freed
			r.links = append(r.links, *l)
			r.counts[refTo(hook.HolderLink, l.ID)] = count{references: int(l.References) - 1}
		}
	})
	if !kinds[hook.HolderProgram] && !kinds[hook.HolderMap] {
		return r
	}
	r.failed[hook.HolderProgram] = read(its, "ld_programs", func(p *programRecord) uint32 { return p.Maps }, func(p *programRecord, used []uint64) {
		r.programs = append(r.programs, *p)
		r.used = append(r.used, slices.Clone(used))
		r.counts[refTo(hook.HolderProgram, p.ID)] = count{references: int(p.References) - 1}
	})
	r.failed[hook.HolderMap] = read(its, "ld_maps", func(m *mapRecord) uint32 { return m.Slots }, func(m *mapRecord, slots []uint64) {
		r.maps = append(r.maps, *m)
		r.slots = append(r.slots, slices.Clone(slots))
		r.counts[refTo(hook.HolderMap, m.ID)] = count{int(m.References) - 1, int(m.Users)}
	})
	return r
}
