package chains

import (
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/programs"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// slot opens a member's slot, which packets of a sealed member do not come by.
func slot(t testing.TB, s *scene.Scene, name string) *ebpf.Map {
	t.Helper()
	m := s.Read(t).Member(name)
	qt.Assert(t, qt.IsNotNil(m))
	slot, err := ebpf.NewMapFromID(ebpf.MapID(m.SlotID))
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { slot.Close() })
	return slot
}

// A sealed chain does what it did, in one program; and unsealed it is what it was.
func TestSeal(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		s.Coded = true
		o := scene.Persistent("1", 10)
		o.Mode = mode
		qt.Assert(t, qt.IsNil(s.Attach(t, s.Tracer(t, 1, scene.Pass), o).Close()))
		qt.Assert(t, qt.IsNil(s.Attach(t, s.Tracer(t, 2, testenv.XDPTX), dispatcher.Options{
			Name: "2", Priority: 20, ContinueOn: hook.SetOf(hook.TX), OnMissing: hook.MissingDrop, Persistent: true,
		}).Close()))
		s.Member(t, 3)
		qt.Assert(t, qt.IsNil(s.Attach(t, s.Tracer(t, 4, scene.Drop), scene.Persistent("4", 40)).Close()))
		s.Member(t, 5)
		s.WantRun(t, 1, 2, 3, 4)
		open := s.Read(t)

		report, err := dispatcher.Seal(t.Context(), s.Target, dispatcher.SealOptions{DryRun: true, BPFFS: s.BPFFS})
		qt.Assert(t, qt.IsNil(err))
		scene.WantSealing(t, report, "1 2 3 4 5")
		qt.Assert(t, qt.DeepEquals(s.Read(t), open))

		s.Seal(t, "1 2 3 4 5")
		s.WantRun(t, 1, 2, 3, 4)
		qt.Assert(t, qt.IsTrue(s.Drops(t)))
		sealed := s.Read(t)
		qt.Assert(t, qt.Not(qt.Equals(sealed.DispatcherID, open.DispatcherID)))

		// What else there is to say of the members is the same.
		for i := range sealed.Members {
			sealed.Members[i].Sealed = false
		}
		sealed.DispatcherID = open.DispatcherID
		qt.Assert(t, qt.DeepEquals(sealed, open))

		// No packet comes by a slot.
		other := s.Trace.Program(t, 9, scene.Pass)
		slot := slot(t, s, "3")
		qt.Assert(t, qt.IsNil(state.Fill(slot, other)))
		s.WantRun(t, 1, 2, 3, 4)
		s.Detach(t, "5") // but with the next change
		s.WantRun(t, 1, 2, 9, 4)
		s.WantSealed(t, "1", "2", "4")
		s.Unseal(t)
		s.WantRun(t, 1, 2, 9, 4)
		qt.Assert(t, qt.IsTrue(s.Drops(t)))

		// Neither is done twice.
		unsealed := s.Read(t)
		s.Unseal(t)
		qt.Assert(t, qt.DeepEquals(s.Read(t), unsealed))
		s.Seal(t, "1 2 3! 4", `its object code is not at hand: .*`)
		once := s.Read(t)
		s.Seal(t, "1 2 3! 4", `its object code is not at hand: .*`)
		qt.Assert(t, qt.DeepEquals(s.Read(t), once))
		s.WantRun(t, 1, 2, 9, 4)
		s.Clear(t)
		s.WantFree(t)
	})
}

// A sealed program goes on with the maps that it had: what it has counted, what it was told, what others write there, and
// its variables and constants.
func TestSealKeepsMaps(t *testing.T) {
	s := scene.New(t)
	from := dispatcher.File("../testdata/filter.o", dispatcher.LoadOptions{Globals: map[string]string{"port": "7003", "left": "1000"}})
	filter := s.Join(t, from, scene.Persistent("filter", 10))
	list, err := programs.Spec("droplist")
	qt.Assert(t, qt.IsNil(err))
	s.Join(t, dispatcher.Spec(list, dispatcher.LoadOptions{Program: programs.Function("droplist", hook.XDP)}), scene.Persistent("list", 20))
	number := func(m *ebpf.Map) uint64 { return numbersIn(t, m)[0] }
	dropped, seen, left := pinnedMap(t, s, "filter", "ldt_dropped"), pinnedMap(t, s, "filter", "%2Ebss"), pinnedMap(t, s, "filter", "%2Edata")
	listed := pinnedMap(t, s, "list", "droplist_v4")
	_, key := programs.DropKey(netip.PrefixFrom(testenv.ClientIPv4, 32))

	count := uint64(0)
	check := func(note string) {
		t.Helper()
		comment := qt.Commentf("%s", note)
		s.WantDropped(t, scene.Port+3)
		count += 5
		qt.Assert(t, qt.Equals(number(dropped), count), comment)
		qt.Assert(t, qt.Equals(number(seen)+number(left), 1000), comment) // each packet takes one of these to that
		qt.Assert(t, qt.IsTrue(number(seen) >= 8*count), comment)

		qt.Assert(t, qt.IsNil(listed.Put(key, uint64(0))))
		qt.Assert(t, qt.Equals(s.Passed(t, scene.Port, 5), 0), comment)
		qt.Assert(t, qt.IsNil(listed.Delete(key)))
		qt.Assert(t, qt.Equals(s.Passed(t, scene.Port, 5), 5), comment)
	}
	check("open")
	s.Seal(t, "filter list")
	check("sealed")
	qt.Assert(t, qt.IsNil(filter.Close()))
	check("its handle closed")

	// Others come and go, and the maps stay.
	s.Join(t, scene.File("several.o", "ldt_second"), scene.Persistent("second", 5))
	s.Detach(t, "second")
	check("after others")
	s.Unseal(t)
	check("unsealed")
	s.Clear(t)
	s.WantFree(t)
}
