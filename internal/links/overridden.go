package links

import (
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Overridable returns the program of a cgroup above that does not share: it runs for a
// cgroup only as long as that has no program of its own (compute_effective_progs,
// kernel/bpf/cgroup.c). where is the program's cgroup. The id is 0 if there is none.
// Programs with links always share.
//
// Only the nearest cgroup with programs counts: the ones further up that do not share are
// switched off by those.
func Overridable(path string, h hook.Hook) (prog hook.Program, where string, err error) {
	cg, err := kernel.OpenCgroup(path)
	if err != nil {
		return prog, "", err
	}
	defer cg.Close()
	above, err := cg.Ancestors()
	if err != nil {
		return prog, "", err
	}
	defer kernel.CloseCgroups(above)
	for _, c := range above[1:] {
		q, err := kernel.QueryPrograms(c.FD(), kernel.KindOf(h).Attach, 0)
		if err != nil {
			return prog, "", kernel.Errno("query "+c.Path, err)
		}
		if len(q.Programs) > 0 {
			if !sharesCgroup(q.Flags) {
				prog, where = target.ProgramOf(q.Programs[0]), c.Path
			}
			break
		}
	}
	return prog, where, nil
}

// checkAbove returns ErrBusy if the first program of the cgroup would switch a program of a
// cgroup above off.
func (op *opened) checkAbove(list *order, req target.Request) error {
	if op.cgroup == nil || len(list.Order) > 0 || req.Override {
		return nil
	}
	prog, where, err := Overridable(op.cgroup.Path, op.Hook)
	if err != nil || prog.ID == 0 {
		return err
	}
	return hook.Because(hook.ErrBusy, "it would not run for %s any more: it was attached to %s without BPF_F_ALLOW_MULTI, and a program below takes its place", op.cgroup.Path, where).
		HeldBy(&hook.Occupant{Kind: hook.KindLegacy, Program: prog}).
		Hint("\"%s\" makes it a member, and both run; --override attaches in its place", op.Command("adopt", string(op.Hook), where))
}
