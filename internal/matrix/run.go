package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
)

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

const runUsage = `usage: matrix run [OPTION]... -- COMMAND [ARGUMENT]...

Boots a virtual machine, runs the command in it as root, and ends with its status.

`

// runCommand runs "matrix run".
func runCommand(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	var o options
	var files, env list
	kernel := flags.String("kernel", "7.2", "the `series` of the kernel")
	tools := flags.String("xdp-tools", "", "add xdp-tools of these `versions` or Debian releases, comma-separated, or all")
	flags.Var(&files, "file", "copy this file or folder into the machine, `HERE[:THERE]`; may be repeated; without THERE it goes to /root")
	flags.Var(&env, "env", "set an environment variable, `NAME=VALUE`; may be repeated")
	dir := flags.String("dir", "/root", "the `folder` to run in")
	timeout := flags.Duration("timeout", 30*time.Minute, "the command must end within this")
	flags.BoolVar(&o.counted, "counted", false, "let the machine's clock count executed instructions, so that equal work takes equal time")
	o.flags(flags)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), runUsage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return exitStatus(2)
	}
	if flags.NArg() == 0 {
		flags.Usage()
		return exitStatus(2)
	}
	if *tools != "" {
		o.tools = strings.Split(*tools, ",")
	}
	for _, f := range files {
		here, there, ok := strings.Cut(f, ":")
		if !ok {
			abs, err := filepath.Abs(here)
			if err != nil {
				return err
			}
			there = path.Join("/root", filepath.Base(abs))
		}
		o.files = append(o.files, file{here, there})
	}
	return bootOne(ctx, *kernel, o, guest.Step{
		Name: flags.Arg(0), Args: flags.Args(), Dir: *dir, Env: env, Timeout: *timeout,
	})
}

// bootOne runs one step in a machine, prints the step's output and returns its status.
func bootOne(ctx context.Context, kernel string, o options, step guest.Step) error {
	status := 0
	err := boot(ctx, kernel, o, []guest.Step{step}, handler{
		output: func(stderr bool, content []byte) {
			if stderr {
				os.Stderr.Write(content)
			} else {
				os.Stdout.Write(content)
			}
		},
		end: func(r guest.Result) {
			status = r.Status
			if r.Error != "" {
				fmt.Fprintf(os.Stderr, "matrix: %s: %s\n", step.Name, r.Error)
				status = max(status, 1)
			}
		},
	})
	if err != nil {
		return err
	}
	if status != 0 {
		return exitStatus(status)
	}
	return nil
}
