// Command hooks attaches the same counter to a device, for packets that come in
// and for packets that go out, and to a cgroup. It owns all three members until
// Ctrl-C. All hooks are attached in the same way.
//
//	hooks eth0 /sys/fs/cgroup/system.slice
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: hooks DEVICE CGROUP")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device, cgroup string) error {
	spec, err := programs.Spec("count")
	if err != nil {
		return err
	}
	// The file has a program for each kind of hook, and Attach loads the one that fits.
	counter := dispatcher.Spec(spec, dispatcher.LoadOptions{})
	for _, t := range []dispatcher.Target{
		dispatcher.XDP(device),
		dispatcher.On(hook.TCXEgress, device),
		dispatcher.On(hook.CgroupSKBEgress, cgroup),
	} {
		link, err := dispatcher.Attach(ctx, t, counter, dispatcher.Options{Name: "example-count"})
		if err != nil {
			return err // names the hook and the target, and what to do
		}
		defer link.Close()
		if err := show(ctx, link); err != nil {
			return err
		}
	}
	<-ctx.Done()
	return nil
}

// show prints the programs on the hook, in the order in which they run.
func show(ctx context.Context, link *dispatcher.Link) error {
	chain, err := link.Chain(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("%s %s:", chain.Hook, chain.Target)
	for _, m := range chain.Members {
		fmt.Printf(" %s (%s)", m.Name, m.Kind)
	}
	fmt.Println()
	return nil
}
