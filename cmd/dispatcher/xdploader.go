package main

import (
	"context"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher/internal/xdploader"
)

// xdpLoader is the name under which this command acts as libxdp's.
const xdpLoader = "xdp-loader"

// runXDPLoader acts as xdp-loader; name is the name by which it was called.
func runXDPLoader(ctx context.Context, name string, args []string, stdout, stderr io.Writer) int {
	return xdploader.Main(ctx, append([]string{name}, args...), stdout, stderr, os.Getenv)
}

// An exit is an exit status, after all messages have been printed.
type exit int

func (exit) Error() string { return "" }

// xdpLoaderCommand is for the help and the manual page; see also main.
func (a *app) xdpLoaderCommand(args []string) *cobra.Command {
	return &cobra.Command{
		Use:   xdpLoader + " COMMAND",
		Short: "Act as xdp-loader, the command of libxdp, for scripts that call it",
		Long: `Act as xdp-loader, the command of libxdp: load, unload, status, clean, features
and help, with the options, messages and exit codes of xdp-loader 1.6.
dispatcher also acts as xdp-loader when it is called by that name, through a
link. docs/xdp-loader.md lists the differences.

It works in the network namespace that it runs in; global options do not apply.`,
		Example: `  dispatcher xdp-loader load eth0 filter.o -P 10
  dispatcher xdp-loader status
  ln -s $(command -v dispatcher) /usr/local/sbin/xdp-loader`,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, rest []string) error {
			if len(args) == 0 || args[0] != xdpLoader {
				return usage("for another namespace use \"ip netns exec NS dispatcher xdp-loader ...\"", "%s takes no global options", xdpLoader)
			}
			if len(rest) == 1 && (rest[0] == "--help" || rest[0] == "-h") {
				return cmd.Help()
			}
			if code := runXDPLoader(cmd.Context(), "dispatcher "+xdpLoader, rest, a.stdout, a.stderr); code != 0 {
				return exit(code)
			}
			return nil
		},
	}
}
