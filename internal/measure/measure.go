package measure

import (
	"context"
	"errors"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/scan"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// Options say what is measured.
type Options struct {
	scan.Options
	// Place is the one hook to measure; nil: all that are found.
	Place *attach.Place
	// Interval is how long a sample takes.
	Interval time.Duration
	// Ready is called when the counting has begun; may be nil.
	Ready func()
}

// By is how a hook was measured.
type By string

const (
	ByNothing By = ""       // it was not
	ByChain   By = "chain"  // a dispatcher of ours counted
	ByKernel  By = "kernel" // run statistics of the programs
)

// A Sample is what happened on one hook in one interval.
type Sample struct {
	Chain   hook.Chain
	Time    time.Time // when it was taken
	Elapsed time.Duration
	By      By
	// Clock is how much of the time of each run is the clock's own.
	Clock time.Duration
	// Interrupted: the chain was changed, and counting began anew.
	Interrupted bool
	Whole       Counts   // of what the chain as a whole did
	Entries     []Counts // one for each of Chain.Members
	Err         error    // why it was not measured
}

// Counts are what one program did.
type Counts struct {
	Known    bool // it was measured
	Runs     uint64
	Verdicts [hook.Verdicts]uint64
	Other    uint64
	Empty    uint64
	Time     time.Duration
}

// cleanUp bounds how long the end of the counting may take.
const cleanUp = 10 * time.Second

// Run takes samples until ctx ends or emit returns false. The error is that
// nothing could be read at the start, that the place is gone, or that the
// counting could not be ended.
func Run(ctx context.Context, o Options, emit func([]Sample) bool) (err error) {
	m := &meter{Options: o, hooks: map[place]*meterOf{}}
	defer func() {
		// The end of ctx is how it is meant to end.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUp)
		defer cancel()
		if ctx.Err() != nil {
			err = nil
		}
		err = errors.Join(err, m.close(last))
	}()
	if _, err := m.take(ctx); err != nil {
		return err
	}
	if o.Ready != nil {
		o.Ready()
	}
	for m.wait(ctx) {
		samples, err := m.take(ctx)
		if err != nil {
			return err
		}
		if !emit(samples) {
			return nil
		}
	}
	return nil
}

// A meter measures hooks.
type meter struct {
	Options
	clock time.Duration
	stats runStats
	taken time.Time // the last samples
	hooks map[place]*meterOf
}

// A place names a hook across samples.
type place struct {
	hook    hook.Hook
	inode   uint64
	cookie  uint64
	ifindex int
	cgroup  uint64
	target  string // of what is on neither
}

func placeOf(c *hook.Chain) place {
	p := place{hook: c.Hook, inode: c.NetNS.Inode, cookie: c.NetNS.Cookie, ifindex: c.Ifindex, cgroup: c.CgroupID}
	if p.ifindex == 0 && p.cgroup == 0 {
		p.target = c.Target
	}
	return p
}

// wait returns when it is time for a sample; false at the end of ctx.
func (m *meter) wait(ctx context.Context) bool {
	timer := time.NewTimer(time.Until(m.taken.Add(m.Interval)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return ctx.Err() == nil
	}
}

// take reads all counters and begins to count what is new.
func (m *meter) take(ctx context.Context) ([]Sample, error) {
	defer func() { m.taken = time.Now() }()
	chains, err := m.look(ctx)
	if err != nil {
		return nil, err
	}
	samples := []Sample{}
	seen := map[place]bool{}
	for i := range chains {
		c := &chains[i]
		p := placeOf(c)
		if len(c.Members) == 0 && c.Err == nil && m.Place == nil || seen[p] {
			continue
		}
		seen[p] = true
		of := m.hooks[p]
		if of == nil {
			of = &meterOf{meter: m, at: time.Now()}
			m.hooks[p] = of
		}
		samples = append(samples, of.take(ctx, c))
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	var gone []error
	for p, of := range m.hooks {
		if !seen[p] {
			gone = append(gone, of.stop(ctx))
			delete(m.hooks, p)
		}
	}
	return samples, errors.Join(gone...)
}

func (m *meter) look(ctx context.Context) ([]hook.Chain, error) {
	if m.Place == nil {
		return scan.All(ctx, m.Options.Options)
	}
	c, err := attach.Read(ctx, *m.Place)
	if err != nil {
		return nil, err
	}
	return []hook.Chain{*c}, nil
}

func (m *meter) close(ctx context.Context) error {
	var errs []error
	for _, of := range m.hooks {
		errs = append(errs, of.stop(ctx))
	}
	return errors.Join(append(errs, m.stats.close())...)
}

// A meterOf measures one hook.
type meterOf struct {
	*meter
	at       time.Time // the last sample
	counting *attach.Counting
	last     map[uint32]Counts // by slot
	ran      map[uint32]Counts // by program
}

func (of *meterOf) take(ctx context.Context, c *hook.Chain) Sample {
	s := Sample{Chain: *c, Entries: make([]Counts, len(c.Members))}
	switch {
	case c.Err != nil, c.Hook.OnDevice() && c.Ifindex == 0, len(c.Members) == 0:
		s.By, s.Err = ByNothing, c.Err
	case c.Style == hook.StyleOwned:
		s.By, s.Clock = ByChain, of.clock
		s.Err = of.count(ctx, &s)
	default:
		s.By = ByKernel
		s.Err = of.statistics(&s)
	}
	if s.By != ByChain {
		s.Err = errors.Join(s.Err, of.stop(ctx))
	}
	if s.By != ByKernel {
		of.ran = nil
	}
	if s.Err != nil {
		s.By = ByNothing
	}
	s.Time = time.Now()
	s.Elapsed, of.at = s.Time.Sub(of.at), s.Time
	return s
}

// count reads the counters of a chain, after it has seen to it that they count.
func (of *meterOf) count(ctx context.Context, s *Sample) error {
	if of.counting != nil {
		if err := of.read(s); err != nil {
			return err
		}
		if of.counting.Counts(&s.Chain) {
			return nil
		}
		// Somebody has changed the chain: to begin with, no build of it counts.
		s.Interrupted = true
		if err := of.stop(ctx); err != nil {
			return err
		}
	}
	var err error
	if of.clock == 0 {
		if of.meter.clock, err = state.ClockTime(); err != nil {
			return err
		}
		s.Clock = of.clock
	}
	of.counting, err = attach.Count(ctx, of.placeOf(&s.Chain))
	if err != nil {
		return err
	}
	return of.read(&Sample{Chain: s.Chain, Entries: make([]Counts, len(s.Entries))})
}

// placeOf is where the chain is to be found by others.
func (of *meterOf) placeOf(c *hook.Chain) attach.Place {
	if of.Place != nil {
		return *of.Place
	}
	p := attach.Place{Hook: c.Hook, Target: c.Target, NetNS: c.NetNS.Name, BPFFS: of.BPFFS}
	if p.NetNS == "" {
		p.NetNS = of.NetNS
	}
	return p
}

// read fills in what was counted since it was read last.
func (of *meterOf) read(s *Sample) error {
	now, err := of.counting.Read()
	if err != nil {
		return err
	}
	last := of.last
	of.last = make(map[uint32]Counts, len(now))
	for slot, counted := range now {
		of.last[slot] = Counts{
			Known: true, Runs: counted.Ran(), Verdicts: counted.Verdicts, Other: counted.Other,
			Empty: counted.Empty, Time: time.Duration(counted.Nanos),
		}
	}
	for i, m := range s.Chain.Members { // one that came just now is not among them
		if c, ok := of.last[m.SlotID]; ok {
			s.Entries[i] = c.since(last[m.SlotID])
		}
	}
	for _, e := range s.Entries {
		if e.Known && !s.Whole.Known { // all packets come to the first one
			s.Whole = Counts{Known: true, Runs: e.Runs + e.Empty}
		}
		s.Whole.Time += e.Time
	}
	return nil
}

// statistics reads what the kernel knows of the programs.
func (of *meterOf) statistics(s *Sample) error {
	if err := of.stats.enable(); err != nil {
		return err
	}
	now := map[uint32]Counts{}
	read := func(id uint32) Counts {
		ran, ok := runsOf(id)
		if !ok {
			return Counts{}
		}
		now[id] = ran
		before, known := of.ran[id]
		if !known {
			return Counts{} // how much of it was before, nobody knows
		}
		return ran.since(before)
	}
	if s.Chain.Style == hook.StyleLibxdp {
		// Its components are no programs of their own for the kernel: freplace has put
		// them into the dispatcher.
		s.Whole = read(s.Chain.DispatcherID)
	} else {
		for i, m := range s.Chain.Members {
			if m.Program.ID != 0 && m.State == hook.StateRunning {
				s.Entries[i] = read(m.Program.ID)
			}
		}
		if s.Chain.Hook == hook.XDP {
			s.Whole = s.Entries[0]
		}
	}
	of.ran = now
	return nil
}

func (of *meterOf) stop(ctx context.Context) error {
	if of.counting == nil {
		return nil
	}
	c := of.counting
	of.counting, of.last = nil, nil
	return c.Close(ctx)
}

func (c Counts) since(before Counts) Counts {
	for v := range c.Verdicts {
		c.Verdicts[v] -= before.Verdicts[v]
	}
	c.Runs, c.Other, c.Empty, c.Time = c.Runs-before.Runs, c.Other-before.Other, c.Empty-before.Empty, c.Time-before.Time
	return c
}
