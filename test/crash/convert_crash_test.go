package crash

import (
	"errors"
	"io/fs"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A process may be killed while it moves a chain over: the chain is then the old
// one or the new one, or, in the gap, none; the next one can go on.
func TestConvertCrash(t *testing.T) {
	testenv.NeedFreplace(t)
	for _, to := range []hook.Style{hook.StyleOwned, hook.StyleLibxdp} {
		t.Run(string(to), func(t *testing.T) {
			s := scene.New(t)
			for n := 1; diesConverting(t, s, to, n); n++ {
			}
		})
	}
}

// diesConverting lets a process die at the n-th step of a conversion, and returns
// false when there are fewer.
func diesConverting(t *testing.T, s *scene.Scene, to hook.Style, n int) bool {
	t.Helper()
	from := hook.StyleLibxdp
	if to == from {
		from = hook.StyleOwned
	}
	begin := scene.NewApp(t)
	qt.Assert(t, qt.IsNil(begin.Do(t, s.Command(scene.Command{Op: "libxdp", Maps: true}))))
	if from == hook.StyleOwned {
		qt.Assert(t, qt.IsNil(begin.Do(t, s.Command(scene.Command{Op: "convert", Member: string(from)}))))
	}
	begin.Kill()
	qt.Assert(t, qt.Equals(s.Read(t).Style, from))

	victim := scene.NewApp(t)
	got := victim.Try(t, s.Command(scene.Command{Op: "convert", Member: string(to), DieAt: n}))
	victim.Kill()
	at := qt.Commentf("died at step %d, %q", n, got.Died)
	if got.Died == "" {
		qt.Assert(t, qt.IsNil(got.Err()))
		qt.Assert(t, qt.Equals(s.Read(t).Style, to), at)
	}
	// A link that was not pinned goes in the kernel's own time, and a slot with it.
	scene.Soon(t, func() bool {
		c := s.Read(t)
		return len(c.Members) == 0 || len(c.Members) == 1 && c.Members[0].State == hook.StateRunning
	})
	c := s.Read(t)
	if len(c.Members) == 0 {
		gap := strings.Contains(got.Died, "in the gap") || strings.Contains(got.Died, "after the gap") || strings.HasPrefix(got.Died, "move pins")
		qt.Check(t, qt.IsTrue(gap), at)
	} else {
		qt.Check(t, qt.Equals(c.Members[0].Name, "ldt_counting"), at)
		qt.Check(t, qt.IsTrue(c.Style == from || c.Style == to), at)
	}

	// The next one can do it, or begin anew.
	next := scene.NewApp(t)
	op := scene.Command{Op: "convert", Member: string(to)}
	if len(c.Members) == 0 {
		op = scene.Command{Op: "libxdp", Maps: true}
	}
	if err := next.Do(t, s.Command(op)); !errors.Is(err, fs.ErrExist) {
		qt.Assert(t, qt.IsNil(err), at)
	}
	next.Kill()
	s.Clear(t)
	_, err := dispatcher.Recover(t.Context(), dispatcher.RecoverOptions{BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err), at)
	s.WantFree(t)
	s.WantNoDispatchers(t)
	return got.Died != ""
}
