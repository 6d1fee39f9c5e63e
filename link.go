package dispatcher

import (
	"context"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A Link owns a member, as a bpf_link owns an attachment: the member stays while
// a Link to it is open in any process, or while it is pinned. A Link goes on
// working when its device is renamed or moves to another network namespace. It
// may be used by several goroutines. Keep it: one that is garbage collected is
// closed.
//
// On tc/ingress and tc/egress the kernel knows no owners: there a member stays
// until it is detached, and the Link is only a way to it.
//
// After the device or the cgroup is gone, its methods return [ErrDefunct]; after
// somebody detached the member, fs.ErrNotExist, or ErrDefunct where the kernel
// does not tell the one from the other (TCX, cgroups).
type Link struct {
	target Target
	handle target.Handle
}

// Update replaces the member's program, atomically for packets; all other
// members go on undisturbed. The new program must fit as in [Attach].
//
// A program from a [File] or [Spec] goes on with the maps of the one that it
// replaces where they have the same names, unless [LoadOptions] say NewMaps.
// Pins of maps beside a persistent member become those of the new program.
func (l *Link) Update(ctx context.Context, from Source) error {
	return wrap("replace", l.target, l.handle.Update(ctx, from.source()))
}

// Set changes the member's settings; zero values stay as they are.
//
// On XDP the chain is exchanged as a whole, atomically for packets. On other
// hooks there is only the priority, and a member whose place it changes gets a
// new link, because the kernel moves none: each packet meets it once on TCX; on
// a cgroup and on clsact both places have it for a moment. Other Links to the
// member take hold of the new one with their next call. A member that is not
// pinned can be moved only by a Link that attached it: [ErrBusy].
func (l *Link) Set(ctx context.Context, s hook.Settings) error {
	return wrap("set", l.target, l.handle.Set(ctx, s))
}

// Move gives the member another place, and a priority that fits there, as Set
// does.
func (l *Link) Move(ctx context.Context, to hook.Position) error {
	return wrap("move", l.target, l.handle.Move(ctx, to))
}

// Pin makes the member persistent: it stays when the Link is closed. The pins are made
// in the bpffs that the Link was made with. Pin returns the path that [OpenPinned]
// takes, also for a member that is pinned already. The path is empty on clsact and in
// chains of libxdp, where members stay without such a pin. It changes when the member
// gets a new link, see Set.
func (l *Link) Pin(ctx context.Context) (path string, err error) {
	path, err = l.handle.Pin(ctx)
	return path, wrap("pin", l.target, err)
}

// Unpin removes the pins: the member stays while Links to it are open.
func (l *Link) Unpin(ctx context.Context) error {
	return wrap("unpin", l.target, l.handle.Unpin(ctx))
}

// Detach takes the member out of the chain, and its pins with it, also when
// others own it as well. With the last member the hook becomes free. The Link
// is to be closed still. A member that is gone already is no error.
func (l *Link) Detach(ctx context.Context) error {
	return wrap("detach", l.target, l.handle.Detach(ctx))
}

// Close gives up ownership. A member that nobody else owns and that is not
// pinned leaves, and with the last such member the dispatcher leaves the
// device. The kernel does both a little after Close has returned: 8 to 33 ms
// were seen until no packet met the member any more. Closing twice is no error.
func (l *Link) Close() error { return wrap("close", l.target, l.handle.Close()) }

// Info describes the member as it is now.
func (l *Link) Info(ctx context.Context) (*hook.Member, error) {
	m, err := l.handle.Info(ctx)
	return m, wrap("info", l.target, err)
}

// Chain describes the chain that the member is in, wherever the device is by now.
func (l *Link) Chain(ctx context.Context) (*hook.Chain, error) {
	c, err := l.handle.Chain(ctx)
	return c, wrap("read", l.target, err)
}

// Program opens the member's program, for its maps for example. The caller
// closes it.
func (l *Link) Program(ctx context.Context) (*ebpf.Program, error) {
	p, err := l.handle.Program(ctx)
	return p, wrap("open program", l.target, err)
}
