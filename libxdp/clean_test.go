package libxdp

import (
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// A dispatcher that could not be looked for is not one that is on no device: its pins would be removed, and its members stop.
func TestUnknownIsNotIdle(t *testing.T) {
	s := newScene(t)
	prog := testenv.VerdictProgram(t, "ldt_on_device", pass)
	ns, err := kernel.OpenNetNS(s.Server.Name)
	qt.Assert(t, qt.IsNil(err))
	defer ns.Close()
	swap := func(fd, old int) error {
		return rtnl.In(ns, func(conn *rtnl.Conn) error { return conn.ReplaceXDP(s.ServerIfindex, fd, old, hook.ModeGeneric) })
	}
	qt.Assert(t, qt.IsNil(swap(prog.FD(), -1)))
	p := pinned{ifindex: s.ServerIfindex, prog: kernel.ProgramID(prog), dir: t.TempDir()}
	// The test's own descriptor would count. It opens another one to clean up.
	kept, err := prog.Clone()
	qt.Assert(t, qt.IsNil(err))
	defer kept.Close()
	for name, o := range map[string]holders.Options{
		"by iterators": {}, "by /proc": {NoIterators: true}, // with none of this process's own
	} {
		t.Run(name, func(t *testing.T) {
			testenv.EachLimit(t, func() error {
				idle, done, err := idleDispatchers(o)
				if err != nil {
					return err
				}
				defer done()
				is, err := idle(p)
				qt.Check(t, qt.IsFalse(is))
				return err
			}, func(err error) {
				if err != nil {
					qt.Check(t, qt.ErrorIs(err, unix.EMFILE))
				}
			})
		})
	}
	qt.Assert(t, qt.IsNil(swap(-1, kept.FD())))
	idle, done, err := idleDispatchers(holders.Options{NoIterators: true})
	qt.Assert(t, qt.IsNil(err))
	defer done()
	is, err := idle(p)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(is))
}
