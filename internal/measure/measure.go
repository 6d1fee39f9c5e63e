package measure

import (
	"context"
	"io"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/attach"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/scan"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Options say what to measure.
type Options struct {
	scan.Options
	// Target is the one hook to measure; nil for all hooks.
	Target *target.Target
	// Interval is the time between two samples.
	Interval time.Duration
	// Ready is called when counting has begun; may be nil.
	Ready func()
}

// checkEvery is how often to check, between two samples, whether chains still
// count.
const checkEvery = 100 * time.Millisecond

// cleanUp bounds how long the end of the counting may take.
const cleanUp = 10 * time.Second

// Run takes samples until ctx ends or emit returns false. It returns an error
// when nothing could be read at the start, when the target is gone, or when
// counting could not be ended. The end of ctx is not an error.
func Run(ctx context.Context, o Options, emit func([]hook.Sample) bool) (err error) {
	m := &meter{Options: o, hooks: map[hook.EventTarget]*hookMeter{}}
	defer func() {
		// The end of ctx is the normal end.
		last, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanUp)
		defer cancel()
		if ctx.Err() != nil {
			err = nil
		}
		err = kernel.Join(err, m.close(last))
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
	stats io.Closer // the kernel's run statistics, once they are enabled
	taken time.Time // the last samples
	hooks map[hook.EventTarget]*hookMeter
}

// keyOf identifies a hook across samples: names may change.
func keyOf(c *hook.Chain) hook.EventTarget {
	k := hook.EventTarget{Hook: c.Hook, NetNS: c.NetNS, Ifindex: c.Ifindex, CgroupID: c.CgroupID}
	k.NetNS.Name = ""
	if k.Ifindex == 0 && k.CgroupID == 0 {
		k.Target = c.Target
	}
	return k
}

// wait waits until the next sample is due. It returns false when ctx ends.
func (m *meter) wait(ctx context.Context) bool {
	for end := m.taken.Add(m.Interval); ; {
		left := time.Until(end)
		timer := time.NewTimer(min(left, checkEvery))
		select {
		case <-ctx.Done():
			timer.Stop()
			return false
		case <-timer.C:
		}
		if left <= checkEvery {
			return ctx.Err() == nil
		}
		for _, of := range m.hooks {
			of.recount(ctx)
		}
	}
}

// take reads all counters and starts to count on new chains.
func (m *meter) take(ctx context.Context) ([]hook.Sample, error) {
	defer func() { m.taken = time.Now() }()
	chains, err := m.readChains(ctx)
	if err != nil {
		return nil, err
	}
	samples := []hook.Sample{}
	seen := map[hook.EventTarget]bool{}
	for i := range chains {
		c := &chains[i]
		p := keyOf(c)
		if len(c.Members) == 0 && c.Err == nil && m.Target == nil || seen[p] {
			continue
		}
		seen[p] = true
		of := m.hooks[p]
		if of == nil {
			of = &hookMeter{meter: m, at: time.Now()}
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
	return samples, kernel.Join(gone...)
}

func (m *meter) readChains(ctx context.Context) ([]hook.Chain, error) {
	if m.Target == nil {
		return scan.All(ctx, m.Options.Options)
	}
	c, err := attach.Read(ctx, *m.Target)
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
	if m.stats != nil {
		errs = append(errs, m.stats.Close())
	}
	return kernel.Join(errs...)
}

// A hookMeter measures one hook.
type hookMeter struct {
	*meter
	at       time.Time                  // time of the last sample
	ran      map[uint32]hook.Counts     // the kernel's counts at that time, by program
	counting *chains.Counting           // for an owned chain; else nil
	counted  target.Target              // the target of counting
	last     map[uint32]dispatch.Counts // the counters when they were read last, by slot
	sum      map[uint32]dispatch.Counts // counts since the last sample, by slot
	// interrupted tells that some runs were not counted.
	interrupted bool
}

func (of *hookMeter) take(ctx context.Context, c *hook.Chain) hook.Sample {
	s := hook.Sample{Chain: *c, Entries: make([]hook.Counts, len(c.Members))}
	switch {
	case c.Err != nil, c.Hook.OnDevice() && c.Ifindex == 0, len(c.Members) == 0:
		s.Method, s.Err = hook.MethodNone, c.Err
	case c.Style == hook.StyleOwned:
		s.Method, s.Clock = hook.MethodChain, of.clock
		s.Err = of.count(ctx, &s)
	default:
		s.Method = hook.MethodKernel
		s.Err = of.statistics(&s)
	}
	if s.Method != hook.MethodChain {
		s.Err = kernel.Join(s.Err, of.stop(ctx))
	}
	if s.Method != hook.MethodKernel {
		of.ran = nil
	}
	if s.Err != nil {
		s.Method = hook.MethodNone
	}
	s.Time = time.Now()
	s.Elapsed, of.at = s.Time.Sub(of.at), s.Time
	return s
}

// count moves a chain's counts into the sample, and makes the chain count.
func (of *hookMeter) count(ctx context.Context, s *hook.Sample) error {
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
	of.counted = of.target(&s.Chain)
	return of.start(ctx)
}

// recount makes a chain count again after another process changed it: such a change
// builds a dispatcher that does not count. The next sample reports an error.
func (of *hookMeter) recount(ctx context.Context) {
	if of.counting == nil || of.counting.Current() {
		return
	}
	of.interrupted = true
	if of.collect() == nil && of.stop(ctx) == nil {
		_ = of.start(ctx)
	}
}

// start makes the chain count.
func (of *hookMeter) start(ctx context.Context) (err error) {
	if of.counting, err = attach.Count(ctx, of.counted); err != nil {
		return err
	}
	of.last = of.counting.Found()
	return nil
}

// target returns the target by which attach finds the chain.
func (of *hookMeter) target(c *hook.Chain) target.Target {
	if of.Target != nil {
		return *of.Target
	}
	t := target.Target{Hook: c.Hook, Name: c.Target, NetNS: c.NetNS.Name, BPFFS: of.BPFFS}
	if t.NetNS == "" {
		t.NetNS = of.NetNS
	}
	return t
}

// collect adds the counts since the counters were read last.
func (of *hookMeter) collect() error {
	now, err := of.counting.Read()
	if err != nil {
		return err
	}
	if of.sum == nil {
		of.sum = map[uint32]dispatch.Counts{}
	}
	for slot, c := range now {
		of.sum[slot] = of.sum[slot].Plus(c.Minus(of.last[slot]))
	}
	of.last = now
	return nil
}

// fill moves the counts into a sample.
func (of *hookMeter) fill(s *hook.Sample) {
	for i, m := range s.Chain.Members {
		sum, known := of.sum[m.SlotID]
		if !known {
			continue
		}
		c := hook.Counts{
			Known: true, Runs: sum.Ran(), Verdicts: sum.Verdicts, Other: sum.Other, Empty: sum.Empty, Time: time.Duration(sum.Nanos),
		}
		s.Entries[i] = c
		if !s.Whole.Known { // all packets come to the first member
			s.Whole = hook.Counts{Known: true, Runs: c.Runs + c.Empty}
		}
		s.Whole.Time += c.Time
	}
	s.Interrupted = of.interrupted
	of.sum, of.interrupted = nil, false
}

// statistics reads the kernel's counts of the programs.
func (of *hookMeter) statistics(s *hook.Sample) error {
	if err := of.countRuns(); err != nil {
		return err
	}
	now := map[uint32]hook.Counts{}
	read := func(id uint32) hook.Counts {
		ran, ok := runsOf(id)
		if !ok {
			return hook.Counts{}
		}
		now[id] = ran
		before, known := of.ran[id]
		if !known {
			return hook.Counts{} // the part before this interval is unknown
		}
		return since(ran, before)
	}
	if s.Chain.Style == hook.StyleLibxdp {
		// For the kernel its components are no programs of their own: freplace made
		// them part of the dispatcher.
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

func (of *hookMeter) stop(ctx context.Context) error {
	if of.counting == nil {
		return nil
	}
	c := of.counting
	of.counting, of.last = nil, nil
	return c.Close(ctx)
}

// since returns what a program did after before.
func since(c, before hook.Counts) hook.Counts {
	c.Runs, c.Time = c.Runs-before.Runs, c.Time-before.Time
	return c
}
