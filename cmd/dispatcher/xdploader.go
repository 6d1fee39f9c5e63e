package main

import (
	"context"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher/internal/xdploader"
)

// xdpLoader is the name under which the command is that of libxdp.
const xdpLoader = "xdp-loader"

// runXDPLoader is xdp-loader; name is how it was called.
func runXDPLoader(ctx context.Context, name string, args []string, stdout, stderr io.Writer) int {
	return xdploader.Main(ctx, append([]string{name}, args...), stdout, stderr, os.Getenv)
}

// An exit is the exit status of what has said itself all there is to say.
type exit int

func (exit) Error() string { return "" }

// xdpLoaderCommand is for the help and the manual; see also main.
func (a *app) xdpLoaderCommand(args []string) *cobra.Command {
	return &cobra.Command{
		Use:   xdpLoader + " COMMAND",
		Short: "Be xdp-loader, the command of libxdp, for scripts that call it",
		Long: `Be xdp-loader, the command of libxdp: load, unload, status, clean, features and help,
with the options, words and exit codes of xdp-loader 1.6. The command is that as
well when it is called by this name, through a link. docs/xdp-loader.md says what differs.

It works in the network namespace that it runs in; global options do not apply.`,
		Example: `  dispatcher xdp-loader load eth0 filter.o -P 10
  dispatcher xdp-loader status
  ln -s $(command -v dispatcher) /usr/local/sbin/xdp-loader`,
		DisableFlagParsing: true,
		RunE: func(cmd *cobra.Command, rest []string) error {
			if len(args) == 0 || args[0] != xdpLoader {
				return usage("\"ip netns exec NS dispatcher xdp-loader ...\" is how it works in another namespace", "%s takes no global options", xdpLoader)
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
