// Package demo shows what libdispatcher does, act by act, on packets that really
// travel, and writes a transcript. Everything happens in network namespaces, a
// cgroup and a bpffs of the demo's own, by the commands that a user would type.
// Every claim is checked, and at the end the demo checks that nothing is left.
package demo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// An act is a part of the demo. Its steps follow each other like those of a script: a
// step that fails ends the act, as in a test.
type act struct {
	title string
	play  func(*stage, context.Context)
}

// A failure is what a failed step panics with.
type failure struct{ error }

// must ends the act if there is an error.
func must(err error) {
	if err != nil {
		panic(failure{err})
	}
}

// value is must for a call with a result.
func value[T any](v T, err error) T {
	must(err)
	return v
}

// attempt calls fn and returns the error of the failed step.
func attempt(fn func()) (err error) {
	defer func() {
		if r := recover(); r != nil {
			f, ok := r.(failure)
			if !ok {
				panic(r)
			}
			err = f.error
		}
	}()
	fn()
	return nil
}

// Run plays the demo and writes the transcript to out. The error is the error
// of the failed step, if any, with what could not be cleaned up. The caller's
// executable must be the dispatcher command, because the demo runs it.
func Run(ctx context.Context, out io.Writer, color bool) error {
	return perform(ctx, &transcript{out: out, color: color}, acts)
}

func perform(ctx context.Context, t *transcript, acts []act) error {
	if err := ready(ctx); err != nil {
		return err
	}
	// A closed terminal, or "| head", must not prevent the clean-up. With
	// SIGPIPE caught, the write fails instead.
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	// The kernel kills the demo's processes when the thread that started them
	// ends, so that thread must live as long as the demo.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	sweep()
	start := time.Now()
	s := newStage(t)
	err := s.play(ctx, acts)
	if err != nil {
		s.say("")
	}
	if err = errors.Join(err, s.strike()); err != nil {
		return err
	}
	s.say("\n%s went as they should, in %.1f s.", s.played(len(acts)), time.Since(start).Seconds())
	return s.failed
}

// played says how many acts were played.
func (s *stage) played(all int) string {
	var not []string
	if s.missed > 0 {
		not = append(not, fmt.Sprintf("%d could not be played on this machine", s.missed))
	}
	if s.inPart > 0 {
		not = append(not, fmt.Sprintf("%d could only in part", s.inPart))
	}
	if len(not) == 0 {
		return fmt.Sprintf("All %d acts", all)
	}
	return fmt.Sprintf("Of %d acts %s; the others", all, strings.Join(not, ", "))
}

// A notHere names what an act needs and this machine lacks.
type notHere string

func (what notHere) Error() string { return string(what) }

func (s *stage) play(ctx context.Context, acts []act) error {
	for i, a := range acts {
		s.heading(i+1, a.title)
		said := s.lacking
		err := attempt(func() { a.play(s, ctx) })
		var what notHere
		if errors.As(err, &what) {
			s.notHere(string(what))
			s.missed++
			err = nil
		} else if s.lacking > said {
			s.inPart++
		}
		if ctx.Err() != nil {
			return fmt.Errorf("the demo was interrupted in act %d", i+1)
		}
		if err = cmp.Or(err, s.failed); err != nil {
			return fmt.Errorf("act %d (%s): %w", i+1, a.title, err)
		}
	}
	return nil
}

// ready says what is missing before anything begins.
func ready(ctx context.Context) error {
	if missing := kernel.MissingCapabilities(); len(missing) > 0 {
		return hook.Because(hook.ErrPermission, "missing %s; run the demo as root", strings.Join(missing, " and "))
	}
	for _, tool := range []struct{ name, fedora string }{{"ip", "iproute"}, {"tc", "iproute-tc"}} {
		// Busybox has commands of these names, but not iproute2's.
		version, err := exec.CommandContext(ctx, tool.name, "-V").CombinedOutput()
		if err != nil || !strings.Contains(string(version), "iproute2") {
			return fmt.Errorf("the demo needs the command %s of iproute2; install the package iproute2 (Debian, Alpine, Arch) or %s (Fedora, RHEL)", tool.name, tool.fedora)
		}
	}
	return nil
}
