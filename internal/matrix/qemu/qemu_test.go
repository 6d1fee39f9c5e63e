package qemu

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
)

// receiveAll receives all frames, and returns what the handler got.
func receiveAll(t *testing.T, wire string) (heard []string, alive int, done bool, err error) {
	t.Helper()
	say := func(what string, args ...any) { heard = append(heard, strings.TrimSpace(what+" "+fmt.Sprint(args...))) }
	done, err = receive(strings.NewReader(wire), Handler{
		Ready:  func(release string) { say("ready", release) },
		Begin:  func(step string) { say("begin", step) },
		Output: func(stderr bool, content []byte) { say("output", stderr, " ", string(content)) },
		End:    func(r guest.Result) { say("end", r.Status, " ", r.Error) },
	}, func() { alive++ })
	return heard, alive, done, err
}

func wire(t *testing.T, frames ...string) string {
	t.Helper()
	var b bytes.Buffer
	s := guest.NewSender(&b)
	for _, f := range frames {
		qt.Assert(t, qt.IsNil(s.Send(guest.Kind(f[0]), []byte(f[1:]))))
	}
	return b.String()
}

func TestReceive(t *testing.T) {
	heard, alive, done, err := receiveAll(t, wire(t, "R7.2", "Bone", "Ohello", "Eoops", "A", `X{"Status":3}`, "Q"))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsTrue(done))
	qt.Check(t, qt.Equals(alive, 7))
	qt.Check(t, qt.DeepEquals(heard, []string{"ready 7.2", "begin one", "output false hello", "output true oops", "end 3"}))
}

// A machine that ends early has not done its job.
func TestReceiveEndsEarly(t *testing.T) {
	all := wire(t, "R7.2", "Bone", "Ohello")
	for n := range len(all) + 1 {
		_, _, done, err := receiveAll(t, all[:n])
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsFalse(done))
	}
}

func TestReceiveFails(t *testing.T) {
	_, _, done, err := receiveAll(t, wire(t, "Fno modules", "Q"))
	qt.Check(t, qt.IsFalse(done))
	qt.Check(t, qt.ErrorMatches(err, "in the machine: no modules"))
	_, _, _, err = receiveAll(t, "qemu-system: a message")
	qt.Check(t, qt.ErrorMatches(err, "not a frame: .*"))
	_, _, _, err = receiveAll(t, wire(t, "Xtext"))
	qt.Check(t, qt.IsNotNil(err))
}

func TestArgs(t *testing.T) {
	m := Machine{Kernel: "k", Initrd: "i", Console: "c", Memory: 512, CPUs: 1, Append: "lsm=bpf"}
	args := m.args()
	at := slices.Index(args, "-append")
	qt.Check(t, qt.Equals(args[at+1], "console=ttyS0 loglevel=5 panic=-1 oops=panic lsm=bpf"))
	qt.Check(t, qt.IsFalse(slices.Contains(args, "kvm")))
	m.KVM = true
	qt.Check(t, qt.IsTrue(slices.Contains(m.args(), "kvm")))
	m.Counted = true // only with an emulator
	qt.Check(t, qt.IsFalse(slices.Contains(m.args(), "kvm")))
	qt.Check(t, qt.IsTrue(slices.Contains(m.args(), "-icount")))
}

func TestWatchedBuffer(t *testing.T) {
	found := 0
	b := &watchedBuffer{word: "KVM internal error", found: func() { found++ }}
	b.Write([]byte("all is well\nKVM inter"))
	qt.Check(t, qt.Equals(found, 0))
	b.Write([]byte("nal error. Suberror: 1"))
	qt.Check(t, qt.Equals(found, 1))
}
