package kernel

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// Command returns the line that runs the dispatcher command for a shell, for
// hints. An empty namespace is the caller's, an empty bpffs the default one.
func Command(netns, bpffs string, args ...string) string {
	words := []string{"dispatcher"}
	if netns != "" {
		words = append(words, "-n", netns)
	}
	if bpffs != "" && bpffs != DefaultBPFFS {
		words = append(words, "--bpffs", bpffs)
	}
	return Shell(append(words, args...)...)
}

// IPCommand returns the line that runs ip(8) in a namespace, TCCommand the one for tc(8).
func IPCommand(netns string, args ...string) string { return toolCommand("ip", netns, args) }

func TCCommand(netns string, args ...string) string { return toolCommand("tc", netns, args) }

func toolCommand(tool, netns string, args []string) string {
	words := []string{tool}
	switch path := netnsPath(netns); {
	case netns == "":
	case filepath.Dir(path) == netnsDir:
		words = append(words, "-n", filepath.Base(path))
	default: // ip and tc take names only
		words = []string{"nsenter", "--net=" + path, tool}
	}
	return Shell(append(words, args...)...)
}

// MountCommand returns the line that mounts a bpffs at path.
func MountCommand(path string) string {
	line := Shell("mount", "-t", "bpf", "-o", "mode=0700", "bpffs", path)
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return Shell("mkdir", path) + " && " + line
	}
	return line
}

// Shell returns words as a line for a shell.
func Shell(words ...string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = quote(w)
	}
	return strings.Join(quoted, " ")
}

const plain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_./:@%+=,"

func quote(s string) string {
	if s != "" && strings.Trim(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
