package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"testing"
)

// A scope replaces the test that internal/testenv needs: things made in it end with it, and a failure ends
// it.
type scope struct {
	testing.TB // for the methods that scope lacks; nothing calls them
	ctx        context.Context
	undo       []func()
	errs       []error
}

// failed is the value with which Fatal panics.
type failed struct{ error }

// within runs fn in a scope and cleans up after it.
func within(ctx context.Context, fn func(t *scope)) error {
	s := &scope{ctx: ctx}
	for run := func() { fn(s) }; run != nil; {
		s.guard(run)
		run = nil
		if n := len(s.undo); n > 0 {
			run, s.undo = s.undo[n-1], s.undo[:n-1]
		}
	}
	return errors.Join(s.errs...)
}

func (s *scope) guard(fn func()) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failed:
			s.errs = append(s.errs, r.error)
		default:
			s.errs = append(s.errs, fmt.Errorf("%v\n%s", r, debug.Stack()))
		}
	}()
	fn()
}

func (s *scope) Helper()                        {}
func (s *scope) Name() string                   { return "bench" }
func (s *scope) Context() context.Context       { return s.ctx }
func (s *scope) Failed() bool                   { return len(s.errs) > 0 }
func (s *scope) Cleanup(fn func())              { s.undo = append(s.undo, fn) }
func (s *scope) Logf(string, ...any)            {}
func (s *scope) Log(...any)                     {}
func (s *scope) Fatal(args ...any)              { panic(failed{errors.New(fmt.Sprint(args...))}) }
func (s *scope) Fatalf(format string, a ...any) { panic(failed{fmt.Errorf(format, a...)}) }
func (s *scope) Error(args ...any)              { s.errs = append(s.errs, errors.New(fmt.Sprint(args...))) }
func (s *scope) Errorf(format string, a ...any) { s.errs = append(s.errs, fmt.Errorf(format, a...)) }
func (s *scope) Skip(args ...any)               { s.Fatal(args...) }
func (s *scope) Skipf(format string, a ...any)  { s.Fatalf(format, a...) }

func (s *scope) TempDir() string {
	dir, err := os.MkdirTemp("", "libdispatcher-bench-")
	s.must(err)
	s.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// must ends the scope if there is an error, or if the user interrupted the benchmark.
func (s *scope) must(err error) {
	if err = errors.Join(slices.DeleteFunc([]error{err, context.Cause(s.ctx)}, func(e error) bool { return e == nil })...); err != nil {
		panic(failed{err})
	}
}
