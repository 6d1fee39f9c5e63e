package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/interop"
	"github.com/libdispatcher/dispatcher/internal/load"
)

// ConvertOptions say how a chain changes to the other style. The zero value is useful.
type ConvertOptions struct {
	// Programs are the sources of the members' programs, by name or as "id:PROG". A
	// program from a file takes over the maps of the program that it replaces. Default:
	// each member's loaded program, if the kernel can call it from the other
	// dispatcher.
	Programs map[hook.Ref]Source
	// NoGap replaces libxdp's dispatcher by an owned chain in one step, through
	// netlink. The owned chain then has no link and is not protected until [Adopt]
	// gives it a link.
	NoGap bool
	// ConfigVersion of a chain of libxdp is as in [Options].
	ConfigVersion uint8
	// Owner is the label of the members of an owned chain. Default: the
	// executable's name.
	Owner string
	// BPFFS is where the pins are and will be. Default: /sys/fs/bpf.
	BPFFS string
}

// Convert moves all members of the chain on an XDP hook to a chain of the other
// style, with their order, continue sets and maps. It returns the new chain.
//
// To hook.StyleOwned it takes the members of libxdp's dispatcher, which anyone can
// replace, and makes them persistent members of a chain that a link protects.
// Priorities above 65535 become 65535. Programs that use libxdp cannot join any more:
// they get EBUSY.
//
// To hook.StyleLibxdp it does the reverse. The chain must have at most 10 members,
// all persistent, none with a closed door. libxdp orders members of equal priority by
// name: if that would change the order, the later members get higher priorities.
//
// Between the old chain and the new one nothing is attached for a moment, and packets
// pass unfiltered: in the kernel a link cannot replace what netlink attached, nor the
// reverse. Everything else is done before. A process that dies in that gap leaves the
// device without programs.
//
// Errors: [ErrIncompatible] when a member cannot be in the other chain, with the
// member's name; [ErrBusy] when a member belongs to a process; ebpf.ErrNotSupported
// when this kernel refuses freplace, which libxdp needs; fs.ErrNotExist when nothing
// is attached; fs.ErrExist when the chain has that style already. The old chain then
// stays.
func Convert(ctx context.Context, t Target, to hook.Style, o ConvertOptions) (*hook.Chain, error) {
	req := interop.ConvertRequest{To: to, NoGap: o.NoGap, ConfigVersion: o.ConfigVersion, Owner: o.Owner, Programs: map[hook.Ref]load.Source{}}
	for ref, src := range o.Programs {
		req.Programs[ref] = src.source()
	}
	c, err := attach.Convert(ctx, t.place(o.BPFFS), req)
	return c, wrap("convert", t, err)
}
