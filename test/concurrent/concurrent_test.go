package concurrent

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Many processes that come at once, on a machine where all see the same bpffs, and in
// containers where none sees another's lock. A process that was told that it worked
// must be in the chain, and where it belongs.
func TestConcurrent(t *testing.T) {
	for _, tc := range []struct {
		name            string
		workers, rounds int
		operations      int
		locked          bool
	}{
		{"with a lock", 20, 3, 5, true},
		{"without a lock", 8, 3, 7, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := scene.New(t)
			bpffs := func() string { return s.BPFFS }
			if !tc.locked {
				bpffs = t.TempDir
			}
			c := newCrowd(t, s, tc.workers, bpffs)
			for range tc.rounds {
				c.start(tc.operations)
				c.compare(t, c.wait(t))
			}
			c.stop(t)
		})
	}
}

// The same when some are killed in the middle of it, wherever they are.
func TestConcurrentKills(t *testing.T) {
	s := scene.New(t)
	c := newCrowd(t, s, 10, func() string { return s.BPFFS })
	c.start(3)
	c.compare(t, c.wait(t))
	c.start(8)
	for i, name := range c.names[:5] {
		time.Sleep(time.Duration(rand.IntN(100*(i+1))) * time.Millisecond) // any moment will do
		c.workers[name].Kill()
		delete(c.workers, name)
	}
	c.compare(t, c.wait(t))
	c.start(2)
	c.compare(t, c.wait(t))
	c.stop(t)
}

// A Link may be used by several goroutines; run it with -race.
func TestOneLinkManyGoroutines(t *testing.T) {
	s := scene.New(t)
	ctx := t.Context()
	programs := []*ebpf.Program{s.Tracer(t, 1, scene.Pass), s.Tracer(t, 2, scene.Pass)}
	link := s.Attach(t, programs[0], dispatcher.Options{Name: "shared"})
	var closed sync.WaitGroup
	var all sync.WaitGroup
	each := func(n int, fn func(i int) error) {
		all.Add(1)
		closed.Add(1)
		go func() {
			defer all.Done()
			for i := range n {
				if err := fn(i); err != nil {
					t.Errorf("%d: %v", i, err)
				}
			}
			closed.Done()
			// And some more while it is being closed.
			for i := range n {
				if err := fn(i); err != nil && !errors.Is(err, fs.ErrClosed) {
					t.Errorf("on closing: %v", err)
				}
			}
		}()
	}
	each(5, func(i int) error { return link.Update(ctx, dispatcher.Program(programs[i%2])) })
	each(5, func(i int) error { return link.Set(ctx, scene.Priority(1+i)) })
	each(3, func(int) error { return errors.Join(scene.Second(link.Pin(ctx)), link.Unpin(ctx)) })
	each(10, func(int) error { _, err := link.Info(ctx); return err })
	each(10, func(int) error {
		prog, err := link.Program(t.Context())
		if err == nil {
			err = prog.Close()
		}
		return err
	})
	closed.Wait()
	qt.Assert(t, qt.IsNil(link.Close()))
	all.Wait()
	s.Clear(t) // a Pin may have come without its Unpin
	s.WantFree(t)
}
