package scan

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"slices"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Options say what to look for. The zero value is everything.
type Options struct {
	// NetNS is one network namespace, as for kernel.OpenNetNS; then cgroups are
	// left out. Empty: all namespaces, and all cgroups.
	NetNS string
	// BPFFS is the bpffs of the pins. It need not exist.
	BPFFS string
	// Hooks tells which hooks are wanted. Nil: all.
	Hooks func(hook.Hook) bool
}

// All returns what is attached. Hooks without a program are left out.
//
// The caller's network namespace comes first, then the others by name. In each, the
// hooks of the namespace itself come first, then its devices by index, and on a
// device the hooks in the order of hook.Hooks. Next come links without a known
// target, then cgroups, each before the cgroups in it. The last are members on a
// device or cgroup that is gone; their Target is empty.
//
// An entry with an Err says what could not be read: a hook or, if Hook is empty, a
// whole namespace or cgroup. A link without a known target has an Err, too: it is
// on a device of a namespace, or on a cgroup, that cannot be seen from here. An
// exception are netfilter links: some kernels do not tell their namespace, and then
// NetNS is zero and Err nil.
//
// All returns an error if it could read nothing at all, or if ctx ended.
func All(ctx context.Context, o Options) ([]hook.Chain, error) {
	s := &scan{Options: o, shown: map[uint32]bool{}, places: map[place]bool{}}
	if s.Hooks == nil {
		s.Hooks = func(hook.Hook) bool { return true }
	}
	if err := s.readLinks(ctx); err != nil {
		return nil, err
	}
	reader, err := attach.NewReader(o.BPFFS, s.links, s.Hooks)
	if err != nil {
		return nil, err
	}
	defer reader.Close()
	s.reader = reader
	return s.all(ctx)
}

// A scan is one look at the machine.
type scan struct {
	Options
	reader interface {
		Devices(context.Context, *kernel.NetNS) ([]hook.Chain, error)
		Cgroup(ctx context.Context, path string) []hook.Chain
		Defunct(ctx context.Context) []hook.Chain
	}
	chains []hook.Chain
	links  []kernel.LinkInfo // in the order of their ids
	// shown and places are what lost leaves out: links by their ids, and XDP links
	// by their places.
	shown  map[uint32]bool
	places map[place]bool
	// blind means that the kernel does not tell the namespaces of netfilter links.
	blind bool
}

func (s *scan) all(ctx context.Context) ([]hook.Chain, error) {
	if err := s.netNamespaces(ctx); err != nil {
		return nil, err
	}
	end := len(s.chains)
	if s.NetNS == "" {
		if err := s.cgroups(ctx); err != nil {
			return nil, err
		}
	}
	lost, err := s.lost(ctx)
	if err != nil {
		return nil, err
	}
	s.chains = slices.Insert(s.chains, end, lost...)
	if s.NetNS == "" {
		s.add(s.reader.Defunct(ctx))
	}
	s.extensions()
	return s.chains, nil
}

func (s *scan) wantsAny(pred func(hook.Hook) bool) bool {
	all := append(hook.Hooks(), hook.Shown()...)
	return slices.ContainsFunc(all, func(h hook.Hook) bool { return pred(h) && s.Hooks(h) })
}

// add adds the chains of one namespace or cgroup.
func (s *scan) add(chains []hook.Chain) {
	order := append(hook.Hooks(), hook.Shown()...)
	slices.SortStableFunc(chains, func(a, b hook.Chain) int {
		return cmp.Or(
			cmp.Compare(a.Ifindex, b.Ifindex),
			cmp.Compare(slices.Index(order, a.Hook), slices.Index(order, b.Hook)),
		)
	})
	for i := range chains {
		c := &chains[i]
		if len(c.Members) == 0 && len(c.Others) == 0 && c.DispatcherID == 0 && c.Err == nil {
			continue
		}
		if c.Pins == nil {
			c.Pins = []string{}
		}
		if c.Members == nil {
			c.Members = []hook.Member{}
		}
		s.note(c)
		s.chains = append(s.chains, *c)
	}
}

// netNamespaces reads the hooks of devices and namespaces.
func (s *scan) netNamespaces(ctx context.Context) error {
	if !s.wantsAny(func(h hook.Hook) bool { return !h.OnCgroup() }) {
		return nil
	}
	var all []*kernel.NetNS
	if s.NetNS != "" {
		ns, err := kernel.OpenNetNS(s.NetNS)
		if err != nil {
			return err
		}
		all = append(all, ns)
	} else {
		var err error
		if all, err = kernel.NetNamespaces(); err != nil {
			return err
		}
		slices.SortFunc(all[1:], func(a, b *kernel.NetNS) int { return cmp.Compare(a.ID().Name, b.ID().Name) })
	}
	for _, ns := range all {
		if ctx.Err() == nil {
			s.add(s.netNS(ctx, ns))
		}
		ns.Close()
	}
	return ctx.Err()
}

func (s *scan) netNS(ctx context.Context, ns *kernel.NetNS) []hook.Chain {
	if err := ns.Do(func() error { return nil }); err != nil {
		return []hook.Chain{{NetNS: ns.ID(), Err: err}}
	}
	var chains []hook.Chain
	if s.wantsAny(hook.Hook.OnDevice) {
		var err error
		if chains, err = s.reader.Devices(ctx, ns); err != nil {
			chains = append(chains, hook.Chain{NetNS: ns.ID(), Err: err})
		}
	}
	for _, read := range []func(context.Context, *kernel.NetNS) []hook.Chain{s.netkit, s.netfilter, s.ofNetNS} {
		chains = append(chains, read(ctx, ns)...)
	}
	return chains
}

// cgroups reads the hooks of all cgroups.
func (s *scan) cgroups(ctx context.Context) error {
	if !s.wantsAny(hook.Hook.OnCgroup) {
		return nil
	}
	paths, err := kernel.CgroupPaths()
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // not mounted
	case err != nil:
		s.add([]hook.Chain{{Err: err}})
		return nil
	}
	for _, p := range paths {
		if err := ctx.Err(); err != nil {
			return err
		}
		s.add(append(s.reader.Cgroup(ctx, p.Path), s.lsmCgroup(p)...))
	}
	return nil
}
