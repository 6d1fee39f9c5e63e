// Package guest is the part that runs inside the virtual machine: the first process, which prepares the
// system, runs the given steps, and reports to the host.
//
// The two talk over the second serial port, so that the kernel's output does not mix with the commands'
// output. A frame is a byte for its kind, four bytes for its length, and the content.
package guest

import (
	"encoding/binary"
	"fmt"
	"io"
	"sync"
	"time"
)

// A Kind says what a frame contains.
type Kind byte

// The kinds of frames.
const (
	Ready  Kind = 'R' // the machine is up; the content is the kernel's release
	Begin  Kind = 'B' // a step begins; its name
	Stdout Kind = 'O'
	Stderr Kind = 'E'
	End    Kind = 'X' // a step ended: a Result as JSON
	Alive  Kind = 'A' // every few seconds, so that the host notices a hang
	Failed Kind = 'F' // the machine could not do its part; why
	Bye    Kind = 'Q' // all steps are done
)

// JobFile is the path of a virtual machine's Job.
const JobFile = "/job.json"

// A Job is the work of a virtual machine.
type Job struct {
	Steps []Step
}

// A Step is a command. When it has ended the next step runs, whatever the result.
type Step struct {
	Name    string
	Args    []string
	Dir     string
	Env     []string
	Timeout time.Duration // 0: none
}

// A Result is how a step ended.
type Result struct {
	Status   int           // the exit status, or 128 plus the number of the signal that killed it
	Error    string        // why it could not run, or did not end
	Duration time.Duration // by the machine's own clock
}

const maxFrame = 1 << 16

// A Sender writes frames. Several goroutines may use it.
type Sender struct {
	mu sync.Mutex
	w  io.Writer
}

// NewSender returns a Sender that writes to w.
func NewSender(w io.Writer) *Sender { return &Sender{w: w} }

// Send writes content as one frame, or as several frames when it is long.
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

// Stream returns a writer that sends its content as frames of that kind.
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
