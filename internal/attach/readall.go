package attach

import (
	"context"
	"errors"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Reader reads many hooks one after the other.
type Reader struct {
	names *names
	pins  *state.Pins
	bpffs string
	links []LinkInfo
	want  func(hook.Hook) bool
}

// NewReader makes a reader of the hooks that want chooses, which knows the
// links; nil for all that there are. The caller closes it.
func NewReader(bpffs string, links []LinkInfo, want func(hook.Hook) bool) *Reader {
	r := &Reader{bpffs: bpffs, links: links, want: want}
	s := &site{}
	s.pins, _ = state.OpenPins(bpffs)
	r.pins, r.names = s.pins, s.names()
	return r
}

// Close releases the reader.
func (r *Reader) Close() { r.names.close() }

// Devices returns what is on the devices of a network namespace. An error that
// concerns one hook is in its entry.
func (r *Reader) Devices(ctx context.Context, ns *kernel.NetNS) ([]hook.Chain, error) {
	var chains []hook.Chain
	err := rtnl.In(ns, func(conn *rtnl.Conn) error {
		devices, err := conn.Devices()
		if err != nil {
			return err
		}
		for _, d := range devices {
			chains = append(chains, r.device(ctx, conn, ns, d)...)
		}
		return nil
	})
	return chains, err
}

// device reads the hooks of one device, in the thread's namespace.
func (r *Reader) device(ctx context.Context, conn *rtnl.Conn, ns *kernel.NetNS, d rtnl.Device) (chains []hook.Chain) {
	s := &site{Place: Place{Target: d.Name, BPFFS: r.bpffs}, ns: ns, pins: r.pins, links: r.links}
	add := func(h hook.Hook, read func() (*hook.Chain, error)) {
		if !r.want(h) {
			return
		}
		s.Hook = h
		var c *hook.Chain
		err := kernel.Retry(ctx, func() (err error) {
			c, err = read()
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
		chains = append(chains, *c)
	}
	add(hook.XDP, func() (*hook.Chain, error) {
		if _, ok := d.Software(); !ok {
			return &hook.Chain{}, nil
		}
		now, err := conn.DeviceByIndex(d.Index)
		if err != nil {
			return nil, err
		}
		var snap snapshot
		defer snap.close()
		if err := s.inspect(&snap, conn, *now); err != nil {
			return nil, err
		}
		return s.view(&snap)
	})
	for _, h := range []hook.Hook{hook.TCXIngress, hook.TCXEgress} {
		add(h, func() (*hook.Chain, error) {
			sp := &spot{hook: h, kind: kernel.KindOf(h), name: d.Name, index: d.Index, ns: ns, here: true}
			list, err := sp.list(r.names, r.links)
			if err != nil {
				return nil, err
			}
			return sp.view(list, r.names), nil
		})
	}
	var filters []rtnl.Filter
	var filtersErr error
	if r.want(hook.TCIngress) || r.want(hook.TCEgress) || r.want(hook.TCQdisc) {
		filters, filtersErr = conn.FiltersOf(&d)
	}
	for _, h := range []hook.Hook{hook.TCIngress, hook.TCEgress, hook.TCQdisc} {
		add(h, func() (*hook.Chain, error) {
			if filtersErr != nil {
				return nil, filtersErr
			}
			return newLane(s, h, &d, filters).view(), nil
		})
	}
	return chains
}

// Cgroup returns what is on the hooks of a cgroup. A cgroup that is gone
// meanwhile has nothing.
func (r *Reader) Cgroup(ctx context.Context, path string) []hook.Chain {
	cg, err := kernel.OpenCgroup(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return []hook.Chain{{Hook: "cgroup", Target: path, Pins: []string{}, Members: []hook.Member{}, Err: err}}
	}
	defer cg.Close()
	var chains []hook.Chain
	for _, h := range hook.CgroupHooks() {
		if !r.want(h) {
			continue
		}
		sp := &spot{hook: h, kind: kernel.KindOf(h), cgroup: cg}
		var list *listing
		err := kernel.Retry(ctx, func() (err error) {
			list, err = sp.list(r.names, r.links)
			return err
		})
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV), errors.Is(err, ebpf.ErrNotSupported):
		case err != nil:
			chains = append(chains, hook.Chain{Hook: h, Target: cg.Path, CgroupID: cg.ID, Pins: []string{}, Members: []hook.Member{}, Err: err})
		case len(list.entries) > 0:
			chains = append(chains, *sp.view(list, r.names))
		}
	}
	return chains
}

// Effective returns what runs for a cgroup, see dispatcher.Effective.
func Effective(ctx context.Context, p Place) (chains []hook.Chain, err error) {
	if !p.Hook.OnCgroup() {
		return nil, hook.Because(hook.ErrUsage, "%s is not a hook of cgroups: nothing is inherited there", p.Hook)
	}
	err = p.do(func(s *site) error {
		return kernel.Retry(ctx, func() error {
			chains, err = s.effective()
			return err
		})
	})
	return chains, err
}

// effective returns what runs for the cgroup of the site, and then for those
// below that have something of their own.
func (s *site) effective() ([]hook.Chain, error) {
	names := s.names()
	defer names.close()
	sp, err := s.spot()
	if err != nil {
		return nil, err
	}
	defer sp.close()
	c, err := sp.effective(names)
	if err != nil {
		return nil, err
	}
	chains := []hook.Chain{*c}
	all, err := kernel.CgroupPaths()
	if err != nil {
		return nil, err
	}
	for _, below := range all {
		if !strings.HasPrefix(below.Path, strings.TrimSuffix(sp.cgroup.Path, "/")+"/") {
			continue
		}
		c, err := sp.effectiveBelow(below.Path, names)
		switch {
		case errors.Is(err, fs.ErrNotExist): // gone meanwhile
		case err != nil:
			return nil, err
		case c != nil:
			chains = append(chains, *c)
		}
	}
	return chains, nil
}

// effectiveBelow returns nil for a cgroup that has nothing of its own.
func (sp *spot) effectiveBelow(path string, names *names) (*hook.Chain, error) {
	cg, err := kernel.OpenCgroup(path)
	if err != nil {
		return nil, err
	}
	below := &spot{hook: sp.hook, kind: sp.kind, cgroup: cg}
	defer below.close()
	q, err := below.query(0)
	if err != nil || len(q.Programs) == 0 {
		return nil, err
	}
	return below.effective(names)
}

func (sp *spot) effective(names *names) (*hook.Chain, error) {
	q, err := sp.query(unix.BPF_F_QUERY_EFFECTIVE)
	if err != nil {
		return nil, err
	}
	links, err := AllLinks()
	if err != nil {
		return nil, err
	}
	above, err := sp.cgroup.Ancestors()
	if err != nil {
		return nil, err
	}
	defer kernel.CloseCgroups(above)
	c := &hook.Chain{Hook: sp.hook, Target: sp.cgroup.Path, CgroupID: sp.cgroup.ID, Pins: []string{}, Members: []hook.Member{}}
	var from []hook.Member
	for _, cg := range above {
		at := &spot{hook: sp.hook, kind: sp.kind, cgroup: cg}
		list, err := at.list(names, links)
		if err != nil {
			return nil, err
		}
		part := at.view(list, names)
		c.Pins = append(c.Pins, part.Pins...)
		for _, m := range part.Members {
			m.From = cg.Path
			from = append(from, m)
		}
	}
	// The query tells programs; whose they are is found from the cgroup upwards,
	// as they run, but for those that asked to run before (BPF_F_PREORDER).
	for _, id := range q.Programs {
		m := hook.Member{Kind: hook.KindLegacy, State: hook.StateRunning, Program: programOf(id)}
		m.Name = m.Program.Name
		for i := range from {
			if from[i].Program.ID == id {
				m = from[i]
				from = append(from[:i:i], from[i+1:]...)
				break
			}
		}
		c.Members = append(c.Members, m)
	}
	return c, nil
}
