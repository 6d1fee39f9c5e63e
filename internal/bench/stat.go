package main

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A Stat sums up what was measured again and again.
type Stat struct {
	Median float64 `json:"median"`
	Q1     float64 `json:"q1"` // a quarter was below
	Q3     float64 `json:"q3"` // a quarter was above
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Count  int     `json:"count"`
}

func statOf(samples []float64) Stat {
	s := slices.Sorted(slices.Values(samples))
	if len(s) == 0 {
		return Stat{}
	}
	return Stat{quantile(s, 0.5), quantile(s, 0.25), quantile(s, 0.75), s[0], s[len(s)-1], len(s)}
}

// exactly is the Stat of what has no spread.
func exactly(v float64) Stat { return Stat{v, v, v, v, v, 1} }

// quantile interpolates between the two nearest of the sorted samples.
func quantile(sorted []float64, q float64) float64 {
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 == len(sorted) {
		return sorted[i]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// cpuTime is what the thread has spent on the CPU, so that it is not counted when others have it.
func cpuTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		panic(err)
	}
	return time.Duration(ts.Nano())
}

// elapsed is how long fn takes.
func elapsed(fn func()) time.Duration {
	begin := time.Now()
	fn()
	return time.Since(begin)
}
