package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
)

// SealOptions are how a chain is sealed. The zero value is useful.
type SealOptions struct {
	// DryRun only tells what would become of each member.
	DryRun bool
	// BPFFS is where the members are pinned. Default: /sys/fs/bpf.
	BPFFS string
}

// Seal makes the chain on an XDP hook faster: the members that can be are linked
// into the dispatcher, so that packets are not taken through their slots. It is
// swapped in in one step. What becomes of each member, in the order of the chain,
// is returned.
//
// A member is sealed when it is persistent and its object code is at hand: that is
// kept with each program that this library has loaded, from a [File] or a [Spec],
// in a map that is bound to the program and dies with it. The program goes on with
// its very maps, and no state is lost. A member stays in its slot, and runs from
// there, when a process owns it, when it was loaded elsewhere, when it makes tail
// calls, when its license is not compatible with the GPL, and when the verifier
// does not take it together with the others; the reason is in the result.
//
// The chain goes on as any: members join (in slots, until it is sealed again),
// leave, are replaced and set, and each change links the sealed ones anew. One that
// is replaced stays sealed if the new program can be; [Link.Unpin] takes it out of
// the seal first. What differs: packets run what was linked, whatever is done to
// a slot by other means. So a member whose pin is removed by hand leaves with the
// next change of the chain, and not at once. Earlier versions of this library refuse
// to touch a sealed chain (ebpf.ErrNotSupported).
//
// Errors: [ErrIncompatible] on a chain of libxdp; [ErrBusy] when what is
// attached is no chain; fs.ErrNotExist when nothing is attached.
func Seal(ctx context.Context, t Target, o SealOptions) ([]hook.Sealing, error) {
	report, err := attach.Seal(ctx, t.place(o.BPFFS), o.DryRun)
	return report, wrap("seal", t, err)
}

// UnsealOptions are how a chain is unsealed. The zero value is useful.
type UnsealOptions struct {
	// BPFFS is where the members are pinned. Default: /sys/fs/bpf.
	BPFFS string
}

// Unseal undoes [Seal], in one step: packets take the way through the slots again.
// A chain that is not sealed stays as it is.
func Unseal(ctx context.Context, t Target, o UnsealOptions) error {
	return wrap("unseal", t, attach.Unseal(ctx, t.place(o.BPFFS)))
}
