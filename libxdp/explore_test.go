package libxdp

import (
	"os/exec"
	"strings"
	"testing"
	"time"
)

func TestExplore(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		for _, version := range []uint8{1, 2, 3} {
			show := func(args ...string) {
				out, err := x.try(args...)
				t.Logf("config %d: %s: %v\n%s", version, strings.Join(args[:1], " "), err, out)
			}
			o := at(10)
			o.Version = version
			x.join(t, 1, o)
			x.join(t, 2, o)
			show("status", x.Name)
			show(x.loadArgs(t, "count")...)
			t.Log(names(x.read(t)))
			id := x.member(t, "ldt_trace_1").Program.ID
			show("unload", x.Name, "-i", itoa(id))
			t.Log(names(x.read(t)))
			show("clean", x.Name)
			t.Log(x.pinned(t))
			show("unload", x.Name, "--all")
			t.Log(x.pinned(t))
			if x.read(t) != nil {
				t.Log("STILL THERE")
				x.DetachAll(t.Context())
			}
			t.Log(x.pinned(t))
		}
		o := at(10)
		o.Version = x.config
		x.join(t, 1, o)
		x.join(t, 2, o)
		for _, p := range []string{"", "ldt_trace_1", "all"} {
			args := []string{"-i", x.Name, "--rx-capture", "entry,exit", "-x"}
			if p != "" {
				args = append(args, "-p", p)
			}
			cmd := x.command("xdpdump", args...)
			var out strings.Builder
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := x.Server.Run(cmd.Start); err != nil {
				t.Log(err)
				continue
			}
			time.Sleep(4 * time.Second)
			x.Send(t, port, 2)
			time.Sleep(2 * time.Second)
			cmd.Process.Signal(interrupt)
			done := make(chan error)
			go func() { done <- cmd.Wait() }()
			select {
			case err := <-done:
				t.Log(err)
			case <-time.After(10 * time.Second):
				cmd.Process.Kill()
				<-done
			}
			t.Logf("xdpdump %q: %s", p, out.String())
		}
		x.wantSame(t, "ldt_trace_1", "ldt_trace_2")
		_ = exec.Command
		x.DetachAll(t.Context())
	})
}
