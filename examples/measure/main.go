// Command measure prints every second, until Ctrl-C, how many packets the programs
// on a device see, and how many packets the members of a chain drop.
//
//	measure eth0
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: measure DEVICE")
		os.Exit(1)
	}
	// The counting ends with the context, or with the loop.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device string) error {
	target := dispatcher.XDP(device)
	for samples, err := range dispatcher.Measure(ctx, dispatcher.MeasureOptions{Target: &target}) {
		if err != nil {
			return err
		}
		for _, s := range samples {
			for i, m := range s.Chain.Members {
				counts := s.Entries[i]
				if !counts.Known {
					continue // the member came just now
				}
				fmt.Printf("%s: %.0f packets/s, %v each", m.Name, float64(counts.Runs)/s.Elapsed.Seconds(), counts.PerRun())
				if s.Method == hook.MethodChain {
					fmt.Printf(", %d dropped", counts.Verdicts[hook.Drop])
				}
				fmt.Println()
			}
		}
	}
	return nil
}
