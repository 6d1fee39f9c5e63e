package chains

import (
	"encoding/binary"
	"errors"
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
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// player makes random changes, to the chain and to the model at once.
type player struct {
	*scene.Scene
	t      *testing.T
	rand   *rand.Rand
	model  *model
	links  []*modelLink
	number int
	waited int // how often a name was refused after a wait
	log    []string
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
	prog := p.Tracer(p.t, next.number, int(next.verdict))
	next.program = uint32(scene.ID(p.t, prog))
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
	name := p.name()
	old := p.model.named(name)
	if old != nil && old.running() && !old.pinned { // Attach waits for seconds, for such a member may be leaving
		if p.waited == 2 {
			p.close()
			return
		}
		p.waited++
	}
	prog, mm := p.program(&modelMember{name: name, s: p.settings(), pinned: p.rand.IntN(3) == 0})
	link, err := dispatcher.Attach(p.t.Context(), p.Target, dispatcher.Program(prog), dispatcher.Options{
		Name: mm.name, Priority: mm.s.Priority, ContinueOn: mm.s.ContinueOn, OnMissing: mm.s.OnMissing, Persistent: mm.pinned, BPFFS: p.BPFFS,
	})
	var want error
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
	link, err := dispatcher.Open(p.t.Context(), p.Target, hook.Ref(name), p.Look())
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
	if l := p.link(); l != nil && p.changed(l, scene.Second(l.Pin(p.t.Context())), "pin %s", l.member.name) {
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
	p.did(dispatcher.Detach(p.t.Context(), p.Target, hook.Ref(name), p.Leave()), want, "detach %s", name)
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
	p.did(dispatcher.DetachAll(p.t.Context(), p.Target, p.Leave()), want, "detach all")
	p.model = &model{}
}

// compare looks at the kernel and at packets. What a Link leaves on closing,
// the kernel clears away in its own time, and also a chain without its last pin.
func (p *player) compare() {
	t := p.t
	t.Helper()
	ran, verdict := p.model.outcome()
	if n := len(p.log); n > 0 && (strings.HasPrefix(p.log[n-1], "close") || len(p.model.members) == 0) {
		scene.Soon(t, func() bool {
			return described(p.Read(t)) == p.model.String() && slices.Equal(p.Ran(t), ran)
		})
	}
	c := p.Read(t)
	qt.Assert(t, qt.Equals(described(c), p.model.String()))
	p.Trace.Reset(t)
	passed := p.Passed(t, scene.Port, 1)
	qt.Assert(t, qt.DeepEquals(p.Trace.Last(t), ran))
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
	binary.BigEndian.PutUint16(packet[12:], 0x0800)          // IPv4
	packet[14], packet[14+9] = 0x45, 17                      // UDP
	binary.BigEndian.PutUint16(packet[14+20+2:], scene.Port) // to the port
	binary.BigEndian.PutUint64(packet[14+20+8:], 1<<63)      // and not one that was sent
	v, err := prog.Run(&ebpf.RunOptions{Data: packet})
	qt.Assert(t, qt.IsNil(err))
	return hook.Verdict(v)
}
