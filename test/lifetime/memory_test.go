package lifetime

import (
	"fmt"
	"io/fs"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A process whose cgroup has hardly any memory left (BPF memory counts there from Linux 5.11 on) says so, and changes nothing or
// all of it. If the kernel kills it for that, the members are the old ones or the new ones. The kernel kills, rather than to refuse,
// unless no process of the cgroup may be killed. Where it refuses it does not always say ENOMEM: a program whose JIT has no memory is
// EINVAL, a system call that cannot write its result EFAULT, and cilium/ebpf then takes what it tries for what the kernel has not.
func TestWithoutMemory(t *testing.T) {
	if !kernel.Since(5, 11) {
		t.Skip("BPF memory counts towards the cgroup from Linux 5.11 on")
	}
	outcomes := map[string]int{}
	lackingOn(t, func(t *testing.T, l *lacking) {
		limited := testenv.NewLimitedCgroup(t)
		members := []*ebpf.Program{l.Tracer(t, 1), l.Tracer(t, 2)}
		three, four := scene.ID(t, l.Tracer(t, 3)), scene.ID(t, l.Tracer(t, 4))
		for _, does := range []scene.Command{
			{Op: "attach", Member: "3", Program: three, Persistent: true, Settings: scene.Priority(15)},
			{Op: "update", Program: four},
			{Op: "set", Settings: scene.Priority(5)},
			{Op: "detach", Member: "2"},
		} {
			var states []string
			var app *scene.App
			limits := []int{unlimited, 0, 24 << 10, killed}
			if does.Op == "update" || does.Op == "detach" {
				limits = limits[:3] // these have the fewest steps to be killed at
			}
			for _, more := range limits {
				for i, program := range members {
					qt.Assert(t, qt.IsNil(l.Attach(t, program, l.options(fmt.Sprint(i+1), 10*(i+1))).Close()))
				}
				if app == nil {
					app = scene.NewAppIn(t, limited)
					app.Spare(t, true)
				}
				if len(states) == 0 {
					states = append(states, l.is())
				}
				throughLink := does.Op == "update" || does.Op == "set"
				if throughLink {
					qt.Assert(t, qt.IsNil(app.Do(t, l.Command(scene.Command{Op: "open", Member: "2"}))))
				}
				app.Spare(t, more != killed)
				if more != unlimited {
					limited.LimitMemory(t, max(more, 0))
				}
				// A page fault without memory is tried again for ever.
				enough := time.AfterFunc(time.Second, func() { limited.LimitMemory(t, unlimited) })
				err, alive := app.Survives(t, l.Command(does))
				enough.Stop()
				limited.LimitMemory(t, unlimited)
				said := qt.Commentf("%s with %d bytes: %v, alive %v", does.Op, more, err, alive)
				if !alive { // killed, or given up by Go's runtime; the next one cleans up
					app.Kill()
					app = nil
					qt.Check(t, qt.ErrorIs(dispatcher.Detach(t.Context(), l.Target, "nobody", l.Leave()), fs.ErrNotExist))
				} else if throughLink || does.Op == "attach" && err == nil {
					qt.Check(t, qt.IsNil(app.Do(t, scene.Command{Op: "close"})))
				}
				switch now := l.is(); {
				case more == unlimited:
					qt.Assert(t, qt.IsNil(err))
					states = append(states, now)
				case alive && err == nil:
					outcomes["done"]++
					qt.Check(t, qt.Equals(now, states[1]), said)
				default:
					outcomes[fmt.Sprintf("alive %v", alive)]++
					qt.Check(t, qt.SliceContains(states, now), said)
				}
				for _, wrong := range []error{fs.ErrNotExist, dispatcher.ErrDefunct, dispatcher.ErrBusy, dispatcher.ErrUsage} {
					qt.Check(t, qt.Not(qt.ErrorIs(err, wrong)), said)
				}
				t.Logf("%s with %d bytes: %v, alive %v", does.Op, more, err, alive)
				l.Clear(t)
			}
			if app != nil {
				app.Kill()
			}
		}
	})
	t.Logf("%v", outcomes)
}

// Without a limit, and with one of 0 bytes for a process that may be killed.
const unlimited, killed = -1, -2
