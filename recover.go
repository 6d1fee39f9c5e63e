package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"

	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// DetachLink detaches a link by its id, whoever holds it, wherever it is
// (BPF_LINK_DETACH, Linux 5.9): the hook is free, and the holders keep a link
// that does nothing. Nobody is killed. A link that is not ours only with Force:
// [ErrBusy]. The root link of an XDP chain goes with all members, pins and all.
//
// Errors: fs.ErrNotExist when there is no such link, ebpf.ErrNotSupported for
// types that the kernel cannot detach: tracing, raw tracepoints, freplace and
// others. Those are up to their holders.
func DetachLink(ctx context.Context, id uint32, o DetachOptions) error {
	return wrap("detach", link(id), attach.DetachLink(ctx, id, bpffsOf(o.BPFFS), o.Force))
}

// AdoptLinkOptions are how what a link of another tool attaches becomes a member.
// The zero value is useful. The fields are as in [AdoptOptions].
type AdoptLinkOptions struct {
	Name       string
	Priority   int
	ContinueOn hook.VerdictSet
	OnMissing  hook.OnMissing
	Persistent bool
	Owner      string
	BPFFS      string
}

// AdoptLink makes what a link of another tool attaches a member, without a
// moment in which it does not run. On XDP the link goes on with a chain that has
// its program as the first member; on TCX and cgroups it becomes a member as it is.
//
// Whoever made the link and holds it can still update it. On XDP that puts a
// program in the place of the chain: [Read] then shows that program, and members
// that are pinned beside it as hook.StateDisplaced.
//
// Errors as for [Adopt].
func AdoptLink(ctx context.Context, id uint32, o AdoptLinkOptions) (*Link, error) {
	h, on, err := attach.AdoptLink(ctx, id, bpffsOf(o.BPFFS), target.Request{
		Name: o.Name, Settings: hook.Settings{Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing},
		Persistent: o.Persistent, Owner: o.Owner,
	})
	if err != nil {
		return nil, wrap("adopt", link(id), err)
	}
	t := link(id)
	t.Hook = on
	return &Link{target: t, handle: h}, nil
}

// link is a target for errors about a link by its id.
func link(id uint32) Target { return Target{Device: string(hook.LinkRef(id))} }

// RecoverOptions say how to recover. The zero value collects what is left over.
type RecoverOptions struct {
	// BPFFS is the bpffs to look at. Default: /sys/fs/bpf.
	BPFFS string
	// DryRun changes nothing.
	DryRun bool
	// Reattach attaches persistent members again, with their names, order and
	// options, where their device is back under the name that it had, in the same
	// network namespace, or their cgroup under its path. What has no place to go to
	// stays. Without it those are collected.
	Reattach bool
}

// Recover cleans up a bpffs: members whose device or cgroup is gone, what
// processes that were killed have left half done, and a registry that this
// version cannot read. Nothing that runs is touched. The error is about the whole;
// fs.ErrNotExist when there is no bpffs.
func Recover(ctx context.Context, o RecoverOptions) ([]hook.Leftover, error) {
	found, err := attach.Recover(ctx, bpffsOf(o.BPFFS), o.DryRun, o.Reattach)
	for i := range found {
		l := &found[i]
		l.Err = wrap("recover", On(l.Hook, l.Target), l.Err)
	}
	return found, wrap("recover", Target{}, err)
}

func bpffsOf(path string) string {
	if path == "" {
		return kernel.DefaultBPFFS
	}
	return path
}
