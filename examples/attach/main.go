// Command attach loads a program with cilium/ebpf, attaches it to a device and
// owns it until Ctrl-C. When the command ends, even by kill -9, the program leaves
// the device.
//
//	attach eth0
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/rlimit"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: attach DEVICE")
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device string) error {
	// Before Linux 5.11 the memory of maps counts towards a low limit.
	if err := rlimit.RemoveMemlock(); err != nil {
		return err
	}
	// Any XDP program will do, for example one of your own from bpf2go.
	spec, err := programs.Spec("count")
	if err != nil {
		return err
	}
	coll, err := ebpf.NewCollection(spec)
	if err != nil {
		return fmt.Errorf("load: %w", err)
	}
	defer coll.Close()

	link, err := dispatcher.Attach(ctx, dispatcher.XDP(device), dispatcher.Program(coll.Programs["count"]), dispatcher.Options{
		Name: "example-count",
		// After pass the next member runs. This program only counts, and always passes.
		Priority: 10, ContinueOn: hook.SetOf(hook.Pass),
	})
	if err != nil {
		return err // names what is on the device, and the next step
	}
	defer link.Close()

	fmt.Printf("counting on %s, Ctrl-C ends it\n", device)
	<-ctx.Done()

	// The member uses the collection's maps. This map has a value for each CPU.
	var total []programs.Traffic
	if err := coll.Maps["total"].Lookup(uint32(0), &total); err != nil {
		return fmt.Errorf("read the counters: %w", err)
	}
	var sum programs.Traffic
	for _, cpu := range total {
		sum.Packets += cpu.Packets
		sum.Bytes += cpu.Bytes
	}
	fmt.Printf("%d packets, %d bytes\n", sum.Packets, sum.Bytes)
	return nil
}
