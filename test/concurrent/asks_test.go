package concurrent

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// waiting runs operations while the lock of the pins is held, until all of them ask, then meanwhile, and lets go of the
// lock. It returns their errors, and how many dispatchers were swapped in by all of them.
func waiting(t *testing.T, s *scene.Scene, meanwhile func(), operations ...func() error) (errs []error, swaps int32) {
	t.Helper()
	dir := filepath.Join(s.BPFFS, "libdispatcher")
	lock, err := os.Open(dir)
	qt.Assert(t, qt.IsNil(err))
	defer lock.Close()
	qt.Assert(t, qt.IsNil(unix.Flock(int(lock.Fd()), unix.LOCK_EX)))

	var swapped atomic.Int32
	kernel.OnStep = func(step string) {
		if step == "swap: after" {
			swapped.Add(1)
		}
	}
	defer func() { kernel.OnStep = nil }()
	results := make([]chan error, len(operations))
	for i, op := range operations {
		results[i] = make(chan error, 1)
		go func() { results[i] <- op() }()
	}
	scene.Soon(t, func() bool { return len(asks(t, s)) == len(operations) })
	meanwhile()
	qt.Assert(t, qt.Equals(swapped.Load(), 0))
	qt.Assert(t, qt.IsNil(lock.Close()))
	for _, r := range results {
		errs = append(errs, <-r)
	}
	return errs, swapped.Load()
}

// joining returns operations that attach tracers, and the links that they make.
func joining(t *testing.T, s *scene.Scene, from, n int, o func(i int) dispatcher.Options) (ops []func() error, links []*dispatcher.Link) {
	links = make([]*dispatcher.Link, n)
	for i := range n {
		prog, opt := s.Tracer(t, from+i, scene.Pass), o(i)
		opt.BPFFS = s.BPFFS
		ops = append(ops, func() (err error) {
			links[i], err = dispatcher.Attach(context.Background(), s.Target, dispatcher.Program(prog), opt)
			return err
		})
	}
	t.Cleanup(func() {
		for _, l := range links {
			if l != nil {
				_ = l.Close()
			}
		}
	})
	return ops, links
}

// Loading a dispatcher is most of the time of a change. So of those that wait for the lock one makes the changes of all:
// many writers of one chain are not slower than few.
func TestAsks(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 9, scene.Pass), dispatcher.Options{Name: "guard", Priority: 900})

	joins, links := joining(t, s, 10, 12, func(i int) dispatcher.Options {
		return dispatcher.Options{Name: fmt.Sprint("m", i), Priority: 100 + i}
	})
	errs, swaps := waiting(t, s, func() {}, joins...)
	for _, err := range errs {
		qt.Check(t, qt.IsNil(err))
	}
	qt.Check(t, qt.Equals(swaps, 1))
	s.WantRun(t, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 9)

	var leaves []func() error
	for _, l := range links[2:] {
		leaves = append(leaves, func() error { return l.Detach(context.Background()) })
	}
	errs, swaps = waiting(t, s, func() {}, leaves...)
	for _, err := range errs {
		qt.Check(t, qt.IsNil(err))
	}
	qt.Check(t, qt.Equals(swaps, 1))
	s.WantRun(t, 10, 11, 9)
	s.WantNoPins(t)

	// A place may be named by the member of another process, and a process that cannot join is told why.
	more, _ := joining(t, s, 30, 4, func(i int) dispatcher.Options {
		return []dispatcher.Options{
			{Name: "first", Position: hook.Position{First: true}},
			{Name: "m0"},
			{Name: "behind", Position: hook.Position{After: "m1"}},
			{Name: "lost", Position: hook.Position{After: "nobody"}},
		}[i]
	})
	errs, _ = waiting(t, s, func() {}, more...)
	qt.Check(t, qt.IsNil(errs[0]))
	qt.Check(t, qt.ErrorIs(errs[1], fs.ErrExist))
	qt.Check(t, qt.IsNil(errs[2]))
	qt.Check(t, qt.ErrorIs(errs[3], fs.ErrNotExist))
	s.WantRun(t, 30, 10, 11, 32, 9)

	// A pinned member is joined by another, and pinned by itself.
	pinned, _ := joining(t, s, 40, 2, func(i int) dispatcher.Options {
		return dispatcher.Options{Name: fmt.Sprint("stays", i), Persistent: true, Priority: 950}
	})
	errs, swaps = waiting(t, s, func() {}, pinned...)
	qt.Check(t, qt.DeepEquals(errs, []error{nil, nil}))
	qt.Check(t, qt.Equals(swaps, 1))
	for i := range pinned {
		qt.Check(t, qt.HasLen(s.MemberPins(t, fmt.Sprint("stays", i)), 1))
	}
	s.Detach(t, "stays0")
	s.Detach(t, "stays1")
	s.WantNoPins(t)
}

// A process that gives up, or dies, while it waits does not become a member.
func TestAsksOfTheDead(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 9, scene.Pass), dispatcher.Options{Name: "guard", Priority: 900})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ops, _ := joining(t, s, 2, 1, func(int) dispatcher.Options { return dispatcher.Options{Name: "joins"} })
	prog := s.Tracer(t, 1, scene.Pass)
	givesUp := make(chan struct{})
	ops = append(ops, func() error {
		defer close(givesUp)
		_, err := dispatcher.Attach(ctx, s.Target, dispatcher.Program(prog), dispatcher.Options{Name: "gives-up", BPFFS: s.BPFFS})
		return err
	})
	errs, _ := waiting(t, s, func() { cancel(); <-givesUp }, ops...)
	qt.Check(t, qt.IsNil(errs[0]))
	qt.Check(t, qt.ErrorIs(errs[1], context.Canceled))
	s.WantRun(t, 2, 9)

	// What the dead have asked for goes with the next change.
	slot, err := state.NewSlot("dead")
	qt.Assert(t, qt.IsNil(err))
	id, err := kernel.MapID(slot)
	qt.Assert(t, qt.IsNil(err))
	slot.Close()
	path := filepath.Join(s.BPFFS, "libdispatcher", fmt.Sprintf("ask_%016x_%010d", 1, id))
	qt.Assert(t, qt.IsNil(os.Symlink("{}", path)))
	scene.Soon(t, func() bool {
		s.Attach(t, s.Tracer(t, 3, scene.Pass), dispatcher.Options{Name: "next"}).Detach(t.Context())
		return len(asks(t, s)) == 0
	})
}

func asks(t *testing.T, s *scene.Scene) []string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(s.BPFFS, "libdispatcher", "ask_*"))
	qt.Assert(t, qt.IsNil(err))
	return found
}
