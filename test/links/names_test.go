package links

import (
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// named lists what is on the hook: "name:kind", with a star for what is pinned.
func named(t testing.TB, s *scene.Scene) []string {
	t.Helper()
	words := []string{}
	for _, m := range s.Read(t).Members {
		word := m.Name + ":" + string(m.Kind)
		if m.Persistent {
			word += "*"
		}
		words = append(words, word)
	}
	return words
}

// Where there is no bpffs, all works but pinning: the names are in the kernel.
func TestNamesWithoutBPFFS(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s = s.WithoutBPFFS(t)
			link := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one", Owner: "me", Priority: 20})
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"one:member"}))
			m := s.Read(t).Members[0]
			qt.Check(t, qt.Equals(m.Priority, 20))
			qt.Check(t, qt.Equals(m.Owner, "me"))

			same := s.Open(t, "one")
			qt.Assert(t, qt.IsNil(same.Update(t.Context(), dispatcher.Program(s.Tracer(t, 2)))))
			s.WantRun(t, 2)
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(30))))
			qt.Check(t, qt.Equals(s.Read(t).Member("one").Priority, 30))
			qt.Check(t, qt.IsNotNil(scene.Second(link.Pin(t.Context()))))
			qt.Assert(t, qt.IsNil(link.Close()))
			s.WantRun(t, 2) // the other one has it
			s.Detach(t, "one")
			s.WantRun(t)
		})
	}
}

// Who looks while a member is attached sees it with its name or not at all: its link is there before its record can be.
func TestNoStrangersWhileAttaching(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one"})
			program := dispatcher.Program(s.Tracer(t, 2))
			linked, goOn := make(chan bool), make(chan bool)
			kernel.OnStep = func(step string) {
				if step == "attach: attached" {
					linked <- true
					<-goOn
				}
			}
			defer func() { kernel.OnStep = nil }()
			done, seen := make(chan error), make(chan []string)
			go func() {
				_, err := dispatcher.Attach(t.Context(), s.Target, program, dispatcher.Options{Name: "two", BPFFS: s.BPFFS, Persistent: true})
				done <- err
			}()
			<-linked
			go func() { seen <- named(t, s) }()
			folder := s.BPFFS + "/libdispatcher"
			scene.Soon(t, func() bool { return kernel.LockWaits(folder) })
			close(goOn)
			qt.Check(t, qt.IsNil(<-done))
			qt.Check(t, qt.DeepEquals(<-seen, []string{"one:member", "two:member*"}))
			s.Detach(t, "two")
		})
	}
}

// A second bpffs over the first hides the pins, and no names: what is attached is not attached again.
func TestNamesUnderSecondBPFFS(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one", Owner: "me", Priority: 20, Persistent: true}).Close()
			qt.Assert(t, qt.IsNil(unix.Mount("bpf", s.BPFFS, "bpf", 0, "mode=0700")))
			above := true
			defer func() {
				if above {
					_ = unix.Unmount(s.BPFFS, 0)
				}
			}()
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"one:member"}))
			_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 2)), dispatcher.Options{Name: "one", BPFFS: s.BPFFS, Persistent: true})
			qt.Check(t, qt.ErrorMatches(err, `.*there is a member "one" already.*`))
			two := s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "two", Priority: 20})
			s.WantRun(t, 1, 2)
			qt.Assert(t, qt.IsNil(two.Close()))
			qt.Assert(t, qt.IsNil(s.Open(t, "one").Update(t.Context(), dispatcher.Program(s.Tracer(t, 3)))))
			found, err := dispatcher.Doctor(t.Context(), s.Look())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.IsTrue(slices.ContainsFunc(found, func(f hook.Finding) bool {
				return f.Check == "other-bpffs" && f.Text == "another file system is mounted over a bpffs: what is pinned there stays, and cannot be reached by its path: "+s.BPFFS
			})), qt.Commentf("%+v", found))

			qt.Assert(t, qt.IsNil(unix.Unmount(s.BPFFS, 0)))
			above = false
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"one:member*"}))
			s.WantRun(t, 3)
			s.Detach(t, "one")
			s.WantFree(t)
		})
	}
}

// One program at several places has a name at each.
func TestNamesOfOneProgram(t *testing.T) {
	s := scene.NewOn(t, hook.CgroupConnect4)
	prog := s.Tracer(t, 1)
	cgroup := testenv.NewCgroup(t)
	there := s.OnDevice(dispatcher.On(hook.CgroupConnect4, cgroup.Path))
	s.Attach(t, prog, dispatcher.Options{Name: "here", Persistent: true})
	other := there.Attach(t, prog, dispatcher.Options{Name: "there"})
	twice := s.Attach(t, prog, dispatcher.Options{Name: "again"})
	qt.Check(t, qt.DeepEquals(named(t, s), []string{"here:member*", "again:member"}))
	qt.Check(t, qt.DeepEquals(named(t, there), []string{"there:member"}))

	// A program that is elsewhere keeps the other names.
	second := s.Tracer(t, 2)
	qt.Assert(t, qt.IsNil(other.Update(t.Context(), dispatcher.Program(second))))
	qt.Assert(t, qt.IsNil(twice.Update(t.Context(), dispatcher.Program(second))))
	qt.Check(t, qt.DeepEquals(named(t, s), []string{"here:member*", "again:member"}))
	qt.Check(t, qt.DeepEquals(named(t, there), []string{"there:member"}))
	qt.Assert(t, qt.IsNil(other.Update(t.Context(), dispatcher.Program(prog))))
	qt.Check(t, qt.DeepEquals(named(t, there), []string{"there:member"}))
	qt.Assert(t, qt.IsNil(other.Close()))
	qt.Assert(t, qt.IsNil(twice.Close()))
	s.Detach(t, "here")
}

// When the holder of a link puts another program in by itself, the name goes with the old program, unless the member is pinned.
// The next change by the member's Link gives it back.
func TestNameAfterForeignUpdate(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			own := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "own", Priority: 10})
			s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "pinned", Priority: 20, Persistent: true})
			for n, name := range []string{"own", "pinned"} {
				raw, err := link.NewFromID(link.ID(s.Read(t).Member(name).LinkID))
				qt.Assert(t, qt.IsNil(err))
				qt.Assert(t, qt.IsNil(raw.Update(s.Tracer(t, n+3))))
				qt.Assert(t, qt.IsNil(raw.Close()))
			}
			s.WantRun(t, 3, 4)
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_3:foreign", "pinned:member*"}))
			m, err := own.Info(t.Context())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Name, "own"))
			qt.Check(t, qt.Equals(m.Priority, 10))
			qt.Assert(t, qt.IsNil(own.Set(t.Context(), scene.Priority(15))))
			pinned := s.Open(t, "pinned")
			qt.Assert(t, qt.IsNil(pinned.Set(t.Context(), scene.Priority(40))))
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"own:member", "pinned:member*"}))
			qt.Check(t, qt.Equals(s.Read(t).Member("own").Priority, 15))
			qt.Check(t, qt.Equals(s.Read(t).Member("pinned").Priority, 40))
			qt.Assert(t, qt.IsNil(own.Close()))
			s.Detach(t, "pinned")
			s.WantFree(t)
		})
	}
}

// Of a link that is gone, or of another hook, a record gives no link a name.
func TestStaleRecords(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			prog := s.Tracer(t, 2)
			_, foreign := s.Foreign(t, prog)
			records, err := state.KeepRecords(prog)
			qt.Assert(t, qt.IsNil(err))
			defer records.Close()
			qt.Assert(t, qt.IsNil(records.Put(foreign, &state.Record{Name: "impostor", Priority: 1, Attach: ebpf.AttachSkLookup})))
			qt.Assert(t, qt.IsNil(records.Put(1<<30, &state.Record{Name: "gone", Priority: 1, Attach: testenv.AttachType(h)})))
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_2:foreign"}))
			_, err = dispatcher.Open(t.Context(), s.Target, "impostor", s.Look())
			qt.Check(t, qt.IsNotNil(err))
			// A name that only such a record has is free.
			for _, name := range []string{"gone", "impostor"} {
				link := s.Attach(t, s.Tracer(t, 3), dispatcher.Options{Name: name})
				qt.Check(t, qt.IsNil(link.Close()))
			}
		})
	}
}

// A record that cannot be read leaves its member without a name, unless it is pinned, and in its work.
func TestDamagedRecords(t *testing.T) {
	for name, damage := range map[string]func([]byte){
		"garbage":       func(b []byte) { copy(b, "garbage") },
		"later version": func(b []byte) { b[4] = 99 },
		"no name":       func(b []byte) { clear(b[32:96]) },
	} {
		t.Run(name, func(t *testing.T) {
			s := scene.NewOn(t, hook.TCXIngress)
			own := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "own", Priority: 10})
			s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "pinned", Priority: 20, Persistent: true})
			for _, member := range []string{"own", "pinned"} {
				key := struct{ Prefix, Link uint32 }{32, s.Read(t).Member(member).LinkID}
				records := s.Records(t, member)[0]
				b, err := records.LookupBytes(key)
				qt.Assert(t, qt.IsNil(err))
				damage(b)
				qt.Assert(t, qt.IsNil(records.Put(key, b)))
			}
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_1:foreign", "pinned:member*"}))
			s.Attach(t, s.Tracer(t, 3), dispatcher.Options{Name: "third"})
			s.WantRun(t, 1, 2, 3)
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_1:foreign", "pinned:member*", "third:member"}))
			qt.Assert(t, qt.IsNil(own.Update(t.Context(), dispatcher.Program(s.Tracer(t, 4)))))
			s.WantRun(t, 4, 2, 3)
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"own:member", "pinned:member*", "third:member"}))
			s.Detach(t, "pinned")
			s.WantRun(t, 4, 3)
		})
	}
}

// The same name twice: on one hook it is refused; two hooks do not know of each other.
func TestNamesOfLinks(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			link := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one", Persistent: true})
			again := func() error {
				l, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 2)), dispatcher.Options{Name: "one", BPFFS: s.BPFFS})
				if err == nil {
					l.Close()
				}
				return err
			}
			qt.Check(t, qt.ErrorMatches(again(), `.*there is a member "one" already.*`))
			other := map[hook.Hook]hook.Hook{
				hook.TCXIngress: hook.TCXEgress, hook.TCXEgress: hook.TCXIngress, hook.CgroupConnect4: hook.CgroupSKBEgress,
			}[h]
			twin := s.SameOn(other)
			l := twin.Attach(t, twin.Tracer(t, 2), dispatcher.Options{Name: "one"})
			qt.Check(t, qt.IsNil(l.Close()))
			qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		})
	}
}
