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
	// A signal may come twice, from the terminal and from a supervisor. The
	// second one must not interrupt the clean-up.
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	kernel.RaiseMemlock()
	if name := filepath.Base(os.Args[0]); name == xdpLoader {
		os.Exit(runXDPLoader(ctx, name, os.Args[1:], newEscaper(os.Stdout), newEscaper(os.Stderr)))
	}
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
