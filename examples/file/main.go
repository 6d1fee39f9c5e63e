// Command file attaches a program from an object file so that it stays. The member
// is pinned in a bpffs and outlives the command, until "dispatcher detach" or a
// reboot.
//
//	file eth0 filter.o
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
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: file DEVICE FILE")
		os.Exit(1)
	}
	if err := run(context.Background(), os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device, path string) error {
	// The library mounts nothing by itself.
	if _, err := dispatcher.MountBPFFS("/sys/fs/bpf"); err != nil {
		return err
	}

	// The defaults are the only XDP program of the file, and its constants as
	// they are.
	source := dispatcher.File(path, dispatcher.LoadOptions{
		// Program: "xdp_filter",
		// Globals: map[string]string{"limit": "1000"},
	})
	link, err := dispatcher.Attach(ctx, dispatcher.XDP(device), source, dispatcher.Options{
		Name:       "example-file",
		Priority:   20,
		ContinueOn: hook.SetOf(hook.Pass, hook.TX),
		// If somebody removes its pin, no packet passes until the member is back.
		OnMissing:  hook.MissingDrop,
		Persistent: true,
		Owner:      "examples/file",
	})
	var refused *hook.VerifierRefusal
	switch {
	case errors.Is(err, fs.ErrExist):
		return fmt.Errorf("%w\n(to attach it anew: dispatcher detach xdp %s example-file)", err, device)
	case errors.As(err, &refused):
		return fmt.Errorf("%w\n%+v", err, refused.Err) // with the whole log of the verifier
	case err != nil:
		return err
	}
	defer link.Close() // the pin keeps the member

	chain, err := link.Chain(ctx)
	if err != nil {
		return err
	}
	for _, pin := range chain.Pins {
		fmt.Println(pin)
	}
	return nil
}
