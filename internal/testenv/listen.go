package testenv

import (
	"context"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// Listen answers TCP connections and UDP datagrams at an address with that address, so that a client sees
// which listener it reached. It ends with the test. With port 0 the kernel chooses a port.
func (ns *NetNS) Listen(t testing.TB, addr netip.AddrPort) netip.AddrPort {
	t.Helper()
	var stream net.Listener
	var datagrams net.PacketConn
	ns.Do(t, func() {
		var lc net.ListenConfig
		lc.SetMultipathTCP(false)
		var err error
		if stream, err = lc.Listen(context.Background(), "tcp", addr.String()); err != nil {
			t.Fatal(err)
		}
		addr = stream.Addr().(*net.TCPAddr).AddrPort()
		if datagrams, err = lc.ListenPacket(context.Background(), "udp", addr.String()); err != nil {
			stream.Close()
			t.Fatal(err)
		}
	})
	answer := []byte(addr.String())
	var listeners sync.WaitGroup
	listeners.Go(func() {
		for {
			conn, err := stream.Accept()
			if err != nil {
				return
			}
			conn.SetDeadline(time.Now().Add(time.Second))
			conn.Write(answer)
			conn.Read(make([]byte, 1)) // an unread request would cause a reset
			conn.Close()
		}
	})
	listeners.Go(func() {
		for {
			_, from, err := datagrams.ReadFrom(make([]byte, 1))
			if err != nil {
				return
			}
			datagrams.WriteTo(answer, from)
		}
	})
	t.Cleanup(func() {
		stream.Close()
		datagrams.Close()
		listeners.Wait()
	})
	return addr
}
