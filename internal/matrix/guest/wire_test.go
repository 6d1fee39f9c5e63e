package guest

import (
	"bytes"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestFrames(t *testing.T) {
	var wire bytes.Buffer
	s := NewSender(&wire)
	long := strings.Repeat("x", 3*maxFrame+1)
	qt.Assert(t, qt.IsNil(s.Send(Ready, []byte("7.2"))))
	qt.Assert(t, qt.IsNil(s.Send(Alive, nil)))
	n, err := s.Stream(Stdout).Write([]byte(long))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(n, len(long)))

	kind, content, err := Receive(&wire)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(kind, Ready))
	qt.Check(t, qt.Equals(string(content), "7.2"))
	kind, content, err = Receive(&wire)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(kind, Alive))
	qt.Check(t, qt.HasLen(content, 0))
	var got strings.Builder
	for range 4 {
		kind, content, err = Receive(&wire)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(kind, Stdout))
		got.Write(content)
	}
	qt.Check(t, qt.IsTrue(got.String() == long))
	_, _, err = Receive(&wire)
	qt.Check(t, qt.ErrorIs(err, io.EOF))
}

func TestFramesDoNotMix(t *testing.T) {
	var wire bytes.Buffer
	s := NewSender(&wire)
	var wait sync.WaitGroup
	for _, kind := range []Kind{Stdout, Stderr} {
		wait.Go(func() {
			for range 1000 {
				s.Stream(kind).Write([]byte{byte(kind), byte(kind)})
			}
		})
	}
	wait.Wait()
	for range 2000 {
		kind, content, err := Receive(&wire)
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.DeepEquals(content, []byte{byte(kind), byte(kind)}))
	}
}

func TestNoFrame(t *testing.T) {
	_, _, err := Receive(strings.NewReader("qemu: some message"))
	qt.Check(t, qt.ErrorMatches(err, "not a frame: .*"))
	_, _, err = Receive(strings.NewReader("O\x00\x00\x00\x05ab"))
	qt.Check(t, qt.ErrorIs(err, io.ErrUnexpectedEOF))
}
