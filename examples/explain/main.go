// Command explain shows what each program on a device does to a packet. It runs
// the programs one after the other, without sending the packet.
//
//	explain eth0 0200000000020200000000010800450000...
package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"os"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: explain DEVICE PACKET (PACKET in hexadecimal, from the Ethernet header on)")
		os.Exit(1)
	}
	if err := run(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device, text string) error {
	packet, err := hex.DecodeString(text)
	if err != nil {
		return err
	}
	// Explain reads once what is on the device. The programs run with their own
	// maps, so their counters count the packet.
	e, err := dispatcher.Explain(ctx, dispatcher.XDP(device), dispatcher.ExplainOptions{})
	if err != nil {
		return err
	}
	defer e.Close()
	traces, err := e.Run(ctx, packet) // takes any number
	if err != nil {
		return err
	}
	t := traces[0]
	if t.Err != nil {
		return t.Err
	}
	for _, s := range t.Steps {
		if s.Member < 0 {
			fmt.Printf("all members say %s\n", s.Says) // see Together
			continue
		}
		name := e.Chain().Members[s.Member].Name
		if s.Outcome != hook.OutcomeRan {
			fmt.Printf("%s: %s\n", name, s.Outcome)
			continue
		}
		fmt.Printf("%s says %s, and has changed the packet: %v\n", name, s.Says, !s.Change.IsZero())
	}
	fmt.Printf("so it is: %v\n", t.Verdict)
	return nil
}
