package doctor

import (
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// at is a finding about a hook.
func at(c *hook.Chain, check string, level Level) Finding {
	return Finding{Check: check, Level: level, Hook: c.Hook, Target: c.Target, NetNS: c.NetNS}
}

// on is a command about the hook of c: the verb, and what follows the target.
// Empty once there is no target.
func (e *exam) on(c *hook.Chain, verb string, args ...string) string {
	if c.Target == "" {
		return ""
	}
	return dispatcher(c.NetNS.Name, e.bpffs, append([]string{verb, string(c.Hook), c.Target}, args...)...)
}

// recover is the command that clears up what dead processes left.
func (e *exam) recover() string { return dispatcher("", e.bpffs, "recover") }

// dispatcher is a command line.
func dispatcher(netns, bpffs string, args ...string) string {
	words := []string{"dispatcher"}
	if netns != "" {
		words = append(words, "-n", netns)
	}
	if bpffs != kernel.DefaultBPFFS {
		words = append(words, "--bpffs", bpffs)
	}
	return shell(append(words, args...)...)
}

// shell makes words a line for a shell.
func shell(words ...string) string {
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

// oneLine makes an error fit a line.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
