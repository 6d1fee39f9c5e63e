package chains

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

var modelSeed = flag.Uint64("model.seed", 0, "seed for TestModel instead of random ones")

// model is what the documentation says about a chain, in the plainest way.
type model struct {
	members []*modelMember // in run order
	links   int            // open Links, also those to members that were detached
}

type modelMember struct {
	name    string
	s       hook.Settings
	number  int // of the tracer
	verdict hook.Verdict
	program uint32
	links   int
	pinned  bool
}

func (m *modelMember) running() bool { return m.links > 0 || m.pinned }

// outcome is what becomes of a packet: which programs run, and the verdict.
func (m *model) outcome() (ran []int, v hook.Verdict) {
	v = hook.Pass
	for _, mm := range m.members {
		if !mm.running() {
			switch mm.s.OnMissing {
			case hook.MissingDrop:
				return ran, hook.Drop
			case hook.MissingAborted:
				return ran, hook.Aborted
			}
			continue
		}
		ran, v = append(ran, mm.number), mm.verdict
		if !mm.s.ContinueOn.Has(v) {
			return ran, v
		}
	}
	return ran, v
}

// String describes the members as [described] does.
func (m *model) String() string {
	var words []string
	for _, mm := range m.members {
		state, program := hook.StateRunning, mm.program
		if !mm.running() {
			state, program = hook.StateEmpty, 0
		}
		words = append(words, fmt.Sprintf("%s(%d %v %v) program %d %s pinned=%v", mm.name, mm.s.Priority, mm.s.ContinueOn, mm.s.OnMissing, program, state, mm.pinned))
	}
	return strings.Join(words, "\n")
}

// described is a chain in the words of the model.
func described(c *hook.Chain) string {
	var words []string
	for _, m := range c.Members {
		words = append(words, fmt.Sprintf("%s(%d %v %v) program %d %s pinned=%v", m.Name, m.Priority, m.ContinueOn, m.OnMissing, m.Program.ID, m.State, m.Persistent))
	}
	return strings.Join(words, "\n")
}

func (m *model) named(name string) *modelMember {
	for _, mm := range m.members {
		if mm.name == name {
			return mm
		}
	}
	return nil
}

func (m *model) has(mm *modelMember) bool { return slices.Contains(m.members, mm) }

// tidy is part of every change of structure: the empty places go.
func (m *model) tidy() {
	m.members = slices.DeleteFunc(m.members, func(mm *modelMember) bool {
		return !mm.running() && mm.s.OnMissing == hook.MissingContinue
	})
}

func (m *model) insert(mm *modelMember) {
	i := 0
	for i < len(m.members) && m.members[i].s.Priority <= mm.s.Priority {
		i++
	}
	m.members = slices.Insert(m.members, i, mm)
}

func (m *model) remove(mm *modelMember) {
	m.members = slices.DeleteFunc(m.members, func(o *modelMember) bool { return o == mm })
}

// held tells whether something still keeps the chain.
func (m *model) held() bool {
	return m.links > 0 || slices.ContainsFunc(m.members, func(mm *modelMember) bool { return mm.pinned })
}

// modelLink is an open Link.
type modelLink struct {
	*dispatcher.Link
	chain  *model
	member *modelMember
	left   bool
}

// Whatever sequence of operations comes, the chain must be what the model
// says: what Read shows, which programs a packet meets, and what becomes of it.
// A failure tells its seed: run it again with -model.seed.
func TestModel(t *testing.T) {
	seeds := []uint64{rand.Uint64(), rand.Uint64()}
	if *modelSeed != 0 {
		seeds = []uint64{*modelSeed}
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			p := &player{Scene: scene.New(t), t: t, rand: rand.New(rand.NewPCG(seed, 0)), model: &model{}}
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the operations were:\n%s", strings.Join(p.log, "\n"))
				}
			})
			for range 150 {
				p.play()
				p.compare()
			}
			for _, l := range p.links {
				qt.Check(t, qt.IsNil(l.Close()))
			}
			p.Clear(t)
			p.WantFree(t)
		})
	}
}

// letGo is what Close does, and Detach: the link holds nothing any more.
func (l *modelLink) letGo() {
	if !l.left {
		l.left = true
		l.chain.links--
		l.member.links--
	}
}
