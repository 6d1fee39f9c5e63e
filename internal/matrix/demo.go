package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
)

const demoUsage = `usage: matrix demo [OPTION]...

Runs the demo in a virtual machine. Nothing on this machine is touched.

`

// demoCommand runs "matrix demo".
func demoCommand(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	var o options
	kernel := flags.String("kernel", "7.2", "the `series` of the kernel")
	o.flags(flags)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), demoUsage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return exitStatus(2)
	}
	root, err := moduleRoot(ctx)
	if err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "libdispatcher-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	command := filepath.Join(tmp, "dispatcher")
	if err := buildCommand(ctx, root, command); err != nil {
		return err
	}
	o.files = []file{{command, "/usr/local/bin/dispatcher"}}
	call := []string{"dispatcher", "demo"}
	if info, err := os.Stdout.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" {
		call = append(call, "--color", "always")
	}
	step := guest.Step{Name: "demo", Args: call, Dir: "/root", Timeout: 10 * time.Minute}
	return bootOne(ctx, *kernel, o, step)
}
