package chains

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Defunct describes the chain of a link that has lost its device. It returns nil for
// a link without a chain, and for a chain that runs on another link.
func Defunct(o *target.Opened, li kernel.LinkInfo) (*hook.Chain, error) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(li.Program))
	if err != nil {
		return nil, kernel.Errno(fmt.Sprintf("program id %d", li.Program), err)
	}
	defer prog.Close()
	chain, err := state.Find(prog)
	switch {
	case errors.Is(err, state.ErrNotOurs) && o.Pins != nil:
		return displacedAndGone(o, li)
	case errors.Is(err, state.ErrNotOurs), err == nil && (chain.Closed || runs(o, chain.ID)):
		return nil, nil
	case err != nil:
		return nil, err
	}
	c := &hook.Chain{Hook: hook.XDP, Mode: chain.LastSeen.Mode, Pins: []string{}, Members: []hook.Member{}}
	if err := viewChain(c, prog, chain, &linkRoot{id: li.ID, pins: o.Pins}, nil, o.Pins); err != nil {
		return nil, err
	}
	for i := range c.Members {
		c.Members[i].Detail = chain.LastSeen.String()
	}
	return c, nil
}

// runs reports whether a chain was attached again. Earlier owners of its members may
// still hold the old link.
func runs(o *target.Opened, chainID uint64) bool {
	for _, li := range o.Links {
		if li.Type != link.XDPType || li.Gone() {
			continue
		}
		if chain, err := ChainOf(li.Program); err == nil && chain != nil && chain.ID == chainID {
			return true
		}
	}
	return false
}

// displacedAndGone describes the members that are pinned beside a link which has lost
// both their chain and its device.
func displacedAndGone(o *target.Opened, li kernel.LinkInfo) (*hook.Chain, error) {
	folder := state.ChainFolder(li.ID, 0)
	members, err := displaced(o.Pins, folder)
	for i := range members {
		members[i].State = hook.StateDefunct
	}
	return &hook.Chain{Hook: hook.XDP, LinkID: li.ID, Pins: o.Pins.List(folder), Members: members}, err
}
