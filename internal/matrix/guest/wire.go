// Package guest is the side inside the virtual machine: its first process, which prepares the system and
// runs what it was given, and what it says to the side outside.
//
// They talk over the second serial port, so that what the kernel prints does not mix with what the
// commands do: each frame is a byte that says what it is, four bytes of length, and that much content.
package guest

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"
)

// A Kind is what a frame holds.
type Kind byte

// The kinds of frames.
const (
	Ready  Kind = 'R' // the machine is up; the content is the kernel's release
	Begin  Kind = 'B' // a step begins; its name
	Stdout Kind = 'O'
	Stderr Kind = 'E'
	End    Kind = 'X' // a step ended: a Result as JSON
	Alive  Kind = 'A' // every few seconds, so that a hang is noticed
	Failed Kind = 'F' // the machine could not do its part; why
	Bye    Kind = 'Q' // all steps are done
)

// JobFile is where a virtual machine finds its Job.
const JobFile = "/job.json"

// A Job is what a virtual machine is to do.
type Job struct {
	Steps []Step
}

// A Step is a command. The next one is run when it has ended, whatever its result.
type Step struct {
	Name    string
	Args    []string
	Dir     string
	Env     []string
	Timeout time.Duration // 0: none
}

// A Result is how a step ended.
type Result struct {
	Status   int           // the exit status; 128 and the signal's number if one ended it
	Error    string        // why it could not be run, or did not end
	Duration time.Duration // as the machine's own clock has it
}

const maxFrame = 1 << 16

// A Sender writes frames. It may be used by several goroutines.
type Sender struct {
	mu sync.Mutex
	w  io.Writer
}

// NewSender sends to w.
func NewSender(w io.Writer) *Sender { return &Sender{w: w} }

// Send writes content as one frame, or as several when it is long.
func (s *Sender) Send(kind Kind, content []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		n := min(len(content), maxFrame)
		frame := binary.BigEndian.AppendUint32([]byte{byte(kind)}, uint32(n))
		if _, err := s.w.Write(append(frame, content[:n]...)); err != nil {
			return err
		}
		if content = content[n:]; len(content) == 0 {
			return nil
		}
	}
}

// Stream makes a writer whose content is sent as frames of that kind.
func (s *Sender) Stream(kind Kind) io.Writer { return stream{s, kind} }

type stream struct {
	*Sender
	kind Kind
}

func (s stream) Write(p []byte) (int, error) {
	if err := s.Send(s.kind, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Receive reads one frame.
func Receive(r io.Reader) (Kind, []byte, error) {
	var header [5]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(header[1:])
	if n > maxFrame {
		return 0, nil, fmt.Errorf("not a frame: % x", header)
	}
	content := make([]byte, n)
	_, err := io.ReadFull(r, content)
	return Kind(header[0]), content, err
}
