package watch

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// errQuiet says why no signs are heard with Options.Quiet.
var errQuiet = errors.New("not asked for")

// A source is a descriptor that tells of changes.
type source struct {
	fd     int
	read   func() (sign bool, lost string)
	follow func() // listens to what is new since the last look
	close  func()
}

// sources waits for signs of a change.
type sources struct {
	wake chan struct{}
	stop int // eventfd
	done sync.WaitGroup

	signals []source
	tracer  *tracer
	said    hook.WatchSources

	mu   sync.Mutex
	lost []string // what overflowed
}

func newSources(o *Options) *sources {
	s := &sources{wake: make(chan struct{}, 1), stop: -1}
	s.said = hook.WatchSources{Netlink: errQuiet, Pins: errQuiet, Calls: errQuiet, Programs: errQuiet}
	if o.Quiet {
		return s
	}
	var err error
	if s.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		s.said = hook.WatchSources{Netlink: err, Pins: err, Calls: err, Programs: err}
		return s
	}
	l, err := newListener(o.NetNS)
	if s.said.Netlink = err; err == nil {
		s.signals = append(s.signals, source{l.fd, l.read, l.follow, l.close})
	}
	p, err := newPinWatch(o.BPFFS)
	if s.said.Pins = err; err == nil {
		s.signals = append(s.signals, source{p.fd, p.read, p.follow, p.close})
	}
	rings, err := newProgramEvents()
	s.said.Programs = err
	for _, r := range rings {
		s.signals = append(s.signals, source{r.fd, r.read, func() {}, r.close})
	}
	s.tracer, s.said.Calls = newTracer(s.sign)
	s.done.Go(s.poll)
	return s
}

// sign tells the watcher that something may have changed.
func (s *sources) sign() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *sources) lose(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lost = append(s.lost, what)
}

// poll waits for the sources that are descriptors.
func (s *sources) poll() {
	fds := []unix.PollFd{{Fd: int32(s.stop), Events: unix.POLLIN}}
	for _, src := range s.signals {
		fds = append(fds, unix.PollFd{Fd: int32(src.fd), Events: unix.POLLIN})
	}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			s.lose("poll: " + err.Error())
			return
		}
		if fds[0].Revents != 0 {
			return
		}
		for i, src := range s.signals {
			switch revents := fds[i+1].Revents; {
			case revents&unix.POLLIN != 0:
			case revents != 0:
				fds[i+1].Fd = -1 // nothing more will come
				continue
			default:
				continue
			}
			sign, lost := src.read()
			if lost != "" {
				s.lose(lost)
			}
			if sign || lost != "" {
				s.sign()
			}
		}
	}
}

// follow makes the sources listen to what is new since the last look.
func (s *sources) follow() {
	for _, src := range s.signals {
		src.follow()
	}
}

// taken returns the traced calls, and the names of what overflowed.
func (s *sources) taken() (list []call, lost []string) {
	if s.tracer != nil {
		list, lost = s.tracer.take()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	lost = append(lost, s.lost...)
	s.lost = nil
	return list, lost
}

func (s *sources) close() {
	if s.stop < 0 {
		return
	}
	if s.tracer != nil {
		s.tracer.close()
	}
	for {
		if _, err := unix.Write(s.stop, []byte{1, 0, 0, 0, 0, 0, 0, 1}); err == nil || !errors.Is(err, unix.EINTR) {
			break
		}
	}
	s.done.Wait()
	unix.Close(s.stop)
	for _, src := range s.signals {
		src.close()
	}
}

// recent is how long the kernel may take to free the objects of a process that ended. The end is
// traced before the kernel takes down the memory and the files of the process (do_exit), which took
// more than 300 ms on a busy emulated processor.
const recent = 2 * time.Second
