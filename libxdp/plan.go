package libxdp

import (
	"cmp"
	"errors"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// plan is a chain to build.
type plan struct {
	config  Config
	mode    hook.Mode
	entries []*entry // in run order once it is sorted
}

// entry is a program of a plan, loaded or not loaded yet.
type entry struct {
	name   string
	config ProgramConfig
	prog   *ebpf.Program // nil when it is not loaded
	source *loader       // nil for a program that is in the chain already
	was    Member        // its member, when it is in the chain already
}

// loader loads a source once, however often the change is tried.
type loader struct {
	Source
	prog *ebpf.Program
}

// plan returns the chain as it is. Like libxdp it relinks pinned programs that
// lost their link, and leaves out slots about which nothing is known.
func (s *snapshot) plan() *plan {
	p := &plan{config: s.chain.Config, mode: s.mode}
	for slot, m := range s.chain.Members {
		if s.parts[slot].prog != nil {
			p.entries = append(p.entries, &entry{name: m.Name, config: s.chain.Config.Programs[slot], prog: s.parts[slot].prog, was: m})
		}
	}
	return p
}

// rank returns the rank that decides the entry's position.
func (e *entry) rank() (rank, error) {
	r := rank{Priority: e.config.Priority, Name: e.name, Loaded: e.source == nil}
	if e.source != nil {
		if s, ok := e.source.Source.(interface{ instructions() int }); ok {
			r.Instructions = s.instructions()
		}
		return r, nil
	}
	info, err := e.prog.Info()
	if err != nil {
		return r, kernel.Errno("program of a member", err)
	}
	r.Tag = info.Tag
	since, _ := info.LoadTime()
	r.LoadTime = uint64(since)
	return r, nil
}

// sort puts the entries into libxdp's order, completes the configuration, and
// makes the checks that do not need the kernel.
func (p *plan) sort() error {
	if len(p.entries) > MaxMembers {
		return hook.Because(hook.ErrChainFull, "a dispatcher of libxdp's runs %d programs at most", MaxMembers)
	}
	ranks := map[*entry]rank{}
	for _, e := range p.entries {
		var err error
		if ranks[e], err = e.rank(); err != nil {
			return err
		}
	}
	slices.SortStableFunc(p.entries, func(a, b *entry) int { return ranks[a].compare(ranks[b]) })
	p.config.Programs = nil
	p.config.Frags = p.config.Version > 1
	for _, e := range p.entries {
		if p.config.DevBound {
			e.config.Flags |= unix.BPF_F_XDP_DEV_BOUND_ONLY
		}
		p.config.Frags = p.config.Frags && e.config.Flags&unix.BPF_F_XDP_HAS_FRAGS != 0
		p.config.Programs = append(p.config.Programs, e.config)
	}
	return nil
}

// built is a dispatcher with its components that is not on the device yet. It
// does not own the programs.
type built struct {
	prog  *ebpf.Program
	links []link.Link
	progs []*ebpf.Program
}

func (b *built) close() {
	b.prog.Close()
	for _, l := range b.links {
		l.Close()
	}
}

// build loads the dispatcher of a sorted plan and attaches the components.
func (s *site) build(p *plan, ifindex int) (*built, error) {
	var prog *ebpf.Program
	err := s.ns.Do(func() (err error) { // which has the index
		prog, err = newDispatcher(p.config, ifindex)
		if p.config.Frags && errors.Is(err, unix.EINVAL) { // before Linux 5.18
			p.config.Frags = false
			prog, err = newDispatcher(p.config, ifindex)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	b := &built{prog: prog}
	for n, e := range p.entries {
		stub := stubName(n, len(p.entries))
		if err := b.add(e, stub); err != nil {
			b.close()
			return nil, err
		}
	}
	return b, nil
}

// add replaces a stub by a component.
func (b *built) add(e *entry, stub string) (err error) {
	prog := e.prog
	if l := e.source; l != nil {
		if l.prog == nil {
			if l.prog, err = l.Load(b.prog, stub); err != nil {
				return err
			}
		}
		prog = l.prog
	}
	l, err := linkComponent(prog, b.prog, stub)
	if err != nil {
		return err
	}
	b.links, b.progs = append(b.links, l), append(b.progs, prog)
	return nil
}

// view returns the chain that was built.
func (p *plan) view(dev rtnl.Device, b *built, f folder) (*Chain, error) {
	c := &Chain{
		Device: dev.Name, Ifindex: dev.Index, Mode: p.mode, Config: p.config, Pins: []string{}, Members: []Member{},
	}
	if b != nil {
		c.Dispatcher = kernel.Describe(b.prog)
		c.Folder = f.of(dev.Index, c.Dispatcher.ID)
	}
	for n, e := range p.entries {
		m := Member{Name: e.name, Slot: n, Program: e.was.Program}
		m.configure(e.config)
		if b != nil {
			m.Program = kernel.Describe(b.progs[n])
			info, err := b.links[n].Info()
			if err != nil {
				return nil, kernel.Errno("link of a member", err)
			}
			m.LinkID = uint32(info.ID)
		}
		c.Members = append(c.Members, m)
	}
	return c, nil
}

// find returns the entry that ref names.
func (p *plan) find(ref hook.Ref) (*entry, error) {
	c := &Chain{}
	for _, e := range p.entries {
		c.Members = append(c.Members, e.was)
	}
	m, err := c.Find(ref)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(p.entries, func(e *entry) bool { return e.was.Slot == m.Slot })
	return p.entries[i], nil
}

// configure changes what settings ask for, and keeps the rest.
func (p *ProgramConfig) configure(s hook.Settings) {
	p.Priority = cmp.Or(uint32(s.Priority), p.Priority)
	if s.ContinueOn != 0 {
		p.Actions = uint32(s.ContinueOn &^ hook.Never)
	}
}

func (p *ProgramConfig) setFrags(frags bool) {
	p.Flags &^= hasFrags
	if frags {
		p.Flags |= hasFrags
	}
}

// checkSettings refuses settings that libxdp does not have.
func checkSettings(s hook.Settings) error {
	if err := s.Check(); err != nil {
		return hook.Because(hook.ErrUsage, "%w", err)
	}
	if s.OnMissing != 0 && s.OnMissing != hook.MissingContinue {
		return hook.Because(hook.ErrUsage, "on-missing %v: a dispatcher of libxdp's always goes on where a program is missing", s.OnMissing)
	}
	return nil
}
