package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// hold owns a member until ctx ends, which is the normal end. It is an error
// when the member is gone before that: a supervisor of the command must not
// believe that packets still go through the member.
func (a *app) hold(ctx context.Context, t dispatcher.Target, link *dispatcher.Link, m *hook.Member) error {
	if err := a.printHolding(t, m.Name); err != nil {
		return err
	}
	gone := link.Wait(ctx)
	if ctx.Err() == nil {
		return hook.Wrap("hold", t.Hook, t.Name(), errors.Unwrap(gone))
	}
	err := link.Close()
	if m.OnMissing > hook.MissingContinue && a.stays(context.WithoutCancel(ctx), t, m.Name) {
		a.warn("the slot of %q on %s %s is a closed door: it drops packets until the member is attached again or detached", m.Name, t.Hook, t.Name())
	}
	return err
}

// stays tells whether a released member is still in a chain. The last member is
// not.
func (a *app) stays(ctx context.Context, t dispatcher.Target, name string) bool {
	chain, err := dispatcher.Read(ctx, t, a.readOptions())
	return err == nil && chain.Member(name) != nil
}

// printHolding says that the member is attached. Scripts may rely on it from
// this line on.
func (a *app) printHolding(t dispatcher.Target, name string) error {
	switch {
	case a.format == formatJSON:
		return encodeLine(a.stdout, struct {
			Version int         `json:"version"`
			Holding jsonHolding `json:"holding"`
		}{schema, jsonHolding{string(t.Hook), t.Name(), name}})
	case a.quiet:
		return nil
	}
	return a.print(fmt.Sprintf("holding member %q on %s %s; Ctrl-C lets it go\n", name, t.Hook, t.Name()))
}

type jsonHolding struct {
	Hook   string `json:"hook"`
	Target string `json:"target"`
	Name   string `json:"name"`
}
