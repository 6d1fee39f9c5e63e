package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/scan"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// again is the time between the two looks at the state.
const again = 100 * time.Millisecond

// Look does all checks, with the pins of the bpffs at that path. The only error is the
// end of ctx.
func Look(ctx context.Context, bpffs string) ([]hook.Finding, error) {
	found := machine{bpffs: bpffs, read: readFile}.look(ctx)
	drifts, err := lookAtState(ctx, bpffs)
	if err == nil && len(drifts) > 0 {
		// A process may be in the middle of a change. What it leaves half done is gone
		// or different at the second look.
		var still []hook.Finding
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(again):
			still, err = lookAtState(ctx, bpffs)
		}
		drifts = slices.DeleteFunc(drifts, func(f hook.Finding) bool { return !slices.Contains(still, f) })
	}
	if err != nil {
		return nil, err
	}
	found = append(found, drifts...)
	for _, c := range stateChecks {
		if !slices.ContainsFunc(drifts, func(f hook.Finding) bool { return f.Check == c.name }) {
			found = append(found, hook.Finding{Check: c.name, Level: hook.LevelOK, Text: c.good})
		}
	}
	return found, nil
}

// stateChecks are the checks of the state, each with its text for when it finds
// nothing.
var stateChecks = []struct{ name, good string }{
	{"leftover", "no process died while it made or removed pins"},
	{"move", "no move was left unfinished"},
	{"defunct", "no pins and links of a device or cgroup that is gone"},
	{"orphan", "all pins belong to something that is attached"},
	{"incomplete", "no pins were removed by hand"},
	{"lock", "no process keeps the lock of the pins"},
	{"access", "only root may use the pins"},
	{"unreadable", "all could be read"},
	{"closed", "no chain without members was left on a device"},
	{"displaced", "the chains run where they were attached"},
	{"overridden", "no program of a cgroup has switched off one of a cgroup above"},
	{"twice", "no program of a member runs a second time without its member"},
	{"extended", "freplace has put nothing in the place of a member's or a dispatcher's functions"},
	{"unprotected", "links hold all chains"},
	{"watched", "no dispatcher counts for somebody who is gone"},
	{"empty", "no slot has lost its owner"},
	{"unpinned", "the members that shall outlive their process are pinned"},
	{"order", "the members are in the order of their priorities"},
	{"priority", "the priorities of all members are known"},
	{"in-front", "nothing of others runs before the members"},
	{"tail-calls", "no member can use up the tail calls of those after it"},
}

// An exam is one look at the state.
type exam struct {
	bpffs   string
	pins    *state.Pins // nil without a bpffs
	chains  []hook.Chain
	links   map[uint32]kernel.LinkInfo
	loaded  map[uint32]*state.Chain // by the id of the dispatcher
	later   map[uint32]error        // why a chain is not in loaded: it is damaged, or of a later version
	movedTo map[uint32]uint32       // the link that has taken the place of another
	found   []hook.Finding
}

// add adds a finding, unless another check has already found the same.
func (e *exam) add(f hook.Finding) {
	if !slices.Contains(e.found, f) {
		e.found = append(e.found, f)
	}
}

// drift adds a finding about the pins. An empty mend means that no command mends it.
func (e *exam) drift(check, mend, format string, args ...any) {
	e.add(hook.Finding{Check: check, Level: hook.LevelDrift, Mend: mend, Text: fmt.Sprintf(format, args...)})
}

func lookAtState(ctx context.Context, bpffs string) ([]hook.Finding, error) {
	e := &exam{bpffs: bpffs, links: map[uint32]kernel.LinkInfo{}, movedTo: map[uint32]uint32{}}
	var err error
	if e.pins, err = state.OpenPins(bpffs); err != nil && !errors.Is(err, fs.ErrNotExist) {
		// Nothing reads pins that others can change, so nothing else can be told.
		e.add(hook.Finding{Check: "access", Level: hook.LevelBroken, Text: oneLine(err)})
		return e.found, nil
	}
	if err := e.read(ctx); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		// Without the list, nothing can be said about the pins.
		e.add(hook.Finding{Check: "unreadable", Level: hook.LevelBroken, Text: "what is attached cannot be read: " + oneLine(err)})
		return e.found, nil
	}
	e.lookAtPins()
	e.unlisted()
	for i := range e.chains {
		e.chain(&e.chains[i])
	}
	return e.found, nil
}

func (e *exam) read(ctx context.Context) (err error) {
	if e.chains, err = scan.All(ctx, scan.Options{BPFFS: e.bpffs}); err != nil {
		return err
	}
	links, err := kernel.AllLinks()
	if err != nil {
		return err
	}
	for _, l := range links {
		e.links[l.ID] = l
	}
	if err := e.readMoves(); err != nil {
		return err
	}
	e.loaded, e.later, err = loadedChains()
	return err
}
