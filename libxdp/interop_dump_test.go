package libxdp

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-quicktest/qt"
)

// xdpdump sees our members by their names.
func TestInteropDump(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		o := at(10)
		o.Version = x.config
		x.join(t, 1, o)
		x.join(t, 2, o)
		cmd := x.command("xdpdump", "-i", x.Name, "--rx-capture", "entry,exit", "-p", "all")
		out := &lockedBuffer{}
		cmd.Stdout, cmd.Stderr = out, out
		err := x.Server.Run(cmd.Start)
		if errors.Is(err, exec.ErrNotFound) {
			t.Skip("needs xdpdump (xdp-tools), which is not installed: runs in the kernel matrix")
		}
		qt.Assert(t, qt.IsNil(err))
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for deadline := time.Now().Add(time.Minute); !strings.Contains(out.String(), "listening on"); time.Sleep(10 * time.Millisecond) {
			select {
			case err := <-ended:
				t.Fatalf("xdpdump: %v\n%s", err, out)
			default:
			}
			qt.Assert(t, qt.IsTrue(time.Now().Before(deadline)), qt.Commentf("%s", out))
		}
		// A chain can be read and changed while xdpdump watches it.
		x.wantSame(t, "ldt_trace_1", "ldt_trace_2")
		x.join(t, 3, o)
		x.wantRun(t, 1, 2, 3)
		qt.Assert(t, qt.IsNil(x.Detach(t.Context(), "ldt_trace_3")))
		// xdpdump's dispatcher is no longer the current one, but the members are.
		x.wantSame(t, "ldt_trace_1", "ldt_trace_2")
		before := strings.Count(out.String(), " ldt_trace_1()@entry:")
		x.Send(t, port, 3)
		time.Sleep(time.Second) // it reads its ring some time later
		qt.Assert(t, qt.IsNil(cmd.Process.Signal(os.Interrupt)))
		qt.Assert(t, qt.IsNil(<-ended), qt.Commentf("%s", out))
		for _, name := range []string{"ldt_trace_1", "ldt_trace_2"} {
			for _, point := range []string{"()@entry:", "()@exit[PASS]:"} {
				qt.Assert(t, qt.IsTrue(strings.Count(out.String(), " "+name+point) >= before+3), qt.Commentf("%s", out))
			}
		}
		qt.Assert(t, qt.IsNil(x.DetachAll(t.Context())))
		x.wantPins(t)
	})
}

type lockedBuffer struct {
	mu sync.Mutex
	strings.Builder
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Builder.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.Builder.String()
}
