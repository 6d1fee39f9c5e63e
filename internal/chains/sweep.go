package chains

import (
	"errors"
	"io/fs"

	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// Sweep removes the pins of members that are in no chain, and of closed chains. It
// keeps chains that have lost their device, and whatever it cannot read.
func Sweep(l *state.Locked) {
	folders, err := l.Chains()
	if err != nil {
		return
	}
	for _, folder := range folders {
		r, err := openPinnedRoot(l.Pins, folder)
		switch {
		case err == nil:
			// The chain had just got its link when the process died.
			if to := state.ChainFolder(r.id, 0); folder != to && l.Move(folder, to, nil) == nil {
				folder = to
			}
			sweepChain(l, folder, r)
			r.Close()
		case errors.Is(err, fs.ErrNotExist) && !Alive(folder):
			_ = l.RemoveChain(folder)
		}
	}
}

// Alive reports whether the chain of a folder without a root pin still exists. When
// in doubt it returns true.
func Alive(folder string) bool {
	linkID, chainID := state.ParseChainFolder(folder)
	switch {
	case linkID != 0:
		return kernel.LinkMayExist(linkID)
	case chainID != 0:
		for prog, err := range kernel.Programs() {
			if err != nil {
				return true
			}
			c, err := state.Find(prog)
			if err == nil && c.ID == chainID || err != nil && !errors.Is(err, state.ErrNotOurs) {
				return true // in doubt: a chain of a later version, with an unknown id
			}
		}
		return false
	}
	return true
}

func sweepChain(l *state.Locked, folder string, r *linkRoot) {
	id, ifindex, err := r.state()
	if err != nil {
		return
	}
	l.DropDispatchers(folder, id)
	prog, err := r.open(id)
	if err != nil {
		return
	}
	defer prog.Close()
	chain, err := find(r, prog)
	if err != nil {
		return
	}
	if chain.Closed {
		if ifindex != 0 && r.Release(prog) != nil {
			return
		}
		_ = l.RemoveChain(folder)
		return
	}
	PinDispatcher(r)
	if ifindex != 0 {
		_ = unwatch(r, prog, chain)
	}
	members, err := l.Members(folder)
	if err != nil {
		return
	}
	for _, member := range members {
		if chain.Named(member) < 0 {
			_ = l.Remove(folder, member)
		}
	}
	if members, err = l.Members(folder); err == nil && len(members) == 0 {
		_ = l.RemoveChain(folder)
	}
}
