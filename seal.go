package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
)

// SealOptions say how a chain is sealed. The zero value is useful.
type SealOptions struct {
	// DryRun only tells what would become of each member.
	DryRun bool
	// BPFFS is where the members are pinned. Default: /sys/fs/bpf.
	BPFFS string
}

// Seal makes the chain on an XDP hook faster: it links members into the dispatcher
// where it can, so that packets do not go through the members' slots. The new dispatcher
// is swapped in in one step. Seal returns what became of each member, in the order of
// the chain.
//
// A member is sealed when it is persistent and its object code is at hand. This library
// keeps the code of each program that it loads from a [File] or a [Spec], in a map that
// is bound to the program and dies with it. The program goes on with the same maps, and
// no state is lost. A member stays in its slot, and runs from
// there, when a process owns it, when it was loaded elsewhere, when it makes tail
// calls, when its license is not compatible with the GPL, and when the verifier
// does not take it together with the others; the reason is in the result.
//
// A sealed chain can be changed as any other: members join (in slots, until the chain is
// sealed again), leave, are replaced and set, and each change links the sealed members
// again. A replaced member stays sealed if the new program can be sealed. [Link.Unpin]
// takes a member out of the seal first. One thing differs: packets run the linked
// program, whatever other tools do to the slot. So a member with a pin that is removed by
// hand leaves with the next change of the chain, and not at once. Earlier versions of
// this library refuse to change a sealed chain (ebpf.ErrNotSupported).
//
// Errors: [ErrIncompatible] on a chain of libxdp; [ErrBusy] when what is
// attached is no chain; fs.ErrNotExist when nothing is attached.
func Seal(ctx context.Context, t Target, o SealOptions) ([]hook.Sealing, error) {
	report, err := attach.Seal(ctx, t.place(o.BPFFS), o.DryRun)
	return report, wrap("seal", t, err)
}

// Unseal undoes [Seal], in one step: packets go through the slots again. A chain that is
// not sealed stays as it is. Errors are as for [Seal].
func Unseal(ctx context.Context, t Target, o ReadOptions) error {
	return wrap("unseal", t, attach.Unseal(ctx, t.place(o.BPFFS)))
}
