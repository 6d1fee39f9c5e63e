package doctor

import (
	"fmt"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// at returns a finding about the hook of c, and of a member, if not empty.
func at(c *hook.Chain, member, check string, level hook.Level, format string, args ...any) hook.Finding {
	return hook.Finding{Check: check, Level: level, Hook: c.Hook, Target: c.Target, NetNS: c.NetNS, Member: member, Text: fmt.Sprintf(format, args...)}
}

// on returns a command about the hook of c: the verb, the target, args and flags. It is
// empty when there is no target any more.
func (e *exam) on(c *hook.Chain, flags kernel.Flags, verb string, args ...string) string {
	if c.Target == "" {
		return ""
	}
	return kernel.Command(c.NetNS.Name, e.bpffs, flags, append([]string{verb, string(c.Hook), c.Target}, args...)...)
}

// recover returns the command that removes what dead processes left.
func (e *exam) recover() string { return kernel.Command("", e.bpffs, nil, "recover") }

// oneLine returns the text of an error in one line.
func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }
