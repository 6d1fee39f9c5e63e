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
	// Interval is how often to look when no sign of a change has come. Default:
	// one second.
	Interval time.Duration
	// First reports what is attached at the start, as [hook.EventPresent].
	First bool
	// Started is called when the first look is done: what changes from then on is
	// reported. It gets what the watching relies on.
	Started func(hook.WatchSources)
	// IntervalOnly looks at intervals only, and listens to nothing.
	IntervalOnly bool
}

// Watch reports what changes on the hooks that [List] lists, until ctx ends or
// the loop does. It looks at the machine and compares: at every interval, and
// soon after each sign of a change that the kernel gives, see [hook.WatchSources].
// So an event is late, but what is reported is true, and each state that lasts
// as long as an interval is reported. What came and went between two looks is not.
//
// Events with a sign were 11 to 28 ms late (the medians, by what happened), and 36
// ms at most; those without, as when a link is closed whose program stays loaded,
// up to an interval (BenchmarkWatchLate, Linux 6.18, 2 CPUs). To hear calls of
// bpf(2) costs every system call of the machine 0.05 µs, see
// WatchOptions.IntervalOnly.
//
// The only error is that nothing could be read at the start, and it ends the
// loop; the end of ctx is none.
//
// Watching changes nothing. A look opens what is attached for a moment, so that
// what its owner lets go in that moment leaves when the look is over.
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
