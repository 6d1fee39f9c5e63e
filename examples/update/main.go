// Command update gives a member of a chain another program. Each packet meets the
// old program or the new one, never none and never both. The other members are not
// touched.
//
//	update eth0 filter filter-v2.o
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func main() {
	if len(os.Args) != 4 {
		fmt.Fprintln(os.Stderr, "usage: update DEVICE MEMBER FILE")
		os.Exit(1)
	}
	// Update waits while others change the chain. The time limit ends that wait.
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := run(ctx, os.Args[1], os.Args[2], os.Args[3]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, device, name, path string) error {
	// Open works for every member, also if another process attached it.
	link, err := dispatcher.Open(ctx, dispatcher.XDP(device), hook.Ref(name), dispatcher.ReadOptions{})
	if err != nil {
		return err
	}
	defer link.Close()
	before, err := link.Info(ctx)
	if err != nil {
		return err
	}

	// The file is loaded to fit the chain. The new program takes over the old
	// program's maps of the same names (except those in LoadOptions.NewMaps). If
	// this fails, the old program runs on.
	err = link.Update(ctx, dispatcher.File(path, dispatcher.LoadOptions{}))
	if errors.Is(err, dispatcher.ErrDefunct) {
		return fmt.Errorf("%s is gone, and its chain with it", device)
	}
	if err != nil {
		return err
	}
	after, err := link.Info(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("%s: program %d became %d\n", name, before.Program.ID, after.Program.ID)
	return nil
}
