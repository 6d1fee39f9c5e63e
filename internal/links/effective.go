package links

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/target"
	"golang.org/x/sys/unix"
)

// EffectiveOn describes what runs for the target's cgroup, also from the cgroups above.
func EffectiveOn(o *target.Opened) (*hook.Chain, error) { return look(o, (*opened).effective) }

// EffectiveBelow is EffectiveOn for the target's cgroup, and then for each cgroup below
// that has programs of its own. It also tells which programs of the cgroups above do not
// run there.
func EffectiveBelow(o *target.Opened) ([]hook.Chain, error) { return look(o, (*opened).effectiveBelow) }

func (op *opened) effectiveBelow() ([]hook.Chain, error) {
	c, err := op.withOverridden()
	if err != nil {
		return nil, err
	}
	chains := []hook.Chain{*c}
	all, err := kernel.CgroupPaths()
	if err != nil {
		return nil, err
	}
	for _, below := range all {
		if !strings.HasPrefix(below.Path, strings.TrimSuffix(op.cgroup.Path, "/")+"/") {
			continue
		}
		c, err := op.effectiveIn(below.Path)
		switch {
		case errors.Is(err, fs.ErrNotExist): // the cgroup is gone meanwhile
		case err != nil:
			return nil, err
		case c != nil:
			chains = append(chains, *c)
		}
	}
	return chains, nil
}

// at returns the opened target with another cgroup.
func (op *opened) at(cg *kernel.Cgroup) *opened {
	other := *op
	other.cgroup = cg
	return &other
}

// effectiveIn is withOverridden for the cgroup at path; nil if it has no programs of its own.
func (op *opened) effectiveIn(path string) (*hook.Chain, error) {
	cg, err := kernel.OpenCgroup(path)
	if err != nil {
		return nil, err
	}
	defer cg.Close()
	below := op.at(cg)
	q, err := below.query(0)
	if err != nil || len(q.Programs) == 0 {
		return nil, err
	}
	return below.withOverridden()
}

// withOverridden is effective, and the program above that does not run for a cgroup because
// that has programs of its own.
func (op *opened) withOverridden() (*hook.Chain, error) {
	c, err := op.effective()
	if err != nil || !slices.ContainsFunc(c.Members, func(m hook.Member) bool { return m.From == op.cgroup.Path }) {
		return c, err
	}
	prog, where, err := overridable(op.cgroup, op.Hook)
	if err == nil && prog.ID != 0 {
		c.Members = append(c.Members, hook.Member{Name: prog.Name, Kind: hook.KindLegacy, State: hook.StateOverridden, Program: prog, From: where})
	}
	return c, err
}

func (op *opened) effective() (*hook.Chain, error) {
	q, err := op.query(unix.BPF_F_QUERY_EFFECTIVE)
	if err != nil {
		return nil, err
	}
	known := *op.Opened
	if known.Links, err = kernel.AllLinks(); err != nil {
		return nil, err
	}
	above, err := op.cgroup.Ancestors()
	if err != nil {
		return nil, err
	}
	defer kernel.CloseCgroups(above)
	c := &hook.Chain{Hook: op.Hook, Target: op.cgroup.Path, CgroupID: op.cgroup.ID, Pins: []string{}, Members: []hook.Member{}}
	var from []hook.Member
	for _, cg := range above {
		at := op.at(cg)
		at.Opened = &known
		part, err := at.read()
		if err != nil {
			return nil, err
		}
		c.Pins = append(c.Pins, part.Pins...)
		for _, m := range part.Members {
			m.From = cg.Path
			from = append(from, m)
		}
	}
	// The query returns programs only. Their members are found from the cgroup
	// upwards: in run order, except for programs with BPF_F_PREORDER.
	for _, id := range q.Programs {
		m := hook.Member{Kind: hook.KindLegacy, State: hook.StateRunning, Program: target.ProgramOf(id)}
		m.Name = m.Program.Name
		if i := slices.IndexFunc(from, func(f hook.Member) bool { return f.Program.ID == id }); i >= 0 {
			m = from[i]
			from = slices.Delete(from, i, i+1)
		} else if unseen, err := op.unseen(id, known.Links); err != nil {
			return nil, err
		} else if unseen != nil {
			m = *unseen
		}
		c.Members = append(c.Members, m)
	}
	return c, nil
}

// unseen returns the entry of a program that runs for the cgroup and is on none that can be
// seen: it is above the root of a cgroup namespace, or of a mount of a part of the tree. nil if no link carries it, or
// several on such cgroups do, of which it cannot be known which is above.
func (op *opened) unseen(program uint32, links []kernel.LinkInfo) (*hook.Member, error) {
	links = slices.DeleteFunc(slices.Clone(links), func(l kernel.LinkInfo) bool {
		return l.Hook() != op.Hook || l.Program != program || l.Gone()
	})
	if len(links) == 0 {
		return nil, nil
	}
	seen, err := kernel.CgroupPaths()
	if err != nil {
		return nil, err
	}
	links = slices.DeleteFunc(links, func(l kernel.LinkInfo) bool {
		return slices.ContainsFunc(seen, func(c kernel.CgroupPath) bool { return c.ID == l.CgroupID })
	})
	if len(links) != 1 {
		return nil, nil
	}
	e, err := op.names.entry(op.Hook, links[0].Attach, program, links[0].ID)
	if err != nil {
		return nil, err
	}
	m := viewEntry(e)
	m.From = fmt.Sprintf("a cgroup above /, id %d", links[0].CgroupID)
	return &m, nil
}
