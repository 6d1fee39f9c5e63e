// Command matrix runs commands, tests and the demo in virtual machines with Debian's kernels. It is a
// tool of this project: "make test-kernels" and similar targets call it.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
)

const usage = `usage: matrix COMMAND

  run    run a command in a virtual machine: matrix run -kernel 6.12 -- COMMAND
  test   run the project's tests in virtual machines
  demo   run the demo in a virtual machine
  doc    write docs/kernels.md from the results of the tests
  here   say why the demo and the tests cannot run on this machine itself
`

// exitStatus is an error that means only an exit status.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

func main() {
	if os.Getpid() == 1 {
		guest.Init()
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGPIPE)
	defer stop()
	err := dispatch(ctx, os.Args[1:])
	var status exitStatus
	switch {
	case err == nil:
	case errors.As(err, &status):
		os.Exit(int(status))
	case ctx.Err() != nil:
		os.Exit(130) // the status of a shell after Ctrl-C
	default:
		fmt.Fprintln(os.Stderr, "matrix:", err)
		os.Exit(1)
	}
}

func dispatch(ctx context.Context, args []string) error {
	if len(args) == 0 {
		fmt.Fprint(os.Stderr, usage)
		return exitStatus(2)
	}
	switch args[0] {
	case "steps":
		return guest.Steps()
	case "run":
		return runCommand(ctx, args[1:])
	case "test":
		return testCommand(ctx, args[1:])
	case "demo":
		return demoCommand(ctx, args[1:])
	case "doc":
		return docCommand(ctx, args[1:])
	case "here":
		return hereCommand(ctx, args[1:])
	}
	fmt.Fprint(os.Stderr, usage)
	return exitStatus(2)
}
