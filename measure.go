package dispatcher

import (
	"context"
	"iter"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/measure"
)

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
	// Started is called when the counting has begun. What happens from then on is
	// in the samples.
	Started func()
}

// Measure tells how often programs run, for how long, and on owned XDP chains with
// which verdicts. After each interval it returns the samples of all hooks, until ctx or
// the loop ends.
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
// Measuring a program does not keep it attached.
//
// All other programs are measured by the kernel's run statistics, which are on
// for all programs of the machine meanwhile, where there are such programs.
//
// The error is that nothing could be read at the start, that the device or cgroup
// of Target is gone, or that the counting could not be ended; it ends the loop.
// The end of ctx is not an error.
func Measure(ctx context.Context, o MeasureOptions) iter.Seq2[[]hook.Sample, error] {
	return func(yield func([]hook.Sample, error) bool) {
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
			mo.Target = new(at.place(o.BPFFS))
		}
		stopped := false
		err := measure.Run(ctx, mo, func(samples []hook.Sample) bool {
			stopped = !yield(samples, nil)
			return !stopped
		})
		if err != nil && !stopped {
			yield(nil, wrap("measure", at, err))
		}
	}
}
