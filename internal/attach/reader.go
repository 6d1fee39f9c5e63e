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

// at returns the target as if it had been opened.
func (r *Reader) at(h hook.Hook, name string, ns *kernel.NetNS) *target.Opened {
	o := r.opened
	o.Hook, o.Name, o.NS = h, name, ns
	return &o
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
		if !r.want(h) {
			return
		}
		var c *hook.Chain
		err := kernel.Retry(ctx, func() (err error) {
			c, err = read(r.at(h, d.Name, ns))
			return err
		})
		switch {
		case errors.Is(err, fs.ErrNotExist) || h != hook.XDP && errors.Is(err, ebpf.ErrNotSupported):
			return // gone meanwhile, or a hook that this kernel does not have
		case err != nil:
			c = &hook.Chain{Hook: h, Target: d.Name, Ifindex: d.Index, NetNS: ns.ID(), Pins: []string{}, Members: []hook.Member{}, Err: err}
		case len(c.Members) == 0:
			return
		}
		found = append(found, *c)
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
		c, err := chains.On(o).View(snap)
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
		return []hook.Chain{{Hook: "cgroup", Target: path, Pins: []string{}, Members: []hook.Member{}, Err: err}}
	}
	defer cg.Close()
	var found []hook.Chain
	for _, h := range hook.CgroupHooks() {
		if !r.want(h) {
			continue
		}
		var c *hook.Chain
		err := kernel.Retry(ctx, func() (err error) {
			c, err = links.ReadOnCgroup(r.at(h, cg.Path, nil), cg, r.names)
			return err
		})
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, ebpf.ErrNotSupported):
		case err != nil:
			found = append(found, hook.Chain{Hook: h, Target: cg.Path, CgroupID: cg.ID, Pins: []string{}, Members: []hook.Member{}, Err: err})
		case len(c.Members) > 0:
			found = append(found, *c)
		}
	}
	return found
}
