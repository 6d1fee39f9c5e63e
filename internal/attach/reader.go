package attach

import (
	"context"
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/filters"
	"github.com/libdispatcher/dispatcher/internal/interop"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A Reader reads many hooks, one after the other.
type Reader struct {
	opened target.Opened // the pins, and the links that are known
	names  *links.Names
	want   func(hook.Hook) bool
}

// NewReader returns a Reader of the hooks for which want is true. known are the
// machine's links, see kernel.AllLinks. The error is fs.ErrPermission if other users can
// change the pins. The caller closes the Reader.
func NewReader(bpffs string, known []kernel.LinkInfo, want func(hook.Hook) bool) (*Reader, error) {
	o, err := target.OpenPins(target.Target{BPFFS: bpffs}, nil)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // without a bpffs there is less to tell
		return nil, err
	}
	o.Links = known
	return &Reader{opened: *o, names: links.OpenNames(o), want: want}, nil
}

// Close releases the reader.
func (r *Reader) Close() { r.names.Close() }

// hook reads one hook, if it is wanted: the one of blank, on the target of blank. It
// returns nothing where nothing is attached, where the target is gone meanwhile, and for a
// hook that this kernel does not have. An error is in the chain that it returns.
func (r *Reader) hook(ctx context.Context, blank hook.Chain, ns *kernel.NetNS, read func(*target.Opened) (*hook.Chain, error)) []hook.Chain {
	if !r.want(blank.Hook) {
		return nil
	}
	o := r.opened
	o.Hook, o.Name, o.NS = blank.Hook, blank.Target, ns
	var c *hook.Chain
	err := kernel.Retry(ctx, func() (err error) {
		c, err = read(&o)
		return err
	})
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), blank.Hook != hook.XDP && errors.Is(err, ebpf.ErrNotSupported):
		return nil
	case err != nil:
		return unread(blank, err)
	case len(c.Members) == 0 && len(c.Others) == 0:
		return nil
	}
	return []hook.Chain{*c}
}

// unread returns the chain of a hook that could not be read.
func unread(blank hook.Chain, err error) []hook.Chain {
	blank.Pins, blank.Members, blank.Err = []string{}, []hook.Member{}, err
	return []hook.Chain{blank}
}

// Devices returns what is on the devices of a network namespace. An error that
// concerns one hook is in the hook's chain.
func (r *Reader) Devices(ctx context.Context, ns *kernel.NetNS) ([]hook.Chain, error) {
	var found []hook.Chain
	err := rtnl.In(ns, func(conn *rtnl.Conn) error {
		devices, err := conn.Devices()
		if err != nil {
			return err
		}
		for _, d := range devices {
			found = append(found, r.device(ctx, conn, ns, d)...)
		}
		return nil
	})
	return found, err
}

// device reads the hooks of one device. The device is in the thread's namespace.
func (r *Reader) device(ctx context.Context, conn *rtnl.Conn, ns *kernel.NetNS, d rtnl.Device) (found []hook.Chain) {
	add := func(h hook.Hook, read func(*target.Opened) (*hook.Chain, error)) {
		found = append(found, r.hook(ctx, hook.Chain{Hook: h, Target: d.Name, Ifindex: d.Index, NetNS: ns.ID()}, ns, read)...)
	}
	add(hook.XDP, func(o *target.Opened) (*hook.Chain, error) {
		if _, ok := d.Software(); !ok {
			return &hook.Chain{}, nil
		}
		now, err := conn.DeviceByIndex(d.Index)
		if err != nil {
			return nil, err
		}
		snap, err := chains.ReadDevice(o, conn, *now)
		if err != nil {
			return nil, err
		}
		defer snap.Close()
		c, err := chains.Device{Opened: o}.View(snap)
		if errors.Is(err, chains.ErrStyle) {
			return interop.LibxdpChain(o, snap)
		}
		return c, err
	})
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCXEgress} {
		add(h, func(o *target.Opened) (*hook.Chain, error) { return links.ReadOnDevice(o, d, r.names) })
	}
	var all []rtnl.Filter
	var filtersErr error
	if r.want(hook.TCIngress) || r.want(hook.TCEgress) || r.want(hook.TCQdisc) {
		all, filtersErr = conn.FiltersOf(&d)
	}
	for _, h := range []hook.Hook{hook.TCIngress, hook.TCEgress, hook.TCQdisc} {
		add(h, func(o *target.Opened) (*hook.Chain, error) {
			if filtersErr != nil {
				return nil, filtersErr
			}
			return filters.ViewFilters(o, &d, all), nil
		})
	}
	return found
}

// Cgroup returns what is on the hooks of a cgroup: nothing if the cgroup is gone
// meanwhile.
func (r *Reader) Cgroup(ctx context.Context, path string) []hook.Chain {
	cg, err := kernel.OpenCgroup(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return unread(hook.Chain{Hook: "cgroup", Target: path}, err)
	}
	defer cg.Close()
	var found []hook.Chain
	for _, h := range hook.CgroupHooks() {
		found = append(found, r.hook(ctx, hook.Chain{Hook: h, Target: cg.Path, CgroupID: cg.ID}, nil, func(o *target.Opened) (*hook.Chain, error) {
			return links.ReadOnCgroup(o, cg, r.names)
		})...)
	}
	return found
}
