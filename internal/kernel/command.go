package kernel

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Flags are the flags of a command, with their values.
type Flags []string

// Command returns the line that runs the dispatcher command for a shell, for hints: the
// verb and what it is about, then its flags. An empty namespace is the caller's, an empty
// bpffs the default one.
//
// Devices, cgroups and members have names that others choose: one may look like a flag.
// Then the flags come first, and "--" ends them.
func Command(netns, bpffs string, flags Flags, args ...string) string {
	words := []string{"dispatcher"}
	if netns != "" {
		words = append(words, "-n", netns)
	}
	if bpffs != "" && bpffs != DefaultBPFFS {
		words = append(words, "--bpffs", bpffs)
	}
	if slices.ContainsFunc(args, func(arg string) bool { return strings.HasPrefix(arg, "-") }) {
		words = append(append(words, args[0]), flags...)
		return Shell(append(append(words, "--"), args[1:]...)...)
	}
	return Shell(append(append(words, args...), flags...)...)
}

// IPCommand returns the line that runs ip(8) in a namespace, TCCommand the one for tc(8).
func IPCommand(netns string, args ...string) string { return toolCommand("ip", netns, args) }

func TCCommand(netns string, args ...string) string { return toolCommand("tc", netns, args) }

func toolCommand(tool, netns string, args []string) string {
	words := []string{tool}
	switch path := netnsPath(netns); {
	case netns == "":
	case filepath.Dir(path) == NetNSDir:
		words = append(words, "-n", filepath.Base(path))
	default: // ip and tc take names only
		words = []string{"nsenter", "--net=" + path, tool}
	}
	return Shell(append(words, args...)...)
}

// MountCommand returns the line that mounts a bpffs at path.
func MountCommand(path string) string {
	if strings.HasPrefix(path, "-") {
		path = "./" + path
	}
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

// quote quotes a word. What does not print would not be in the text that is copied (the
// command escapes it), so printf makes it.
func quote(s string) string {
	switch {
	case s != "" && strings.Trim(s, plain) == "":
		return s
	case utf8.ValidString(s) && !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }):
		return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
	}
	var b strings.Builder
	for _, c := range []byte(s) {
		if strings.IndexByte(plain, c) >= 0 && c != '%' && c != '-' { // printf has flags, too
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, `\%03o`, c)
		}
	}
	return `"$(printf '` + b.String() + `')"`
}
