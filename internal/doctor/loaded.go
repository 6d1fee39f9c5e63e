package doctor

import (
	"errors"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// loadedChains returns the chains of all loaded dispatchers. For damaged dispatchers
// and dispatchers of later versions, later says why they cannot be read.
func loadedChains() (chains map[uint32]*state.Chain, later map[uint32]error, err error) {
	chains, later = map[uint32]*state.Chain{}, map[uint32]error{}
	for prog, err := range kernel.Programs() {
		if err != nil {
			return nil, nil, err
		}
		switch c, err := state.Find(prog); {
		case err == nil:
			chains[kernel.ProgramID(prog)] = c
		case !errors.Is(err, state.ErrNotOurs):
			later[kernel.ProgramID(prog)] = err
		}
	}
	return chains, later, nil
}

func (e *exam) isLoaded(chainID uint64) bool {
	for _, c := range e.loaded {
		if c.ID == chainID {
			return true
		}
	}
	return false
}

// unlisted looks for the devices of chains without members and of chains of later
// versions: the list of what is attached does not have them.
func (e *exam) unlisted() {
	any := len(e.later) > 0
	for _, c := range e.loaded {
		any = any || c.Closed
	}
	if !any {
		return
	}
	all, err := kernel.NetNamespaces()
	if err != nil {
		e.drift("unreadable", "", "%s", oneLine(err))
		return
	}
	for _, ns := range all {
		_ = rtnl.In(ns, func(conn *rtnl.Conn) error {
			devices, err := conn.Devices()
			for _, d := range devices {
				if on, ok := d.Software(); ok {
					e.carries(on.Program, &hook.Chain{Hook: hook.XDP, Target: d.Name, NetNS: ns.ID()})
				}
			}
			return err
		})
		ns.Close()
	}
}

// carries looks at the program on a device.
func (e *exam) carries(program uint32, c *hook.Chain) {
	if c.Err = e.later[program]; c.Err != nil {
		e.unreadable(c)
	}
	if chain := e.loaded[program]; chain != nil && chain.Closed {
		f := at(c, "", "closed", hook.LevelDrift, "a chain without members is left on the device: the process that detached the last one died before the end; it passes everything")
		f.Mend = e.on(c, kernel.Flags{"--all"}, "detach")
		e.add(f)
	}
}
