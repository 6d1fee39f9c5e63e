package dispatcher

import (
	"context"
	"sync"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A Link owns a member, as a bpf_link owns an attachment: the member stays while
// a Link to it is open in any process, or while it is pinned. A Link goes on
// working when its device is renamed or moves to another network namespace. It
// may be used by several goroutines. Keep it: a Link that is garbage collected is
// closed.
//
// On tc/ingress and tc/egress the kernel knows no owners: a member stays until it is
// detached, and the Link only refers to it.
//
// The methods return [ErrDefunct] when the device or the cgroup is gone. When the member
// was detached they return fs.ErrNotExist, or ErrDefunct where the kernel does not tell
// the two apart (TCX, cgroups).
type Link struct {
	target Target
	handle target.Handle

	watch    sync.Once
	done     chan struct{}
	endWatch context.CancelFunc // ends what watch started
}

// Wait waits until the member is gone, and returns why: fs.ErrNotExist when somebody
// detached it, [ErrDefunct] when the device or the cgroup is gone, or where the two cannot
// be told apart, and os.ErrClosed after Close. When ctx ends first it returns the error of
// ctx. A member that is moved or updated is not gone.
//
// A change by this library wakes it at once, in all processes that see the same bpffs. The
// kernel gives no sign of what others do to a link: for that Wait looks once a second.
func (l *Link) Wait(ctx context.Context) error {
	return wrap("wait", l.target, target.Wait(ctx, l.handle))
}

// Done returns a channel that is closed when [Link.Wait] would return: when the member is
// gone, or the Link is closed. The first call starts a goroutine, which ends with that; a
// Link with one is not garbage collected.
func (l *Link) Done() <-chan struct{} {
	l.watch.Do(func() {
		l.done = make(chan struct{})
		var ctx context.Context
		ctx, l.endWatch = context.WithCancel(context.Background())
		go func() {
			defer close(l.done)
			_ = target.Wait(ctx, l.handle)
		}()
	})
	return l.done
}

// Update replaces the member's program, atomically for packets. All other members go on
// undisturbed. The new program must fit as in [Attach].
//
// A program from a [File] or [Spec] takes over the maps of the same names from the old
// program, unless LoadOptions.NewMaps is set. The map pins beside a persistent member
// then pin the maps of the new program.
func (l *Link) Update(ctx context.Context, from Source) error {
	return wrap("replace", l.target, l.handle.Update(ctx, from.source()))
}

// Set changes the member's settings; zero values stay as they are.
//
// On XDP the chain is exchanged as a whole, atomically for packets. On other
// hooks there is only the priority, and a member that changes its place gets a
// new link, because the kernel cannot move a link. On TCX each packet meets the member
// once; on a cgroup and on clsact both places have the member for a moment. Other Links
// to the member open the new link with their next call. Only the Link that attached a
// member can move it while it is not pinned; other Links get [ErrBusy].
func (l *Link) Set(ctx context.Context, s hook.Settings) error {
	return wrap("set", l.target, l.handle.Set(ctx, s))
}

// Move gives the member another place, and a priority that fits there, in the way that
// [Link.Set] does.
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

// Detach removes the member and its pins from the chain, even when other processes own
// the member too. With the last member the hook becomes free. The caller still closes the
// Link. It is not an error when the member is gone already. When ctx ends first, the member
// may still leave: another process that changes the chain may be at it.
func (l *Link) Detach(ctx context.Context) error {
	return wrap("detach", l.target, l.handle.Detach(ctx))
}

// Close gives up ownership. A member that nobody else owns and that is not
// pinned leaves, and with the last such member the dispatcher leaves the
// device. The kernel does both a little after Close has returned: 8 to 33 ms
// were seen until no packet met the member any more. Closing twice is no error.
func (l *Link) Close() error {
	l.watch.Do(func() { // nothing is to be watched any more
		l.done = make(chan struct{})
		close(l.done)
		l.endWatch = func() {}
	})
	l.endWatch()
	return wrap("close", l.target, l.handle.Close())
}

// Info describes the member as it is now.
func (l *Link) Info(ctx context.Context) (*hook.Member, error) {
	m, err := l.handle.Info(ctx)
	return m, wrap("info", l.target, err)
}

// Chain describes the member's chain, also when the device was renamed or moved.
func (l *Link) Chain(ctx context.Context) (*hook.Chain, error) {
	c, err := l.handle.Chain(ctx)
	return c, wrap("read", l.target, err)
}

// Program opens the member's program, for its maps for example. The caller
// closes it.
func (l *Link) Program(ctx context.Context) (*ebpf.Program, error) {
	p, err := target.Program(ctx, l.handle)
	if err != nil {
		return nil, wrap("open program", l.target, err)
	}
	defer p.Close()
	prog, err := p.Program.Clone()
	return prog, wrap("open program", l.target, err)
}
