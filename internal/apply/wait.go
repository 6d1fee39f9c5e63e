package apply

import (
	"cmp"
	"context"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/plan"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// lookAgain is how often is looked for a cgroup or a network namespace that is not there yet: the kernel has no
// event for them that does not need the folder around them.
const lookAgain = time.Second

// A Waiter waits for devices.
type Waiter struct {
	woken  chan struct{}
	events map[string]*rtnl.Events // by network namespace
	docs   []Document
	netns  string
}

// NewWaiter begins to listen for the devices that documents ask for; do it before Apply, so that no device is
// missed. It keeps their network namespaces alive. The caller closes it.
func NewWaiter(docs []Document, netns string) (*Waiter, error) {
	w := &Waiter{woken: make(chan struct{}, 1), events: map[string]*rtnl.Events{}, docs: docs, netns: netns}
	if err := w.listen(); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

// listen listens in the namespaces that there are.
func (w *Waiter) listen() error {
	for _, d := range w.docs {
		for i := range d.Attachments {
			a := &d.Attachments[i]
			spec := cmp.Or(a.On.NetNS, w.netns)
			if hook.Hook(a.Hook).OnCgroup() || w.events[spec] != nil {
				continue
			}
			err := kernel.InNetNS(spec, func() error {
				e, err := rtnl.Listen()
				if err != nil {
					return err
				}
				w.events[spec] = e
				go w.wake(e)
				return nil
			})
			if err != nil && spec == "" {
				return err
			} // another namespace may still come
		}
	}
	return nil
}

func (w *Waiter) wake(e *rtnl.Events) {
	for e.Wait() == nil {
		select {
		case w.woken <- struct{}{}:
		default:
		}
	}
}

// Close ends the listening.
func (w *Waiter) Close() {
	for _, e := range w.events {
		e.Close()
	}
}

// Wait waits until it is worth to apply again what the report says has no device yet. The error is that of ctx.
func (w *Waiter) Wait(ctx context.Context, r *Report) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var tick <-chan time.Time
	for i := range r.Results {
		if item := &r.Results[i].Item; item.State == plan.NoDevice && (item.Place.Hook.OnCgroup() || w.events[item.NetNS] == nil) {
			timer := time.NewTimer(lookAgain)
			defer timer.Stop()
			tick = timer.C
			break
		}
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-w.woken:
	case <-tick:
	}
	return w.listen()
}

// Missing tells whether something has no device yet.
func (r *Report) Missing() bool {
	for i := range r.Results {
		if r.Results[i].State == plan.NoDevice {
			return true
		}
	}
	return false
}
