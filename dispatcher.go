package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Options are how a program joins a chain. The zero value is useful.
type Options struct {
	// Name of the member, unique in its chain: 1 to 63 bytes of printable
	// UTF-8 without spaces. Default: the program's name.
	Name string
	// Settings are priority, continue set and what an empty slot does.
	hook.Settings
	// Mode is native or generic XDP; a chain has one mode for all members.
	// Default: the chain's, and for a new one what the kernel prefers.
	Mode hook.Mode
	// Persistent pins the member, so that it outlives this process. Default:
	// it is owned by the returned Link and leaves with it.
	Persistent bool
	// Owner is a label for others to read. Default: the executable's name.
	Owner string
	// BPFFS is the bpffs for pins and the lock. Default: /sys/fs/bpf. When
	// nothing is mounted there, Persistent fails (see [MountBPFFS]), and all
	// else works without a lock.
	BPFFS string
}

// Attach puts a program on a hook. On XDP it joins the chain that is there, or
// starts one.
//
// The returned Link belongs to the caller, who closes it. ctx bounds the
// waiting, for the lock and for others who change the chain at the same time.
//
// Errors: [ErrBusy] when a program is on the hook that is not a chain of ours
// (the [Error] names it; see [Adopt]), [ErrIncompatible] when the program does
// not fit the chain, [ErrChainFull] at 32 members, fs.ErrExist when the name
// is taken, fs.ErrNotExist when there is no such device. On any error nothing
// has changed.
func Attach(ctx context.Context, t Target, from Source, o Options) (*Link, error) {
	h, err := attach.Attach(ctx, t.place(o.BPFFS), from.source(), o.request())
	if err != nil {
		return nil, wrap("attach", t, err)
	}
	return &Link{target: t, handle: h}, nil
}

// Plan does all that [Attach] does but the last step: the program is loaded
// and the dispatcher accepted by the kernel. It returns the chain as it would
// be. Nothing stays.
func Plan(ctx context.Context, t Target, from Source, o Options) (*hook.Chain, error) {
	c, err := attach.Plan(ctx, t.place(o.BPFFS), from.source(), o.request())
	return c, wrap("attach", t, err)
}

// AdoptOptions are how a program that was attached without a link becomes a
// member.
type AdoptOptions struct {
	// Options are those of the member. Mode is ignored: the program's stays.
	Options
	// NoGap replaces the program by the chain in one step, through netlink.
	// The chain is then not protected: it has no link, and anyone may replace
	// it. Without NoGap the kernel wants the hook to be empty before a link
	// takes it, and the packets of that moment pass unfiltered.
	NoGap bool
}

// Adopt makes the program that was attached to the device without a link (by
// netlink: "ip link set xdp", xdp-loader) the first member of a new chain. It
// keeps running, the same program with the same maps.
//
// A chain that is not protected becomes protected by adopting it without
// NoGap; the result is then a Link to its first member.
//
// The owners of the other members of such a chain take hold of the new link
// with their next call: keep the result open until then, or have a member
// pinned. With Persistent it is an error if none is.
//
// A process that dies in the gap leaves the device without a program. On a veth
// pair the gap was 14 to 31 ms.
//
// Errors as for [Attach]; [ErrBusy] when the hook is held by a link,
// fs.ErrNotExist when nothing is attached.
func Adopt(ctx context.Context, t Target, o AdoptOptions) (*Link, error) {
	h, err := attach.Adopt(ctx, t.place(o.BPFFS), o.request(), o.NoGap)
	if err != nil {
		return nil, wrap("adopt", t, err)
	}
	return &Link{target: t, handle: h}, nil
}

// Open opens a member by its name: another handle, which owns the member just
// as the first one does.
//
// Errors: fs.ErrNotExist when there is no such member, or when it is empty
// because its owner is gone.
func Open(ctx context.Context, t Target, name string, o ReadOptions) (*Link, error) {
	h, err := attach.Open(ctx, t.place(o.BPFFS), name)
	if err != nil {
		return nil, wrap("open", t, err)
	}
	return &Link{target: t, handle: h}, nil
}

// OpenPinned opens a member by the path of its pin. It works wherever the
// device is by now.
func OpenPinned(ctx context.Context, path string) (*Link, error) {
	h, err := attach.OpenPinned(ctx, path)
	t := Target{Hook: hook.XDP}
	if err != nil {
		t.Device = path
		return nil, wrap("open", t, err)
	}
	return &Link{target: t, handle: h}, nil
}

// Detach takes a member out of a chain, whoever owns it, and removes its pins.
// With the last member the hook becomes free. It works on empty members too.
// Closed doors (see hook.OnMissing) go only this way.
func Detach(ctx context.Context, t Target, name string, o ReadOptions) error {
	return wrap("detach", t, attach.Detach(ctx, t.place(o.BPFFS), name))
}

// DetachAll takes all members out and frees the hook. Programs that are not
// ours are left alone: [ErrBusy].
func DetachAll(ctx context.Context, t Target, o ReadOptions) error {
	return wrap("detach", t, attach.DetachAll(ctx, t.place(o.BPFFS)))
}

// ReadOptions say where to look. The zero value is useful.
type ReadOptions struct {
	// BPFFS is the bpffs whose pins are shown and removed. Default: /sys/fs/bpf.
	// The chains themselves are found without it.
	BPFFS string
}

// Read returns what is on a hook: the members of a chain in run order, or the
// one program that somebody else attached. The error is fs.ErrNotExist when
// the device does not exist; a device with nothing attached gives a chain
// without members.
func Read(ctx context.Context, t Target, o ReadOptions) (*hook.Chain, error) {
	c, err := attach.Read(ctx, t.place(o.BPFFS))
	return c, wrap("read", t, err)
}

// List returns what is on the XDP hooks of all devices in a network namespace
// (empty: the caller's), devices without a program left out.
func List(ctx context.Context, netns string, o ReadOptions) ([]hook.Chain, error) {
	t := Target{Hook: hook.XDP, NetNS: netns}
	chains, err := attach.List(ctx, t.place(o.BPFFS))
	return chains, wrap("list", t, err)
}

// MountBPFFS mounts a bpffs at path, by convention /sys/fs/bpf, unless there
// is one. It tells whether it did.
func MountBPFFS(path string) (mounted bool, err error) { return kernel.MountBPFFS(path) }

func (t Target) place(bpffs string) attach.Place {
	if bpffs == "" {
		bpffs = kernel.DefaultBPFFS
	}
	return attach.Place{Hook: t.Hook, Device: t.Device, NetNS: t.NetNS, BPFFS: bpffs}
}

func (o Options) request() attach.Request {
	return attach.Request{Name: o.Name, Settings: o.Settings, Mode: o.Mode, Persistent: o.Persistent, Owner: o.Owner}
}
