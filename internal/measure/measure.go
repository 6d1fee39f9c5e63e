package measure

import (
	"context"
	"errors"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
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
	// Interrupted: the chain was changed, and not all was counted.
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

// glance is how often to look, between two samples, whether chains still count.
const glance = 100 * time.Millisecond

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
	for end := m.taken.Add(m.Interval); ; {
		left := time.Until(end)
		timer := time.NewTimer(min(left, glance))
		select {
		case <-ctx.Done():
			timer.Stop()
			return false
		case <-timer.C:
		}
		if left <= glance {
			return ctx.Err() == nil
		}
		for _, of := range m.hooks {
			of.recount(ctx)
		}
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
	at       time.Time         // the last sample
	ran      map[uint32]Counts // what the kernel knew then, by program
	counting *attach.Counting  // of a chain; else nil
	place    attach.Place      // where that is
	last     map[uint32]Counts // what the counters had when they were read last, by slot
	sum      map[uint32]Counts // what was counted since the last sample, by slot
	// interrupted: not all of it was.
	interrupted bool
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

// count takes what was counted of a chain, and sees to it that it counts.
func (of *meterOf) count(ctx context.Context, s *Sample) error {
	if of.counting != nil {
		if err := of.collect(); err != nil {
			return err
		}
		if !of.counting.Counts(&s.Chain) {
			of.interrupted = true
			if err := of.stop(ctx); err != nil {
				return err
			}
		}
	}
	of.fill(s)
	if of.counting != nil {
		return nil
	}
	if of.clock == 0 {
		clock, err := state.ClockTime()
		if err != nil {
			return err
		}
		of.meter.clock, s.Clock = clock, clock
	}
	of.place = of.placeOf(&s.Chain)
	return of.start(ctx)
}

// recount has a chain counted again that somebody has changed: no build of it counts
// but ours. What fails is left to the next sample.
func (of *meterOf) recount(ctx context.Context) {
	if of.counting == nil || of.counting.Current() {
		return
	}
	of.interrupted = true
	if of.collect() == nil && of.stop(ctx) == nil {
		_ = of.start(ctx)
	}
}

// start has the chain counted.
func (of *meterOf) start(ctx context.Context) (err error) {
	if of.counting, err = attach.Count(ctx, of.place); err != nil {
		return err
	}
	of.last = countsOf(of.counting.Found())
	return nil
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

func countsOf(counted map[uint32]dispatch.Counts) map[uint32]Counts {
	counts := make(map[uint32]Counts, len(counted))
	for slot, c := range counted {
		counts[slot] = Counts{
			Known: true, Runs: c.Ran(), Verdicts: c.Verdicts, Other: c.Other, Empty: c.Empty, Time: time.Duration(c.Nanos),
		}
	}
	return counts
}

// collect adds what was counted since the counters were read last.
func (of *meterOf) collect() error {
	counted, err := of.counting.Read()
	if err != nil {
		return err
	}
	now := countsOf(counted)
	if of.sum == nil {
		of.sum = map[uint32]Counts{}
	}
	for slot, c := range now {
		of.sum[slot] = of.sum[slot].plus(c.since(of.last[slot]))
	}
	of.last = now
	return nil
}

// fill moves what was counted into a sample.
func (of *meterOf) fill(s *Sample) {
	for i, m := range s.Chain.Members {
		c := of.sum[m.SlotID]
		s.Entries[i] = c
		if c.Known && !s.Whole.Known { // all packets come to the first one
			s.Whole = Counts{Known: true, Runs: c.Runs + c.Empty}
		}
		s.Whole.Time += c.Time
	}
	s.Interrupted = of.interrupted
	of.sum, of.interrupted = nil, false
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

func (c Counts) plus(d Counts) Counts {
	for v := range c.Verdicts {
		c.Verdicts[v] += d.Verdicts[v]
	}
	c.Known, c.Runs, c.Other, c.Empty, c.Time = true, c.Runs+d.Runs, c.Other+d.Other, c.Empty+d.Empty, c.Time+d.Time
	return c
}

func (c Counts) since(before Counts) Counts {
	for v := range c.Verdicts {
		c.Verdicts[v] -= before.Verdicts[v]
	}
	c.Runs, c.Other, c.Empty, c.Time = c.Runs-before.Runs, c.Other-before.Other, c.Empty-before.Empty, c.Time-before.Time
	return c
}
