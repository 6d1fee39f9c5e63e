package flood

import (
	"encoding/binary"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A recorder is a program for TC that notes of each datagram of a flood to port or port+1 that it was there, by the number
// that the datagram carries: so one that it did not see cannot be made up for by another that it saw twice. Its verdict
// is for those to port; the others go on.
type recorder struct {
	*ebpf.Program
	seen *ebpf.Map
}

func newRecorder(t testing.TB, name string, verdict int32, as ebpf.AttachType) *recorder {
	t.Helper()
	const size = 2 << scene.RecorderBits * 4
	seen, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ldt_seen", Type: ebpf.Array, KeySize: 4, ValueSize: size, MaxEntries: 1})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { seen.Close() })
	prog := testenv.Load(t, &ebpf.ProgramSpec{
		Name: name, Type: ebpf.SchedCLS, AttachType: as, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{
			asm.LoadMem(asm.R6, asm.R1, 76, asm.Word), // data and data_end of struct __sk_buff
			asm.LoadMem(asm.R7, asm.R1, 80, asm.Word),
			asm.Mov.Reg(asm.R1, asm.R6),
			asm.Add.Imm(asm.R1, 14+20+8+8),
			asm.JGT.Reg(asm.R1, asm.R7, "other"),
			asm.LoadMem(asm.R1, asm.R6, 12, asm.Half),
			asm.HostTo(asm.BE, asm.R1, asm.Half),
			asm.JNE.Imm(asm.R1, unix.ETH_P_IP, "other"),
			asm.LoadMem(asm.R1, asm.R6, 14+9, asm.Byte),
			asm.JNE.Imm(asm.R1, unix.IPPROTO_UDP, "other"),
			asm.LoadMem(asm.R1, asm.R6, 14+20+2, asm.Half),
			asm.HostTo(asm.BE, asm.R1, asm.Half),
			asm.Sub.Imm(asm.R1, scene.Port),
			asm.JGT.Imm(asm.R1, 1, "other"),
			asm.Mov.Reg(asm.R8, asm.R1),
			asm.LSh.Imm(asm.R1, scene.RecorderBits),
			asm.LoadMem(asm.R2, asm.R6, 14+20+8, asm.DWord),
			asm.HostTo(asm.BE, asm.R2, asm.DWord),
			asm.And.Imm(asm.R2, 1<<scene.RecorderBits-1),
			asm.Or.Reg(asm.R2, asm.R1),
			asm.And.Imm(asm.R2, 1<<(scene.RecorderBits+1)-1), // Linux 5.10 does not see it
			asm.LSh.Imm(asm.R2, 2),
			asm.LoadMapValue(asm.R3, seen.FD(), 0),
			asm.Add.Reg(asm.R3, asm.R2),
			asm.Mov.Imm(asm.R1, 1),
			asm.AddAtomic.Mem(asm.R3, asm.R1, asm.Word, 0),
			asm.JNE.Imm(asm.R8, 0, "other"),
			asm.Mov.Imm(asm.R0, verdict),
			asm.Return(),
			asm.Mov.Imm(asm.R0, testenv.TCNext).WithSymbol("other"),
			asm.Return(),
		},
	})
	return &recorder{prog, seen}
}

func (r *recorder) read(t testing.TB) []byte {
	t.Helper()
	b, err := r.seen.LookupBytes(uint32(0))
	qt.Assert(t, qt.IsNil(err))
	return b
}

// compare counts the datagrams that r saw less often than the witness did, and more often. At least so many must have come
// on each port that was flooded.
func (r *recorder) compare(t testing.TB, witness *recorder, atLeast int) (missed, doubled int) {
	t.Helper()
	a, b := witness.read(t), r.read(t)
	var seen [2]int
	for i := 0; i < len(a); i += 4 {
		want, got := binary.NativeEndian.Uint32(a[i:]), binary.NativeEndian.Uint32(b[i:])
		seen[i/(len(a)/2)] += int(want)
		switch {
		case got < want:
			missed++
		case got > want:
			doubled++
		}
	}
	t.Logf("the witness saw %d and %d datagrams; of these %d were missed and %d met more than once", seen[0], seen[1], missed, doubled)
	qt.Assert(t, qt.IsTrue(seen[0] >= atLeast && (seen[1] == 0 || seen[1] >= atLeast)))
	return missed, doubled
}

// wantOnce checks that r saw each datagram exactly as often as the witness did.
func (r *recorder) wantOnce(t testing.TB, witness *recorder) {
	t.Helper()
	missed, doubled := r.compare(t, witness, 1000)
	qt.Check(t, qt.Equals(missed, 0), qt.Commentf("missed"))
	qt.Check(t, qt.Equals(doubled, 0), qt.Commentf("met twice"))
}

// And one that is at two places at once is seen by the recorders.
func TestRecorderSeesDoubles(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	witness, twice := newRecorder(t, "ldt_witness", testenv.TCNext, 0), newRecorder(t, "ldt_twice", testenv.TCNext, 0)
	s.Attach(t, witness.Program, dispatcher.Options{})
	s.Attach(t, twice.Program, dispatcher.Options{})
	again := s.SameOn(hook.TCIngress)
	flood := s.Flood(t, scene.Port)
	link := again.Attach(t, twice.Program, dispatcher.Options{Persistent: true})
	scene.Flow(t, flood)
	qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	flood.Stop()
	missed, doubled := twice.compare(t, witness, 1)
	qt.Check(t, qt.Equals(missed, 0))
	qt.Check(t, qt.IsTrue(doubled > 0))
}
