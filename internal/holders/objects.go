package holders

import "github.com/libdispatcher/dispatcher/hook"

// objects are all objects of some kinds, and how they refer to each other.
type objects struct {
	*search
	known    map[hook.HolderRef]bool
	refers   map[hook.HolderRef][]hook.HolderObject // what refers to the key
	unlisted map[hook.HolderKind]error              // why a kind could not be listed

	dispatched map[uint32]bool // programs, see carry
}

// refer notes that from refers to an object n times. References of the same sort are
// one Object.
func (o *objects) refer(to, from hook.HolderRef, how string, n int) {
	list := o.refers[to]
	for i := range list {
		if list[i].HolderRef == from && list[i].How == how {
			list[i].References += n
			return
		}
	}
	o.refers[to] = append(list, hook.HolderObject{HolderRef: from, How: how, References: n})
}

// The types of links and maps that take special references (linux/bpf.h).
const (
	linkIter      = 4
	linkXDP       = 6
	linkPerfEvent = 7
	linkStructOps = 9
	linkSockMap   = 14

	mapProgArray   = 3
	mapArrayOfMaps = 12
	mapHashOfMaps  = 13
	mapDevMap      = 14
	mapCPUMap      = 16
	mapXSK         = 17
	mapDevMapHash  = 25
	mapStructOps   = 26
)

// lookAtObjects uses the records, and asks the kernel for what they lack. What refers
// to programs and maps is only known from all kinds.
func lookAtObjects(s *search, r *records, kinds map[hook.HolderKind]bool) *objects {
	o := &objects{
		search: s, known: map[hook.HolderRef]bool{}, refers: map[hook.HolderRef][]hook.HolderObject{}, unlisted: map[hook.HolderKind]error{},
		dispatched: map[uint32]bool{},
	}
	wide := kinds[hook.HolderProgram] || kinds[hook.HolderMap]
	for ref := range r.counts {
		o.known[ref] = true
	}
	for kind := range commands {
		if r.failed[kind] != nil && (wide || kind == hook.HolderLink) {
			o.enumerate(kind, wide)
		}
	}
	if wide {
		o.relate(r)
	}
	return o
}

// relate finds in the records what refers to programs and maps.
func (o *objects) relate(r *records) {
	programs := map[uint64]uint32{} // ids by address
	maps := map[uint64]uint32{}
	for _, p := range r.programs {
		programs[p.Object] = p.ID
	}
	for _, m := range r.maps {
		maps[m.Object] = m.ID
	}
	refer := func(kind hook.HolderKind, ids map[uint64]uint32, object uint64, from hook.HolderRef, how string) {
		if id, ok := ids[object]; ok {
			o.refer(refTo(kind, id), from, how, 1)
		}
	}

	for _, l := range r.links {
		link := refTo(hook.HolderLink, l.ID)
		if l.Program != 0 {
			o.carry(link, l.Type, l.Program, l.Attached != 0)
		}
		refer(hook.HolderProgram, programs, l.Target, link, "attached to it")
		o.linkToMap(link, l.Type)
	}
	for i, p := range r.programs {
		refer(hook.HolderProgram, programs, p.Target, refTo(hook.HolderProgram, p.ID), "loaded for it")
		for _, m := range r.used[i] {
			refer(hook.HolderMap, maps, m, refTo(hook.HolderProgram, p.ID), "uses it")
		}
	}
	for i, m := range r.maps {
		for _, p := range r.slots[i] {
			refer(hook.HolderProgram, programs, p, refTo(hook.HolderMap, m.ID), "slot")
		}
		// A prog array without a user is not opened: the kernel is emptying it, and
		// then never frees it if it is opened.
		if m.Type != mapProgArray || m.Slots == 0 && m.Users > 0 {
			o.readMap(m.ID, m.Type)
		}
	}
}

// carry notes that a link carries a program. Some hooks take references besides the
// link's: XDP takes one for the driver (dev_xdp_install, net/core/dev.c) and one for
// all devices together (bpf_dispatcher_add_prog, kernel/bpf/dispatcher.c), and a
// perf event takes one (bpf_perf_link_attach).
func (o *objects) carry(link hook.HolderRef, kind uint32, id uint32, attached bool) {
	program := refTo(hook.HolderProgram, id)
	o.refer(program, link, "carries it", 1)
	switch {
	case kind == linkXDP && attached:
		o.refer(program, link, "runs it", 1)
		if !o.dispatched[id] {
			o.dispatched[id] = true
			o.refer(program, link, "runs it", 1)
		}
	case kind == linkPerfEvent, kind == linkSockMap:
		o.refer(program, link, "runs it", 1)
	}
}
