package holders

// objects are all of some kinds, and how they refer to each other.
type objects struct {
	known    map[Ref]bool
	refers   map[Ref][]Object // to the key
	unlisted map[Kind]error   // why not all of a kind are known

	dispatched map[uint32]bool // programs, see carry
}

// refer takes note that from refers to an object. Several references of one
// sort are one Object.
func (o *objects) refer(to, from Ref, how string, n int) {
	list := o.refers[to]
	for i := range list {
		if list[i].Ref == from && list[i].How == how {
			list[i].References += n
			return
		}
	}
	o.refers[to] = append(list, Object{from, how, n})
}

// Types of links and maps that take references of a kind of their own
// (linux/bpf.h).
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

// lookAtObjects takes from records what it can, and asks the kernel for the rest. To
// know what refers to programs or maps it takes all kinds.
func lookAtObjects(r *records, kinds map[Kind]bool) *objects {
	o := &objects{
		known: map[Ref]bool{}, refers: map[Ref][]Object{}, unlisted: map[Kind]error{},
		dispatched: map[uint32]bool{},
	}
	wide := kinds[Program] || kinds[Map]
	for ref := range r.counts {
		o.known[ref] = true
	}
	for kind := range commands {
		if r.failed[kind] != nil && (wide || kind == Link) {
			o.enumerate(kind, wide)
		}
	}
	if wide {
		o.relate(r)
	}
	return o
}

// relate takes from records what refers to programs and maps.
func (o *objects) relate(r *records) {
	programs := map[uint64]uint32{} // ids by address
	maps := map[uint64]uint32{}
	for _, p := range r.programs {
		programs[p.Object] = p.ID
	}
	for _, m := range r.maps {
		maps[m.Object] = m.ID
	}
	refer := func(kind Kind, ids map[uint64]uint32, object uint64, from Ref, how string) {
		if id, ok := ids[object]; ok {
			o.refer(Ref{kind, id}, from, how, 1)
		}
	}

	for _, l := range r.links {
		link := Ref{Link, l.ID}
		if l.Program != 0 {
			o.carry(link, l.Type, l.Program, l.Attached != 0)
		}
		refer(Program, programs, l.Target, link, "attached to it")
		o.linkToMap(link, l.Type)
	}
	for i, p := range r.programs {
		refer(Program, programs, p.Target, Ref{Program, p.ID}, "loaded for it")
		for _, m := range r.used[i] {
			refer(Map, maps, m, Ref{Program, p.ID}, "uses it")
		}
	}
	for i, m := range r.maps {
		for _, p := range r.slots[i] {
			refer(Program, programs, p, Ref{Map, m.ID}, "slot")
		}
		// A prog array is opened only if it has a user: to open one that is
		// just being emptied for want of users makes the kernel keep it.
		if m.Type != mapProgArray || m.Slots == 0 && m.Users > 0 {
			o.readMap(m.ID, m.Type)
		}
	}
}

// carry takes note that a link carries a program. Some hooks take references
// beside that of the link: XDP one for the driver (dev_xdp_install,
// net/core/dev.c) and one for all devices together (bpf_dispatcher_add_prog,
// kernel/bpf/dispatcher.c), a perf event one of its own (bpf_perf_link_attach).
func (o *objects) carry(link Ref, kind uint32, id uint32, attached bool) {
	program := Ref{Program, id}
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
