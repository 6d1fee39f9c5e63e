// Command adopt makes the program that was attached to a device without a link
// ("ip link set xdp", older tools) the first member of a chain. It is the same
// program with the same maps, and others can then join it.
//
//	adopt eth0
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/libdispatcher/dispatcher"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: adopt DEVICE")
		os.Exit(1)
	}
	if err := run(context.Background(), os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device string) error {
	// Nobody owned the program: it stayed because it was on the device. As a
	// member it stays because it is pinned.
	if _, err := dispatcher.MountBPFFS("/sys/fs/bpf"); err != nil {
		return err
	}
	link, err := dispatcher.Adopt(ctx, dispatcher.XDP(device), dispatcher.AdoptOptions{
		Options: dispatcher.Options{Persistent: true, Owner: "examples/adopt"},
		// The kernel wants the device to be empty before a link takes it, and
		// the packets of that moment pass unfiltered. With NoGap none does, and
		// the chain is not protected until it is adopted once more without.
		NoGap: false,
	})
	var e *dispatcher.Error
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("nothing to adopt on %s: %w", device, err)
	case errors.Is(err, dispatcher.ErrBusy) && errors.As(err, &e) && e.Occupant != nil:
		return fmt.Errorf("%s has an owner already, link %d: it can only let go by itself", device, e.Occupant.LinkID)
	case err != nil:
		return err
	}
	defer link.Close()

	member, err := link.Info(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("%s is now a member, with program %d\n", member.Name, member.Program.ID)
	return nil
}
