package dispatcher

import (
	"context"
	"iter"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/measure"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A Method is how a hook was measured.
type Method string

const (
	// MethodNone: it was not; Sample.Err says why, unless there was nothing to measure.
	MethodNone Method = ""
	// MethodChain: by a dispatcher of an owned XDP chain that counts: all that
	// Counts has.
	MethodChain Method = "chain"
	// MethodKernel: by the kernel's run statistics of programs (BPF_ENABLE_STATS,
	// Linux 5.8): how often each ran, and for how long. A program that is attached
	// several times has one sum for all.
	MethodKernel Method = "kernel"
)

// Counts are what the program of an entry did in one interval.
type Counts struct {
	// Known tells that it was measured: not the entry that came in this interval.
	Known bool
	// Runs is how often the program ran: on XDP and TCX the packets that it saw.
	Runs uint64
	// Verdicts is how often it said each; Other what is no verdict. With
	// MethodChain only.
	Verdicts [hook.Verdicts]uint64
	Other    uint64
	// Empty is how many packets found the slot of the member empty.
	Empty uint64
	// Time is how long it ran in all. With MethodChain that includes the clock,
	// see Sample.Clock, and the call.
	Time time.Duration
}

// PerRun is how long one run took, 0 without one.
func (c Counts) PerRun() time.Duration {
	if c.Runs == 0 {
		return 0
	}
	return c.Time / time.Duration(c.Runs)
}

// A Sample is what happened on one hook in one interval.
type Sample struct {
	// Chain is what is on the hook at the end of the interval.
	Chain hook.Chain
	// Time is the end of the interval, and Elapsed how long it was, as measured.
	Time    time.Time
	Elapsed time.Duration
	Method  Method
	// Clock is how much of the time of each run is the clock's own, with
	// MethodChain.
	Clock time.Duration
	// Interrupted: the chain was changed in this interval, and what it did just after
	// that was not counted.
	Interrupted bool
	// Whole is what came to an XDP hook: of a chain the packets, and the times of its
	// members together; for libxdp's all that is known. Not known on other hooks.
	Whole Counts
	// Entries are the counts of Chain.Members, one for each.
	Entries []Counts
	// Err is why it was not measured.
	Err error
}

// MeasureOptions say what to measure, and how. The zero value measures all hooks.
type MeasureOptions struct {
	// Target is the one hook to measure. NetNS and Hooks are empty then.
	Target *Target
	// NetNS, Hooks and BPFFS choose the hooks as in [ListOptions].
	NetNS string
	Hooks []hook.Hook
	BPFFS string
	// Interval is how long a sample takes. Default: one second.
	Interval time.Duration
	// Started is called when the counting has begun: what happens from then on is
	// in the first samples.
	Started func()
}

// Measure tells how often programs run, for how long, and on owned XDP chains what
// they say: after each interval the samples of all hooks, until ctx ends or
// the loop does.
//
// An owned XDP chain gets a dispatcher that counts for as long as it is measured,
// and its plain one afterwards. Both are swapped in as any change is: packets
// meet all members, at all times. Everybody else can go on changing the chain; a
// change brings the plain dispatcher back, and the counting goes on 100 ms later
// at most, but of a chain that netlink carries with the next interval. Several may
// measure at the same time. When the process dies the kernel takes the counting
// away, and what is left is a dispatcher that looks for it in vain, until the next
// change or [Recover]; internal/dispatch/doc.go has what each of them costs.
//
// To be measured keeps nothing attached.
//
// All other programs are measured by the kernel's run statistics, which are on
// for all programs of the machine meanwhile, where there are such programs.
//
// The error is that nothing could be read at the start, that the device or cgroup
// of Target is gone, or that the counting could not be ended; it ends the loop.
// The end of ctx is not an error.
func Measure(ctx context.Context, o MeasureOptions) iter.Seq2[[]Sample, error] {
	return func(yield func([]Sample, error) bool) {
		mo := measure.Options{Options: scanned(o.NetNS, o.Hooks, o.BPFFS), Interval: o.Interval, Ready: o.Started}
		if mo.Interval <= 0 {
			mo.Interval = time.Second
		}
		at := Target{NetNS: o.NetNS}
		if o.Target != nil {
			at = *o.Target
			if o.NetNS != "" || len(o.Hooks) > 0 {
				yield(nil, wrap("measure", at, hook.Because(ErrUsage, "Target is the one hook to measure; leave NetNS and Hooks out")))
				return
			}
			mo.Place = new(target.Target)
			*mo.Place = at.place(o.BPFFS)
		}
		stopped := false
		err := measure.Run(ctx, mo, func(samples []measure.Sample) bool {
			list := make([]Sample, len(samples))
			for i := range samples {
				list[i] = sampleOf(&samples[i])
			}
			stopped = !yield(list, nil)
			return !stopped
		})
		if err != nil && !stopped {
			yield(nil, wrap("measure", at, err))
		}
	}
}

func sampleOf(s *measure.Sample) Sample {
	entries := make([]Counts, len(s.Entries))
	for i, c := range s.Entries {
		entries[i] = Counts(c)
	}
	return Sample{
		Chain: s.Chain, Time: s.Time, Elapsed: s.Elapsed, Method: Method(s.By), Clock: s.Clock,
		Interrupted: s.Interrupted, Whole: Counts(s.Whole), Entries: entries, Err: s.Err,
	}
}
