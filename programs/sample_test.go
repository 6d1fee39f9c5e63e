package programs_test

import (
	"errors"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/ringbuf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/programs"
)

// samples takes all records out of the ring buffer.
func samples(t *testing.T, coll *ebpf.Collection) []programs.Sample {
	t.Helper()
	r, err := ringbuf.NewReader(coll.Maps["samples"])
	qt.Assert(t, qt.IsNil(err))
	defer r.Close()
	r.SetDeadline(time.Now())

	var all []programs.Sample
	for {
		record, err := r.Read()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all
		}
		qt.Assert(t, qt.IsNil(err))
		s, err := programs.ParseSample(record.RawSample)
		qt.Assert(t, qt.IsNil(err))
		all = append(all, s)
	}
}

func sampleStats(t *testing.T, coll *ebpf.Collection) programs.SampleStats {
	t.Helper()
	s := perCPU(t, coll.Maps["stats"], uint32(0), func(sum *programs.SampleStats, v programs.SampleStats) {
		sum.Packets += v.Packets
		sum.Sampled += v.Sampled
		sum.Lost += v.Lost
	})
	return s
}

// onOneCPU keeps the test on its CPU: each CPU counts to N by itself.
func onOneCPU(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	var before, one unix.CPUSet
	qt.Assert(t, qt.IsNil(unix.SchedGetaffinity(0, &before)))
	for cpu := 0; one.Count() == 0; cpu++ {
		if before.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	qt.Assert(t, qt.IsNil(unix.SchedSetaffinity(0, &one)))
	t.Cleanup(func() {
		qt.Check(t, qt.IsNil(unix.SchedSetaffinity(0, &before)))
		runtime.UnlockOSThread()
	})
}

func now() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

func TestSample(t *testing.T) {
	// BPF_PROG_TEST_RUN pretends that packets come from here.
	lo, err := net.InterfaceByName("lo")
	qt.Assert(t, qt.IsNil(err))

	long := packet(eth(typeIPv4), ipv4("192.0.2.1", protoTCP), payload(1000))
	for _, test := range []struct {
		name   string
		set    constants
		packet []byte
		want   int // captured
	}{
		{"defaults", nil, long, 128},
		{"shorter than snaplen", nil, long[:60], 60},
		{"exactly snaplen", nil, long[:128], 128},
		{"odd snaplen", constants{"snaplen": 77}, long, 77},
		{"the most", constants{"snaplen": 512}, long, 512},
		{"more than the most", constants{"snaplen": 4_294_967_295}, long, 512},
		{"only the lengths", constants{"snaplen": 0}, long, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			coll := load(t, "sample", test.set)
			before := now()
			qt.Check(t, qt.Equals(run(t, coll, "sample", test.packet), pass)) // the first packet is always chosen
			after := now()

			all := samples(t, coll)
			qt.Assert(t, qt.HasLen(all, 1))
			s := all[0]
			qt.Check(t, qt.IsTrue(before <= s.Time && s.Time <= after), qt.Commentf("%v <= %v <= %v", before, s.Time, after))
			qt.Check(t, qt.Equals(s.PacketLen, uint32(len(test.packet))))
			qt.Check(t, qt.Equals(s.Ifindex, uint32(lo.Index)))
			qt.Check(t, qt.Equals(s.RxQueue, 0))
			qt.Check(t, qt.DeepEquals(s.Bytes, test.packet[:test.want]))
		})
	}
}

func TestSampleEvery(t *testing.T) {
	onOneCPU(t)
	for _, test := range []struct {
		every uint64
		want  []byte // which of 12 packets
	}{
		{0, nil},
		{1, []byte{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}},
		{2, []byte{0, 2, 4, 6, 8, 10}},
		{5, []byte{0, 5, 10}},
		{4_294_967_295, []byte{0}},
	} {
		coll := load(t, "sample", constants{"every": test.every})
		for i := range 12 {
			qt.Check(t, qt.Equals(run(t, coll, "sample", packet(eth(typeARP), []byte{byte(i)})), pass))
		}

		var got []byte
		for _, s := range samples(t, coll) {
			got = append(got, s.Bytes[14])
		}
		qt.Check(t, qt.DeepEquals(got, test.want), qt.Commentf("every %d", test.every))
		qt.Check(t, qt.Equals(sampleStats(t, coll), programs.SampleStats{Packets: 12, Sampled: uint64(len(test.want))}))
	}
}

func TestSampleTruncated(t *testing.T) {
	coll := load(t, "sample", constants{"every": 1, "snaplen": 64})
	whole := packet(eth(typeIPv6), ipv6("2001:db8::1", protoUDP), payload(40))
	for n := minPacket; n <= len(whole); n++ {
		qt.Check(t, qt.Equals(run(t, coll, "sample", whole[:n]), pass))
	}
	for i, s := range samples(t, coll) {
		n := minPacket + i
		qt.Check(t, qt.Equals(s.PacketLen, uint32(n)))
		qt.Check(t, qt.DeepEquals(s.Bytes, whole[:min(n, 64)]))
	}
}

// When nobody reads, samples are lost and counted as lost, and packets still pass.
func TestSampleLost(t *testing.T) {
	coll := load(t, "sample", constants{"every": 1, "snaplen": 512})
	const sent = 1000
	for range sent {
		qt.Check(t, qt.Equals(run(t, coll, "sample", packet(eth(typeARP), payload(1000))), pass))
	}

	s := sampleStats(t, coll)
	qt.Check(t, qt.Equals(s.Packets, sent))
	qt.Check(t, qt.IsTrue(s.Lost > 0))
	qt.Check(t, qt.Equals(s.Sampled+s.Lost, sent))
	qt.Check(t, qt.HasLen(samples(t, coll), int(s.Sampled)))

	run(t, coll, "sample", packet(eth(typeARP)))
	qt.Check(t, qt.HasLen(samples(t, coll), 1))
}

func TestParseSampleTooShort(t *testing.T) {
	_, err := programs.ParseSample(make([]byte, 23))
	qt.Check(t, qt.ErrorMatches(err, "sample of 23 bytes: shorter than its header"))

	record := make([]byte, 32)
	for i := 12; i < 16; i++ {
		record[i] = 0xff
	}
	_, err = programs.ParseSample(record)
	qt.Check(t, qt.ErrorMatches(err, "sample of 32 bytes: 4294967295 captured bytes do not fit"))
}
