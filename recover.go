package dispatcher

import (
	"cmp"
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// DetachLink detaches a link by its id, in any namespace and with any holder
// (BPF_LINK_DETACH, Linux 5.9). The hook becomes free, and the holders keep a link that
// does nothing. With the root link of an XDP chain all members and their pins go.
//
// Errors: [ErrBusy] when the link is not ours and Force is not set; fs.ErrNotExist when
// there is no such link; ebpf.ErrNotSupported for a type of link that the kernel cannot
// detach: tracing, raw tracepoints, freplace and others. Only a holder can close such a
// link.
func DetachLink(ctx context.Context, id uint32, o DetachOptions) error {
	return wrap("detach", link(id), attach.DetachLink(ctx, id, bpffsOf(o.BPFFS), o.Force))
}

// AdoptLink makes what a link of another tool attaches a member, without a gap. On XDP
// the link then carries a chain with its program as the first member; on TCX and cgroups
// the link becomes a member as it is.
//
// A process that holds the link can still update it. On XDP that replaces the chain by a
// program: [Read] then shows that program, and pinned members beside it as
// hook.StateDisplaced.
//
// The caller closes the returned Link. Options and errors are as for [Adopt], but Entry
// must be empty: [ErrUsage].
func AdoptLink(ctx context.Context, id uint32, o AdoptOptions) (*Link, error) {
	t := link(id)
	if o.Entry != "" {
		return nil, wrap("adopt", t, hook.Because(ErrUsage, "entry %q: the link names the program", string(o.Entry)))
	}
	h, on, err := attach.AdoptLink(ctx, id, bpffsOf(o.BPFFS), o.request())
	t.Hook = on
	return t.link("adopt", h, err)
}

// link returns a target for errors about a link that was named by its id.
func link(id uint32) Target { return Target{Device: string(hook.LinkRef(id))} }

// RecoverOptions say how to recover. The zero value collects what is left over.
type RecoverOptions struct {
	// BPFFS is the bpffs to look at. Default: /sys/fs/bpf.
	BPFFS string
	// DryRun changes nothing.
	DryRun bool
	// Reattach attaches persistent members again, with their names, order and options,
	// if their device is back under its old name in the same network namespace, or
	// their cgroup under its old path. Members without a device or cgroup to go to
	// stay. Without Reattach all such members are collected.
	Reattach bool
	// Override allows Reattach what [Options].Override allows Attach: that a member takes
	// the place of the program of a cgroup above.
	Override bool
}

// Recover cleans up a bpffs: members that lost their device or cgroup, and what killed
// processes left half done. It touches nothing that runs. The error is about the whole; it
// is fs.ErrNotExist when there is no bpffs.
func Recover(ctx context.Context, o RecoverOptions) ([]hook.Leftover, error) {
	found, err := attach.Recover(ctx, bpffsOf(o.BPFFS), o.DryRun, o.Reattach, o.Override)
	for i := range found {
		l := &found[i]
		l.Err = wrap("recover", On(l.Hook, l.Target), l.Err)
	}
	return found, wrap("recover", Target{}, err)
}

func bpffsOf(path string) string { return cmp.Or(path, kernel.DefaultBPFFS) }
