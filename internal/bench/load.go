package main

import (
	"time"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

const (
	loadPort    = 7000
	loadChanges = 2000
)

// loadSection changes chains while a member drops packets. No packet may get through.
func loadSection(b *bench, s *Section) {
	s.Title = "Changes under load"
	s.About = []string{
		"One thread sends UDP datagrams through a veth pair as fast as it can. A member drops all of them except every " +
			"16th, which goes to another port. Meanwhile the chain is changed again and again. A datagram that arrives at the " +
			"dropped port has met no filter: that must not happen once. The control detaches the filter and attaches it " +
			"again, as one had to do without links. It shows that the test sees what slips through.",
		"The longest gap is the longest time between two datagrams of the other port. Without changes it shows how evenly " +
			"this machine gives CPU time to the sender and the receiver.",
	}
	t := s.table(Table{Name: "flood", Title: "Datagrams", Unit: "each row a flood", Labels: []string{
		"changes", "per second", "sent to be dropped", "not filtered", "arrived of the others", "longest gap, ms",
	}})
	for _, f := range []flooding{
		{calm, func(p *playground, filter *dispatcher.Link, _ [2]*ebpf.Program) func(int) *dispatcher.Link {
			return func(int) *dispatcher.Link { time.Sleep(time.Millisecond); return filter }
		}},
		{"update of the filter", updating},
		{"changes of structure", restructuring},
		{control, reattaching},
	} {
		b.apart(func(b *bench) { f.run(newPlayground(b), t) })
	}
}

// Names of rows.
const (
	calm    = "no changes"
	control = "control: detach and attach"
)

// A flooding is a way to change a chain while packets flow.
type flooding struct {
	name    string
	prepare func(p *playground, filter *dispatcher.Link, drops [2]*ebpf.Program) (change func(i int) *dispatcher.Link)
}

func (f flooding) run(p *playground, t *Table) {
	changes := loadChanges
	if f.name == control {
		changes = 100 // enough to show that the test sees packets that get through
	}
	if p.quick {
		changes = 100
	}
	drops := [2]*ebpf.Program{
		testenv.DropUDPPort(p.scope, "ldt_drop_0", loadPort), testenv.DropUDPPort(p.scope, "ldt_drop_1", loadPort),
	}
	filter := p.attach(drops[0], dispatcher.Options{Name: "filter"})
	change := f.prepare(p, filter, drops)
	// Emulated machines and busy machines are slow.
	const longest = 100 * time.Second
	flood := p.Flood(p.scope, loadPort, loadPort+1)
	begin, done := time.Now(), 0
	for ; done < changes && time.Since(begin) < longest; done++ {
		if done%50 == 0 {
			p.progress("%s, %d of %d", f.name, done, changes)
		}
		filter = change(done)
	}
	took := time.Since(begin)
	sent, leaked := flood.Stop()
	_, arrived := flood.Marker()
	filter.Close()
	for i, v := range []float64{
		float64(done), float64(done) / took.Seconds(), float64(sent), float64(leaked), float64(arrived), float64(flood.LongestGap()) / 1e6,
	} {
		t.put(f.name, i, exactly(v))
	}
}

func (p *playground) attach(prog *ebpf.Program, o dispatcher.Options) *dispatcher.Link {
	o.BPFFS = p.bpffs
	l, err := dispatcher.Attach(p.ctx, p.target, dispatcher.Program(prog), o)
	p.must(err)
	p.Cleanup(func() { l.Close() })
	return l
}

// updating replaces the filter's program.
func updating(p *playground, filter *dispatcher.Link, drops [2]*ebpf.Program) func(int) *dispatcher.Link {
	return func(i int) *dispatcher.Link {
		p.must(filter.Update(p.ctx, dispatcher.Program(drops[(i+1)%2])))
		return filter
	}
}

// restructuring moves another member before the filter and behind it again, and changes its continue set.
func restructuring(p *playground, filter *dispatcher.Link, _ [2]*ebpf.Program) func(int) *dispatcher.Link {
	mover := p.attach(p.one, dispatcher.Options{Name: "mover"})
	return func(i int) *dispatcher.Link {
		p.must(mover.Set(p.ctx, hook.Settings{Priority: 10 + 80*(i%2), ContinueOn: hook.VerdictSet(4 + i%4)})) // always with pass
		return filter
	}
}

// reattaching detaches and attaches, as everybody did before links.
func reattaching(p *playground, filter *dispatcher.Link, drops [2]*ebpf.Program) func(int) *dispatcher.Link {
	return func(int) *dispatcher.Link {
		p.must(filter.Detach(p.ctx))
		p.must(filter.Close())
		filter = p.attach(drops[0], dispatcher.Options{Name: "filter"})
		return filter
	}
}
