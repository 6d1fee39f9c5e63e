package watch

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/scan"
)

// Options say what is watched.
type Options struct {
	scan.Options
	// Interval is the time between looks when nothing wakes the watcher.
	Interval time.Duration
	// First reports what is there at the start.
	First bool
	// Ready is called after the first look; may be nil.
	Ready func(hook.WatchSources)
	// Quiet listens to no signs, so that only Interval counts. Tests and measurements
	// use it.
	Quiet bool
}

const (
	// settle is the time from the first sign of a change to the look. An attachment
	// takes several calls, and only the last ones give it its name and pins.
	settle = 20 * time.Millisecond
	// later is when to look once more after a sign: the kernel empties slots and
	// frees links a while after their owner is gone.
	later = 60 * time.Millisecond
	// patience is how many looks in a row may fail before an event says so: links that
	// are being made cannot be read while much changes.
	patience = 10
)

// Run looks until ctx ends or emit returns false. It returns an error when nothing could
// be read at the start.
func Run(ctx context.Context, o Options, emit func(hook.Event) bool) error {
	w := &watcher{Options: o}
	w.sources = newSources(&w.Options)
	defer w.sources.close()
	if err := w.first(ctx, emit); err != nil || w.stopped {
		return err
	}
	for w.wait(ctx) && w.step(ctx, emit) {
	}
	return nil
}

type watcher struct {
	Options
	sources *sources
	last    *Look
	began   time.Time // the last look
	now     uint64    // the same time by the kernel's clock
	clock   uint64    // the kernel's time of the last look that was reported
	took    time.Duration
	again   time.Time // when to look once more; zero for never
	calls   calls
	failed  int // looks in a row
	stopped bool
}

func (w *watcher) first(ctx context.Context, emit func(hook.Event) bool) error {
	now, err := w.look(ctx)
	if ctx.Err() != nil {
		w.stopped = true
		return nil
	}
	if err != nil {
		return err
	}
	none := &Look{}
	Settle(none, now)
	w.last, w.clock = now, w.now
	w.sources.follow()
	if w.Ready != nil {
		w.Ready(w.sources.said)
	}
	for _, e := range Initial(now, w.First) {
		e.Time = time.Now()
		if !emit(e) {
			w.stopped = true
			return nil
		}
	}
	return nil
}

// wait returns true when it is time for a look, and false at the end of ctx.
func (w *watcher) wait(ctx context.Context) bool {
	next := w.began.Add(w.Interval)
	if !w.again.IsZero() && w.again.Before(next) {
		next = w.again
	}
	timer := time.NewTimer(time.Until(next))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		w.again = time.Time{}
		return ctx.Err() == nil
	case <-w.sources.wake:
	}
	// Looks take at most half of the time.
	pause := max(settle, time.Until(w.began.Add(2*w.took)))
	select {
	case <-ctx.Done():
		return false
	case <-time.After(pause):
	}
	w.again = time.Now().Add(later)
	return true
}

// errTorn says that too much changed during the look.
var errTorn = errors.New("torn")

// step looks and reports what is new. It returns false when emit did.
func (w *watcher) step(ctx context.Context, emit func(hook.Event) bool) bool {
	now, err := w.look(ctx)
	if ctx.Err() != nil {
		return false
	}
	var events []hook.Event
	switch {
	case err == nil:
		w.failed = 0
		events = w.compare(ctx, now)
	case w.failed < patience:
		w.failed++
		w.again = time.Now().Add(settle)
		return true
	case w.failed == patience:
		w.failed++ // the event is reported once
		events = append(events, hook.Event{Kind: hook.EventUnreadable, Err: err.Error()})
	}
	for _, e := range w.explain(events) {
		e.Time = time.Now()
		if !emit(e) {
			return false
		}
	}
	return true
}

// explain says of each event which process caused it, where that is certain, and returns the
// events and what else is to be reported. A call shows its effect before it ends, and is
// traced when it ends: a process may lose the processor in between.
func (w *watcher) explain(events []hook.Event) []hook.Event {
	for tries := 0; ; tries++ {
		news, lost := w.sources.taken()
		w.calls.add(news, len(lost) > 0, w.clock)
		for _, what := range lost {
			events = append(events, hook.Event{Kind: hook.EventMissed, Err: what})
		}
		w.calls.explain(events)
		if tries == 3 || w.sources.tracer == nil || !slices.ContainsFunc(events, awaitsCall) {
			break
		}
		time.Sleep(settle)
	}
	w.calls.forget(events)
	w.clock = w.now
	return events
}

// compare returns what is new, and keeps the look for the next comparison.
func (w *watcher) compare(ctx context.Context, now *Look) []hook.Event {
	Settle(w.last, now)
	events := Diff(w.last, now)
	if slices.ContainsFunc(events, unsure) {
		time.Sleep(settle)
		if next, err := w.look(ctx); err == nil {
			Settle(w.last, next)
			now, events = next, Diff(w.last, next)
		}
	}
	w.last = now
	w.sources.follow()
	return events
}

// unsure tells whether an event needs a second look. A foreign link may be a new member
// that has no record yet, and what cannot be read may have changed too fast.
func unsure(e hook.Event) bool {
	return e.Kind == hook.EventAttached && e.Entry == hook.KindForeign && e.After.LinkID != 0 || e.Kind == hook.EventUnreadable
}

// look looks at everything that is watched.
func (w *watcher) look(ctx context.Context) (*Look, error) {
	w.began, w.now = time.Now(), kernelClock()
	defer func() { w.took = time.Since(w.began) }()
	chains, err := scan.All(ctx, w.Options.Options)
	if err != nil {
		return nil, err
	}
	now := &Look{Chains: chains}
	if w.last == nil {
		return now, nil
	}
	missing, bare := w.last.Missing(now), w.last.newlyBare(now)
	if len(missing) == 0 && len(bare) == 0 {
		return now, nil
	}
	links, err := kernel.AllLinks()
	if err != nil {
		return nil, err
	}
	torn := func(c *hook.Chain) bool { return isTorn(c, links) }
	if slices.ContainsFunc(bare, torn) && w.failed < patience {
		return nil, errTorn
	}
	for _, c := range bare {
		if isTorn(c, links) {
			now.Doubtful = append(now.Doubtful, c.At())
		}
	}
	w.follow(now, missing, links)
	return now, nil
}

// follow finds out what became of links that do not attach anything any more where they
// did.
func (w *watcher) follow(now *Look, missing []uint32, links []kernel.LinkInfo) {
	now.Links = map[uint32]LinkState{}
	for _, l := range links {
		switch {
		case !slices.Contains(missing, l.ID):
		case l.Gone() && w.isThere(w.last.chainOf(l.ID)):
			// The link was detached, and a process or pin still holds it.
		case l.Gone():
			now.Links[l.ID] = LinkDefunct
		case w.NetNS != "":
			now.Links[l.ID] = LinkElsewhere
		default:
			now.Links[l.ID] = LinkUnsettled
			w.again = time.Now().Add(later)
		}
	}
}

// isThere tells whether the device or cgroup of a hook is where it was.
func (w *watcher) isThere(c *hook.Chain) bool {
	if c.Hook.OnCgroup() {
		cg, err := kernel.OpenCgroup(c.Target)
		if err != nil {
			return false
		}
		defer cg.Close()
		return cg.ID == c.CgroupID
	}
	ns, err := kernel.OpenNetNS(cmp.Or(w.NetNS, c.NetNS.Name))
	if err != nil {
		return false
	}
	defer ns.Close()
	return netnsOf(ns.ID()) == netnsOf(c.NetNS) && rtnl.In(ns, func(conn *rtnl.Conn) error {
		_, err := conn.DeviceByIndex(c.Ifindex)
		return err
	}) == nil
}

// newlyBare returns the chains on cgroups in the next look that have a new entry without
// a link.
func (l *Look) newlyBare(next *Look) (list []*hook.Chain) {
	known := map[key]bool{}
	for _, e := range entries(l.Chains) {
		known[e.key()] = true
	}
	for _, e := range entries(next.Chains) {
		isNew := e.c.Hook.OnCgroup() && e.m.Kind == hook.KindLegacy && !known[e.key()]
		if isNew && !slices.Contains(list, e.c) {
			list = append(list, e.c)
		}
	}
	return list
}

// isTorn tells whether an entry that seems to have no link has one that was made while
// the hook was read. The kernel does not say which links a cgroup has.
func isTorn(c *hook.Chain, links []kernel.LinkInfo) bool {
	return slices.ContainsFunc(c.Members, func(m hook.Member) bool {
		if m.Kind != hook.KindLegacy {
			return false
		}
		return slices.ContainsFunc(links, func(l kernel.LinkInfo) bool {
			return l.CgroupID == c.CgroupID && l.Program == m.Program.ID && l.Hook() == c.Hook && !carries(c, l.ID)
		})
	})
}
