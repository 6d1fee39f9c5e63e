// Command observe prints what is on a device: the members of a chain in the order
// in which they run, or the only program if another tool attached it.
//
//	observe eth0
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: observe DEVICE")
		os.Exit(1)
	}
	if err := run(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device string) error {
	chain, err := dispatcher.Read(ctx, dispatcher.XDP(device), dispatcher.ReadOptions{})
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no device %s", device)
	}
	if err != nil {
		return err
	}
	switch {
	case len(chain.Members) == 0:
		fmt.Println("nothing is attached")
		return nil
	case chain.Ours():
		fmt.Printf("a chain in %v mode, protected: %v\n", chain.Mode, chain.Protected())
	case chain.Protected():
		fmt.Printf("held by link %d of another tool, in %v mode\n", chain.LinkID, chain.Mode)
	default:
		fmt.Printf("attached without a link, in %v mode: anyone may replace it\n", chain.Mode)
	}
	for i, m := range chain.Members {
		fmt.Printf("%2d. %s", i+1, m.Name)
		if m.Program.ID != 0 {
			fmt.Printf(", program %s (id %d)", m.Program.Name, m.Program.ID)
		}
		if m.Kind == hook.KindMember {
			fmt.Printf(", priority %d, continues on %v, %v", m.Priority, m.ContinueOn, m.State)
		}
		fmt.Println()
	}
	return nil
}
