package main

import (
	"context"
	"errors"
	"fmt"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) watchCommand() *cobra.Command {
	o := dispatcher.WatchOptions{Interval: time.Second}
	cmd := &cobra.Command{
		Use:   "watch [HOOK|FAMILY [TARGET]]",
		Short: "Show changes, one line for each change",
		Long: `Show changes on the hooks that "list" shows, made by any program: one line for
each change, until Ctrl-C.

A member is attached, left, updated (another program), reordered, set (other
settings), pinned or unpinned; emptied, when the owner of its slot died;
defunct, when its device or cgroup is gone; adopted or named, when it became a
member; overtaken, when a program of another tool now runs before it and did not
before; or extended, when freplace has put a program in the place of one of its
functions, and restored, when that program is gone. Programs of other tools have
the same events. A device that has another name, or is in another network
namespace, has moved.

The kernel reports some changes at once and others not at all, so watch also
checks all hooks every --interval. A program that comes and goes between two
checks is not shown. "by pid" is there when it is certain which process made the
change.`,
		Example: `  dispatcher watch
  dispatcher watch xdp eth0
  dispatcher -n blue watch tcx --first
  dispatcher watch -j | jq -r 'select(.event == "overtaken") | .target'`,
		Args:              words(1, "[HOOK]", "[TARGET]"),
		ValidArgsFunction: completeArgs(1, offerListed, a.offerTargets),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.watch(cmd.Context(), withoutDev(args, 1), o)
		},
	}
	flags := cmd.Flags()
	flags.DurationVar(&o.Interval, "interval", o.Interval, "check every `D`, such as 200ms or 5s, if no sign of a change comes first")
	flags.BoolVar(&o.First, "first", false, "begin with the entries that are attached already")
	return cmd
}

// watch prints changes until ctx ends, which is the normal end.
func (a *app) watch(ctx context.Context, args []string, o dispatcher.WatchOptions) error {
	if o.Interval < 10*time.Millisecond {
		return usage("", "--interval %v: at least 10ms", o.Interval)
	}
	o.NetNS, o.BPFFS = a.netns, a.bpffs
	if len(args) > 0 {
		var err error
		if o.Hooks, err = a.parseHooks(args[0]); err != nil {
			return err
		}
	}
	var only *onTarget
	if len(args) > 1 {
		var err error
		if only, err = a.onTarget(ctx, o.Hooks[0], args[1]); err != nil {
			return err
		}
	}
	signal.Ignore(syscall.SIGPIPE) // the failed write reports it
	o.Started = func(s hook.WatchSources) { a.noteSources(s, o.Interval) }
	for e, err := range dispatcher.Watch(ctx, o) {
		if err != nil {
			return err
		}
		if only != nil && !only.takes(&e) {
			continue
		}
		if err := a.printEvent(e); err != nil {
			if errors.Is(err, syscall.EPIPE) {
				return nil // the reader has gone
			}
			return err
		}
	}
	return nil
}

// noteSources says which sources of changes are used.
func (a *app) noteSources(s hook.WatchSources, interval time.Duration) {
	var heard, deaf []string
	for _, source := range []struct {
		name string
		err  error
	}{{"netlink", s.Netlink}, {"pins", s.Pins}, {"programs that come and go", s.Programs}, {"calls of bpf(2)", s.Calls}} {
		if source.err == nil {
			heard = append(heard, source.name)
		} else {
			deaf = append(deaf, fmt.Sprintf("%s (%v)", source.name, source.err))
		}
	}
	text := fmt.Sprintf("checking every %v", interval)
	if len(heard) > 0 {
		text += ", and on signs from " + strings.Join(heard, ", ")
	}
	if len(deaf) > 0 {
		text += "; not available: " + strings.Join(deaf, ", ")
	}
	a.note("%s", text)
}

// onTarget chooses the events of one device or cgroup, even if it moves.
type onTarget struct{ hook.EventTarget }

func (a *app) onTarget(ctx context.Context, h hook.Hook, name string) (*onTarget, error) {
	if h.OnNetNS() {
		return nil, usage("-n chooses one", "%s belongs to a whole network namespace, and has no other target", h)
	}
	known := hook.XDP // a hook that all devices have
	if h.OnCgroup() {
		known = hook.CgroupSKBIngress
	}
	c, err := dispatcher.Read(ctx, dispatcher.On(known, name).In(a.netns), a.readOptions())
	if err != nil {
		shown(err).Hook = h
		return nil, err
	}
	return &onTarget{c.At()}, nil
}

func (t *onTarget) takes(e *hook.Event) bool {
	if e.From != nil && t.is(*e.From) {
		t.EventTarget = e.EventTarget
		return true
	}
	return e.Hook == "" || t.is(e.EventTarget) // an event without a hook is about several
}

func (t *onTarget) is(p hook.EventTarget) bool {
	return t.NetNS.Inode == p.NetNS.Inode && t.NetNS.Cookie == p.NetNS.Cookie && t.Ifindex == p.Ifindex && t.CgroupID == p.CgroupID
}

// The JSON of an event is a contract, like the JSON of a chain.
type jsonEvent struct {
	Version int `json:"version"`
	hook.Event
	Before *jsonMember `json:"before"`
	After  *jsonMember `json:"after"`
	By     *jsonMember `json:"by,omitempty"`
	Twin   *jsonMember `json:"twin,omitempty"`
}

// printEvent writes one event, on one line.
func (a *app) printEvent(e hook.Event) error {
	if a.format != formatJSON {
		return a.print(e.String() + "\n")
	}
	entry := func(m *hook.Member) *jsonMember {
		if m == nil {
			return nil
		}
		protected := m.Protected()
		if e.Hook == hook.XDP {
			protected = e.LinkID != 0 && m.State != hook.StateBypassed
		}
		j := describeMember(e.Hook, m, protected)
		return &j
	}
	e.Time, e.Err = e.Time.UTC(), oneLine(e.Err)
	return encodeLine(a.stdout, jsonEvent{schema, e, entry(e.Before), entry(e.After), entry(e.By), entry(e.Twin)})
}
