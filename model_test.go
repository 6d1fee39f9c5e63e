package dispatcher_test

import (
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
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

// held tells whether there is still somebody who keeps the chain.
func (m *model) held() bool {
	return m.links > 0 || slices.ContainsFunc(m.members, func(mm *modelMember) bool { return mm.pinned })
}

// player makes random changes, to the chain and to the model at once.
type player struct {
	*scene
	t      *testing.T
	rand   *rand.Rand
	model  *model
	links  []*modelLink
	number int
	log    []string
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
			p := &player{scene: newScene(t), t: t, rand: rand.New(rand.NewPCG(seed, 0)), model: &model{}}
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
			p.clear(t)
			p.wantFree(t)
		})
	}
}

// play does one operation.
func (p *player) play() {
	ops := []func(){
		p.attach, p.attach, p.attach, p.open, p.close, p.close, p.update, p.set, p.set, p.pin, p.unpin, p.detachByName, p.detachByLink,
	}
	if p.rand.IntN(40) == 0 {
		ops = []func(){p.detachAll}
	}
	ops[p.rand.IntN(len(ops))]()
	if len(p.model.members) > 0 && !p.model.held() {
		p.model = &model{} // the kernel has taken it off the device
	}
}

// did checks that an operation ended as the model says.
func (p *player) did(err, want error, format string, args ...any) {
	p.t.Helper()
	p.log = append(p.log, fmt.Sprintf(format, args...)+fmt.Sprintf(": %v", err))
	if !errors.Is(err, want) {
		p.t.Fatalf("%s, want %v", p.log[len(p.log)-1], want)
	}
}

func (p *player) name() string { return string(rune('a' + p.rand.IntN(8))) }

func (p *player) settings() hook.Settings {
	sets := []hook.VerdictSet{
		hook.SetOf(hook.Pass), hook.SetOf(hook.Pass), hook.SetOf(hook.Pass, hook.TX), hook.SetOf(hook.Drop, hook.Aborted, hook.Pass),
		hook.SetOf(hook.Redirect), hook.Never, hook.SetOf(hook.Aborted, hook.Drop, hook.Pass, hook.TX, hook.Redirect),
	}
	missing := []hook.OnMissing{hook.MissingContinue, hook.MissingContinue, hook.MissingDrop, hook.MissingAborted}
	return hook.Settings{
		Priority:   1 + p.rand.IntN(4),
		ContinueOn: sets[p.rand.IntN(len(sets))],
		OnMissing:  missing[p.rand.IntN(len(missing))],
	}
}

// program loads the next tracer.
func (p *player) program(mm *modelMember) (*ebpf.Program, *modelMember) {
	verdicts := []hook.Verdict{hook.Pass, hook.Pass, hook.Pass, hook.Drop, hook.Aborted, hook.TX, hook.Redirect}
	next := *mm
	p.number++
	next.number, next.verdict = p.number, verdicts[p.rand.IntN(len(verdicts))]
	prog := p.tracer(p.t, next.number, int(next.verdict))
	next.program = uint32(idOf(p.t, prog))
	return prog, &next
}

// link chooses one of the open Links; nil when there is none.
func (p *player) link() *modelLink {
	if len(p.links) == 0 {
		return nil
	}
	return p.links[p.rand.IntN(len(p.links))]
}

func (p *player) opened(link *dispatcher.Link, mm *modelMember) {
	mm.links++
	p.model.links++
	p.links = append(p.links, &modelLink{Link: link, chain: p.model, member: mm})
}

func (p *player) attach() {
	prog, mm := p.program(&modelMember{name: p.name(), s: p.settings(), pinned: p.rand.IntN(3) == 0})
	link, err := dispatcher.Attach(p.t.Context(), p.target, dispatcher.Program(prog), dispatcher.Options{
		Name: mm.name, Settings: mm.s, Persistent: mm.pinned, BPFFS: p.bpffs,
	})
	var want error
	old := p.model.named(mm.name)
	if old != nil && old.running() {
		want = fs.ErrExist
	}
	p.did(err, want, "attach %s %+v persistent=%v, verdict %v", mm.name, mm.s, mm.pinned, mm.verdict)
	if err != nil {
		return
	}
	p.model.tidy()
	p.model.remove(old)
	p.model.insert(mm)
	p.opened(link, mm)
}

func (p *player) open() {
	name := p.name()
	link, err := dispatcher.Open(p.t.Context(), p.target, name, p.look())
	mm := p.model.named(name)
	var want error
	if mm == nil || !mm.running() {
		want = fs.ErrNotExist
	}
	p.did(err, want, "open %s", name)
	if err == nil {
		p.opened(link, mm)
	}
}

func (p *player) close() {
	l := p.link()
	if l == nil {
		return
	}
	p.did(l.Close(), nil, "close a link to %s", l.member.name)
	p.links = slices.DeleteFunc(p.links, func(o *modelLink) bool { return o == l })
	l.letGo()
}

// letGo is what Close does, and Detach: whoever left holds nothing.
func (l *modelLink) letGo() {
	if !l.left {
		l.left = true
		l.chain.links--
		l.member.links--
	}
}

// changed checks what an operation on a link returned, and tells whether its
// member is there to be changed.
func (p *player) changed(l *modelLink, err error, format string, args ...any) bool {
	p.t.Helper()
	var want error
	if l.chain != p.model || !p.model.has(l.member) {
		want = fs.ErrNotExist
	}
	p.did(err, want, format, args...)
	return want == nil
}

func (p *player) update() {
	if l := p.link(); l != nil {
		prog, next := p.program(l.member)
		if p.changed(l, l.Update(p.t.Context(), dispatcher.Program(prog)), "update %s, verdict %v", l.member.name, next.verdict) {
			*l.member = *next
		}
	}
}

func (p *player) set() {
	l := p.link()
	if l == nil {
		return
	}
	s := p.settings()
	if p.rand.IntN(2) == 0 {
		s.Priority = 0 // as it is
	}
	if p.changed(l, l.Set(p.t.Context(), s), "set %s %+v", l.member.name, s) {
		s = s.Or(l.member.s)
		p.model.tidy()
		moved := s.Priority != l.member.s.Priority
		l.member.s = s
		if moved {
			p.model.remove(l.member)
			p.model.insert(l.member)
		}
	}
}

func (p *player) pin() {
	if l := p.link(); l != nil && p.changed(l, l.Pin(p.t.Context()), "pin %s", l.member.name) {
		p.model.tidy()
		l.member.pinned = true
	}
}

func (p *player) unpin() {
	if l := p.link(); l != nil && p.changed(l, l.Unpin(p.t.Context()), "unpin %s", l.member.name) {
		p.model.tidy()
		l.member.pinned = false
	}
}

// detached takes a member out of the model; with the last the chain ends, and
// the Links to it lead nowhere.
func (p *player) detached(mm *modelMember) {
	p.model.tidy()
	p.model.remove(mm)
	if len(p.model.members) == 0 {
		p.model = &model{}
	}
}

func (p *player) detachByName() {
	name := p.name()
	mm := p.model.named(name)
	var want error
	if mm == nil {
		want = fs.ErrNotExist
	}
	p.did(dispatcher.Detach(p.t.Context(), p.target, name, p.leave()), want, "detach %s", name)
	if mm != nil {
		p.detached(mm)
	}
}

func (p *player) detachByLink() {
	if l := p.link(); l != nil {
		p.did(l.Detach(p.t.Context()), nil, "detach %s by its link", l.member.name)
		if l.chain == p.model && p.model.has(l.member) {
			p.detached(l.member)
		}
		l.letGo()
	}
}

func (p *player) detachAll() {
	var want error
	if len(p.model.members) == 0 {
		want = fs.ErrNotExist
	}
	p.did(dispatcher.DetachAll(p.t.Context(), p.target, p.leave()), want, "detach all")
	p.model = &model{}
}

// compare looks at the kernel and at packets. What a Link leaves on closing,
// the kernel clears away in its own time, and so it does a chain whose last pin is gone.
func (p *player) compare() {
	t := p.t
	t.Helper()
	ran, verdict := p.model.outcome()
	if n := len(p.log); n > 0 && (strings.HasPrefix(p.log[n-1], "close") || len(p.model.members) == 0) {
		soon(t, func() bool {
			return described(p.read(t)) == p.model.String() && slices.Equal(p.ran(t), ran)
		})
	}
	c := p.read(t)
	qt.Assert(t, qt.Equals(described(c), p.model.String()))
	p.trace.Reset(t)
	passed := p.Passed(t, port, 1)
	qt.Assert(t, qt.DeepEquals(p.trace.Last(t), ran))
	qt.Assert(t, qt.Equals(passed == 1, verdict == hook.Pass), qt.Commentf("verdict %v", verdict))
	if c.Ours() {
		qt.Assert(t, qt.Equals(verdictOf(t, c), verdict))
	}
}

// verdictOf runs the dispatcher of a chain with a packet such as those of the
// tests: of the verdicts that drop, the network shows no difference.
func verdictOf(t testing.TB, c *hook.Chain) hook.Verdict {
	t.Helper()
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(c.DispatcherID))
	qt.Assert(t, qt.IsNil(err))
	defer prog.Close()
	packet := make([]byte, 14+20+8+8)
	binary.BigEndian.PutUint16(packet[12:], 0x0800)     // IPv4
	packet[14], packet[14+9] = 0x45, 17                 // UDP
	binary.BigEndian.PutUint16(packet[14+20+2:], port)  // to the port
	binary.BigEndian.PutUint64(packet[14+20+8:], 1<<63) // and not one that was sent
	v, err := prog.Run(&ebpf.RunOptions{Data: packet})
	qt.Assert(t, qt.IsNil(err))
	return hook.Verdict(v)
}
