package main

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// samples returns one sample of each kind.
func samples() []hook.Sample {
	at := time.Date(2026, 3, 1, 12, 30, 0, 500, time.UTC)
	counts := func(runs uint64, took time.Duration, verdicts map[hook.Verdict]uint64) hook.Counts {
		c := hook.Counts{Known: true, Runs: runs, Time: took}
		for v, n := range verdicts {
			c.Verdicts[v] = n
		}
		return c
	}
	xdp, others := chains(), otherHooks()
	first := counts(1_234_567, 98_765_360*time.Nanosecond, map[hook.Verdict]uint64{hook.Pass: 1_200_000, hook.Drop: 34_566, hook.Redirect: 1})
	second := counts(3, 900, map[hook.Verdict]uint64{hook.TX: 1, hook.Aborted: 1})
	second.Other = 1
	return []hook.Sample{
		{
			Chain: xdp[0], Time: at, Elapsed: 2 * time.Second, Method: hook.MethodChain, Clock: 21, Whole: counts(1_234_567, 0, nil),
			Entries: []hook.Counts{first, second, {Known: true, Empty: 12}},
		},
		{
			Chain: xdp[0], Time: at, Elapsed: time.Second, Method: hook.MethodChain, Clock: 21, Interrupted: true,
			Entries: make([]hook.Counts, 3),
		},
		{Chain: xdp[1], Time: at, Elapsed: time.Second, Method: hook.MethodKernel, Whole: counts(50, 5000, nil), Entries: []hook.Counts{counts(50, 5000, nil)}},
		{Chain: xdp[4], Time: at, Elapsed: time.Second, Method: hook.MethodKernel, Whole: counts(50, 5000, nil), Entries: make([]hook.Counts, 2)},
		{Chain: xdp[2], Time: at, Elapsed: time.Second, Err: errors.New("run statistics: enable: operation\nnot permitted"), Entries: make([]hook.Counts, 1)},
		{Chain: others[0], Time: at, Elapsed: time.Second, Method: hook.MethodKernel, Entries: make([]hook.Counts, len(others[0].Members))},
		{Chain: hook.Chain{Hook: hook.XDP, Target: "eth5", Ifindex: 11}, Time: at, Elapsed: time.Second},
	}
}

func TestTopOutput(t *testing.T) {
	here := time.Local
	time.Local = time.UTC
	defer func() { time.Local = here }()
	for format, file := range map[string]string{formatTable: "top.txt", formatJSON: "top.json"} {
		var out bytes.Buffer
		a := app{stdout: &out, format: format}
		qt.Assert(t, qt.IsNil(a.printSamples(a.screen(), samples())))
		golden(t, file, out.String())
	}
}

func TestRates(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 1: "1.0", 9: "9.0", 10: "10", 999: "999", 1000: "1,000", 1_234_567: "1,234,567"} {
		qt.Check(t, qt.Equals(perSecond(n, time.Second), want))
	}
	// The rate uses the measured time, not the interval that was asked for.
	qt.Check(t, qt.Equals(perSecond(1000, 1500*time.Millisecond), "667"))
	qt.Check(t, qt.Equals(perSecond(1000, 0), "0"))
	for n, want := range map[uint64]string{1: "<0.1%", 10: "0.1%", 5000: "50.0%", 9999: ">99.9%", 10000: "100%"} {
		qt.Check(t, qt.Equals(percent(n, 10000), want))
	}
}
