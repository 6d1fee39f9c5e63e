package main

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// What a signal ended is told as that, with the status that shells have for it.
func TestInterrupted(t *testing.T) {
	ended := func(cause error) context.Context {
		ctx, cancel := context.WithCancelCause(context.Background())
		cancel(cause)
		return ctx
	}
	cut := hook.Wrap("attach", hook.XDP, "eth0", fmt.Errorf("wait: %w", context.Canceled))
	for _, test := range []struct {
		ctx    context.Context
		err    error
		text   string
		status int
	}{
		{ended(interruption{syscall.SIGINT}), cut, "attach xdp eth0: interrupted", 130},
		{ended(interruption{syscall.SIGTERM}), cut, "attach xdp eth0: terminated by a signal", 143},
		{ended(interruption{syscall.SIGINT}), context.Canceled, "interrupted", 130},
		{ended(interruption{syscall.SIGINT}), dispatcher.ErrBusy, "hook is busy", statusBusy},
		{ended(errors.New("x")), context.Canceled, "context canceled", statusFailed},
	} {
		err := because(test.ctx, test.err)
		qt.Check(t, qt.Equals(err.Error(), test.text))
		qt.Check(t, qt.Equals(exitStatus(err), test.status))
	}
}
