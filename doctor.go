package dispatcher

import (
	"context"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/doctor"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A Level says how bad a [Finding] is.
type Level string

const (
	LevelOK     = Level(doctor.OK)     // a check that found nothing
	LevelNote   = Level(doctor.Note)   // worth knowing
	LevelDrift  = Level(doctor.Drift)  // not as it was meant to be
	LevelBroken = Level(doctor.Broken) // does not work, or harms
)

// A Finding is what a check of [Doctor] has found.
type Finding struct {
	// Check is what was looked at: short and stable.
	Check string
	Level Level
	// Hook, Target and NetNS are where it is, as in [hook.Chain], and Member whose it
	// is; zero for what is on no hook.
	Hook   hook.Hook
	Target string
	NetNS  hook.NetNS
	Member string
	// Text is one line.
	Text string
	// Mend is the command that mends it, for a shell. Empty when there is nothing
	// to do, or no command that does it.
	Mend string
}

// Doctor looks for what is not as it should be: on the machine, in the pins and
// on all hooks; and for the command that mends it. Checks that found nothing are
// in the list, too. What others are in the middle of doing is not reported: the
// state is looked at again before.
//
// Nothing is changed. Features are tried as [Features] does. What cannot be looked
// at is a finding; the error is the end of ctx.
func Doctor(ctx context.Context, o ReadOptions) ([]Finding, error) {
	if o.BPFFS == "" {
		o.BPFFS = kernel.DefaultBPFFS
	}
	found, err := doctor.Look(ctx, o.BPFFS)
	if err != nil {
		return nil, wrap("doctor", Target{}, err)
	}
	list := make([]Finding, 0, len(found))
	for _, f := range found {
		list = append(list, Finding{
			Check: f.Check, Level: Level(f.Level), Hook: f.Hook, Target: f.Target, NetNS: f.NetNS, Member: f.Member,
			Text: f.Text, Mend: f.Mend,
		})
	}
	return list, nil
}
