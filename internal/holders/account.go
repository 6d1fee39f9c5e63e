package holders

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// account compares what was found with what the kernel counts.
func (v *View) account(h *hook.Holders, open map[uint64]bool) {
	objects := 0
	for _, o := range h.Objects {
		objects += o.References
	}
	h.Found = h.Files + len(h.Pins) + objects

	before, counted := v.before.counts[h.HolderRef]
	if !counted || v.why != nil {
		h.Missing = "it is not known how many references the kernel counts"
		if why := cmp.Or(v.why, v.before.failed[h.Kind]); why != nil {
			h.Missing += ": " + why.Error()
		}
		return
	}
	own := map[uint64]bool{} // open files that only this process has
	for _, d := range v.mine[h.HolderRef] {
		if !open[d.file] {
			own[d.file] = true
		}
	}
	h.Counted = before.references - len(own)
	if after := v.after.counts[h.HolderRef]; after != before && v.after.failed[h.Kind] == nil {
		h.Missing = "the references changed meanwhile; look again"
		return
	}
	if h.Found >= h.Counted {
		h.Verified = h.Found == h.Counted
		if !h.Verified {
			h.Missing = fmt.Sprintf("%d references were found, but the kernel counts only %d; look again", h.Found, h.Counted)
		}
		return
	}
	v.explain(h, before.users-len(own)-h.Files-len(h.Pins))
}

// explain says what may hold the references that were not found. For a map the
// kernel counts users apart: users is how many of those were not found.
func (v *View) explain(h *hook.Holders, users int) {
	var may []string
	missing := h.Counted - h.Found
	if h.Kind != hook.HolderMap {
		users = missing
	}
	for _, o := range h.Objects { // these links count as users of a map
		if h.Kind == hook.HolderMap && (o.How == "iterates over it" || o.How == "attached to it") {
			users -= o.References
		}
	}
	if users > 0 {
		may = append(may, "a descriptor in the queue of a unix socket, or registered in an io_uring")
		h.Suspects = v.suspectsOf(h.Kind)
		if len(h.Suspects) > 0 {
			var names []string
			for _, s := range h.Suspects {
				names = append(names, fmt.Sprintf("pid %d (%s: %s)", s.PID, s.Comm, s.Why))
			}
			may[0] += ", perhaps of " + strings.Join(names, ", ")
		}
		if procfs.Namespace("/proc/self", "pid") != procfs.InitialPIDNS {
			may = append(may, "a process outside of this pid namespace")
		}
		for _, m := range v.hidden {
			may = append(may, fmt.Sprintf("a pin in the bpffs at %s in mount namespace %d, which another mount covers", m.Point, m.NS))
		}
	}
	if h.Kind == hook.HolderMap && missing > users {
		may = append(may, v.keepsMap(h.ID))
	}
	if h.Kind == hook.HolderProgram {
		may = append(may, "something that it is attached to without a link: a device by netlink, a tc filter, a cgroup, a socket, a perf event; a driver may take a reference for each queue")
	}
	h.Missing = fmt.Sprintf("%d of %d references not found; it may be %s", missing, h.Counted, strings.Join(may, "; or "))
}

// keepsMap says what in the kernel may hold a map and cannot be found.
func (v *View) keepsMap(id uint32) string {
	for _, m := range v.before.maps {
		if m.ID != id {
			continue
		}
		switch {
		case m.Type == mapProgArray && m.Users == 0:
			// It is the reference of the deferred clearing. Linux 6.18 never releases
			// it if the array is opened and closed meanwhile.
			return "the kernel, which empties the array, or lost count when it did"
		case m.Type == mapXSK:
			return "a socket that is in it"
		case m.Type == mapStructOps:
			return "the kernel, where it is registered"
		}
	}
	return "a program that is being freed"
}
