package scene

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// App is another process that uses the library. It has at most one Link.
type App struct{ *testenv.Proc }

// Command is what an app is told to do.
type Command struct {
	Op         string // see [operations]
	Target     dispatcher.Target
	BPFFS      string
	Member     string
	Program    ebpf.ProgramID
	Maps       bool // load a program that has maps instead
	Settings   hook.Settings
	Persistent bool
	NoGap      bool
	Entry      hook.Ref      // to adopt
	Position   hook.Position // to attach at or move to

	// DieAt makes the app end itself with SIGKILL when it comes to that step
	// of the operation (kernel.OnStep), counted from 1.
	DieAt int
}

// Answer is what became of it.
type Answer struct {
	Died   string // the step at which it did
	Error  string
	Causes []int // in the list of causes
}

// causes are the errors that can be told from each other across processes.
var causes = []error{
	fs.ErrNotExist, fs.ErrExist, fs.ErrClosed, ebpf.ErrNotSupported, dispatcher.ErrBusy, dispatcher.ErrChanged,
	dispatcher.ErrChainFull, dispatcher.ErrDefunct, dispatcher.ErrIncompatible, dispatcher.ErrPermission, dispatcher.ErrUsage,
}

func newAnswer(err error) (a Answer) {
	if err == nil {
		return a
	}
	a.Error = err.Error()
	for i, cause := range causes {
		if errors.Is(err, cause) {
			a.Causes = append(a.Causes, i)
		}
	}
	return a
}

// Err is the error, with the same causes.
func (a Answer) Err() error {
	if a.Error == "" {
		return nil
	}
	err := errors.New(a.Error)
	for _, i := range a.Causes {
		err = hook.Because(causes[i], "%w", err)
	}
	return err
}

// NewApp starts an app.
func NewApp(t testing.TB) *App {
	t.Helper()
	return &App{testenv.StartHelper(t, "app")}
}

// Do tells the app to do something and returns the error that it got.
func (a *App) Do(t testing.TB, c Command) error {
	t.Helper()
	return a.Try(t, c).Err()
}

// Try is [App.Do] for an app that may die of it.
func (a *App) Try(t testing.TB, c Command) (got Answer) {
	t.Helper()
	line, err := json.Marshal(c)
	qt.Assert(t, qt.IsNil(err))
	a.Send(string(line))
	qt.Assert(t, qt.IsNil(json.Unmarshal([]byte(a.Expect(t, "answer")), &got)))
	if got.Died != "" {
		a.Kill() // it is at it; this waits for the end
	}
	return got
}

// NewAppIn starts an app in a cgroup. It has some memory to spare, as a process that has been at work has, so that what it asks
// the kernel for is what lacks first.
func NewAppIn(t testing.TB, c *testenv.Cgroup) *App {
	t.Helper()
	a := &App{c.StartHelper(t, "app")}
	qt.Assert(t, qt.IsNil(a.Do(t, Command{Op: "grow"})))
	return a
}

// Survives is [App.Try] for an app that the kernel may kill. It says whether the app lives, or else waits for its end.
func (a *App) Survives(t testing.TB, c Command) (err error, alive bool) {
	t.Helper()
	line, err := json.Marshal(c)
	qt.Assert(t, qt.IsNil(err))
	a.Send(string(line))
	said, ended := a.ExpectOrEnd(t, "answer")
	if ended {
		return nil, false
	}
	var got Answer
	qt.Assert(t, qt.IsNil(json.Unmarshal([]byte(said), &got)))
	return got.Err(), true
}

// Spare makes the app one that the kernel does not kill for the memory that it wants, but refuses, or the other way round.
func (a *App) Spare(t testing.TB, spared bool) {
	t.Helper()
	score := map[bool]string{true: "-1000", false: "1000"}[spared]
	qt.Assert(t, qt.IsNil(os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", a.Pid), []byte(score), 0)))
}

// Command fills in where it happens.
func (s *Scene) Command(c Command) Command {
	c.Target, c.BPFFS = s.Target, s.BPFFS
	return c
}

// AttachIn makes a program a member that another process owns.
func (s *Scene) AttachIn(t testing.TB, prog *ebpf.Program, o dispatcher.Options) *App {
	t.Helper()
	a := NewApp(t)
	qt.Assert(t, qt.IsNil(a.Do(t, s.Command(Command{
		Op: "attach", Member: o.Name, Program: ID(t, prog), Persistent: o.Persistent,
		Settings: hook.Settings{Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing},
	}))))
	return a
}

func init() {
	testenv.RegisterHelper("app", func([]string) {
		var a appState
		answers := json.NewEncoder(os.Stdout)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			var c Command
			if err := json.Unmarshal(in.Bytes(), &c); err != nil {
				panic(err)
			}
			steps := 0
			kernel.OnStep = func(step string) {
				if steps++; steps == c.DieAt {
					fmt.Print("answer ")
					answers.Encode(Answer{Died: step})
					unix.Kill(os.Getpid(), unix.SIGKILL)
					select {}
				}
			}
			err := operations[c.Op](&a, context.Background(), c)
			fmt.Print("answer ")
			answers.Encode(newAnswer(err))
		}
	})
}

// appState is what an app has.
type appState struct{ link *dispatcher.Link }

// keep makes the link that an operation returned the app's.
func (a *appState) keep(link *dispatcher.Link, err error) error {
	if err == nil {
		a.link = link
	}
	return err
}

func (c Command) options() dispatcher.Options {
	return dispatcher.Options{
		Name: c.Member, Priority: c.Settings.Priority, ContinueOn: c.Settings.ContinueOn, OnMissing: c.Settings.OnMissing,
		Position: c.Position, Persistent: c.Persistent, BPFFS: c.BPFFS,
	}
}

func (c Command) source() dispatcher.Source {
	if c.Maps {
		return dispatcher.Spec(CountingOn(c.Target.Hook), dispatcher.LoadOptions{})
	}
	return dispatcher.ProgramID(uint32(c.Program))
}

// operations are what an app can do.
var operations = map[string]func(*appState, context.Context, Command) error{
	"attach": func(a *appState, ctx context.Context, c Command) error {
		return a.keep(dispatcher.Attach(ctx, c.Target, c.source(), c.options()))
	},
	"adopt": func(a *appState, ctx context.Context, c Command) error {
		o := c.options()
		return a.keep(dispatcher.Adopt(ctx, c.Target, dispatcher.AdoptOptions{
			Name: o.Name, Priority: o.Priority, ContinueOn: o.ContinueOn, OnMissing: o.OnMissing,
			Persistent: o.Persistent, BPFFS: o.BPFFS, NoGap: c.NoGap, Entry: c.Entry,
		}))
	},
	"open": func(a *appState, ctx context.Context, c Command) error {
		return a.keep(dispatcher.Open(ctx, c.Target, hook.Ref(c.Member), dispatcher.ReadOptions{BPFFS: c.BPFFS}))
	},
	"update": func(a *appState, ctx context.Context, c Command) error { return a.link.Update(ctx, c.source()) },
	"seal": func(_ *appState, ctx context.Context, c Command) error {
		_, err := dispatcher.Seal(ctx, c.Target, dispatcher.SealOptions{BPFFS: c.BPFFS})
		return err
	},
	"unseal": func(_ *appState, ctx context.Context, c Command) error {
		return dispatcher.Unseal(ctx, c.Target, dispatcher.ReadOptions{BPFFS: c.BPFFS})
	},
	"set":   func(a *appState, ctx context.Context, c Command) error { return a.link.Set(ctx, c.Settings) },
	"move":  func(a *appState, ctx context.Context, c Command) error { return a.link.Move(ctx, c.Position) },
	"pin":   func(a *appState, ctx context.Context, _ Command) error { return Second(a.link.Pin(ctx)) },
	"unpin": func(a *appState, ctx context.Context, _ Command) error { return a.link.Unpin(ctx) },
	"leave": func(a *appState, ctx context.Context, _ Command) error { return a.link.Detach(ctx) },
	"close": func(a *appState, _ context.Context, _ Command) error { return a.link.Close() },
	"detach": func(_ *appState, ctx context.Context, c Command) error {
		return dispatcher.Detach(ctx, c.Target, hook.Ref(c.Member), dispatcher.DetachOptions{BPFFS: c.BPFFS})
	},
	"measure": func(_ *appState, ctx context.Context, c Command) error {
		for _, err := range dispatcher.Measure(ctx, dispatcher.MeasureOptions{
			Target: &c.Target, Interval: time.Millisecond, BPFFS: c.BPFFS,
		}) {
			return err // after one sample
		}
		return nil
	},
	"clear": func(_ *appState, ctx context.Context, c Command) error {
		return dispatcher.DetachAll(ctx, c.Target, dispatcher.DetachOptions{BPFFS: c.BPFFS})
	},
	"recover": func(_ *appState, ctx context.Context, c Command) error {
		found, err := dispatcher.Recover(ctx, dispatcher.RecoverOptions{BPFFS: c.BPFFS, Reattach: true})
		for _, f := range found {
			err = errors.Join(err, f.Err)
		}
		return err
	},
	"grow": func(*appState, context.Context, Command) error {
		spare := make([]byte, 8<<20)
		for i := 0; i < len(spare); i += 4096 {
			spare[i] = 1
		}
		runtime.GC()
		return nil
	},
	"libxdp": func(a *appState, ctx context.Context, c Command) error {
		return a.keep(dispatcher.Attach(ctx, c.Target, forLibxdp(), dispatcher.Options{Style: hook.StyleLibxdp, Persistent: true, BPFFS: c.BPFFS}))
	},
	"convert": func(_ *appState, ctx context.Context, c Command) error {
		_, err := dispatcher.Convert(ctx, c.Target, hook.Style(c.Member), dispatcher.ConvertOptions{
			BPFFS: c.BPFFS, Programs: map[hook.Ref]dispatcher.Source{"ldt_counting": forLibxdp()},
		})
		return err
	},
}

// forLibxdp is the program with a map, with the type that libxdp's dispatcher wants.
func forLibxdp() dispatcher.Source {
	spec := CountingOn(hook.XDP)
	spec.Programs = Typed(spec.Programs["ldt_counting"]).Programs
	return dispatcher.Spec(spec, dispatcher.LoadOptions{})
}

// AtEachStep calls at for each step that an operation comes to (kernel.Step), while the operation waits.
func AtEachStep(operation func() error, at func(step string)) error {
	steps, next, done := make(chan string), make(chan bool), make(chan error, 1)
	kernel.OnStep = func(step string) { steps <- step; <-next }
	defer func() { kernel.OnStep = nil }()
	go func() { done <- operation() }()
	for {
		select {
		case step := <-steps:
			at(step)
			next <- true
		case err := <-done:
			return err
		}
	}
}
