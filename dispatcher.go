package dispatcher

import (
	"context"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/scan"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Options are how a program joins a chain. The zero value is useful.
type Options struct {
	// Name of the member, unique in its chain: 1 to 63 bytes of printable
	// UTF-8 without spaces. Default: the program's name.
	Name string
	// Priority orders the members: lower runs first, and of equals the one that
	// came first. From 1 to 65535. Default: what the program's file asks for, else
	// [hook.DefaultPriority].
	Priority int
	// ContinueOn is the verdicts after which the next member runs. On XDP only: on
	// other hooks the program itself decides that. Default: what the program's file
	// asks for, else pass.
	ContinueOn hook.VerdictSet
	// OnMissing is what happens when the member's slot is empty. On XDP only.
	// Default: the chain goes on.
	OnMissing hook.OnMissing
	// Position asks for a place, whatever the priority. With a priority of 0 the
	// member gets one that fits there. On a cgroup a place before others needs
	// Linux 6.17.
	Position hook.Position
	// Mode is native or generic XDP; a chain has one mode for all members.
	// Default: the chain's, and for a new one what the kernel prefers.
	Mode hook.Mode
	// Persistent pins the member, so that it outlives this process. Default:
	// it is owned by the returned Link and leaves with it.
	Persistent bool
	// Owner is a label for others to read. Default: the executable's name.
	Owner string
	// Style of the XDP chain. Default: that of the chain on the device, and on a
	// free one an owned chain. hook.StyleLibxdp starts a chain of libxdp, which C
	// programs can join and which nobody owns. A chain of the other style than the
	// one that is asked for is an error; see [Convert].
	Style hook.Style
	// ConfigVersion is that of a chain of libxdp that is started: 1, 2 or 3. A
	// libxdp of another age cannot change it: up to 1.2 they write 1, up to 1.5
	// 2, from 1.6 on 3. Default: see libxdp.AttachOptions.
	ConfigVersion uint8
	// BPFFS is the bpffs for pins and the lock. Default: /sys/fs/bpf. When
	// nothing is mounted there, Persistent fails (see [MountBPFFS]), and all
	// else works without a lock. On TCX and cgroups there is then no registry
	// either: others see the member without its name and priority.
	BPFFS string
}

// Attach puts a program on a hook. On XDP it joins the chain that is there, or
// starts one; on TCX and cgroups it gets a link of its own; on clsact
// (tc/ingress, tc/egress) a filter of its own, which nobody owns, so that it must
// be Persistent.
//
// It runs behind all members of lower or equal priority. What others attached
// without libdispatcher keeps its place; [Link.Chain] tells where the member is.
//
// Where a device has a chain of libxdp (xdp-loader), the program joins that, in
// libxdp's own way: it must be Persistent, is called as its function, and is not
// protected. Package libxdp says more.
//
// The returned Link belongs to the caller, who closes it. ctx bounds the
// waiting, for the lock and for others who change the chain at the same time.
//
// Errors: [ErrBusy] when a program is on the hook that leaves no room for others
// (the [Error] names it; see [Adopt]), [ErrIncompatible] when the program does
// not fit, [ErrChainFull] at 32 members (XDP), 63 programs (TCX) or 64 (cgroup),
// fs.ErrExist when the name is taken or TCX has the program already,
// fs.ErrNotExist when there is no such device or cgroup, ebpf.ErrNotSupported when
// this kernel has no such hook, or not the place that was asked for. On any error
// nothing has changed.
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
// member. The zero value is useful.
type AdoptOptions struct {
	// Name, Priority, ContinueOn, OnMissing, Persistent, Owner and BPFFS are as in
	// [Options]. The priority must fit the place that the program has; by default it
	// does.
	Name       string
	Priority   int
	ContinueOn hook.VerdictSet
	OnMissing  hook.OnMissing
	Persistent bool
	Owner      string
	BPFFS      string
	// NoGap lets no packet pass unfiltered. On XDP the chain then replaces the program
	// in one step, through netlink, and is not protected: it has no link, and anyone
	// may replace it. Without NoGap the kernel wants the device to be empty before a
	// link takes it. On cgroups a program that was attached for itself alone is
	// refused. On all other hooks there is no gap.
	NoGap bool
	// Entry is which program: "id:PROG", by its id. May be empty where there is
	// only one without a link.
	Entry hook.Ref
}

// Adopt makes a program that was attached without a link a member at the same
// place. It keeps running, the same program with the same maps.
//
// On TCX and cgroups it gets a link, without a gap, but for a program that was
// attached to a cgroup for itself alone (without BPF_F_ALLOW_MULTI): the kernel
// wants that one to be off first. On tc/ingress and tc/egress it becomes a member
// of tcx/ingress or tcx/egress, without a gap; before Linux 6.6 it stays a
// filter and gets a name.
//
// On XDP, where netlink attached it ("ip link set xdp"), it becomes the first
// member of a new chain. The members of a chain of libxdp are moved with [Convert].
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
	h, err := attach.Adopt(ctx, t.place(o.BPFFS), target.AdoptRequest{
		Request: target.Request{
			Name: o.Name, Settings: hook.Settings{Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing}, Persistent: o.Persistent, Owner: o.Owner,
		},
		NoGap: o.NoGap, Entry: o.Entry,
	})
	if err != nil {
		return nil, wrap("adopt", t, err)
	}
	return &Link{target: t, handle: h}, nil
}

// Open opens the member that ref names: another handle, which owns the member just
// as the first one does. On TCX and cgroups "link:ID" opens what that link
// attaches, whoever made it.
//
// Errors: fs.ErrNotExist when there is no such member, or when it is empty
// because its owner is gone.
func Open(ctx context.Context, t Target, ref hook.Ref, o ReadOptions) (*Link, error) {
	h, err := attach.Open(ctx, t.place(o.BPFFS), ref)
	if err != nil {
		return nil, wrap("open", t, err)
	}
	return &Link{target: t, handle: h}, nil
}

// OpenPinned opens a member by the path of its pin, which [Link.Pin] returns. It works wherever the
// device is by now.
func OpenPinned(ctx context.Context, path string) (*Link, error) {
	h, on, err := attach.OpenPinned(ctx, path)
	t := On(on, path)
	if err != nil {
		return nil, wrap("open", t, err)
	}
	return &Link{target: t, handle: h}, nil
}

// DetachOptions say how to detach. The zero value is useful.
type DetachOptions struct {
	// BPFFS is the bpffs whose pins are removed. Default: /sys/fs/bpf.
	BPFFS string
	// Force takes out what is not ours, too: a legacy program, or what a link of
	// another tool attaches. On XDP it has no effect.
	Force bool
}

// Detach takes a member out, whoever owns it, and removes its pins: by its name,
// on TCX and cgroups also by its link ("link:ID"), on all hooks but XDP by its
// program ("id:PROG"). Entries that are not ours are left alone without Force:
// [ErrBusy].
//
// With the last member of an XDP chain the hook becomes free. It works on empty
// members too. Closed doors (see hook.OnMissing) go only this way.
func Detach(ctx context.Context, t Target, ref hook.Ref, o DetachOptions) error {
	return wrap("detach", t, attach.Detach(ctx, t.place(o.BPFFS), ref, o.Force))
}

// DetachAll takes all members out. Programs that are not ours are left alone;
// [ErrBusy] when there are no others.
func DetachAll(ctx context.Context, t Target, o DetachOptions) error {
	return wrap("detach", t, attach.DetachAll(ctx, t.place(o.BPFFS)))
}

// ReadOptions say where to look. The zero value is useful.
type ReadOptions struct {
	// BPFFS is the bpffs whose pins are shown and removed. Default: /sys/fs/bpf.
	// The chains themselves are found without it.
	BPFFS string
}

// Read returns what is on a hook, in run order: members and what others have
// attached. The error is fs.ErrNotExist when the device or cgroup does not exist;
// one with nothing attached gives a chain without members.
func Read(ctx context.Context, t Target, o ReadOptions) (*hook.Chain, error) {
	c, err := attach.Read(ctx, t.place(o.BPFFS))
	if err != nil {
		return nil, wrap("read", t, err)
	}
	chains := []hook.Chain{*c}
	if err := scan.Extensions(ctx, chains); err != nil {
		return nil, wrap("read", t, err)
	}
	return &chains[0], nil
}

// Effective returns what runs on a hook for the sockets and processes of a
// cgroup, in run order: what is attached to it and to those that it is in. The
// field From of each entry says to which. After that come the cgroups below that
// have something of their own, each with all that runs for it.
func Effective(ctx context.Context, t Target, o ReadOptions) ([]hook.Chain, error) {
	chains, err := attach.Effective(ctx, t.place(o.BPFFS))
	if err == nil {
		err = scan.Extensions(ctx, chains)
	}
	return chains, wrap("read", t, err)
}

// ListOptions say what to list. The zero value lists everything.
type ListOptions struct {
	// NetNS is the only network namespace to look at, as in [Target]; cgroups are
	// left out then, since they are in none. Default: all that can be found.
	NetNS string
	// Hooks are those to list. Default: all.
	Hooks []hook.Hook
	// BPFFS is as in ReadOptions.
	BPFFS string
}

// List returns what is attached to the network hooks of the machine, whoever did
// it: on all devices of all network namespaces, on all cgroups, and on the
// namespaces themselves. Hooks with nothing attached are left out.
//
// What cannot be read does not spoil the rest: the field Err of its entry says
// why. The error is that of the whole.
func List(ctx context.Context, o ListOptions) ([]hook.Chain, error) {
	chains, err := scan.All(ctx, scanned(o.NetNS, o.Hooks, o.BPFFS))
	return chains, wrap("list", Target{NetNS: o.NetNS}, err)
}

// scanned says what is looked at, for List, Measure and Watch.
func scanned(netns string, hooks []hook.Hook, bpffs string) scan.Options {
	so := scan.Options{NetNS: netns, BPFFS: bpffsOf(bpffs)}
	if len(hooks) > 0 {
		so.Hooks = func(h hook.Hook) bool { return slices.Contains(hooks, h) }
	}
	return so
}

// MountBPFFS mounts a bpffs at path, by convention /sys/fs/bpf, unless there
// is one. It tells whether it did.
func MountBPFFS(path string) (mounted bool, err error) {
	mounted, err = kernel.MountBPFFS(path)
	return mounted, kernel.Wrap("mount bpffs", "", path, err)
}

func (t Target) place(bpffs string) target.Target {
	return target.Target{Hook: t.Hook, Name: t.Name(), NetNS: t.NetNS, BPFFS: bpffsOf(bpffs)}
}

func (o Options) request() target.Request {
	return target.Request{
		Name: o.Name, Settings: hook.Settings{Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing}, Position: o.Position, Mode: o.Mode,
		Persistent: o.Persistent, Owner: o.Owner, Style: o.Style, ConfigVersion: o.ConfigVersion,
	}
}
