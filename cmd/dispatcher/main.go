// Command dispatcher attaches BPF programs to network hooks that several
// programs share, and shows and changes what is attached there.
//
// See "dispatcher --help" or, for everything on one page, "dispatcher man".
package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

func main() {
	ctx := untilSignal()
	kernel.RaiseMemlock()
	if name := filepath.Base(os.Args[0]); name == xdpLoader {
		os.Exit(runXDPLoader(ctx, name, os.Args[1:], newEscaper(os.Stdout), newEscaper(os.Stderr)))
	}
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// An interruption is the signal that ended a context.
type interruption struct{ syscall.Signal }

func (i interruption) Error() string {
	if i.Signal == syscall.SIGINT {
		return "interrupted"
	}
	return "terminated by a signal"
}

// untilSignal returns a context that ends with SIGINT or SIGTERM. A signal may come twice,
// from the terminal and from a supervisor: the second one does not interrupt the clean-up.
func untilSignal() context.Context {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	go func() { cancel(interruption{(<-signals).(syscall.Signal)}) }()
	return ctx
}
