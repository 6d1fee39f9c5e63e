package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/interop"
	"github.com/libdispatcher/dispatcher/internal/load"
)

// ConvertOptions are how a chain goes over to the other style. The zero value is
// useful.
type ConvertOptions struct {
	// Programs are the sources of the members' programs, by name or as "id:PROG". A
	// program from a file goes on with the maps of the one that it replaces. Default:
	// each member's program as it is loaded, where the kernel lets that be called
	// from the other dispatcher.
	Programs map[hook.Ref]Source
	// NoGap lets an owned chain take the place of libxdp's dispatcher in one step,
	// through netlink. It has no link then, and is not protected, until [Adopt]
	// gives it one.
	NoGap bool
	// ConfigVersion is as in [Options].
	ConfigVersion uint8
	// Owner is the label of the members of an owned chain. Default: the
	// executable's name.
	Owner string
	// BPFFS is where the pins are and will be. Default: /sys/fs/bpf.
	BPFFS string
}

// Convert moves the chain on an XDP hook over to the other style: all members,
// with their order and continue sets, and their maps. It returns the chain as it
// is then.
//
// To hook.StyleOwned it takes the members of a dispatcher of libxdp, which anyone
// can replace, and makes them members of a chain that a link protects; they are
// persistent. Priorities above 65535 become that. Programs that use libxdp can then
// not join any more: they get EBUSY.
//
// To hook.StyleLibxdp it is the other way round. There must be no more than 10
// members, all persistent, none with a closed door. Of members of equal priority
// libxdp runs the first by name first: where that would change the order, the
// later ones get higher priorities.
//
// Between the old chain and the new one nothing is attached for a moment, and
// packets pass unfiltered, because the kernel lets neither a link take the place of
// what netlink attached, nor the reverse. All else is done before. A process that
// dies in that gap leaves the device without programs.
//
// Errors: [ErrIncompatible] when a member cannot be one there, and names it;
// [ErrBusy] when it belongs to a process; ebpf.ErrNotSupported when this kernel
// refuses freplace, which libxdp needs; fs.ErrNotExist when nothing is attached;
// fs.ErrExist when the chain has that style already. The old chain then stays.
func Convert(ctx context.Context, t Target, to hook.Style, o ConvertOptions) (*hook.Chain, error) {
	req := interop.ConvertRequest{To: to, NoGap: o.NoGap, ConfigVersion: o.ConfigVersion, Owner: o.Owner, Programs: map[hook.Ref]load.Source{}}
	for ref, src := range o.Programs {
		req.Programs[ref] = src.source()
	}
	c, err := attach.Convert(ctx, t.place(o.BPFFS), req)
	return c, wrap("convert", t, err)
}
