package scan

import (
	"context"
	"errors"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// settle calls read again while programs vanish between the listing of a hook and
// the description of the programs.
func settle(ctx context.Context, read func() error) error {
	return kernel.Retry(ctx, func() error { return kernel.Again(read()) })
}

// netkit reads what is attached to the netkit devices of a namespace.
func (s *scan) netkit(ctx context.Context, ns *kernel.NetNS) []hook.Chain {
	var want []hook.Hook
	for _, h := range []hook.Hook{hook.NetkitPrimary, hook.NetkitPeer} {
		if s.Hooks(h) {
			want = append(want, h)
		}
	}
	if want == nil {
		return nil
	}
	var chains []hook.Chain
	err := rtnl.In(ns, func(conn *rtnl.Conn) error {
		devices, err := conn.Devices()
		if err != nil {
			return err
		}
		for _, d := range devices {
			for _, h := range want {
				c := hook.Chain{Hook: h, Target: d.Name, Ifindex: d.Index, NetNS: ns.ID()}
				c.Err = settle(ctx, func() error { return queryNetkit(&c) })
				// The kernel tells what is a netkit device (netkit_dev_fetch,
				// drivers/net/netkit.c): ENXIO for other devices, EACCES for a peer,
				// because its hook belongs to the primary device, and EINVAL if the
				// kernel has no netkit.
				if errors.Is(c.Err, unix.EINVAL) {
					return nil
				}
				if errors.Is(c.Err, unix.ENXIO) || errors.Is(c.Err, unix.EACCES) || errors.Is(c.Err, unix.ENODEV) {
					break
				}
				chains = append(chains, c)
			}
		}
		return nil
	})
	if err != nil {
		chains = append(chains, hook.Chain{Hook: want[0], NetNS: ns.ID(), Err: err})
	}
	return chains
}

// queryNetkit fills in what is attached to a device of the thread's namespace.
func queryNetkit(c *hook.Chain) error {
	q, err := kernel.QueryPrograms(c.Ifindex, kernel.KindOf(c.Hook).Attach, 0)
	if err != nil {
		return kernel.Errno("query", err)
	}
	c.Revision = q.Revision
	return setMembers(c, q.Programs, q.Links)
}

func setMembers(c *hook.Chain, programs, links []uint32) error {
	c.Members = nil
	for i, id := range programs {
		m, err := member(id, links[i])
		if err != nil {
			return err
		}
		c.Members = append(c.Members, m)
	}
	return nil
}

// ofNetNS reads the hooks of a whole namespace, except netfilter.
func (s *scan) ofNetNS(ctx context.Context, ns *kernel.NetNS) []hook.Chain {
	var chains []hook.Chain
	for _, h := range []hook.Hook{hook.FlowDissector, hook.SKLookup} {
		if s.Hooks(h) {
			c := hook.Chain{Hook: h, NetNS: ns.ID()}
			c.Err = settle(ctx, func() error { return s.queryNetNS(ctx, ns, &c) })
			chains = append(chains, c)
		}
	}
	return chains
}

func (s *scan) queryNetNS(ctx context.Context, ns *kernel.NetNS, c *hook.Chain) error {
	at := kernel.KindOf(c.Hook).Attach
	q, err := kernel.QueryPrograms(ns.FD(), at, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil // a kernel without that hook
	}
	if err != nil {
		return kernel.Errno("query", err)
	}
	links, complete := s.linksOn(ns, q, at)
	if !complete {
		// A program was attached just now, or, as flow dissectors can be, without a
		// link.
		if err := s.readLinks(ctx); err != nil {
			return err
		}
		links, _ = s.linksOn(ns, q, at)
	}
	return setMembers(c, q.Programs, links)
}

// linksOn finds the links of the programs on a namespace. complete is true if each
// program has one. The query does not tell links, but it lists programs in the order
// of their links.
func (s *scan) linksOn(ns *kernel.NetNS, q *kernel.Query, at ebpf.AttachType) (ids []uint32, complete bool) {
	complete = true
	taken := map[uint32]bool{}
	for _, program := range q.Programs {
		var id uint32
		for _, l := range s.links {
			if !taken[l.ID] && l.NetNS == ns.ID().Inode && l.Attach == at && l.Program == program {
				id = l.ID
				break
			}
		}
		taken[id] = true
		ids = append(ids, id)
		complete = complete && id != 0
	}
	return ids, complete
}

// lsmCgroup shows the LSM programs that links attach to a cgroup, in the order in
// which they were attached.
func (s *scan) lsmCgroup(at kernel.CgroupPath) []hook.Chain {
	if !s.Hooks(hook.LSMCgroup) {
		return nil
	}
	c := hook.Chain{Hook: hook.LSMCgroup, Target: at.Path, CgroupID: at.ID}
	for i := range s.links {
		l := &s.links[i]
		if l.CgroupID != at.ID || l.Hook() != hook.LSMCgroup {
			continue
		}
		if m, err := member(l.Program, l.ID); err == nil { // else it is gone
			c.Members = append(c.Members, m)
		}
	}
	return []hook.Chain{c}
}
