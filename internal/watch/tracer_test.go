package watch

import (
	"os"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// Only successful calls of bpf(2) that may attach something are reported, and of calls
// about maps only those about slots.
func TestTracer(t *testing.T) {
	testenv.CheckLeaks(t)
	tr, err := newTracer(func() {})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(tr.close)
	tr.take()

	prog := testenv.VerdictProgram(t, "ldt_traced", testenv.XDPPass)
	slot, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_slot", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer slot.Close()
	array, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_array", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer array.Close()
	info, err := slot.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()

	from := kernelClock()
	qt.Assert(t, qt.IsNil(array.Put(uint32(0), uint32(1))))
	qt.Assert(t, qt.IsNotNil(slot.Put(uint32(1), uint32(prog.FD()))))
	qt.Assert(t, qt.IsNil(slot.Put(uint32(0), uint32(prog.FD()))))
	calls, lost := tr.take()
	qt.Check(t, qt.HasLen(lost, 0))
	qt.Assert(t, qt.HasLen(calls, 1))
	c := calls[0]
	qt.Check(t, qt.Equals(c.pid, os.Getpid()))
	qt.Check(t, qt.Equals(c.cmd, uint32(unix.BPF_MAP_UPDATE_ELEM)))
	qt.Check(t, qt.Equals(c.id, uint32(id)))
	qt.Check(t, qt.IsTrue(c.at >= from && c.at <= kernelClock()))
	qt.Check(t, qt.Not(qt.Equals(c.comm, "")))
	calls, _ = tr.take()
	qt.Check(t, qt.HasLen(calls, 0))
}

// BenchmarkTraced measures what the tracer costs all processes: a system call that does
// nothing, with and without the tracer, and a call of bpf(2) that attaches nothing.
func BenchmarkTraced(b *testing.B) {
	testenv.Require(b)
	array, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_array", Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(b, qt.IsNil(err))
	defer array.Close()
	both := func(b *testing.B) {
		b.Run("getppid", func(b *testing.B) {
			for b.Loop() {
				unix.Getppid()
			}
		})
		b.Run("map lookup", func(b *testing.B) {
			var value uint32
			for b.Loop() {
				_ = array.Lookup(uint32(0), &value)
			}
		})
		b.Run("map update", func(b *testing.B) {
			for b.Loop() {
				_ = array.Put(uint32(0), uint32(1))
			}
		})
	}
	b.Run("without", both)
	start := time.Now()
	tr, err := newTracer(func() {})
	qt.Assert(b, qt.IsNil(err))
	b.Logf("to start it takes %v", time.Since(start))
	defer tr.close()
	b.Run("with", both)
}

// A call shows its effect before it is traced. An event that such a call may have caused waits for it.
func TestExplainWaitsForTheCall(t *testing.T) {
	testenv.CheckLeaks(t)
	tr, err := newTracer(func() {})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(tr.close)
	prog := testenv.VerdictProgram(t, "ldt_late", testenv.XDPPass)
	slot, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_slot", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	defer slot.Close()
	info, err := slot.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	updated := hook.Event{
		Kind: hook.EventUpdated, EventTarget: hook.EventTarget{Hook: hook.XDP}, LinkID: 5, After: &hook.Member{SlotID: uint32(id)},
	}

	// On a busy machine the call may come after the wait, so it is tried again.
	for tries := 1; ; tries++ {
		w := &watcher{sources: &sources{tracer: tr}, clock: kernelClock()}
		called := make(chan error)
		go func() {
			time.Sleep(settle)
			called <- slot.Put(uint32(0), uint32(prog.FD()))
		}()
		events := w.explain([]hook.Event{updated})
		qt.Assert(t, qt.IsNil(<-called))
		if who := events[0].Who; who != nil {
			qt.Check(t, qt.Equals(who.PID, os.Getpid()))
			qt.Check(t, qt.Equals(who.Call, "BPF_MAP_UPDATE_ELEM"))
			break
		}
		if tries == 20 {
			t.Fatal("the call was never waited for")
		}
	}
	// What no call can have caused does not wait.
	w := &watcher{sources: &sources{tracer: tr}, clock: kernelClock()}
	start := time.Now()
	for range 50 {
		w.explain([]hook.Event{{Kind: hook.EventUpdated, EventTarget: hook.EventTarget{Hook: hook.TCIngress}}})
	}
	qt.Check(t, qt.IsTrue(time.Since(start) < 50*settle))
}
