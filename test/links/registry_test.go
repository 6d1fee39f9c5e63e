package links

import (
	"os"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
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

// Where there is no bpffs, a member has no name that others can see: all else works, by its Link and by its number.
func TestNoRegistryAtAll(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			s = s.WithoutBPFFS(t)
			link := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "one", Owner: "me", Priority: 20})
			m, err := link.Info(t.Context())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Name, "one"))
			qt.Check(t, qt.Equals(m.Priority, 20))
			qt.Check(t, qt.Equals(m.Owner, "me"))
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_1:foreign"}))
			ref := hook.LinkRef(m.LinkID)

			same := s.Open(t, string(ref))
			qt.Assert(t, qt.IsNil(same.Update(t.Context(), dispatcher.Program(s.Tracer(t, 2)))))
			s.WantRun(t, 2)
			qt.Assert(t, qt.IsNil(link.Set(t.Context(), scene.Priority(30))))
			m, err = link.Info(t.Context())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Priority, 30))
			qt.Check(t, qt.IsNotNil(scene.Second(link.Pin(t.Context()))))
			qt.Assert(t, qt.IsNil(link.Close()))
			s.WantRun(t, 2) // the other one has it
			qt.Check(t, qt.ErrorIs(dispatcher.Detach(t.Context(), s.Target, ref, s.Leave()), dispatcher.ErrBusy))
			qt.Assert(t, qt.IsNil(dispatcher.Detach(t.Context(), s.Target, ref, dispatcher.DetachOptions{BPFFS: s.BPFFS, Force: true})))
			s.WantRun(t)
		})
	}
}

// When somebody removes the registry, pinned members have their names still, and others get theirs back when their owner
// does something with them. None stops running.
func TestRegistryDeleted(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			own := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "own", Priority: 10})
			pinned := s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "pinned", Priority: 20, Persistent: true})
			qt.Assert(t, qt.IsNil(os.Remove(s.RegistryPath())))
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_1:foreign", "pinned:member*"}))
			s.WantRun(t, 1, 2)

			m, err := own.Info(t.Context())
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Name, "own"))
			qt.Check(t, qt.Equals(m.Priority, 10))
			third := s.Attach(t, s.Tracer(t, 3), dispatcher.Options{Name: "third", Priority: 30}) // makes a new one
			s.WantRun(t, 1, 2, 3)
			qt.Assert(t, qt.IsNil(own.Set(t.Context(), scene.Priority(15))))
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"own:member", "pinned:member*", "third:member"}))
			qt.Check(t, qt.Equals(s.Read(t).Member("own").Priority, 15))

			again := s.Open(t, "pinned")
			qt.Assert(t, qt.IsNil(again.Set(t.Context(), scene.Priority(40))))
			s.WantRun(t, 1, 3, 2)
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"own:member", "third:member", "pinned:member*"}))
			qt.Check(t, qt.Equals(s.Read(t).Member("pinned").Priority, 40))
			m, err = pinned.Info(t.Context()) // follows
			qt.Assert(t, qt.IsNil(err))
			qt.Check(t, qt.Equals(m.Priority, 40))
			qt.Assert(t, qt.IsNil(pinned.Detach(t.Context())))
			qt.Assert(t, qt.IsNil(own.Close()))
			qt.Assert(t, qt.IsNil(third.Close()))
			s.WantFree(t)
		})
	}
}

// The record of a link that is gone goes with the next operation, and no other link gets a name from one.
func TestStaleRecords(t *testing.T) {
	for _, h := range ownLinkHooks {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			own := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "own"})
			_, foreign := s.Foreign(t, s.Tracer(t, 2))
			write(t, s, 1<<30, &state.Record{Name: "gone", Priority: 1, Attach: testenv.AttachType(h)})
			write(t, s, foreign, &state.Record{Name: "impostor", Priority: 1, Attach: ebpf.AttachSkLookup})
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"own:member", "ldt_trace_2:foreign"}))
			_, err := dispatcher.Open(t.Context(), s.Target, "impostor", s.Look())
			qt.Check(t, qt.IsNotNil(err))
			// A name that only such a record has is free.
			for _, name := range []string{"gone", "impostor"} {
				link := s.Attach(t, s.Tracer(t, 3), dispatcher.Options{Name: name})
				qt.Check(t, qt.IsNil(link.Close()))
			}
			_, stays := s.Registry(t)[1<<30]
			qt.Check(t, qt.IsFalse(stays))
			qt.Assert(t, qt.IsNil(own.Close()))
		})
	}
}

// write puts a record into the registry.
func write(t testing.TB, s *scene.Scene, link uint32, rec *state.Record) {
	t.Helper()
	b, err := rec.MarshalBinary()
	qt.Assert(t, qt.IsNil(err))
	writeBytes(t, s, link, b)
}

func writeBytes(t testing.TB, s *scene.Scene, link uint32, b []byte) {
	t.Helper()
	m, err := ebpf.LoadPinnedMap(s.RegistryPath(), nil)
	qt.Assert(t, qt.IsNil(err))
	defer m.Close()
	qt.Assert(t, qt.IsNil(m.Put(link, b)))
}

// A record that cannot be read leaves its member without a name, unless it is pinned, and in its work.
func TestDamagedRecords(t *testing.T) {
	for name, damage := range map[string]func([]byte){
		"garbage":       func(b []byte) { copy(b, "garbage") },
		"later version": func(b []byte) { b[4] = 99 },
		"no name":       func(b []byte) { clear(b[24:88]) },
	} {
		t.Run(name, func(t *testing.T) {
			s := scene.NewOn(t, hook.TCXIngress)
			own := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "own", Priority: 10})
			s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "pinned", Priority: 20, Persistent: true})
			for link, record := range s.Registry(t) {
				damage(record)
				writeBytes(t, s, link, record)
			}
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_1:foreign", "pinned:member*"}))
			s.Attach(t, s.Tracer(t, 3), dispatcher.Options{Name: "third"})
			s.WantRun(t, 1, 2, 3)
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_1:foreign", "pinned:member*", "third:member"}))
			qt.Assert(t, qt.IsNil(own.Update(t.Context(), dispatcher.Program(s.Tracer(t, 4)))))
			s.WantRun(t, 4, 2, 3)
			s.Detach(t, "pinned")
			s.WantRun(t, 4, 3)
		})
	}
}

// What is in the place of the registry and is none that this version can read is left as it is, and everything works
// without it.
func TestForeignRegistry(t *testing.T) {
	asMap := func(spec ebpf.MapSpec) func(*testing.T, string) {
		return func(t *testing.T, path string) {
			spec.Name = "ldt_registry"
			m, err := ebpf.NewMap(&spec)
			qt.Assert(t, qt.IsNil(err))
			defer m.Close()
			qt.Assert(t, qt.IsNil(m.Put(uint32(1), make([]byte, spec.ValueSize))))
			qt.Assert(t, qt.IsNil(m.Pin(path)))
		}
	}
	for name, put := range map[string]func(*testing.T, string){
		"larger records": asMap(ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 432, MaxEntries: 4}),
		"an array":       asMap(ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 424, MaxEntries: 4}),
		"a program": func(t *testing.T, path string) {
			prog := testenv.VerdictProgram(t, "ldt_registry", testenv.TCNext, testenv.On(hook.TCXIngress))
			qt.Assert(t, qt.IsNil(prog.Pin(path)))
		},
		"a folder": func(t *testing.T, path string) { qt.Assert(t, qt.IsNil(os.Mkdir(path, 0o700))) },
	} {
		t.Run(name, func(t *testing.T) {
			s := scene.NewOn(t, hook.TCXIngress)
			qt.Assert(t, qt.IsNil(os.Mkdir(s.BPFFS+"/libdispatcher", 0o700)))
			put(t, s.RegistryPath())
			var before, after unix.Stat_t
			qt.Assert(t, qt.IsNil(unix.Lstat(s.RegistryPath(), &before)))

			own := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "own", Priority: 10})
			s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "pinned", Persistent: true})
			s.WantRun(t, 1, 2)
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_1:foreign", "pinned:member*"}))
			qt.Assert(t, qt.IsNil(own.Move(t.Context(), hook.Position{Last: true})))
			s.WantRun(t, 2, 1)
			qt.Assert(t, qt.IsNil(own.Update(t.Context(), dispatcher.Program(s.Tracer(t, 3)))))
			s.WantRun(t, 2, 3)
			again := s.Open(t, "pinned")
			qt.Assert(t, qt.IsNil(again.Move(t.Context(), hook.Position{Last: true})))
			s.WantRun(t, 3, 2)
			qt.Check(t, qt.DeepEquals(named(t, s), []string{"ldt_trace_3:foreign", "pinned:member*"}))
			s.Detach(t, "pinned")
			s.WantRun(t, 3)
			qt.Assert(t, qt.IsNil(own.Detach(t.Context())))
			s.WantRun(t)

			qt.Assert(t, qt.IsNil(unix.Lstat(s.RegistryPath(), &after)))
			qt.Check(t, qt.Equals(after.Ino, before.Ino))
			left := slices.DeleteFunc(s.Pins(t), func(name string) bool { return name == "registry" })
			qt.Check(t, qt.HasLen(left, 0))
		})
	}
}

// The same name twice: on one hook it is refused, with or without a registry; two hooks do not know of each other.
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
			qt.Assert(t, qt.IsNil(os.Remove(s.RegistryPath())))
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

// What is in the place of the registry and cannot be read may be a good one: members are not attached without their names, and
// recovering leaves it.
func TestRegistryThatCannotBeRead(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	own := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "own"})
	s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "pinned", Persistent: true})
	path := s.RegistryPath()
	qt.Assert(t, qt.IsNil(os.Rename(path, path+"_")))
	qt.Assert(t, qt.IsNil(os.Symlink("registry", path)))

	ctx := t.Context()
	for what, err := range map[string]error{
		"attach":  scene.Second(dispatcher.Attach(ctx, s.Target, dispatcher.Program(s.Tracer(t, 3)), dispatcher.Options{Name: "third", BPFFS: s.BPFFS})),
		"read":    scene.Second(dispatcher.Read(ctx, s.Target, s.Look())),
		"open":    scene.Second(dispatcher.Open(ctx, s.Target, "own", s.Look())),
		"replace": own.Update(ctx, dispatcher.Program(s.Tracer(t, 4))),
		"detach":  own.Detach(ctx),
	} {
		qt.Check(t, qt.ErrorIs(err, unix.ELOOP), qt.Commentf("%s", what))
	}
	list, err := dispatcher.List(ctx, dispatcher.ListOptions{BPFFS: s.BPFFS, NetNS: s.Target.NetNS, Hooks: []hook.Hook{s.Target.Hook}})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(list, 1))
	qt.Check(t, qt.ErrorIs(list[0].Err, unix.ELOOP))
	findings, err := dispatcher.Doctor(ctx, s.Look())
	qt.Assert(t, qt.IsNil(err))
	told := slices.IndexFunc(findings, func(f hook.Finding) bool { return f.Check == "registry" })
	qt.Assert(t, qt.IsTrue(told >= 0))
	qt.Check(t, qt.Equals(findings[told].Level, hook.LevelBroken))
	qt.Check(t, qt.Equals(findings[told].Mend, ""))
	qt.Check(t, qt.StringContains(findings[told].Text, unix.ELOOP.Error()))
	found := s.Recover(t, dispatcher.RecoverOptions{})
	qt.Assert(t, qt.HasLen(found, 1))
	qt.Check(t, qt.Equals(found[0].Path, path))
	qt.Check(t, qt.ErrorIs(found[0].Err, unix.ELOOP))
	s.WantRun(t, 1, 2)

	qt.Assert(t, qt.IsNil(os.Remove(path)))
	qt.Assert(t, qt.IsNil(os.Rename(path+"_", path)))
	qt.Check(t, qt.DeepEquals(named(t, s), []string{"own:member", "pinned:member*"}))
	qt.Assert(t, qt.IsNil(own.Detach(ctx)))
	s.WantRun(t, 2)
	s.Detach(t, "pinned")
	s.WantFree(t)
}
