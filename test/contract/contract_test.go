package contract

import (
	"slices"
	"testing"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// A promise is something that the library promises on every hook.
type promise struct {
	name  string
	check func(t *testing.T, p *place)
	// whole: it is checked on some hooks of each kind only, see wholly. The others differ from those in
	// the numbers that the kernel knows them by.
	whole bool
	// ends: afterwards the device or cgroup is gone, or has moved.
	ends bool
	// cannot is why a family of hooks promises no such thing.
	cannot map[string]string
	// ordered: it takes places among others, which cgroups have since Linux 6.17 only. See checkAppended
	// for what is promised before.
	ordered bool
}

// wholly are the hooks on which all promises are checked.
var wholly = []hook.Hook{
	hook.XDP, hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress, hook.CgroupConnect4, hook.CgroupSKBEgress,
}

// Why a promise is none on some hooks.
const (
	noOwners   = "nobody owns a filter of tc: it stays until it is detached"
	haveOwners = "a member is owned here: it leaves with its owner"
	oneProgram = "one dispatcher holds all of XDP: others have no place beside it, and its members no links"
	noMoves    = "the dispatcher is exchanged as a whole, by whoever asks for it"
	noDevice   = "a cgroup is on no device, and in no network namespace"
	noneBelow  = "devices are not in each other: nothing is inherited"
	leftBehind = "the kernel takes all filters off a device that leaves its namespace"
	takenAlong = "a device takes its links along to another namespace"
	hasOrder   = "members have any place here, on all kernels"
)

// promises are the table of all that is promised.
var promises = []promise{
	{name: "attach", check: checkAttach},
	{name: "order", check: checkOrder, ordered: true},
	{name: "update", check: checkUpdate},
	{name: "set", check: checkSet, ordered: true},
	{name: "pin", check: checkPin, cannot: map[string]string{"tc": noOwners}},
	{name: "die", check: checkDie, cannot: map[string]string{"tc": noOwners}},
	{name: "stay", check: checkStay, cannot: map[string]string{"xdp": haveOwners, "tcx": haveOwners, "cgroup": haveOwners}},
	{name: "appended", check: checkAppended, cannot: map[string]string{"xdp": hasOrder, "tcx": hasOrder, "tc": hasOrder}},
	{name: "wait", check: checkWait},
	{name: "gone", check: checkGone, ends: true},

	// On some hooks of each kind.
	{name: "position", whole: true, check: checkPosition, ordered: true},
	{name: "refer", whole: true, check: checkRefer, ordered: true, cannot: map[string]string{"xdp": oneProgram}},
	{name: "beside others", whole: true, check: checkBeside, ordered: true, cannot: map[string]string{"xdp": oneProgram}},
	{name: "no room", whole: true, check: checkNoRoom, cannot: map[string]string{
		"xdp": oneProgram, "tcx": "the kernel has an order, not numbers", "cgroup": "the kernel has an order, not numbers",
	}},
	{name: "list", whole: true, check: checkList},
	{name: "refuse", whole: true, check: checkRefuse},
	{name: "cancel", whole: true, check: checkCancel},
	{name: "close", whole: true, check: checkClosed},
	{name: "full", whole: true, check: checkFull, cannot: map[string]string{"tc": "filters are limited by their preferences only"}},
	{name: "exclusive", whole: true, check: checkExclusive, cannot: map[string]string{
		"xdp": oneProgram, "tcx": "the kernel knows it on cgroups only", "tc": "the kernel knows it on cgroups only",
	}},
	{name: "overridden", whole: true, check: checkOverridden, cannot: map[string]string{
		"xdp": noneBelow, "tcx": noneBelow, "tc": noneBelow,
	}},
	{name: "held elsewhere", whole: true, check: checkHeldElsewhere, ordered: true, cannot: map[string]string{"xdp": noMoves, "tc": noOwners}},
	{name: "taken out", whole: true, check: checkTakenOut},
	{name: "folder removed", whole: true, check: checkFolderRemoved, ordered: true},
	{name: "without a bpffs", whole: true, check: checkWithoutBPFFS, cannot: map[string]string{"tc": "filters need no bpffs"}},
	{name: "inherited", whole: true, check: checkInherited, cannot: map[string]string{
		"xdp": noneBelow, "tcx": noneBelow, "tc": noneBelow,
	}},
	{name: "replaced", whole: true, ends: true, check: checkReplaced},
	{name: "renamed", whole: true, ends: true, check: checkRenamed, cannot: map[string]string{"cgroup": "the kernel renames no cgroup of v2 (EPERM)"}},
	{name: "moved", whole: true, ends: true, check: checkMoved, cannot: map[string]string{
		"cgroup": noDevice, "tc": leftBehind,
	}},
	{name: "left behind", whole: true, ends: true, check: checkLeftBehind, cannot: map[string]string{
		"cgroup": noDevice, "xdp": takenAlong, "tcx": takenAlong,
	}},
	{name: "legacy", whole: true, check: checkLegacy},
	{name: "peer gone", whole: true, ends: true, check: checkPeerGone, cannot: map[string]string{"cgroup": noDevice}},
	{name: "namespace gone", whole: true, ends: true, check: checkNetNSGone, cannot: map[string]string{"cgroup": noDevice}},
}

// without is why this kernel has not what a promise is about; empty where it has.
func (what promise) without(t testing.TB, h hook.Hook) string {
	t.Helper()
	switch has := !h.OnCgroup() || testenv.Has(t, testenv.FeatureCgroupOrder); {
	case what.ordered && !has:
		return testenv.Requirement(testenv.FeatureCgroupOrder)
	case what.name == "appended" && has:
		return "a place among others is had, see order and position"
	}
	return ""
}

// One hook is like another: what is promised is the same everywhere, and where it is not the
// table says why. A hook that this kernel does not have is refused, with the kernel that has it.
func TestContract(t *testing.T) {
	for _, h := range hook.Hooks() {
		t.Run(string(h), func(t *testing.T) {
			if !testenv.HasHook(t, h) {
				checkMissing(t, placeOn(t, h))
				return
			}
			var shared *place
			for _, what := range promises {
				if what.whole && !slices.Contains(wholly, h) {
					continue
				}
				if shared == nil && !what.whole {
					shared = newPlace(t, h)
				}
				kept := t.Run(what.name, func(t *testing.T) {
					reason := what.cannot[h.Family()]
					if reason == "" {
						reason = what.without(t, h)
					}
					if reason != "" {
						t.Skip(reason)
					}
					p := shared
					if what.whole {
						p = newPlace(t, h)
					}
					what.check(t, p)
					p.end(t, what.ends)
				})
				if !what.whole && (what.ends || !kept) {
					shared = nil
				}
			}
		})
	}
}
