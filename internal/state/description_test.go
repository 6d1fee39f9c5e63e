package state_test

import (
	"encoding/binary"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// These offsets in a description never change within a version: other programs read
// them, too.
const (
	offMagic      = 0
	offVersion    = 4
	offChainID    = 8
	offRootLink   = 16
	offAttachType = 20
	offFlags      = 24
	offMembers    = 28

	offSlot       = 0
	offPriority   = 4
	offContinueOn = 8
	offOnMissing  = 12
	offMemberFlag = 13
	offName       = 16
	offOwner      = 80
)

// member returns the offset of a field of the member at i.
func member(i, field int) int { return state.HeaderSize + i*state.MemberSize + field }

// chain is a description with a value in every field.
func chain() *state.Chain {
	return &state.Chain{
		ID: 0x1122334455667788, RootLink: 12,
		Plan: dispatch.Plan{
			Shape: dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: true},
			Slots: []dispatch.Slot{
				{MapID: 7, Name: "guard", Owner: "ddos-filter", Persistent: true, Settings: hook.Settings{
					Priority: 1, ContinueOn: hook.SetOf(hook.Pass, hook.TX), OnMissing: hook.MissingDrop,
				}},
				{MapID: 8, Name: strings.Repeat("ü", 31) + "x", Settings: hook.Settings{
					Priority: 65535, ContinueOn: hook.Never, OnMissing: hook.MissingAborted,
				}},
			},
		},
	}
}

func full() *state.Chain {
	c := &state.Chain{ID: 1}
	for i := range hook.MaxMembers {
		c.Slots = append(c.Slots, dispatch.Slot{MapID: uint32(i + 1), Name: fmt.Sprint(i), Settings: hook.Settings{}.WithDefaults()})
	}
	return c
}

// sealedChain is chain with its second member linked into the dispatcher.
func sealedChain() *state.Chain {
	c := chain()
	c.Slots[1].Sealed = dispatch.Sealed{Program: 99, Frame: 16, Code: dispatch.CodeHash{1, 2, 31: 32}}
	return c
}

func marshal(t testing.TB, c *state.Chain) []byte {
	t.Helper()
	b, err := c.Marshal()
	qt.Assert(t, qt.IsNil(err))
	return b
}

// A chain is read as it was written.
func TestRoundTrip(t *testing.T) {
	for name, c := range map[string]*state.Chain{
		"full of variety": chain(),
		"sealed":          sealedChain(),
		"full":            full(),
		"of other kind":   {ID: 1, Plan: dispatch.Plan{Shape: dispatch.Shape{AttachType: ebpf.AttachNone}}},
		"closed":          {ID: 1<<64 - 1, Closed: true, Plan: dispatch.Plan{Shape: dispatch.Plain}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := state.Unmarshal(marshal(t, c))
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.DeepEquals(got, c))
		})
	}
}

// The layout is a contract with programs of other versions.
func TestLayout(t *testing.T) {
	b := marshal(t, chain())
	u32 := func(off int) uint32 { return binary.NativeEndian.Uint32(b[off:]) }
	qt.Assert(t, qt.Equals(len(b), 32+32*144+40))
	qt.Check(t, qt.Equals(u32(offMagic), 0x6c646331))
	qt.Check(t, qt.Equals(u32(offVersion), 1))
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint64(b[offChainID:]), 0x1122334455667788))
	qt.Check(t, qt.Equals(u32(offRootLink), 12))
	qt.Check(t, qt.Equals(u32(offAttachType), uint32(ebpf.AttachXDP)))
	qt.Check(t, qt.Equals(u32(offFlags), 1))
	qt.Check(t, qt.Equals(u32(offMembers), 2))
	qt.Check(t, qt.Equals(u32(member(0, offSlot)), 7))
	qt.Check(t, qt.Equals(u32(member(0, offPriority)), 1))
	qt.Check(t, qt.Equals(u32(member(0, offContinueOn)), 1<<2|1<<3))
	qt.Check(t, qt.Equals(u32(member(1, offContinueOn)), 1<<31))
	qt.Check(t, qt.Equals(b[member(0, offOnMissing)], 2))
	qt.Check(t, qt.Equals(b[member(0, offMemberFlag)], 1))
	qt.Check(t, qt.Equals(string(b[member(0, offName):][:6]), "guard\x00"))
	qt.Check(t, qt.Equals(string(b[member(0, offOwner):][:12]), "ddos-filter\x00"))
}

// A chain with linked members has them after everything that a plain chain has, and another version: a program that
// knows only version 1 must not change such a chain, because it would leave the old code running.
func TestSealedLayout(t *testing.T) {
	plain, sealed := marshal(t, chain()), marshal(t, sealedChain())
	qt.Assert(t, qt.Equals(len(sealed), len(plain)+hook.MaxMembers*40))
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint32(plain[offVersion:]), 1))
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint32(sealed[offVersion:]), 2))
	second := sealed[len(plain)+40:]
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint32(second), 99))
	qt.Check(t, qt.Equals(binary.NativeEndian.Uint32(second[4:]), 16))
	qt.Check(t, qt.DeepEquals(second[8:40], append([]byte{1, 2}, append(make([]byte, 29), 32)...)))
	binary.NativeEndian.PutUint32(sealed[offVersion:], 1)
	qt.Check(t, qt.DeepEquals(sealed[:len(plain)], plain))

	// An unsealed chain has version 1 again.
	c := sealedChain()
	c.Slots[1].Sealed = dispatch.Sealed{}
	qt.Check(t, qt.DeepEquals(marshal(t, c), plain))
}

// A damaged description is refused as a whole: to use half of it would detach
// members.
func TestRejects(t *testing.T) {
	put := func(off int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.NativeEndian.PutUint32(b[off:], v); return b }
	}
	text := func(off int, s string) func([]byte) []byte {
		return func(b []byte) []byte { copy(b[off:], s); return b }
	}
	cut := func(n int) func([]byte) []byte { return func(b []byte) []byte { return b[:n] } }
	for _, tc := range []struct {
		name   string
		damage func([]byte) []byte
		cause  error // if the error has a special cause
	}{
		{"empty", cut(0), state.ErrNotOurs},
		{"half a header", cut(state.HeaderSize - 1), state.ErrNotOurs},
		{"bad magic", put(offMagic, 0x6c646332), state.ErrNotOurs},
		{"later version", put(offVersion, state.Version+1), ebpf.ErrNotSupported},
		{"version 0", put(offVersion, 0), nil},
		{"header only", cut(state.HeaderSize), nil},
		{"truncated", cut(state.ValueSize - 1), nil},
		{"too many members", put(offMembers, hook.MaxMembers+1), nil},
		{"very many members", put(offMembers, 1<<31), nil},
		{"more members than there are", put(offMembers, 3), nil},
		{"unknown flags", put(offFlags, 1<<2), nil},
		{"no slot", put(member(1, offSlot), 0), nil},
		{"a slot twice", put(member(1, offSlot), 7), nil},
		{"a name twice", text(member(1, offName), "guard\x00"), nil},
		{"no name", text(member(1, offName), "\x00"), nil},
		{"name with a space", text(member(1, offName), "a b\x00"), nil},
		{"name that is not UTF-8", text(member(1, offName), "\xff\x00"), nil},
		{"name without an end", text(member(1, offName), strings.Repeat("x", 64)), nil},
		{"bad owner", text(member(0, offOwner), "-x\x00"), nil},
		{"no priority", put(member(1, offPriority), 0), nil},
		{"priority too high", put(member(1, offPriority), 65536), nil},
		{"negative priority", put(member(1, offPriority), 1<<31), nil},
		{"no continue set", put(member(1, offContinueOn), 0), nil},
		{"unknown verdicts", put(member(1, offContinueOn), 1<<5), nil},
		{"never, and yet", put(member(1, offContinueOn), 1<<31|1), nil},
		{"no policy", put(member(1, offOnMissing), 0), nil},
		{"unknown policy", put(member(1, offOnMissing), 4), nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := state.Unmarshal(tc.damage(marshal(t, chain())))
			qt.Assert(t, qt.IsNil(c))
			if tc.cause != nil {
				qt.Assert(t, qt.ErrorIs(err, tc.cause))
			} else {
				qt.Assert(t, qt.ErrorMatches(err, "damaged chain description: .*"))
			}
		})
	}

	for name, damage := range map[string]func([]byte) []byte{
		"sealed, truncated":          cut(len(marshal(t, sealedChain())) - 1),
		"sealed, and not":            cut(len(marshal(t, chain()))),
		"code of no program":         put(len(marshal(t, chain()))+40, 0),
		"code of a member not there": put(len(marshal(t, chain()))+2*40, 1),
	} {
		c, err := state.Unmarshal(damage(marshal(t, sealedChain())))
		qt.Check(t, qt.IsNil(c), qt.Commentf("%s", name))
		qt.Check(t, qt.ErrorMatches(err, "damaged chain description: .*"), qt.Commentf("%s", name))
	}

	c := full()
	c.Slots = append(c.Slots, dispatch.Slot{MapID: 99, Name: "one too many"})
	_, err := c.Marshal()
	qt.Assert(t, qt.ErrorIs(err, hook.ErrChainFull))
}

// Any process with CAP_BPF can make a map that looks like a description: what is
// accepted must be a chain that could have been written.
func FuzzUnmarshal(f *testing.F) {
	f.Add(marshal(f, chain()))
	f.Add(marshal(f, full()))
	f.Add(marshal(f, sealedChain()))
	f.Add(marshal(f, &state.Chain{Closed: true}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := state.Unmarshal(b)
		if err != nil {
			qt.Assert(t, qt.IsNil(c))
			return
		}
		qt.Assert(t, qt.IsTrue(len(c.Slots) <= hook.MaxMembers))
		for i, s := range c.Slots {
			qt.Assert(t, qt.IsNil(hook.CheckName(s.Name)))
			qt.Assert(t, qt.Equals(s.Settings, s.Settings.WithDefaults()))
			qt.Assert(t, qt.IsNil(s.Settings.Check()))
			qt.Assert(t, qt.Equals(c.Index(s.MapID), i))
			qt.Assert(t, qt.Equals(c.Named(s.Name), i))
		}
		again, err := state.Unmarshal(marshal(t, c))
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.DeepEquals(again, c))
	})
}

// buildChain loads the dispatcher of a chain with two empty slots, and returns
// the chain with their ids.
func buildChain(t testing.TB) (*state.Dispatcher, *state.Chain) {
	t.Helper()
	c := chain()
	c.Shape.Frags = c.Shape.Frags && testenv.Has(t, testenv.FeatureFrags)
	var slots []*ebpf.Map
	for i := range c.Slots {
		slot, err := state.NewSlot("ldt")
		qt.Assert(t, qt.IsNil(err))
		t.Cleanup(func() { slot.Close() })
		info, err := slot.Info()
		qt.Assert(t, qt.IsNil(err))
		id, _ := info.ID()
		c.Slots[i].MapID = uint32(id)
		slots = append(slots, slot)
	}
	prog, err := state.Build(c, slots, nil)
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	return prog, c
}

// bpftool shows the linked members as well: the description of a sealed chain has a type for them.
func TestBpftoolShowsSealed(t *testing.T) {
	testenv.CheckLeaks(t)
	loaded := testenv.VerdictProgram(t, "ldt_linked", testenv.XDPPass)
	info, err := loaded.Info()
	qt.Assert(t, qt.IsNil(err))
	id, _ := info.ID()
	slot, err := state.NewSlot("ldt")
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { slot.Close() })
	slotInfo, err := slot.Info()
	qt.Assert(t, qt.IsNil(err))
	slotID, _ := slotInfo.ID()
	code := &dispatch.Code{Name: "ldt_linked", Insns: testenv.VerdictSpec("ldt_linked", testenv.XDPPass).Instructions}
	c := &state.Chain{ID: 1, Plan: dispatch.Plan{Shape: dispatch.Plain, Slots: []dispatch.Slot{{
		MapID: uint32(slotID), Name: "linked", Settings: hook.Settings{}.WithDefaults(), Sealed: dispatch.Sealed{Program: uint32(id), Code: dispatch.CodeHash{7}},
	}}}}
	prog, err := state.Build(c, []*ebpf.Map{slot}, []*dispatch.Code{code})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { prog.Close() })
	got, err := state.Find(prog.Program)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(got, c))

	built, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	ids, _ := built.MapIDs()
	// The dispatcher keeps the slot, although its code does not refer to it.
	qt.Check(t, qt.IsTrue(slices.Contains(ids, slotID)))
	out, err := exec.Command("bpftool", "map", "dump", "id", fmt.Sprint(ids[len(ids)-1])).CombinedOutput()
	qt.Assert(t, qt.IsNil(err), qt.Commentf("bpftool is in the Debian package of that name: %s", out))
	for _, want := range []string{`"version": 2`, `"sealed": [{`, fmt.Sprintf(`"program": %d`, id)} {
		qt.Check(t, qt.StringContains(string(out), want))
	}
}

// A chain is found from its dispatcher alone.
func TestFind(t *testing.T) {
	testenv.CheckLeaks(t)
	prog, want := buildChain(t)
	got, err := state.Find(prog.Program)
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.DeepEquals(got, want))

	other := testenv.VerdictProgram(t, "ldt_other", testenv.XDPPass)
	_, err = state.Find(other)
	qt.Assert(t, qt.ErrorIs(err, state.ErrNotOurs))
}

// Any program may have the dispatcher's name and a map with the description's name.
func TestFindImpostors(t *testing.T) {
	testenv.CheckLeaks(t)
	value := marshal(t, chain())
	for _, tc := range []struct {
		name           string
		program, bound string
		value          []byte
		freeze         bool
		typ            ebpf.MapType
		ours           bool
	}{
		{"the real thing", dispatch.ProgramName, state.MapName, value, true, ebpf.Array, true},
		{"another program", "ldt_x", state.MapName, value, true, ebpf.Array, false},
		{"another map", dispatch.ProgramName, "ldt_x", value, true, ebpf.Array, false},
		{"a map to write to", dispatch.ProgramName, state.MapName, value, false, ebpf.Array, false},
		{"another kind of map", dispatch.ProgramName, state.MapName, value, true, ebpf.Hash, false},
		{"too small", dispatch.ProgramName, state.MapName, value[:16], true, ebpf.Array, false},
		{"no magic", dispatch.ProgramName, state.MapName, make([]byte, len(value)), true, ebpf.Array, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec := testenv.VerdictSpec(tc.program, testenv.XDPPass)
			prog, err := ebpf.NewProgram(spec)
			qt.Assert(t, qt.IsNil(err))
			defer prog.Close()
			m, err := ebpf.NewMap(&ebpf.MapSpec{
				Name: tc.bound, Type: tc.typ, KeySize: 4, ValueSize: uint32(len(tc.value)), MaxEntries: 1,
			})
			qt.Assert(t, qt.IsNil(err))
			defer m.Close()
			qt.Assert(t, qt.IsNil(m.Put(uint32(0), tc.value)))
			if tc.freeze {
				qt.Assert(t, qt.IsNil(m.Freeze()))
			}
			qt.Assert(t, qt.IsNil(prog.BindMap(m)))
			_, err = state.Find(prog)
			if tc.ours {
				qt.Assert(t, qt.IsNil(err))
			} else {
				qt.Assert(t, qt.ErrorIs(err, state.ErrNotOurs))
			}
		})
	}
}

// Without this program an administrator can read the chain with bpftool.
func TestBpftoolShowsDescription(t *testing.T) {
	testenv.CheckLeaks(t)
	prog, c := buildChain(t)
	info, err := prog.Info()
	qt.Assert(t, qt.IsNil(err))
	ids, _ := info.MapIDs()
	out, err := exec.Command("bpftool", "map", "dump", "id", fmt.Sprint(ids[len(ids)-1])).CombinedOutput()
	qt.Assert(t, qt.IsNil(err), qt.Commentf("bpftool is in the Debian package of that name: %s", out))
	for _, want := range []string{
		`"version": 1`, fmt.Sprintf(`"chain_id": %d`, c.ID), `"root_link": 12`, `"members": 2`,
		fmt.Sprintf(`"slot": %d`, c.Slots[0].MapID), `"priority": 65535`, `"continue_on": 12`, `"on_missing": 2`,
		`"name": "guard"`, `"owner": "ddos-filter"`,
	} {
		qt.Check(t, qt.StringContains(string(out), want))
	}
}
