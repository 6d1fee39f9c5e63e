package dispatcher

import (
	"context"
	"errors"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/scan"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Options say how a program joins a chain. The zero value is useful.
type Options struct {
	// Name is the member's name, unique in its chain: 1 to 63 bytes of printable
	// UTF-8 without spaces. Default: the program's name.
	Name string
	// Priority orders the members: lower runs first, and of equals the oldest. From
	// 1 to 65535. Default: what the program's file asks for, else
	// [hook.DefaultPriority].
	Priority int
	// ContinueOn has the verdicts after which the next member runs. On XDP only: on
	// other hooks the program itself decides. Default: what the program's file asks
	// for, else pass.
	ContinueOn hook.VerdictSet
	// OnMissing is what happens when the member's slot is empty. On XDP only.
	// Default: the chain goes on.
	OnMissing hook.OnMissing
	// Position asks for a place, whatever the priority. If Priority is 0, the member
	// gets a priority that fits the place. On a cgroup a place before others needs
	// Linux 6.17.
	Position hook.Position
	// Mode is native or generic XDP; a chain has one mode for all members.
	// Default: the chain's, and for a new one native mode, or generic mode where the
	// driver has no native mode or refuses it; NativeRefused in hook.Chain says why.
	Mode hook.Mode
	// Persistent pins the member, so that it outlives this process. Default: the
	// returned Link owns the member, and the member leaves with the Link.
	Persistent bool
	// Override is for a cgroup below one whose program was attached with
	// BPF_F_ALLOW_OVERRIDE and not with a link: that program runs for a cgroup only as
	// long as the cgroup has none of its own (compute_effective_progs,
	// kernel/bpf/cgroup.c). Default: Attach fails with ErrBusy when the member would
	// switch it off.
	Override bool
	// Owner is a label for others to read. Default: the executable's name.
	Owner string
	// Style is the style of the XDP chain. Default: the style of the chain on the
	// device, and on a free device hook.StyleOwned. hook.StyleLibxdp starts a chain
	// of libxdp, which C programs can join and which nobody owns. It is an error when
	// the chain on the device has the other style; see [Convert].
	Style hook.Style
	// ConfigVersion is the config version of a new chain of libxdp: 1, 2 or 3. It
	// says which versions of libxdp can change the chain: up to 1.2 they write 1, up
	// to 1.5 2, from 1.6 on 3. Default: see libxdp.AttachOptions.
	ConfigVersion uint8
	// BPFFS is the bpffs for pins and the lock. Default: /sys/fs/bpf. When nothing
	// is mounted there, Persistent fails (see [MountBPFFS]), and everything else
	// works without a lock.
	BPFFS string
}

// Attach puts a program on a hook. On XDP the program joins the chain on the device, or
// starts a chain. On TCX and cgroups it gets its own link. On clsact (tc/ingress,
// tc/egress) it gets its own filter, which nobody owns, so it must be Persistent.
//
// The program runs behind all members with the same priority or a lower number. What
// other tools attached keeps its place; [Link.Chain] tells where the member is.
//
// If the device has a chain of libxdp (xdp-loader), the program joins that chain, in
// libxdp's own way: it must be Persistent, its name is its function's, and it is not
// protected. Package libxdp says more.
//
// On a device without Ethernet packets begin with the IP header, see Begins in
// hook.Chain. A program from a file or spec that has the constant ld_link_header gets
// the length of the device's header there, 14 or 0. On devices that never run XDP
// programs (VRF, ifb) it is [ErrIncompatible].
//
// The caller closes the returned Link. ctx limits the waiting, for the lock and for
// other processes that change the chain at the same time.
//
// Errors: [ErrBusy] when a program is on the hook that leaves no room for others
// (the [Error] names it; see [Adopt]), [ErrIncompatible] when the program does
// not fit, [ErrChainFull] at 32 members (XDP), 63 programs (TCX) or 64 (cgroup),
// fs.ErrExist when the name is taken or TCX has the program already,
// fs.ErrNotExist when there is no such device or cgroup, ebpf.ErrNotSupported when
// this kernel does not have the hook or the requested place. On any error nothing has
// changed.
func Attach(ctx context.Context, t Target, from Source, o Options) (*Link, error) {
	h, err := attach.Attach(ctx, t.place(o.BPFFS), from.source(), o.request())
	return t.link("attach", h, err)
}

// Plan does what [Attach] does but for the last step: it loads the program, and lets the
// kernel check the dispatcher. Whether a driver takes native mode (its MTU, its queues)
// only Attach finds out. It returns the chain as it would be. Nothing stays. Errors
// are as for [Attach].
func Plan(ctx context.Context, t Target, from Source, o Options) (*hook.Chain, error) {
	c, err := attach.Plan(ctx, t.place(o.BPFFS), from.source(), o.request())
	return c, wrap("attach", t, err)
}

// AdoptOptions say how a program that was attached without a link becomes a
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
	// in one step, through netlink. It is not protected: it has no link, and anyone may
	// replace it. Without NoGap the program is detached first, because the kernel
	// attaches a link only to an empty device. On cgroups NoGap refuses a program that
	// was attached for itself alone. On all other hooks there is no gap.
	NoGap bool
	// Entry names the program by its id: "id:PROG". It may be empty when only one
	// program has no link.
	Entry hook.Ref
}

// Adopt makes a program that was attached without a link a member at the same
// place. It keeps running, the same program with the same maps. The tool that attached it
// is not asked: see [PlanAdopt].
//
// On TCX and cgroups it gets a link, without a gap, but for a program that was
// attached to a cgroup for itself alone (without BPF_F_ALLOW_MULTI): the kernel
// wants that program to be detached first. On tc/ingress and tc/egress it becomes a
// member of tcx/ingress or tcx/egress, without a gap; before Linux 6.6 it stays a
// filter and gets a name.
//
// On XDP, where netlink attached it ("ip link set xdp"), it becomes the first
// member of a new chain. The members of a chain of libxdp are moved with [Convert].
//
// A chain that is not protected becomes protected when it is adopted without NoGap.
// The result is then a Link to its first member.
//
// The owners of the other members of such a chain open the new link with their next
// call: keep the result open until then, or have a member pinned. With Persistent it
// is an error if no member is pinned.
//
// A process that dies in the gap leaves the device without a program. On a veth
// pair the gap was 14 to 31 ms.
//
// The caller closes the returned Link. Errors are as for [Attach]; [ErrBusy] when a
// link holds the hook, fs.ErrNotExist when nothing is attached.
func Adopt(ctx context.Context, t Target, o AdoptOptions) (*Link, error) {
	h, err := attach.Adopt(ctx, t.place(o.BPFFS), target.AdoptRequest{Request: o.request(), NoGap: o.NoGap, Entry: o.Entry})
	return t.link("adopt", h, err)
}

// PlanAdopt tells what [Adopt] would change for others: for the tool that attached the
// program, whose next attach or detach may fail, and for the cgroups below. It changes
// nothing.
func PlanAdopt(ctx context.Context, t Target, o AdoptOptions) (*hook.Adoption, error) {
	plan, err := attach.PlanAdopt(ctx, t.place(o.BPFFS), target.AdoptRequest{Request: o.request(), NoGap: o.NoGap, Entry: o.Entry})
	return plan, wrap("adopt", t, err)
}

// Open opens the member that ref names. The returned Link owns the member just as the
// first Link does. On TCX and cgroups "link:ID" opens what that link attaches, also
// when another tool made the link.
//
// The caller closes the returned Link. Errors: fs.ErrNotExist when there is no such
// member, or when its slot is empty because its owner is gone.
func Open(ctx context.Context, t Target, ref hook.Ref, o ReadOptions) (*Link, error) {
	h, err := attach.Open(ctx, t.place(o.BPFFS), ref)
	return t.link("open", h, err)
}

// OpenPinned opens a member by the path of its pin, which [Link.Pin] returns, also when
// the device was renamed or moved. The caller closes the returned Link.
func OpenPinned(ctx context.Context, path string) (*Link, error) {
	h, on, err := attach.OpenPinned(ctx, path)
	return On(on, path).link("open", h, err)
}

// DetachOptions say how to detach. The zero value is useful.
type DetachOptions struct {
	// BPFFS is the bpffs to remove pins from. Default: /sys/fs/bpf.
	BPFFS string
	// Force also removes what is not ours: a legacy program, or what a link of
	// another tool attaches. On XDP only [DetachLink] accepts it, and [DetachAll]
	// never does: [ErrUsage].
	Force bool
}

// Detach removes a member with any owner, and its pins. The member is named by its name,
// on TCX and cgroups also by its link ("link:ID"), on all hooks but XDP also by its
// program ("id:PROG"). Without Force, Detach leaves entries that are not ours alone and
// returns [ErrBusy].
//
// When the last member of an XDP chain is detached, the hook becomes free. Detach also
// removes empty members; only Detach removes closed doors (see hook.OnMissing).
func Detach(ctx context.Context, t Target, ref hook.Ref, o DetachOptions) error {
	if o.Force && t.Hook == hook.XDP {
		return wrap("detach", t, hook.Because(ErrUsage, "members of an XDP chain need no force; detach what is not ours by its link"))
	}
	return wrap("detach", t, attach.Detach(ctx, t.place(o.BPFFS), ref, o.Force))
}

// DetachAll removes all members. It leaves programs that are not ours alone, and returns
// [ErrBusy] when there are no others.
func DetachAll(ctx context.Context, t Target, o DetachOptions) error {
	if o.Force {
		return wrap("detach", t, hook.Because(ErrUsage, "DetachAll removes members only, and they need no force"))
	}
	return wrap("detach", t, attach.DetachAll(ctx, t.place(o.BPFFS)))
}

// ReadOptions say where to look. The zero value is useful.
type ReadOptions struct {
	// BPFFS is the bpffs to show and remove pins of. Default: /sys/fs/bpf.
	// The chains themselves are found without it.
	BPFFS string
}

// Read returns what is on a hook, in run order: members and what other tools attached.
// The error is fs.ErrNotExist when the device or cgroup does not exist. When nothing is
// attached, the chain has no members. Without CAP_SYS_ADMIN it does not tell of extensions.
func Read(ctx context.Context, t Target, o ReadOptions) (*hook.Chain, error) {
	c, err := attach.Read(ctx, t.place(o.BPFFS))
	if err != nil {
		return nil, wrap("read", t, err)
	}
	chains := []hook.Chain{*c}
	if err := scan.Extensions(ctx, chains); err != nil && !errors.Is(err, unix.EPERM) {
		return nil, wrap("read", t, err)
	}
	return &chains[0], nil
}

// Effective returns what runs on a hook for the sockets and processes of a cgroup, in
// run order: what is attached to the cgroup and to its ancestors. The field From of each
// entry says to which cgroup. Behind that come the cgroups below that have entries of
// their own, each with all that runs for it.
func Effective(ctx context.Context, t Target, o ReadOptions) ([]hook.Chain, error) {
	chains, err := attach.Effective(ctx, t.place(o.BPFFS))
	if err == nil {
		err = scan.Extensions(ctx, chains)
	}
	return chains, wrap("read", t, err)
}

// ListOptions say what to list. The zero value lists everything.
type ListOptions struct {
	// NetNS is the only network namespace to look at, as in [Target]. Cgroups are
	// then left out, since they are in no network namespace. Default: all namespaces
	// that can be found.
	NetNS string
	// Hooks are the hooks to list. Default: all.
	Hooks []hook.Hook
	// BPFFS is as in ReadOptions.
	BPFFS string
}

// List returns what any tool has attached to the network hooks of the machine: on all
// devices of all network namespaces, on all cgroups, and on the namespaces themselves.
// Hooks with nothing attached are left out.
//
// The field Err of a chain says why its hook could not be read. The returned error is
// about the whole list.
func List(ctx context.Context, o ListOptions) ([]hook.Chain, error) {
	chains, err := scan.All(ctx, scanned(o.NetNS, o.Hooks, o.BPFFS))
	return chains, wrap("list", Target{NetNS: o.NetNS}, err)
}

// scanned returns what List, Measure and Watch look at.
func scanned(netns string, hooks []hook.Hook, bpffs string) scan.Options {
	so := scan.Options{NetNS: netns, BPFFS: bpffsOf(bpffs)}
	if len(hooks) > 0 {
		so.Hooks = func(h hook.Hook) bool { return slices.Contains(hooks, h) }
	}
	return so
}

// MountBPFFS mounts a bpffs at path, by convention /sys/fs/bpf, unless one is mounted
// there. It tells whether it mounted one.
func MountBPFFS(path string) (mounted bool, err error) {
	mounted, err = kernel.MountBPFFS(path)
	return mounted, kernel.Wrap("mount bpffs", "", path, err)
}

// link returns the Link that owns the handle, or the Error of the operation.
func (t Target) link(op string, h target.Handle, err error) (*Link, error) {
	if err != nil {
		return nil, wrap(op, t, err)
	}
	return &Link{target: t, handle: h}, nil
}

func (t Target) place(bpffs string) target.Target {
	return target.Target{Hook: t.Hook, Name: t.Name(), NetNS: t.NetNS, BPFFS: bpffsOf(bpffs)}
}

func (o AdoptOptions) request() target.Request {
	return Options{
		Name: o.Name, Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing, Persistent: o.Persistent, Owner: o.Owner,
	}.request()
}

func (o Options) request() target.Request {
	return target.Request{
		Name: o.Name, Settings: hook.Settings{Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing}, Position: o.Position, Mode: o.Mode,
		Persistent: o.Persistent, Owner: o.Owner, Style: o.Style, ConfigVersion: o.ConfigVersion, Override: o.Override,
	}
}
