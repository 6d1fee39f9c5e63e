package scan

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// readLinks lists all links anew. It tries again while a link is being made: then
// the link has an id, but cannot be opened (bpf_link_by_id, kernel/bpf/syscall.c).
func (s *scan) readLinks(ctx context.Context) error {
	return kernel.Retry(ctx, func() (err error) {
		s.links, err = kernel.AllLinks()
		return err
	})
}

// member describes an entry; linkID is 0 if it has no link. The error is
// fs.ErrNotExist if the program is gone.
func member(program, linkID uint32) (hook.Member, error) {
	m := hook.Member{Kind: hook.KindLegacy, State: hook.StateRunning, LinkID: linkID}
	if linkID != 0 {
		m.Kind = hook.KindForeign
	}
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(program))
	if err != nil {
		return m, kernel.Errno(fmt.Sprintf("program id %d", program), err)
	}
	defer p.Close()
	m.Program = kernel.Describe(p)
	m.Name = m.Program.Name
	return m, nil
}

// A place is a program on a device with that index, in any namespace.
type place struct {
	program uint32
	ifindex int
}

// note remembers which links a chain shows.
func (s *scan) note(c *hook.Chain) {
	s.shown[c.LinkID] = true
	for _, m := range c.Members {
		s.shown[m.LinkID] = true
		// If devices of several namespaces have the same index and program it is not
		// known which link is on which device.
		if c.Hook == hook.XDP {
			s.places[place{m.Program.ID, c.Ifindex}] = true
		}
	}
}

// errNoPlace is the error of a link that is listed by itself.
var errNoPlace = errors.New("its target was not found: it is in a network namespace, or on a cgroup, that cannot be seen from here")

// lost returns what is attached by links that no chain shows.
func (s *scan) lost(ctx context.Context) ([]hook.Chain, error) {
	var chains []hook.Chain
	before := s.links
	if !slices.ContainsFunc(before, s.isLost) {
		return nil, nil
	}
	// A link may be gone or moved meanwhile.
	if err := s.readLinks(ctx); err != nil {
		return nil, err
	}
	for _, l := range before {
		still := func(now kernel.LinkInfo) bool {
			return now.ID == l.ID && now.Program == l.Program && now.Ifindex == l.Ifindex && now.CgroupID == l.CgroupID && now.NetNS == l.NetNS
		}
		if !s.isLost(l) || !slices.ContainsFunc(s.links, still) {
			continue
		}
		m, err := member(l.Program, l.ID)
		if err != nil {
			continue // gone
		}
		c := hook.Chain{
			Hook: l.Hook(), Ifindex: l.Ifindex, CgroupID: l.CgroupID,
			NetNS: hook.NetNS{Inode: l.NetNS}, Pins: []string{}, Members: []hook.Member{m}, Err: errNoPlace,
		}
		switch l.Type {
		case link.XDPType:
			c.LinkID, c.Members[0].LinkID = l.ID, 0 // as everywhere on XDP
		case link.NetfilterType:
			c.Members[0].Detail = netfilterPlace(l.Netfilter)
			if s.blind {
				c.Err = nil
			}
		}
		chains = append(chains, c)
	}
	return chains, nil
}

// isLost tells whether a link is attached and wanted, but no chain shows it.
func (s *scan) isLost(l kernel.LinkInfo) bool {
	h := l.Hook()
	switch {
	case h == "" || !s.Hooks(h) || s.shown[l.ID] || l.Gone():
		return false
	case s.NetNS == "":
		return l.Type != link.XDPType || !s.places[place{l.Program, l.Ifindex}]
	}
	// Other links may be in namespaces that were not asked for.
	return l.Type == link.NetfilterType && s.blind
}
