package testenv

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The bounds of a flood that no test stops.
const (
	floodTime    = 2 * time.Minute
	floodPackets = 50_000_000
)

// markerEvery: every 16th datagram goes to the marker port. That is enough to show that traffic flows,
// and leaves CPU time to others than the marker's receiver.
const markerEvery = 16

// Flood sends UDP datagrams from client to server as fast as one thread can, and counts the
// datagrams that arrive.
type Flood struct {
	t         testing.TB
	pair      *Pair
	streams   []*stream
	stopping  atomic.Bool
	settled   atomic.Bool
	senders   sync.WaitGroup
	receivers sync.WaitGroup
	once      sync.Once
	exhausted atomic.Bool
}

// stream are the datagrams to one port.
type stream struct {
	out, in        int
	sent, received atomic.Uint64
	gap            time.Duration // between two received datagrams; read it when the receiver has ended
}

// Flood starts a flood to port of the server. With a marker port, every 16th datagram goes there: a
// test that expects no arrivals at port can see by the marker that traffic flows. The flood ends with
// the test, after 2 minutes, or after 50 million datagrams; [Flood.Stop] fails the test when the flood
// ended before.
func (p *Pair) Flood(t testing.TB, port int, marker ...int) *Flood {
	t.Helper()
	f := &Flood{t: t, pair: p}
	t.Cleanup(f.stop)
	for _, port := range append([]int{port}, marker...) {
		addr := netip.AddrPortFrom(ServerIPv4, uint16(port))
		s := &stream{in: p.Server.receiver(t, addr), out: p.Client.sender(t, ServerIPv4)}
		f.streams = append(f.streams, s)
		if err := unix.Connect(s.out, sockaddr(addr)); err != nil {
			t.Fatalf("connect to %s: %v", addr, err)
		}
		if err := unix.SetsockoptTimeval(s.in, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 20_000}); err != nil {
			t.Fatalf("set timeout: %v", err)
		}
		f.receivers.Go(func() { f.receive(s) })
	}
	f.senders.Go(f.send)
	return f
}

// Stop ends the flood and returns how many datagrams were sent to the port and how many of them arrived.
func (f *Flood) Stop() (sent, received uint64) {
	f.t.Helper()
	f.stop()
	if f.exhausted.Load() {
		f.t.Errorf("the flood ended by itself, after %s or %d packets", floodTime, floodPackets)
	}
	return f.streams[0].sent.Load(), f.streams[0].received.Load()
}

// Sent returns how many datagrams were sent to the port so far.
func (f *Flood) Sent() uint64 {
	return f.streams[0].sent.Load()
}

// Received returns how many datagrams arrived at the port so far.
func (f *Flood) Received() uint64 {
	return f.streams[0].received.Load()
}

// Marker returns how many datagrams were sent to the marker port so far and how many arrived. The numbers
// are final after [Flood.Stop]. Some datagrams may be missing although no program dropped them: queues
// overflow.
func (f *Flood) Marker() (sent, received uint64) {
	return f.streams[1].sent.Load(), f.streams[1].received.Load()
}

// LongestGap returns the longest time between two datagrams that arrived, at the marker port if there is
// one. Call it after [Flood.Stop].
func (f *Flood) LongestGap() time.Duration {
	return f.streams[len(f.streams)-1].gap
}

func (f *Flood) stop() {
	f.once.Do(func() {
		f.stopping.Store(true)
		f.senders.Wait()
		defer func() {
			f.settled.Store(true)
			f.receivers.Wait()
			for _, s := range f.streams {
				unix.Close(s.in)
				unix.Close(s.out)
			}
		}()
		f.pair.Settle(f.t)
	})
}

func (f *Flood) send() {
	var payload [8]byte // distinct, as [Trace] needs it
	deadline := time.Now().Add(floodTime)
	for n := 0; !f.stopping.Load(); n++ {
		if n == floodPackets || n%1024 == 0 && time.Now().After(deadline) {
			f.exhausted.Store(true)
			return
		}
		s := f.streams[0]
		if len(f.streams) > 1 && n%markerEvery == 0 {
			s = f.streams[1]
		}
		binary.BigEndian.PutUint64(payload[:], uint64(n)+1)
		if _, err := unix.Write(s.out, payload[:]); err == nil {
			s.sent.Add(1)
		}
	}
}

// receive counts until the flood has settled and the socket is empty.
func (f *Flood) receive(s *stream) {
	var buf [64]byte
	var before time.Time
	for {
		last := f.settled.Load()
		_, err := unix.Read(s.in, buf[:])
		if err == nil {
			now := time.Now()
			if s.received.Add(1) > 1 {
				s.gap = max(s.gap, now.Sub(before))
			}
			before = now
		} else if last || !again(err) {
			return
		}
	}
}
