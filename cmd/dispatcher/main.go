// Command dispatcher attaches BPF programs to hooks of the network that several
// programs share, and shows and changes what is attached there.
//
// See "dispatcher --help" and, for all of it on one page, "dispatcher man".
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
	// Signals may come twice, from the terminal and from whoever runs the
	// command: the second one must not end an orderly retreat.
	ctx, _ := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	kernel.RaiseMemlock()
	if name := filepath.Base(os.Args[0]); name == xdpLoader {
		os.Exit(runXDPLoader(ctx, name, os.Args[1:], os.Stdout, os.Stderr))
	}
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}
