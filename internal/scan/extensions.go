package scan

import (
	"context"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Extensions adds to chains that were read one by one what freplace has put in the
// place of functions. It goes through all links.
func Extensions(ctx context.Context, chains []hook.Chain) error {
	s := &scan{chains: chains}
	if err := s.readLinks(ctx); err != nil {
		return err
	}
	s.extensions()
	return nil
}

// extensions adds to the chains what freplace has put in the place of functions, by
// the links that are known.
func (s *scan) extensions() {
	links := map[uint32][]kernel.LinkInfo{} // by the program that they extend
	for _, l := range s.links {
		if l.Extends != 0 {
			links[l.Extends] = append(links[l.Extends], l)
		}
	}
	if len(links) == 0 {
		return // as nearly always
	}
	for i := range s.chains {
		c := &s.chains[i]
		c.Extensions = extensionsOf(c.DispatcherID, links[c.DispatcherID])
		for j := range c.Members {
			m := &c.Members[j]
			m.Extensions = extensionsOf(m.Program.ID, links[m.Program.ID])
		}
		attribute(c)
	}
}

// attribute leaves out the extensions that are members of libxdp's, gives sealed
// members theirs, and marks the members that packets do not meet.
func attribute(c *hook.Chain) {
	var others []hook.Extension // that are not about one member
	for _, x := range c.Extensions {
		about := false
		for i := range c.Members {
			m := &c.Members[i]
			switch {
			case m.Kind == hook.KindLibxdp && (m.LinkID == x.LinkID || m.Program.ID == x.Program.ID):
				about = true // it is the member
			case m.Sealed && m.Program.Name == x.Function && !x.Main:
				about = true // its function in the dispatcher
				mine := x
				mine.Main = true
				m.Extensions = append(m.Extensions, mine)
				bypass(m)
			}
		}
		if !about {
			others = append(others, x)
		}
	}
	c.Extensions = others
	for i := range c.Members {
		// What is in a slot is tail-called, past the jump that freplace has written at
		// the beginning of a main function.
		m := &c.Members[i]
		if c.Bypassed() || c.DispatcherID == 0 && slices.ContainsFunc(m.Extensions, func(x hook.Extension) bool { return x.Main }) {
			bypass(m)
		}
	}
}

func bypass(m *hook.Member) {
	if m.State == hook.StateRunning {
		m.State = hook.StateBypassed
	}
}

// extensionsOf describes the links that extend a program.
func extensionsOf(program uint32, links []kernel.LinkInfo) []hook.Extension {
	if len(links) == 0 {
		return nil
	}
	target, err := ebpf.NewProgramFromID(ebpf.ProgramID(program))
	if err != nil {
		return nil // gone
	}
	defer target.Close()
	var list []hook.Extension
	for _, l := range links {
		m, err := member(l.Program, l.ID)
		if err != nil {
			continue // gone
		}
		x := hook.Extension{LinkID: l.ID, Program: m.Program}
		x.Function, x.Main = function(target, l.Function)
		list = append(list, x)
	}
	return list
}

// function names a function of a program, as far as that can be told, and tells
// whether it is the main one.
func function(prog *ebpf.Program, id btf.TypeID) (name string, main bool) {
	handle, err := prog.Handle()
	if err != nil {
		return "", false
	}
	defer handle.Close()
	types, err := handle.Spec(nil)
	if err != nil {
		return "", false
	}
	fn, err := types.TypeByID(id)
	if err != nil {
		return "", false
	}
	name = fn.TypeName()
	info, err := prog.Info()
	if err != nil {
		return name, false
	}
	functions, err := info.FuncInfos()
	return name, err == nil && len(functions) > 0 && functions[0].Func.Name == name
}
