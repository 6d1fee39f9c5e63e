package apply

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os/exec"
	"time"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/plan"
)

// errUnconfirmed: the probes have not passed in time.
var errUnconfirmed = errors.New("not confirmed")

// probeAgain is how long after a probe that has failed it is tried again.
const probeAgain = 100 * time.Millisecond

// hold lets a new member prove that it does no harm before it is pinned. Until then this process alone owns it: if
// the process dies, the kernel takes the member out.
func hold(ctx context.Context, l *dispatcher.Link, item *plan.Item) error {
	kernel.Step("apply: held")
	if err := confirm(ctx, item.Want.Confirm, item.NetNS); err != nil {
		// Close would do, too, but a little later.
		return errors.Join(err, l.Detach(context.WithoutCancel(ctx)))
	}
	kernel.Step("apply: confirmed")
	_, err := l.Pin(ctx)
	return err
}

// replace puts a new program into a member, and the old one back if the new one is not confirmed.
func replace(ctx context.Context, l *dispatcher.Link, from dispatcher.Source, item *plan.Item) error {
	if item.Want.Confirm == nil {
		return l.Update(ctx, from)
	}
	old, err := l.Program(ctx)
	if err != nil {
		return err
	}
	defer old.Close()
	if err := l.Update(ctx, from); err != nil {
		return err
	}
	kernel.Step("apply: replaced, not confirmed")
	if err := confirm(ctx, item.Want.Confirm, item.NetNS); err != nil {
		return errors.Join(err, l.Update(context.WithoutCancel(ctx), dispatcher.Program(old)))
	}
	return nil
}

// confirm waits until all probes have passed once. The error is errUnconfirmed if they do not in time.
func confirm(ctx context.Context, c *declare.Confirm, netns string) error {
	within, err := time.ParseDuration(c.Within)
	if err != nil {
		return hook.Because(hook.ErrUsage, "within: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	for i := range c.Probes {
		p := &c.Probes[i]
		for {
			err := kernel.InNetNS(netns, func() error { return probe(limited, p) })
			if err == nil {
				break
			}
			select {
			case <-time.After(probeAgain):
				continue
			case <-limited.Done():
			}
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return hook.Because(errUnconfirmed, "%s did not pass within %s, and all is as before: %w", name(p), c.Within, err)
		}
	}
	return nil
}

func name(p *declare.Probe) string {
	if p.TCP != "" {
		return "tcp " + p.TCP
	}
	return "exec " + kernel.Shell(p.Exec...)
}

// probe tries one probe once, in the calling thread's network namespace.
func probe(ctx context.Context, p *declare.Probe) error {
	if p.TCP != "" {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", p.TCP)
		if err != nil {
			return err
		}
		return conn.Close()
	}
	cmd := exec.CommandContext(ctx, p.Exec[0], p.Exec[1:]...)
	cmd.WaitDelay = time.Second // a grandchild may keep the output open
	out, err := cmd.CombinedOutput()
	if last := bytes.TrimSpace(out); err != nil && len(last) > 0 {
		if i := bytes.LastIndexByte(last, '\n'); i >= 0 {
			last = last[i+1:]
		}
		return fmt.Errorf("%w: %.200s", err, last)
	}
	return err
}
