package links

import (
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// nearestAbove returns the programs of the nearest cgroup above that has any, and its path;
// nil if there is none. What that cgroup allows decides for the ones below: whether they may
// have programs (hierarchy_allows_attach, kernel/bpf/cgroup.c), and whether its own programs
// run beside those (compute_effective_progs).
func nearestAbove(cg *kernel.Cgroup, h hook.Hook) (q *kernel.Query, path string, err error) {
	above, err := cg.Ancestors()
	if err != nil {
		return nil, "", err
	}
	defer kernel.CloseCgroups(above)
	for _, c := range above[1:] {
		q, err := kernel.QueryPrograms(c.FD(), kernel.KindOf(h).Attach, 0)
		if err != nil {
			return nil, "", kernel.Errno("query "+c.Path, err)
		}
		if len(q.Programs) > 0 {
			return q, c.Path, nil
		}
	}
	return nil, "", nil
}

// Overridable returns the program of a cgroup above that does not share: it runs for the
// cgroup at path only as long as that has no program of its own. where is the program's
// cgroup. The id is 0 if there is none. Programs with links always share.
func Overridable(path string, h hook.Hook) (prog hook.Program, where string, err error) {
	cg, err := kernel.OpenCgroup(path)
	if err != nil {
		return prog, "", err
	}
	defer cg.Close()
	return overridable(cg, h)
}

func overridable(cg *kernel.Cgroup, h hook.Hook) (prog hook.Program, where string, err error) {
	q, where, err := nearestAbove(cg, h)
	if err != nil || q == nil || sharesCgroup(q.Flags) {
		return prog, "", err
	}
	return target.ProgramOf(q.Programs[0]), where, nil
}

// checkAbove returns ErrBusy if the first program of the cgroup would switch a program of a
// cgroup above off, or if that program allows none below.
func (op *opened) checkAbove(list *order, req target.Request) error {
	if op.cgroup == nil || len(list.Order) > 0 || req.Override {
		return nil
	}
	q, where, err := nearestAbove(op.cgroup, op.Hook)
	switch {
	case err != nil || q == nil || sharesCgroup(q.Flags):
		return err
	case q.Flags&unix.BPF_F_ALLOW_OVERRIDE == 0:
		return op.alone(q.Programs[0], where)
	}
	return hook.Because(hook.ErrBusy, "it would not run for %s any more: it was attached to %s without BPF_F_ALLOW_MULTI, and a program below takes its place", op.cgroup.Path, where).
		HeldBy(&hook.Occupant{Kind: hook.KindLegacy, Program: target.ProgramOf(q.Programs[0])}).
		Hint("\"%s\" makes it a member, and both run; --override attaches in its place", op.Command(nil, "adopt", string(op.Hook), where))
}
