package demo

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// The client has two addresses: packets from goodAddr are welcome, packets from
// badAddr are to be dropped.
var (
	goodAddr   = netip.MustParseAddr("10.66.0.1")
	badAddr    = netip.MustParseAddr("10.66.0.66")
	serverAddr = netip.MustParseAddr("10.66.0.2")
)

const port = 7000

// A network sends UDP from the client's two addresses to the server, through
// ordinary sockets.
type network struct {
	at        ends
	good, bad *flow
	serial    uint64 // of the next datagram; it identifies late ones
}

// ends are the addresses of a network.
type ends struct{ good, bad, server netip.Addr }

// A flow is one source: a socket in the client, and the socket in the server
// that receives this client's datagrams only.
type flow struct {
	out, in net.Conn
	traffic // in a flood
}

// A traffic is how many datagrams were sent and how many of them arrived.
type traffic struct{ sent, arrived uint64 }

func openNetwork(client, server string, at ends) (*network, error) {
	n := &network{at: at, good: &flow{}, bad: &flow{}}
	for _, end := range []struct {
		netns         string
		local, remote netip.Addr
		socket        *net.Conn
	}{
		{server, at.server, at.good, &n.good.in},
		{server, at.server, at.bad, &n.bad.in},
		{client, at.good, at.server, &n.good.out},
		{client, at.bad, at.server, &n.bad.out},
	} {
		err := kernel.InNetNS(end.netns, func() (err error) {
			*end.socket, err = connected(end.local, end.remote)
			return err
		})
		if err != nil {
			n.close()
			return nil, err
		}
	}
	return n, nil
}

// connected opens a UDP socket that sends to one address and receives only from
// there.
func connected(local, remote netip.Addr) (net.Conn, error) {
	d := net.Dialer{
		LocalAddr: net.UDPAddrFromAddrPort(netip.AddrPortFrom(local, port)),
		Control: func(_, _ string, c syscall.RawConn) (err error) {
			if bad := c.Control(func(fd uintptr) { err = prepare(int(fd)) }); bad != nil {
				return bad
			}
			return err
		},
	}
	return d.Dial("udp4", netip.AddrPortFrom(remote, port).String())
}

func prepare(fd int) error {
	return errors.Join(
		// The server has a socket for each source, and all use the same port.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
		// Room for datagrams that arrive while the CPUs are busy.
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 8<<20),
	)
}

func (n *network) close() error {
	for _, f := range []*flow{n.good, n.bad} {
		for _, c := range []net.Conn{f.in, f.out} {
			if c != nil {
				c.Close()
			}
		}
	}
	return nil
}

func (f *flow) send(serial uint64) error {
	_, err := f.out.Write(binary.BigEndian.AppendUint64(nil, serial))
	return err
}

// receive returns the next datagram's serial, or os.ErrDeadlineExceeded if
// there is none.
func (f *flow) receive() (serial uint64, err error) {
	var buf [8]byte
	if _, err := f.in.Read(buf[:]); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint64(buf[:]), nil
}

// sendAndCount sends count datagrams from each source and returns how many
// arrive.
//
// It waits for no fixed time: it sends all datagrams on one CPU, on which the
// kernel keeps them in order, and the last one is good. When that one arrives,
// all others have been delivered or dropped.
func (n *network) sendAndCount(count int) (good, bad int, err error) {
	first := n.serial
	n.serial += uint64(count)
	onOneCPU(func() {
		for i := first; i < n.serial && err == nil; i++ {
			err = errors.Join(n.bad.send(i), n.good.send(i))
		}
	}).Wait()
	if err != nil {
		return 0, 0, err
	}
	take := func(f *flow, wait time.Duration, stop uint64) (arrived int, err error) {
		if err := f.in.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return 0, err
		}
		for {
			serial, err := f.receive()
			switch {
			case errors.Is(err, os.ErrDeadlineExceeded):
				return arrived, nil
			case err != nil:
				return arrived, err
			case serial >= first:
				arrived++
			}
			if serial == stop {
				return arrived, nil
			}
		}
	}
	last := n.serial - 1
	if good, err = take(n.good, time.Second, last); err == nil {
		bad, err = take(n.bad, 20*time.Millisecond, last)
	}
	return good, bad, err
}

// warmUp waits for what the kernel finishes some time after a device comes up.
func (n *network) warmUp() error {
	for start := time.Now(); ; {
		// Without a carrier, sending may fail.
		if good, _, err := n.sendAndCount(1); good == 1 || time.Since(start) > patience {
			return err
		}
	}
}

// onOneCPU runs fn on a thread that stays on one CPU. The thread ends with fn.
func onOneCPU(fn func()) *sync.WaitGroup {
	var w sync.WaitGroup
	w.Go(func() {
		runtime.LockOSThread()
		var may, only unix.CPUSet
		if unix.SchedGetaffinity(0, &may) == nil {
			for cpu := 0; only.Count() == 0 && cpu < len(may)*64; cpu++ {
				if may.IsSet(cpu) {
					only.Set(cpu)
				}
			}
			_ = unix.SchedSetaffinity(0, &only)
		}
		fn()
	})
	return &w
}

// goodEvery is the number of datagrams in a flood for each good one: enough
// good ones to show that packets travel.
const goodEvery = 64

// lastOne is the serial of the datagram that ends a flood.
const lastOne = ^uint64(0)

// A flood sends as fast as one thread can, most of it from the bad address.
type flood struct {
	net      *network
	stopping atomic.Bool
	over     atomic.Bool // all datagrams were delivered or dropped
}

// underFlood calls do while packets come as fast as one thread can send them,
// and returns what happened to the packets.
func (n *network) underFlood(do func()) (bad, good traffic) {
	f := &flood{net: n}
	var takers sync.WaitGroup
	for _, flow := range []*flow{n.good, n.bad} {
		flow.traffic = traffic{}
		takers.Go(func() { f.take(flow) })
	}
	sender := onOneCPU(f.send)
	defer func() {
		f.stopping.Store(true)
		sender.Wait()
		takers.Wait()
		bad, good = n.bad.traffic, n.good.traffic
	}()
	// The flood begins before do and ends after it, so that there is traffic
	// all the time.
	time.Sleep(50 * time.Millisecond)
	do()
	time.Sleep(50 * time.Millisecond)
	return
}

func (f *flood) send() {
	for i := 0; !f.stopping.Load(); i++ {
		flow := f.net.bad
		if i%goodEvery == 0 {
			flow = f.net.good
		}
		if flow.send(0) == nil {
			flow.sent++
		}
	}
	// As in sendAndCount, but the queues are full, so the last datagram may be
	// lost.
	for start := time.Now(); !f.over.Load() && time.Since(start) < time.Second; time.Sleep(time.Millisecond) {
		_ = f.net.good.send(lastOne)
	}
	f.over.Store(true)
}

// take counts arrivals until the flood is over and the socket is empty.
func (f *flood) take(flow *flow) {
	for {
		last := f.over.Load()
		_ = flow.in.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		for {
			serial, err := flow.receive()
			if err != nil {
				break
			}
			if serial == lastOne {
				f.over.Store(true)
				continue
			}
			flow.arrived++
		}
		if last {
			return
		}
	}
}
