// Command adopt makes a program that is on a device without a link ("ip link set
// xdp", older tools) the first member of a chain. The program and its maps stay
// the same, and others can then join.
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
	// The program had no owner: it stayed because it was on the device. As a
	// member it stays because it is pinned.
	if _, err := dispatcher.MountBPFFS("/sys/fs/bpf"); err != nil {
		return err
	}
	link, err := dispatcher.Adopt(ctx, dispatcher.XDP(device), dispatcher.AdoptOptions{
		Persistent: true, Owner: "examples/adopt",
		// The kernel wants the device to be empty before a link takes it, and in
		// that moment packets pass unfiltered. With NoGap no packet does, but the
		// chain is not protected until it is adopted again without NoGap.
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
