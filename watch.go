package dispatcher

import (
	"context"
	"iter"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/watch"
)

// WatchOptions say what to watch, and how. The zero value watches everything.
type WatchOptions struct {
	// NetNS, Hooks and BPFFS choose the hooks as in [ListOptions].
	NetNS string
	Hooks []hook.Hook
	BPFFS string
	// Interval is the time between looks when no sign of a change comes. Default:
	// one second.
	Interval time.Duration
	// First reports what is attached at the start, as [hook.EventPresent].
	First bool
	// Started is called after the first look: what changes from then on is reported.
	// It gets the sources that the watching relies on.
	Started func(hook.WatchSources)
	// IntervalOnly looks at intervals only, and listens to nothing.
	IntervalOnly bool
}

// Watch reports what changes on the hooks that [List] lists, until ctx or the loop
// ends. It looks at the machine at every interval, and soon after each sign of a change
// that the kernel gives, see [hook.WatchSources], and compares. So an event comes late,
// but it is true, and each state that lasts as long as an interval is reported. What came
// and went between two looks is not reported.
//
// Events with a sign were 11 to 28 ms late (the medians, by what happened), and at most
// 36 ms. Events without a sign are up to an interval late, for example when a link is
// closed but its program stays loaded (BenchmarkWatchLate, Linux 6.18, 2 CPUs). Hearing
// calls of bpf(2) costs every system call of the machine 0.05 µs, see
// WatchOptions.IntervalOnly.
//
// The only error is that nothing could be read at the start. It ends the loop. The end of
// ctx is not an error.
//
// Watching changes nothing. A look opens for a moment what is attached. So a member that
// its owner closes in that moment leaves only when the look is over.
func Watch(ctx context.Context, o WatchOptions) iter.Seq2[hook.Event, error] {
	return func(yield func(hook.Event, error) bool) {
		wo := watch.Options{
			Options: scanned(o.NetNS, o.Hooks, o.BPFFS), Interval: o.Interval, First: o.First, Ready: o.Started, Quiet: o.IntervalOnly,
		}
		if wo.Interval <= 0 {
			wo.Interval = time.Second
		}
		err := watch.Run(ctx, wo, func(e hook.Event) bool { return yield(e, nil) })
		if err != nil {
			yield(hook.Event{}, wrap("watch", Target{NetNS: o.NetNS}, err))
		}
	}
}
