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

// readLinks lists all links anew. It tries again while a link is in the making:
// that has an id, but cannot be opened (bpf_link_by_id, kernel/bpf/syscall.c).
func (s *scan) readLinks(ctx context.Context) error {
	return kernel.Retry(ctx, func() (err error) {
		s.links, err = kernel.AllLinks()
		return err
	})
}

// link returns the first of the links that match and are not taken, and takes
// it; 0 when there is none.
func (s *scan) link(taken map[uint32]bool, match func(*kernel.LinkInfo) bool) uint32 {
	for i := range s.links {
		if l := &s.links[i]; !taken[l.ID] && match(l) {
			taken[l.ID] = true
			return l.ID
		}
	}
	return 0
}

// member describes an entry; linkID is 0 when it has no link. fs.ErrNotExist
// when the program is gone.
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
	info, err := p.Info()
	if err != nil {
		return m, kernel.Errno(fmt.Sprintf("program id %d", program), err)
	}
	m.Name, m.Program = info.Name, kernel.DescribeInfo(info)
	return m, nil
}

// A place is where an XDP program is on a device.
type place struct {
	program uint32
	ifindex int
}

// note remembers which links a chain shows.
func (s *scan) note(c *hook.Chain) {
	s.shown[c.LinkID] = true
	for _, m := range c.Members {
		s.shown[m.LinkID] = true
		// Of devices with the same index and program in several namespaces it is
		// not known which link is whose.
		if c.Hook == hook.XDP {
			s.places[place{m.Program.ID, c.Ifindex}] = true
		}
	}
}

// errNoPlace is why a link is listed by itself.
var errNoPlace = errors.New("its place was not found: it is in a network namespace, or on a cgroup, that cannot be seen from here")

// lost returns what is attached by links that no chain shows.
func (s *scan) lost(ctx context.Context) ([]hook.Chain, error) {
	var chains []hook.Chain
	before := s.links
	if !slices.ContainsFunc(before, s.isLost) {
		return nil, nil
	}
	// Some may have gone or moved since.
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

// isLost tells whether a link is attached and wanted, but not shown.
func (s *scan) isLost(l kernel.LinkInfo) bool {
	h := l.Hook()
	switch {
	case h == "" || !s.Hooks(h) || s.shown[l.ID] || l.Gone():
		return false
	case s.NetNS == "":
		return l.Type != link.XDPType || !s.places[place{l.Program, l.Ifindex}]
	}
	// Of the others in other namespaces nothing was asked.
	return l.Type == link.NetfilterType && s.blind
}
