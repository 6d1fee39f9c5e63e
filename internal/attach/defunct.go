package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// Defunct returns the members whose device or cgroup is gone, and that somebody
// still holds: a process or a pin.
func (r *Reader) Defunct(ctx context.Context) []hook.Chain {
	var chains []hook.Chain
	for _, li := range r.links {
		if !li.Gone() || !r.want(li.Hook()) {
			continue
		}
		var c *hook.Chain
		err := kernel.Retry(ctx, func() (err error) {
			switch li.Type {
			case link.XDPType:
				c, err = r.defunctChain(li)
			case link.TCXType, link.CgroupType:
				c, err = r.defunctMember(li)
			}
			return err
		})
		switch {
		case errors.Is(err, fs.ErrNotExist): // gone meanwhile
		case err != nil:
			chains = append(chains, hook.Chain{Hook: li.Hook(), Pins: []string{}, Members: []hook.Member{}, Err: fmt.Errorf("link %d, of what is gone: %w", li.ID, err)})
		case c != nil && len(c.Members) > 0:
			chains = append(chains, *c)
		}
	}
	return chains
}

// defunctChain returns nil for a link that carries no chain.
func (r *Reader) defunctChain(li LinkInfo) (*hook.Chain, error) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(li.Program))
	if err != nil {
		return nil, kernel.Errno(fmt.Sprintf("program id %d", li.Program), err)
	}
	defer prog.Close()
	chain, err := state.Find(prog)
	switch {
	case errors.Is(err, state.ErrNotOurs) && r.pins != nil:
		return r.displacedAndGone(li)
	case errors.Is(err, state.ErrNotOurs), err == nil && (chain.Closed || r.runs(chain.ID)):
		return nil, nil
	case err != nil:
		return nil, err
	}
	c := &hook.Chain{Hook: hook.XDP, Mode: chain.LastSeen.Mode, Pins: []string{}, Members: []hook.Member{}}
	if err := viewChain(c, prog, chain, li.ID, r.pins); err != nil {
		return nil, err
	}
	for i := range c.Members {
		c.Members[i].Detail = wasOn(chain.LastSeen)
	}
	return c, nil
}

// runs tells whether a chain was attached again. Who held its members before may
// still have the old link.
func (r *Reader) runs(chainID uint64) bool {
	for _, li := range r.links {
		if li.Type != link.XDPType || li.Gone() {
			continue
		}
		if chain, err := chainOf(li.Program); err == nil && chain != nil && chain.ID == chainID {
			return true
		}
	}
	return false
}

// displacedAndGone returns the members that are pinned beside a link that does
// not carry their chain any more, on no device any more.
func (r *Reader) displacedAndGone(li LinkInfo) (*hook.Chain, error) {
	folder := state.ChainFolder(li.ID, 0)
	members, err := displaced(r.pins, folder)
	for i := range members {
		members[i].State = hook.StateDefunct
	}
	return &hook.Chain{Hook: hook.XDP, LinkID: li.ID, Pins: r.pins.List(folder), Members: members}, err
}

// defunctMember returns nil for a link that is no member.
func (r *Reader) defunctMember(li LinkInfo) (*hook.Chain, error) {
	h := li.Hook()
	rec, err := r.names.record(li.Attach, li.ID)
	if err != nil {
		return nil, err
	}
	name, pinned, err := r.names.pin(h, li.ID)
	if err != nil {
		return nil, err
	}
	if rec == nil && !pinned || rec != nil && rec.MovedTo != 0 {
		return nil, nil
	}
	e := entry{prog: li.Program, link: li.ID, name: name, rec: rec, pinned: pinned}
	c := &hook.Chain{Hook: h, Pins: []string{}}
	if rec != nil {
		e.name = rec.Name
	}
	m := viewEntry(e)
	m.State = hook.StateDefunct
	if rec != nil {
		m.Detail = wasOn(rec.LastSeen)
	}
	if pinned {
		c.Pins = append(c.Pins, r.pins.List(state.LinkFolder(h, li.ID))...)
	}
	c.Members = []hook.Member{m}
	return c, nil
}

func wasOn(home state.LastSeen) string {
	if home.Target == "" {
		return ""
	}
	return "was on " + home.Target
}
