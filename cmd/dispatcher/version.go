package main

import (
	"cmp"
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker to replace the module's version: -ldflags "-X
// main.version=v1.2.3".
var version string

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  words(0),
		RunE:  func(*cobra.Command, []string) error { return a.printVersion() },
	}
}

func (a *app) printVersion() error {
	v, commit := buildVersion()
	platform := runtime.GOOS + "/" + runtime.GOARCH
	if a.format == formatJSON {
		return a.printJSON(struct {
			Version    int         `json:"version"`
			Dispatcher jsonVersion `json:"dispatcher"`
		}{schema, jsonVersion{v, commit, runtime.Version(), platform}})
	}
	if commit != "" {
		commit += ", "
	}
	return a.print(fmt.Sprintf("dispatcher %s (%s%s, %s)\n", v, commit, runtime.Version(), platform))
}

// buildVersion returns the version and, if the build knows it, the commit.
func buildVersion() (v, commit string) {
	v = version
	if info, ok := debug.ReadBuildInfo(); ok {
		v = cmp.Or(v, info.Main.Version)
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value[:min(len(s.Value), 12)]
			}
		}
	}
	return cmp.Or(v, "(devel)"), commit
}

type jsonVersion struct {
	Version  string `json:"version"`
	Commit   string `json:"commit,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}
